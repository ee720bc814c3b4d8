"""Settings of every objective, and what planning derives from them: token counts and decoder.

Another objective is a class in `OBJECTIVES` and its model in models/objective.py's `MODELS`, both
by the same name, from a plugin or here (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from arvideo_ds.config.settings import Positive, PositiveTriple, Settings, Share
from arvideo_ds.config.sizes import DecoderShape, Size
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept
from arvideo_ds.registry import Registry

# How tokens are chosen that the loss is taken on (models/selection.py). "random" is uniform: a loss
# on part of the tokens then estimates that on all of them. The others are biased on purpose.
# "scores" are those of data.scores.
Rule = Literal["random", "uniform", "running_cell", "scores"]
# A larger difference between the share that is asked for and what is dropped is worth a note.
_SHARE_OF_WRONG_RATIO = 0.03


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
    # Share of the tokens that the encoder could see and that are dropped, where an objective drops
    # whole tokens of clusters.
    dropped_share: float | None = None


class BaseObjective(Settings, ABC):
    """Settings of one objective: `name`, a Literal with a default, and `counts` must be given.

    Cost and memory follow from `counts`, `decoder_shape` and `target_values`.
    """

    name: str
    # Each cube's pixels less their mean, over their deviation, channel by channel.
    normalize_targets: bool = True

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        """Tokens and clusters of a clip (T, H, W); by default the whole clip is one cluster."""
        return Geometry.whole(clip, patch)

    @abstractmethod
    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:
        """How many tokens of one clip go where."""

    def decoder_width(self, size: Size) -> int:
        """Width of the decoder where decoder.width is not given."""
        return size.decoder_width

    def decoder_shape(self, size: Size, decoder: DecoderSettings) -> DecoderShape:
        """The decoder: its settings, else the size table's; by default a `JointDecoder`."""
        width = decoder.width or self.decoder_width(size)
        # A changed width keeps the width of a head.
        heads = decoder.heads or max(1, width // (size.decoder_width // size.decoder_heads))
        return DecoderShape(width, decoder.depth or size.decoder_depth, heads)

    def target_values(self, geometry: Geometry) -> int:
        """Numbers that are predicted for each token."""
        return geometry.cube_values

    def needs_scores(self, decoder: DecoderSettings) -> bool:  # noqa: ARG002
        """Whether each clip must come with the scores (and codes) of its tokens in data.scores."""
        return False

    def notes(self, geometry: Geometry) -> list[str]:  # noqa: ARG002
        """Settings that are allowed but probably not intended, a sentence each."""
        return []

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:  # noqa: ARG002
        """Raise `UserError` for settings that contradict each other."""
        if self.normalize_targets and geometry.cube_pixels < 2:
            raise UserError(
                "objective.normalize_targets needs cubes of two or more pixels, but model.patch "
                "is [1, 1, 1]; set objective.normalize_targets: false for pixel elements."
            )


class ArvideoSettings(BaseObjective):
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
            dropped_share=round(self.effective_drop_ratio(geometry), 4),
        )

    def decoder_shape(self, size: Size, decoder: DecoderSettings) -> DecoderShape:
        shape = super().decoder_shape(size, decoder)
        return replace(shape, crosses=True, self_attention=decoder.self_attention)

    def notes(self, geometry: Geometry) -> list[str]:
        dropped = round(self.effective_drop_ratio(geometry), 4)
        if abs(dropped - self.drop_ratio) <= _SHARE_OF_WRONG_RATIO:
            return []
        return [
            f"objective.drop_ratio={self.drop_ratio:g} drops {dropped:.1%} of the tokens: of each "
            f"cluster of {geometry.cluster_size} token(s) a whole number stays, at least one. "
            "objective.drop=clusters drops whole clusters instead."
        ]

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

    # Share of the places that are hidden at all times (tube masking).
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9

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


OBJECTIVES: Registry[type[BaseObjective]] = Registry(
    "objective", {"arvideo": ArvideoSettings, "videomae": VideomaeSettings, "lvmae": LvmaeSettings}
)


def _by_name(section: Any) -> Any:
    """A recipe's section as the settings of its `name`, which is ARVideo's by default."""
    if not isinstance(section, Mapping):
        return section
    name = str(section.get("name", "arvideo"))
    return OBJECTIVES.choose(name, key="objective.name").model_validate(section)


ObjectiveSettings = Annotated[SerializeAsAny[BaseObjective], BeforeValidator(_by_name)]
