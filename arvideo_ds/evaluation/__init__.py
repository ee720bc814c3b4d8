"""Judging a frozen encoder: features, probes, pictures, reports.

Owns what is measured and drawn after training. Must not know DeepSpeed or how a run was trained:
it reads a run's recipe and weights.
"""
