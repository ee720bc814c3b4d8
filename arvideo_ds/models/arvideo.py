"""ARVideo on one page: predict a clip cluster by cluster, in a sampled order.

    order      a permutation of the clusters                      step i = its i-th cluster
    encode     a random subset of each cluster's tokens, steps 1..C-1, block-causal attention
               (objective.drop=clusters: all tokens of some of these steps instead)
    decode     a query for every token of steps 2..C; it sees encoded tokens of earlier steps
    loss       squared error on the (normalised) pixels of these tokens (objective.py)

Source: ARVideo (Ren et al. 2024, arXiv 2405.15160); the equations are in docs/method.md.

B clips, N tokens, C clusters, S tokens per cluster (R of them targets).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from arvideo_ds.config.objectives import ArvideoSettings, DecoderSettings
from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.geometry import num_kept
from arvideo_ds.models.cubes import pick
from arvideo_ds.models.decoder import Alignment, CrossDecoder
from arvideo_ds.models.draws import random_subsets
from arvideo_ds.models.encoder import Encoder
from arvideo_ds.models.objective import Draw, Objective
from arvideo_ds.models.order import (
    attention_bias,
    cluster_tokens,
    fixed_order,
    may_see_before,
    may_see_up_to,
    random_order,
    step_numbers,
)
from arvideo_ds.models.selection import priorities

_KEEP_PURPOSE, _TARGET_PURPOSE = 2, 3


@dataclass(frozen=True)
class OrderedDraw(Draw):
    """order: of the clusters, B C; tokens are in this order."""

    order: Tensor


class ARVideo(Objective):
    """Encoder, decoder and loss of ARVideo."""

    decoder: CrossDecoder | Alignment
    clusters: Tensor
    encoded_steps: Tensor
    default_order: Tensor | None
    encoder_mask: Tensor
    cross_mask: Tensor
    self_mask: Tensor | None

    def __init__(
        self, settings: ArvideoSettings, encoder: EncoderSpec, decoder: DecoderSettings
    ) -> None:
        super().__init__(settings, encoder)
        geometry = encoder.geometry
        self.num_encoded = len(settings.encoded_steps(geometry))
        self.num_predicted = settings.steps_predicted(geometry)
        self.kept = settings.kept(geometry)
        self.grid, self.target_rule = geometry.grid, decoder.target_rule
        self.targets = num_kept(decoder.target_ratio, geometry.cluster_size)
        shape = settings.decoder_shape(encoder.size, decoder)
        if not self.aligned:
            self.decoder = CrossDecoder(encoder, shape, settings.target_values(geometry))
        encoded_steps = torch.tensor(settings.encoded_steps(geometry))
        encoded = step_numbers(encoded_steps, self.kept)
        queries = step_numbers(torch.arange(2, 2 + self.num_predicted), self.targets)
        masks = {
            "encoder_mask": may_see_up_to(encoded, encoded),
            "cross_mask": may_see_before(queries, encoded),
            "self_mask": may_see_up_to(queries, queries) if decoder.self_attention else None,
        }
        order = settings.order
        buffers = {
            "encoded_steps": encoded_steps,
            "clusters": cluster_tokens(geometry),
            "default_order": None if order == "random" else fixed_order(geometry, order),
            **{k: None if mask is None else attention_bias(mask) for k, mask in masks.items()},
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def encode(self, encoder: Encoder, cubes: Tensor, draw: Draw) -> Tensor:
        mask = self._mask(self.encoder_mask, draw.encoded.shape[1])
        return encoder(pick(cubes, draw.encoded), draw.encoded, mask)

    def predict(self, cubes: Tensor, draw: Draw) -> Tensor:
        seen, asked = draw.encoded.shape[1], draw.targets.shape[1]
        encoded = self.encode(self.encoder, cubes, draw)
        among = None if self.self_mask is None else self._mask(self.self_mask, asked)
        return self.decoder(encoded, draw.targets, self._mask(self.cross_mask, seen), among)

    def _mask(self, bias: Tensor, columns: int) -> Tensor:
        """A padded bias as attention takes it, of the weights' type: cuDNN checks no types."""
        # DeepSpeed may or may not cast buffers. A cast of the columns alone would lose the padding.
        return bias.to(self.decoder.head.weight.dtype)[:, :columns]

    def draw(self, keys: Tensor, scores: Tensor | None = None) -> OrderedDraw:
        num_clusters, size = self.clusters.shape
        if self.default_order is None:
            order = random_order(keys, num_clusters)
        else:
            order = repeat(self.default_order, "c -> b c", b=len(keys))
        kept = random_subsets(keys, _KEEP_PURPOSE, self.num_encoded, size, self.kept)
        predicted = order[:, 1 : 1 + self.num_predicted]
        return OrderedDraw(
            order=order,
            encoded=self._tokens(order[:, self.encoded_steps - 1], kept),
            targets=self._tokens(predicted, self._predicted_members(keys, predicted, scores)),
        )

    def _predicted_members(self, keys: Tensor, clusters: Tensor, scores: Tensor | None) -> Tensor:
        """Members of the predicted clusters B n with a loss: B n R, ascending."""
        if self.target_rule == "random":
            shape = (self.num_predicted, self.clusters.shape[1])
            return random_subsets(keys, _TARGET_PURPOSE, *shape, self.targets)
        ranking = priorities(self.target_rule, keys, self.grid, scores)
        members = rearrange(self.clusters[clusters], "b n s -> b (n s)")
        ranking = rearrange(ranking.gather(1, members), "b (n s) -> b n s", n=clusters.shape[1])
        first = ranking.argsort(dim=2, descending=True, stable=True)[..., : self.targets]
        return first.sort(dim=2).values

    def visible(self, draw: Draw) -> Tensor:
        """The first cluster, whole."""
        assert isinstance(draw, OrderedDraw)
        return self.clusters[draw.order[:, 0]]

    def _tokens(self, clusters: Tensor, members: Tensor) -> Tensor:
        """Tokens at `members` (B n m, indices within a cluster) of clusters B n: B (n m)."""
        return rearrange(self.clusters[clusters].gather(2, members), "b n m -> b (n m)")
