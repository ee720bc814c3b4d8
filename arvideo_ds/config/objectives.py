"""Settings of every objective, and what planning derives from them: token counts and decoder.

An objective is a class in `OBJECTIVES` and a model in `MODELS` (models/objective.py) of the same
name (docs/extending.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from arvideo_ds.config.settings import Positive, PositiveTriple, Settings, Share
from arvideo_ds.config.sizes import DecoderShape, Size
from arvideo_ds.config.teachers import EMA, check_teacher, teacher_size
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept
from arvideo_ds.registry import Registry

# How the tokens under the loss are chosen (models/selection.py). With "random", a loss on part of
# the tokens estimates the loss on all; the others are biased on purpose. "scores": data.scores.
Rule = Literal["random", "uniform", "running_cell", "scores"]
# A larger difference between drop_ratio and the share that is dropped is worth a note.
_TOLERATED_DIFFERENCE = 0.03


class DecoderSettings(Settings):
    """The decoder of pretraining; fine-tuning and exports drop it."""

    width: Positive | None = None
    """Width of the decoder; by default from the size table."""
    depth: Positive | None = None
    """Layers of the decoder; by default from the size table."""
    heads: Positive | None = None
    """Attention heads of the decoder; by default the width of each is that of the size table."""
    self_attention: bool = False
    """ARVideo only: queries attend to the queries of steps up to their own."""
    target_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """ARVideo only: share of each predicted cluster's tokens that the loss uses."""
    target_rule: Rule = "random"
    """ARVideo only: how these tokens are chosen."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one clip: in the encoder, in the layers of the decoder, under the loss.

    dropped_share: of the tokens that the encoder could see, for objectives that drop tokens.
    """

    encoded: int
    decoded: int = 0
    predicted: int = 0
    dropped_share: float | None = None


class BaseObjective(Settings, ABC):
    """What every objective of pretraining has.

    A subclass defines `name`, a Literal with a default, and `counts`. Cost and memory follow from
    `counts`, `decoder_shape` and `target_values`.
    """

    name: str
    """arvideo: clusters of tokens are predicted one after another. videomae: the hidden tokens are
    reconstructed. lvmae: a part of the hidden tokens of a long clip. docs/method.md has the
    equations, docs/extending.md adds objectives."""
    normalize_targets: bool = True
    """Normalise each cube's pixels by their mean and standard deviation, channel by channel."""
    teacher: str | None = None
    """Predict the features of this frozen ViT instead of pixels: a run, an exported encoder, a
    public checkpoint; or ema, a moving average of the run's own encoder (docs/teachers.md)."""
    teacher_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of teacher: ema; by default 0.999."""
    teacher_size: str | None = None
    """The teacher's model.size; by default read from its recipe.yaml or config.json, and recorded
    in the run's recipe.yaml."""
    teacher_clip: PositiveTriple | None = None
    """Frames, height and width of the teacher's clips, read and recorded as teacher_size; its
    positions are interpolated for clips of another shape."""
    teacher_tokens: Literal["predicted", "encoded"] = "predicted"
    """predicted: the decoder predicts features of tokens that the encoder does not see. encoded: a
    linear layer in its place gives those of the encoded tokens, and the teacher sees only these."""

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        """Tokens and clusters of a clip (T, H, W); by default the whole clip is one cluster."""
        return Geometry.whole(clip, patch)

    @abstractmethod
    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:
        """Token counts of one clip."""

    def decoder_width(self, size: Size) -> int:
        """Default of decoder.width."""
        return size.decoder_width

    def decoder_shape(self, size: Size, decoder: DecoderSettings) -> DecoderShape:
        """The decoder: its settings, else the size table's; a `JointDecoder` unless overridden."""
        width = decoder.width or self.decoder_width(size)
        # A changed width keeps the width of a head.
        heads = decoder.heads or max(1, width // (size.decoder_width // size.decoder_heads))
        return DecoderShape(width, decoder.depth or size.decoder_depth, heads)

    @property
    def teacher_shape(self) -> Size | None:
        """Shape of the teacher, if there is one. Errors: `UserError` where its size is unknown."""
        return teacher_size("objective", self.teacher, self.teacher_size)

    @property
    def aligned(self) -> bool:
        """Whether features of the encoded tokens are learnt: there is no decoder."""
        return self.teacher_tokens == "encoded"

    def target_values(self, geometry: Geometry) -> int:
        """Values predicted per token."""
        teacher = self.teacher_shape
        return geometry.cube_values if teacher is None else teacher.width

    def needs_scores(self, decoder: DecoderSettings) -> bool:  # noqa: ARG002
        """Whether clips need the scores (and codes) of their tokens from data.scores."""
        return False

    def notes(self, geometry: Geometry) -> list[str]:  # noqa: ARG002
        """Settings that are allowed but probably not intended, a sentence each."""
        return []

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:  # noqa: ARG002
        """Raise `UserError` for settings that contradict each other."""
        if self.teacher_decay is not None and self.teacher != EMA:
            raise UserError(
                "objective.teacher_decay is for objective.teacher: ema; any other is frozen. "
                "Remove it."
            )
        check_teacher("objective", self)
        if self.aligned and self.teacher == EMA:
            raise UserError(
                "objective.teacher_tokens=encoded with objective.teacher=ema would compare the "
                "encoder's output with itself. Set objective.teacher_tokens: predicted."
            )
        if self.normalize_targets and geometry.cube_pixels < 2:
            raise UserError(
                "objective.normalize_targets needs cubes of two or more pixels, but model.patch "
                "is [1, 1, 1]. Set objective.normalize_targets: false."
            )


class ArvideoSettings(BaseObjective):
    name: Literal["arvideo"] = "arvideo"
    targets: Literal["shifted", "paper"] = "shifted"
    """shifted: steps 1..C-1 predict steps 2..C. paper: the last step is not predicted either, as in
    the paper's Table 5, which counts 1,372 queries for 15 encoded clusters."""
    cluster: PositiveTriple = (2, 7, 7)
    """Tokens along time, height and width of one cluster."""
    order: Literal["spatial_first", "temporal_first", "random"] = "random"
    """Order of the clusters. spatial_first: all places of one time, then the next time.
    temporal_first: all times of one place, then the next place. random: a uniform permutation,
    drawn for each clip at each step."""
    drop_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Share of the tokens of steps 1..C-1 that the encoder does not see."""
    drop: Literal["tokens", "clusters"] = "tokens"
    """tokens: the same share of every cluster, which keeps at least one. clusters: whole clusters,
    of any size; needs a random order."""

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        return Geometry(clip, patch, self.cluster)

    def encoded_steps(self, geometry: Geometry) -> tuple[int, ...]:
        """Steps, from 1, whose cluster the encoder sees; always the first, never the last.

        With drop=clusters they are evenly spaced and the same for every clip, so that all clips
        share the attention masks; a random order makes the dropped clusters random.
        """
        last = geometry.num_clusters - 1
        if self.drop == "tokens":
            return tuple(range(1, last + 1))
        kept = num_kept(1 - self.drop_ratio, last)
        return tuple(1 + number * last // kept for number in range(kept))

    def steps_predicted(self, geometry: Geometry) -> int:
        """Number of predicted clusters: steps 2..C, or 2..C-1 with targets=paper."""
        return geometry.num_clusters - 1 - (self.targets == "paper")

    def kept(self, geometry: Geometry) -> int:
        """Tokens that the encoder sees per encoded cluster."""
        if self.drop == "clusters":
            return geometry.cluster_size
        return num_kept(1 - self.drop_ratio, geometry.cluster_size)

    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:
        targets = num_kept(decoder.target_ratio, geometry.cluster_size)
        queries = self.steps_predicted(geometry) * targets
        encoded = len(self.encoded_steps(geometry)) * self.kept(geometry)
        dropped = 1 - encoded / ((geometry.num_clusters - 1) * geometry.cluster_size)
        return TokenCounts(encoded, queries, queries, dropped_share=round(dropped, 4))

    def decoder_shape(self, size: Size, decoder: DecoderSettings) -> DecoderShape:
        shape = super().decoder_shape(size, decoder)
        return replace(shape, crosses=True, self_attention=decoder.self_attention)

    def notes(self, geometry: Geometry) -> list[str]:
        dropped = self.counts(geometry, DecoderSettings()).dropped_share or 0.0
        if abs(dropped - self.drop_ratio) <= _TOLERATED_DIFFERENCE:
            return []
        return [
            f"objective.drop_ratio={self.drop_ratio:g} drops {dropped:.1%} of the tokens: each "
            f"cluster of {geometry.cluster_size} token(s) keeps a whole number, at least one. "
            "objective.drop=clusters drops whole clusters instead."
        ]

    def needs_scores(self, decoder: DecoderSettings) -> bool:
        return decoder.target_rule == "scores"

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        if self.steps_predicted(geometry) < 1:
            raise UserError(
                f"objective.cluster divides the token grid {geometry.grid} into only "
                f"{geometry.num_clusters} cluster(s). Use smaller clusters."
            )
        super().check(geometry, decoder)
        if self.drop == "clusters" and self.order != "random":
            raise UserError(
                f"objective.drop=clusters with objective.order={self.order} would drop the same "
                "clusters of every clip. Set objective.order: random or objective.drop: tokens."
            )
        if decoder.self_attention and decoder.target_ratio < 1:
            raise UserError(
                f"decoder.target_ratio={decoder.target_ratio} changes what the queries of "
                "decoder.self_attention=true see. Set target_ratio: 1.0 or self_attention: false."
            )
        if decoder.target_rule != "random" and decoder.target_ratio == 1:
            raise UserError(
                f"decoder.target_rule={decoder.target_rule} chooses among the tokens of a cluster, "
                "but decoder.target_ratio=1 takes all. Lower the ratio or remove the rule."
            )


class MaskedSettings(BaseObjective):
    """What masked autoencoders share: tube masking."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the places (row, column) that are hidden at all times (tube masking)."""

    def visible_places(self, geometry: Geometry) -> int:
        """Places (row, column) that the encoder sees at all times."""
        _, h, w = geometry.grid
        return num_kept(1 - self.mask_ratio, h * w)

    @abstractmethod
    def predicted(self, geometry: Geometry, hidden: int) -> int:
        """Number of reconstructed tokens, given the number of hidden ones."""

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
                "decoder.self_attention, decoder.target_ratio and decoder.target_rule are for "
                f"arvideo. Remove them; {self.name} reconstructs fewer tokens with "
                "objective.decoder_mask, such as running_cell."
            )


class VideomaeSettings(MaskedSettings):
    """VideoMAE; with `decoder_mask: running_cell` VideoMAE V2."""

    name: Literal["videomae"] = "videomae"
    decoder_mask: Literal["none", "running_cell"] = "none"
    """Which hidden tokens are not reconstructed: none, or every other one (running_cell)."""

    def predicted(self, geometry: Geometry, hidden: int) -> int:  # noqa: ARG002
        # The cell visits all places equally often, so exactly half of the hidden tokens remain.
        return hidden // 2 if self.decoder_mask == "running_cell" else hidden

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        super().check(geometry, decoder)
        t, h, w = geometry.grid
        if self.decoder_mask == "running_cell" and (t % 4 or h % 2 or w % 2):
            raise UserError(
                "objective.decoder_mask=running_cell needs a token grid of multiples of 4 x 2 x 2, "
                f"not {t}x{h}x{w}. Change data.frames, data.size or objective.decoder_mask."
            )


class LvmaeSettings(MaskedSettings):
    """LVMAE: only a budget of a long clip's hidden tokens is reconstructed, as latents.

    Budgets are shares of all tokens of the clip; a budget above the hidden tokens takes them all.
    """

    name: Literal["lvmae"] = "lvmae"
    decoder_mask: Rule = "scores"
    """Rule that chooses the hidden tokens of `budget`; if it finds fewer, the rest is random."""
    budget: Share = 0.10
    """Share of all tokens of the clip that `decoder_mask` chooses."""
    random_budget: Share = 0.05
    """Further hidden tokens, chosen at random."""
    targets: Literal["latents", "pixels"] = "latents"
    """What is predicted: latents of the tokenizer that made data.scores, or pixels."""
    latent_levels: tuple[Annotated[int, Field(ge=2)], ...] = (8, 8, 8, 8, 8, 8)
    """Quantisation levels of that tokenizer, one per dimension of a latent."""

    def by_rule(self, geometry: Geometry, hidden: int) -> int:
        """Number of tokens that the rule chooses."""
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
        if self.teacher is not None:
            raise UserError(
                "objective.teacher is not for lvmae, whose targets are latents of a tokenizer or "
                "pixels. Remove it, or use objective.name: videomae."
            )
        if not self.latent_levels:
            raise UserError("objective.latent_levels is empty; LVMAE uses [8, 8, 8, 8, 8, 8].")
        if not self.budget + self.random_budget:
            raise UserError(
                "objective.budget and objective.random_budget are both 0: nothing is "
                "reconstructed. LVMAE uses 0.10 and 0.05."
            )
        super().check(geometry, decoder)


def _part(share: float, geometry: Geometry) -> int:
    return num_kept(share, geometry.num_tokens) if share else 0


OBJECTIVES: Registry[type[BaseObjective]] = Registry(
    "objective", {"arvideo": ArvideoSettings, "videomae": VideomaeSettings, "lvmae": LvmaeSettings}
)


def _by_name(section: Any) -> Any:
    """A recipe's section as the settings class of its `name`, by default ARVideo's."""
    if not isinstance(section, Mapping):
        return section
    name = str(section.get("name", "arvideo"))
    return OBJECTIVES.choose(name, key="objective.name").model_validate(section)


ObjectiveSettings = Annotated[SerializeAsAny[BaseObjective], BeforeValidator(_by_name)]
