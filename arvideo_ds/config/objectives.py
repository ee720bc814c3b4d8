"""What a recipe may say of its objective, and the tokens that follow from it.

A new objective is one class here, one file in models/ and one line in tasks/pretrain.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from arvideo_ds.config.settings import Positive, PositiveTriple, Settings
from arvideo_ds.config.sizes import Size
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept


class DecoderSettings(Settings):
    width: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    # Of ARVideo: queries attend to those of steps up to their own.
    self_attention: bool = False
    # Of ARVideo: share of each predicted cluster's tokens that the loss is taken on; uniform and
    # unbiased.
    target_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0


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
    # in the paper's Table 5 (METHOD, section 1).
    targets: Literal["shifted", "paper"] = "shifted"
    # Tokens along time, height and width of one cluster.
    cluster: PositiveTriple = (2, 7, 7)
    order: Literal["spatial_first", "temporal_first", "random"] = "random"
    drop_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.8

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        return Geometry(clip, patch, self.cluster)

    def steps_encoded(self, geometry: Geometry) -> int:
        """Clusters that the encoder sees: all but the last of the order."""
        return geometry.num_clusters - 1

    def steps_predicted(self, geometry: Geometry) -> int:
        """Clusters that are predicted: steps 2..C, or 2..C-1 in the paper's convention."""
        return self.steps_encoded(geometry) - (self.targets == "paper")

    def kept(self, geometry: Geometry) -> int:
        """Tokens of each cluster that the encoder sees."""
        return num_kept(1 - self.drop_ratio, geometry.cluster_size)

    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:
        targets = num_kept(decoder.target_ratio, geometry.cluster_size)
        queries = self.steps_predicted(geometry) * targets
        return TokenCounts(
            encoded=self.steps_encoded(geometry) * self.kept(geometry),
            decoded=queries,
            predicted=queries,
        )

    def decoder_width(self, size: Size) -> int:
        return size.decoder_width

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        if self.steps_predicted(geometry) < 1:
            raise UserError(
                f"objective.cluster makes {geometry.num_clusters} cluster(s) of the token grid "
                f"{geometry.grid}: nothing is left to predict. Use smaller clusters."
            )
        super().check(geometry, decoder)
        if decoder.self_attention and decoder.target_ratio < 1:
            raise UserError(
                f"decoder.target_ratio={decoder.target_ratio} with "
                "decoder.self_attention=true would change what the queries see, so the loss "
                "would no longer estimate the full one. Set target_ratio: 1.0 or "
                "self_attention: false."
            )


class VideomaeSettings(BaseObjective):
    """VideoMAE; with `decoder_mask: running_cell` VideoMAE V2."""

    crosses: ClassVar[bool] = False

    name: Literal["videomae"] = "videomae"
    # Share of the places that are hidden at all times (tube masking).
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    # Which hidden tokens are reconstructed: "none" leaves out none, "running_cell" every other.
    decoder_mask: Literal["none", "running_cell"] = "none"

    def geometry(self, clip: Triple, patch: Triple) -> Geometry:
        return Geometry.whole(clip, patch)

    def visible_places(self, geometry: Geometry) -> int:
        """Places of the picture (row, column) that the encoder sees, at all times."""
        _, h, w = geometry.grid
        return num_kept(1 - self.mask_ratio, h * w)

    def counts(self, geometry: Geometry, decoder: DecoderSettings) -> TokenCounts:  # noqa: ARG002
        visible = self.visible_places(geometry) * geometry.grid[0]
        hidden = geometry.num_tokens - visible
        # The cell visits every place equally often, so it halves the hidden tokens exactly.
        predicted = hidden // 2 if self.decoder_mask == "running_cell" else hidden
        return TokenCounts(encoded=visible, decoded=visible + predicted, predicted=predicted)

    def decoder_width(self, size: Size) -> int:
        return size.videomae_decoder_width

    def check(self, geometry: Geometry, decoder: DecoderSettings) -> None:
        super().check(geometry, decoder)
        t, h, w = geometry.grid
        if not self.counts(geometry, decoder).predicted:
            raise UserError(
                f"objective.mask_ratio={self.mask_ratio} hides none of the {h} x {w} places: "
                "nothing is left to reconstruct. Raise it."
            )
        if self.decoder_mask == "running_cell" and (t % 4 or h % 2 or w % 2):
            raise UserError(
                f"objective.decoder_mask=running_cell walks over cells of 2 x 2 places in 4 times, "
                f"so the token grid must be a multiple of 4 x 2 x 2, but it is {t}x{h}x{w}. Change "
                "data.frames or data.size, or set objective.decoder_mask: none."
            )
        if decoder.self_attention or decoder.target_ratio < 1:
            raise UserError(
                "decoder.self_attention and decoder.target_ratio are ARVideo's; VideoMAE's decoder "
                "always attends to all of its tokens, and objective.decoder_mask=running_cell is "
                "how it reconstructs fewer. Remove them."
            )


def _name_of(value: Any) -> Any:
    """ARVideo's where a recipe names none."""
    if isinstance(value, dict):
        return value.get("name", "arvideo")
    return getattr(value, "name", None)


OBJECTIVES = ("arvideo", "videomae")
ObjectiveSettings = Annotated[
    Annotated[ArvideoSettings, Tag("arvideo")] | Annotated[VideomaeSettings, Tag("videomae")],
    Discriminator(_name_of),
]
