"""Optimisers, parameter groups and learning-rate schedules.

Owns which optimiser updates the weights and what it must obey, which parameter decays, and the
learning rate of a step. Must not know DeepSpeed, data or the loop: groups come from names and
shapes, schedules are pure functions of the step.
"""
