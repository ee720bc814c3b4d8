"""The path of a video: source file -> tar shard -> position in the order -> clip on its way.

Owns annotations, probing and transcoding, shards and manifest, the order of samples, decoders,
transforms, the loader, the store of token scores and the synthetic sets. Must not know
models, objectives or DeepSpeed; of ranks it knows two numbers (rank and world size).
"""
