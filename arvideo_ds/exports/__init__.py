"""Trained models for other programs: folders that open without this one.

Owns the formats (a module each), the comparison of what was exported with what was trained, and
the model card. Must not know DeepSpeed or how a run was trained: it reads a run's recipe, weights
and records. Other programs' libraries are imported where they are used.
"""
