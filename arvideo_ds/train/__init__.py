"""Running: the composition root, the loop, its records and its interruptions.

Owns metrics and their sinks, validation, failures and signals. `run.py` builds a run from the other
rooms; read it first, then loop.py.
"""
