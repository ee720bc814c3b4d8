"""What a recipe costs before it runs: batch and schedule, FLOPs, memory, advice, protocols.

Must not know torch, video files or DeepSpeed: a plan is instant anywhere.
"""
