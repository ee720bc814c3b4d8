"""Models in plain PyTorch.

Owns tokens, positions, orders, masks, encoder, decoders, the objectives built of them, and the
names that other programs give the same weights. Must not know recipes, ranks, DeepSpeed, schedules,
or files other than of weights (weight_files.py). One file to read first: arvideo.py.
"""
