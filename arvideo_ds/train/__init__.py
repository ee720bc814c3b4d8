"""Running: the composition root, the loop, its records and its interruptions.

Owns the run folder, metrics and their sinks, signals. `run.py` is the only file that sees every
room; read it first, then loop.py.
"""
