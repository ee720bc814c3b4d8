"""Models in plain PyTorch.

Owns tokens, positions, orders, masks, encoder, decoders and the objectives built of them. Must
not know files, ranks, DeepSpeed or schedules. One file to read first: arvideo.py.
"""
