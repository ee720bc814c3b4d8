"""The specifications: one file for each task.

Must not import torch at their top: they are read before a run starts.
"""
