"""The specifications, a file for each task.

Importing them needs no torch.
"""
