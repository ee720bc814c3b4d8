"""What a recipe may say of its objective, and the tokens that follow from it.

A new objective is one class here, one file in models/ and one line in tasks/pretrain.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from arvideo_ds.config.settings import Positive, PositiveTriple, Settings, Share
from arvideo_ds.config.sizes import Size
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept

# How tokens are chosen that the loss is taken on (models/selection.py). "random" is uniform: a loss
# on part of the tokens then estimates that on all of them. The others are biased on purpose.
# "scores" are those of data.scores.
Rule = Literal["random", "uniform", "running_cell", "scores"]


class DecoderSettings(Settings):
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    # Of ARVideo: queries attend to those of steps up to their own.
    self_attention: bool = False
    # Of ARVideo: share of each predicted cluster's tokens that the loss is taken on, and which.
    target_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    target_rule: Rule = "random"


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one clip: in the encoder, in the layers of the decoder, under the loss."""

    encoded: int
    decoded: int
    predicted: int


class BaseObjective(Settings, ABC):
    """What every objective's settings answer.

    `crosses`: the decoder's queries look at the encoded tokens by cross-attention, and steps mask
    the attention; else encoded and hidden tokens all attend to each other in the decoder.
    """

    crosses: ClassVar[bool]

    name: str
    # Each cube's pixels less their mean, over their deviation, channel by channel.
    normalize_targets: bool = True

    @abstractmethod
    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        """Tokens and clusters of a clip (T, H, W)."""

    @abstractmethod
    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:
        """How many tokens of one clip go where."""

    @abstractmethod
    def decoder_width(self, size: Size) -> int:
        """Width of the decoder where the recipe names none."""

    def target_values(self, geometry: Geometry) -> int:
        """Numbers that are predicted of a token."""
        return geometry.cube_values

    def needs_scores(self, decoder: DecoderSettings) -> bool:  # noqa: ARG002
        """Whether a clip must come with what data.scores holds of its tokens."""
        return False

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:  # noqa: ARG002
        """Raise `UserError` for settings that contradict each other."""
        if self.normalize_targets and geometry.cube_pixels < 2:
            raise UserError(
                "objective.normalize_targets needs cubes of two or more pixels, but model.patch "
                "is [1, 1, 1]; set objective.normalize_targets: false for pixel elements."
            )


class ArvideoSettings(BaseObjective):
    crosses: ClassVar[bool] = True

    name: Literal["arvideo"] = "arvideo"
    # "shifted": steps 1..C-1 predict steps 2..C. "paper": the last step is dropped everywhere, as
    # in the paper's Table 5, which counts 1,372 queries for 15 encoded clusters.
    targets: Literal["shifted", "paper"] = "shifted"
    # Tokens along time, height and width of one cluster.
    cluster: PositiveTriple = (2, 7, 7)
    order: Literal["spatial_first", "temporal_first", "random"] = "random"
    # Share of the tokens of steps 1..C-1 that the encoder does not see.
    drop_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.8
    # What is dropped. "tokens": the same share of every cluster, but never a whole one, so clusters
    # of one token drop nothing. "clusters": whole clusters, which keeps the ratio for clusters of
    # any size; for a random order.
    drop: Literal["tokens", "clusters"] = "tokens"

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        return Geometry(clip, patch, self.cluster)

    def encoded_steps(self, geometry: Geometry) -> tuple[int, ...]:
        """Steps whose cluster the encoder sees, from 1: all but the last step, or some of those.

        Where whole clusters are dropped, the steps that stay are evenly spaced and the same for
        every clip. The order decides which cluster comes at which step, so a random order drops
        clusters at random, and the attention masks are the same matrices for all clips. Step 1
        always stays: the first prediction has something to attend to.
        """
        last = geometry.num_clusters - 1
        if self.drop == "tokens":
            return tuple(range(1, last + 1))
        kept = num_kept(1 - self.drop_ratio, last)
        return tuple(1 + number * last // kept for number in range(kept))

    def steps_predicted(self, geometry: Geometry) -> int:
        """Clusters that are predicted: steps 2..C, or 2..C-1 in the paper's convention."""
        return geometry.num_clusters - 1 - (self.targets == "paper")

    def kept(self, geometry: Geometry) -> int:
        """Tokens that the encoder sees of each cluster that it sees."""
        if self.drop == "clusters":
            return geometry.cluster_size
        return num_kept(1 - self.drop_ratio, geometry.cluster_size)

    def effective_drop_ratio(self, geometry: Geometry) -> float:
        """Share of the tokens of steps 1..C-1 that is dropped once whole tokens are counted."""
        seen = len(self.encoded_steps(geometry)) * self.kept(geometry)
        return 1 - seen / ((geometry.num_clusters - 1) * geometry.cluster_size)

    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:
        targets = num_kept(decoder.target_ratio, geometry.cluster_size)
        queries = self.steps_predicted(geometry) * targets
        return TokenCounts(
            encoded=len(self.encoded_steps(geometry)) * self.kept(geometry),
            decoded=queries,
            predicted=queries,
        )

    def decoder_width(self, size: Size) -> int:
        return size.decoder_width

    def needs_scores(self, decoder: DecoderSettings) -> bool:
        return decoder.target_rule == "scores"

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        if self.steps_predicted(geometry) < 1:
            raise UserError(
                f"objective.cluster makes {geometry.num_clusters} cluster(s) of the token grid "
                f"{geometry.grid}: nothing is left to predict. Use smaller clusters."
            )
        super().check(geometry, decoder)
        if self.drop == "clusters" and self.order != "random":
            raise UserError(
                f"objective.drop=clusters with objective.order={self.order} would drop the same "
                "clusters of every clip. Set objective.order: random or objective.drop: tokens."
            )
        if decoder.self_attention and decoder.target_ratio < 1:
            raise UserError(
                f"decoder.target_ratio={decoder.target_ratio} with "
                "decoder.self_attention=true would change what the queries see, so the loss "
                "would no longer estimate the full one. Set target_ratio: 1.0 or "
                "self_attention: false."
            )
        if decoder.target_rule != "random" and decoder.target_ratio == 1:
            raise UserError(
                f"decoder.target_rule={decoder.target_rule} chooses among the tokens of a cluster, "
                "but decoder.target_ratio=1 takes them all. Lower the ratio, such as 0.15, or "
                "leave the rule out."
            )


class MaskedSettings(BaseObjective):
    """What the masked autoencoders share: places of the picture that are seen at all times."""

    crosses: ClassVar[bool] = False

    # Share of the places that are hidden at all times (tube masking).
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        return Geometry.whole(clip, patch)

    def visible_places(self, geometry: Geometry) -> int:
        """Places of the picture (row, column) that the encoder sees, at all times."""
        _, h, w = geometry.grid
        return num_kept(1 - self.mask_ratio, h * w)

    @abstractmethod
    def predicted(self, geometry: Geometry, hidden: int) -> int:
        """How many of so many hidden tokens are reconstructed."""

    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:  # noqa: ARG002
        visible = self.visible_places(geometry) * geometry.grid[0]
        predicted = self.predicted(geometry, geometry.num_tokens - visible)
        return TokenCounts(encoded=visible, decoded=visible + predicted, predicted=predicted)

    def decoder_width(self, size: Size) -> int:
        return size.videomae_decoder_width

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        super().check(geometry, decoder)
        _, h, w = geometry.grid
        if not self.counts(geometry, decoder).predicted:
            raise UserError(
                f"objective.mask_ratio={self.mask_ratio} hides none of the {h} x {w} places: "
                "nothing is left to reconstruct. Raise it."
            )
        if decoder.self_attention or decoder.target_ratio < 1 or decoder.target_rule != "random":
            raise UserError(
                "decoder.self_attention, decoder.target_ratio and decoder.target_rule are "
                f"ARVideo's; the decoder of {self.name} always attends to all of its tokens, and "
                "objective.decoder_mask, such as running_cell, is how it reconstructs fewer. "
                "Remove them."
            )


class VideomaeSettings(MaskedSettings):
    """VideoMAE; with `decoder_mask: running_cell` VideoMAE V2."""

    name: Literal["videomae"] = "videomae"
    # Which hidden tokens are reconstructed: "none" leaves out none, "running_cell" every other.
    decoder_mask: Literal["none", "running_cell"] = "none"

    def predicted(self, geometry: Geometry, hidden: int) -> int:  # noqa: ARG002
        # The cell visits every place equally often, so it halves the hidden tokens exactly.
        return hidden // 2 if self.decoder_mask == "running_cell" else hidden

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        super().check(geometry, decoder)
        t, h, w = geometry.grid
        # So that the cell visits all places equally often.
        if self.decoder_mask == "running_cell" and (t % 4 or h % 2 or w % 2):
            raise UserError(
                "objective.decoder_mask=running_cell walks over cells of 2 x 2 places in 4 times, "
                f"so the token grid must be a multiple of 4 x 2 x 2, but it is {t}x{h}x{w}. Change "
                "data.frames or data.size, or objective.decoder_mask."
            )


class LvmaeSettings(MaskedSettings):
    """LVMAE: of a long clip only a budget of hidden tokens is reconstructed, as latents.

    Shares are of all tokens of the clip. What a rule does not fill is drawn at random, and a
    budget above the hidden tokens takes them all.
    """

    name: Literal["lvmae"] = "lvmae"
    # Which hidden tokens come first, and how many of them.
    decoder_mask: Rule = "scores"
    budget: Share = 0.10
    # As many again, at random.
    random_budget: Share = 0.05
    # What is predicted: latents of the tokenizer that made data.scores, or pixels.
    targets: Literal["latents", "pixels"] = "latents"
    # Of that tokenizer's quantisation, one for each number of a latent.
    latent_levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 8, 8, 8, 8, 8)

    def by_rule(self, geometry: Geometry, hidden: int) -> int:
        """Tokens that the rule chooses."""
        return min(hidden, _part(self.budget, geometry))

    def predicted(self, geometry: Geometry, hidden: int) -> int:
        return min(hidden, _part(self.budget, geometry) + _part(self.random_budget, geometry))

    def target_values(self, geometry: Geometry) -> int:
        if self.targets == "latents":
            return len(self.latent_levels)
        return super().target_values(geometry)

    def needs_scores(self, decoder: DecoderSettings) -> bool:  # noqa: ARG002
        return self.decoder_mask == "scores" or self.targets == "latents"

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        if not self.latent_levels:
            raise UserError("objective.latent_levels is empty; [8, 8, 8, 8, 8, 8] is LVMAE's.")
        if not self.budget + self.random_budget:
            raise UserError(
                "objective.budget and objective.random_budget are both 0: nothing is "
                "reconstructed. LVMAE's are 0.10 and 0.05."
            )
        super().check(geometry, decoder)


def _part(share: float, geometry: Geometry) -> int:
    """That share of a clip's tokens; a budget of 0 is none."""
    return num_kept(share, geometry.num_tokens) if share else 0


def _name_of(value: Any) -> Any:
    """ARVideo's where a recipe names none."""
    if isinstance(value, dict):
        return value.get("name", "arvideo")
    return getattr(value, "name", None)


OBJECTIVES = ("arvideo", "videomae", "lvmae")
ObjectiveSettings = Annotated[
    Annotated[ArvideoSettings, Tag("arvideo")]
    | Annotated[VideomaeSettings, Tag("videomae")]
    | Annotated[LvmaeSettings, Tag("lvmae")],
    Discriminator(_name_of),
]
