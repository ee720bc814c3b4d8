"""Several folders of shards as the data of one run, mixed by weight."""

from __future__ import annotations

import hashlib
import json
from typing import TypeAlias

from arvideo_ds.config.schema import DataSettings
from arvideo_ds.config.sources import source_names, whole_weights
from arvideo_ds.shards.manifest import JOINED_BY, Manifest, ShardSet


class ShardMix:
    """The opened sources of data.sources, in their order. names: of the sources, all different.
    Errors: `UserError`, as `ShardSet`."""

    def __init__(self, data: DataSettings) -> None:
        assert data.sources is not None
        self.sets = tuple(ShardSet(source.shards) for source in data.sources)
        self.weights = whole_weights(data.sources)
        datasets = [shards.manifest.dataset for shards in self.sets]
        self.names = source_names(data.sources, datasets)
        self.name = ", ".join(shards.name for shards in self.sets)
        # Order and weights decide which video a position is.
        identity = [[w, s.hash] for w, s in zip(self.weights, self.sets, strict=True)]
        self.hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def videos(self) -> dict[str, int]:
        """Number of videos of each source."""
        counts = (shards.num_samples for shards in self.sets)
        return dict(zip(self.names, counts, strict=True))

    @property
    def layers(self) -> int:
        """Largest of the sources (`ShardSet.layers`): with layers, PyAV is the fastest decoder."""
        return max(shards.layers for shards in self.sets)

    @property
    def num_samples(self) -> int:
        return sum(shards.num_samples for shards in self.sets)

    @property
    def num_bytes(self) -> int:
        return sum(shards.num_bytes for shards in self.sets)

    @property
    def manifest(self) -> Manifest:
        """What holds for all sources: their data sets, without labels and shards."""
        return Manifest(
            dataset=JOINED_BY.join(shards.manifest.dataset for shards in self.sets),
            split=None,
            labels=None,
            settings={},
            num_samples=self.num_samples,
            num_rejects=sum(shards.manifest.num_rejects for shards in self.sets),
            shards=(),
        )


AnyShards: TypeAlias = ShardSet | ShardMix
