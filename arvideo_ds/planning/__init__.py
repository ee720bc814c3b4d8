"""What a recipe costs before it runs: batch and schedule, FLOPs, memory, advice, protocols.

Must not import torch or DeepSpeed, so that a plan is instant on any machine.
"""
