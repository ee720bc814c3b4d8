"""DeepSpeed, and everything that knows of it: the only room that imports it.

Owns process groups, the resolved DeepSpeed configuration, the engine, activation checkpointing,
checkpoints on disk and gathered weights. Must not know recipes' objectives, data or the loop.
`resolve` needs no DeepSpeed, so a dry run and the tests of the JSON files are instant.
"""
