"""From shards to batches: the order of samples, clips, augmentation, boxes and the loader.

Must not know models, objectives or DeepSpeed; of ranks it knows two numbers (rank and world size).
"""
