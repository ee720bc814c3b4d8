"""Judging and using a trained model: features, probes, pictures, reports, predictions, scores of
tokens.

Owns what is measured and drawn after training. Must not know DeepSpeed or how a run was trained:
it reads a run's recipe and weights.
"""
