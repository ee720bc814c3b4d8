"""Files on disk: atomic writes, locks, checksums, JSON lines and tensors.

Must not know recipes, shards or runs.
"""
