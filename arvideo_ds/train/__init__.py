"""Training: `run.py` builds a run from the other rooms, `loop.py` trains.

Owns metrics and their sinks, validation, failures and signals.
"""
