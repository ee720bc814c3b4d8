"""Shards on disk: data sets and their annotations, ingest, writing, verifying, resharding, stores.

Must not know recipes, models or ranks.
"""
