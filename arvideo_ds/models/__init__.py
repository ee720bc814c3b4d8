"""Models in plain PyTorch.

Owns tokens, positions, orders, masks, encoder, decoders, the objectives built from them, and the
layouts of weights in other programs. Must not know recipes, ranks, DeepSpeed, schedules, or files
except weights (weight_files.py). Read arvideo.py first.
"""
