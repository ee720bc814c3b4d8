"""Evaluating and using a trained model: features, probes, scores, detection, predictions.

Owns what is measured and drawn after training. Must not know DeepSpeed or how a run was trained:
it reads a run's recipe and weights.
"""
