"""Optimisers and their rules, parameter groups and the learning-rate schedule.

Must not know DeepSpeed, data or the loop: groups come from names and shapes, the learning rate from
plan and step.
"""
