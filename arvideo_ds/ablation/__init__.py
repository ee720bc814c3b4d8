"""Ablations: a grid of recipes x seeds, run, probed and set beside the paper's figures.

Owns grids, their cells, where these run (local processes, a Slurm array), tables and verdicts. Must
not know DeepSpeed, nor how a recipe is trained or an encoder probed: a cell asks train and
evaluation.
"""
