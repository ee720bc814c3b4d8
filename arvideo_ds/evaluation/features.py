"""Features of whole clips: tokens under full attention, pooled to one vector.

B clips, t times, s places, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import reduce
from torch import Tensor

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import NO_LABEL
from arvideo_ds.data.loader import Batch, worker_count
from arvideo_ds.evaluation.probes import POOLINGS
from arvideo_ds.evaluation.scores import outputs_of
from arvideo_ds.host import available_cores
from arvideo_ds.models.classifier import changes
from arvideo_ds.models.encoder import Encoder, encode_clips
from arvideo_ds.shards.manifest import ShardSet

_BATCH = 64
_SPANS = 8


@dataclass(frozen=True)
class Features:
    """values: n D, float32. labels: n, int64. skipped: number of videos that did not decode."""

    values: Tensor
    labels: Tensor
    skipped: int


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder, and labelled shards to train and test probes on.

    tokens: of a batch's clips, B (t s) D, without gradients. batch: clips per forward pass.
    videos: use the first so many of each set (shards are shuffled when they are made); None = all.
    Frames are sampled as the labels need (data/clips.py, `for_labels`).
    """

    tokens: Callable[[Batch], Tensor]
    recipe: PretrainRecipe
    train: ShardSet
    test: ShardSet
    device: torch.device
    num_workers: int
    batch: int = _BATCH
    videos: tuple[int, int] | None = None
    progress: bool = True

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Features of `train` and of `test`: pooled by `probe.features`, then averaged over the
        `probe.clips` clips of a video. Collective."""
        train, test = self.videos or (None, None)
        return self._of(self.train, train), self._of(self.test, test)

    def _of(self, shards: ShardSet, videos: int | None) -> Features:
        times, probe = self.recipe.geometry.grid[0], self.recipe.probe
        pool = POOLINGS.choose(probe.features, key="probe.features")
        outputs = outputs_of(
            lambda batch: pool(self.tokens(batch), times),
            shards,
            self.recipe,
            views=(probe.clips, 1),
            batch=self.batch,
            num_workers=self.num_workers,
            device=self.device,
            progress=f"features of {shards.name}" if self.progress else None,
            videos=videos,
        )
        usable = outputs.valid & (outputs.labels != NO_LABEL)
        return Features(outputs.values[usable], outputs.labels[usable], len(outputs.skipped))


def freeze(
    encoder: Encoder,
    recipe: PretrainRecipe,
    train: ShardSet,
    test: ShardSet,
    *,
    videos: tuple[int, int] | None = None,
) -> FrozenEncoder:
    """Freeze an encoder, on the GPU where there is one, with a data worker for each core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device).eval()

    @torch.no_grad()
    def tokens(batch: Batch) -> Tensor:
        return encode_clips(encoder, batch.clips, recipe.patch)

    workers = worker_count(recipe, cores=len(available_cores()))
    return FrozenEncoder(tokens, recipe, train, test, device, workers, videos=videos)


def mean(tokens: Tensor, _times: int) -> Tensor:
    """Mean of the tokens.

    Tokens B (t s) D -> B D, as in the published protocols.
    """
    return tokens.mean(1)


def change(tokens: Tensor, times: int) -> Tensor:
    """Mean of the tokens of the later times less that of the earlier times.

    Tokens B (t s) D -> B D. What does not move (scene, colours) cancels; motion remains. The middle
    one of an odd number of times is in neither half.
    """
    means, half = by_time(tokens, times), times // 2
    return means[:, -half:].mean(1) - means[:, :half].mean(1)


def course(tokens: Tensor, times: int) -> Tensor:
    """Means of the tokens of 8 spans of time, each less the mean of all tokens.

    Tokens B (t s) D -> B (8 D), fewer spans where there are fewer times. Unlike `change`, this
    distinguishes when things happen and in which order.
    """
    means = by_time(tokens, times)
    spans = [span.mean(1) for span in means.tensor_split(min(_SPANS, times), dim=1)]
    return torch.cat([span - means.mean(1) for span in spans], dim=1)


def motion(tokens: Tensor, times: int) -> Tensor:
    """Mean absolute change of the tokens from one time to the next.

    Tokens B (t s) D -> B D. Unlike `change`, motions that return to where they began count too.
    """
    return changes(tokens, times).mean(1)


def by_time(tokens: Tensor, times: int) -> Tensor:
    """Tokens B (t s) D -> the mean of each time, B t D."""
    return reduce(tokens, "b (t s) d -> b t d", "mean", t=times)
