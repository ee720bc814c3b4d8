"""Parameter groups and learning-rate schedules.

Owns which parameter decays and what the learning rate of a step is. Must not know DeepSpeed, data
or the loop: groups come from names and shapes, schedules are pure functions of the step.
"""
