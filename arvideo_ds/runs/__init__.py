"""The folder of a run: its files, its recipe, its lock.

Must not know torch or DeepSpeed.
"""
