"""Trained models for other programs: folders that open without this package.

Owns the formats (a module each), the comparison of an export with its run, and the model card. Must
not know DeepSpeed or how a run was trained: it reads a run's recipe, weights and records. Other
programs' libraries are imported where they are used.
"""
