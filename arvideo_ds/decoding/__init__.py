"""Frames of a video: decoders, facts about a file, and processes that can be killed.

Must not know shards, recipes or ranks.
"""
