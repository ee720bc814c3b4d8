"""What recipes share that start from the weights of another run, and those that learn labels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from arvideo_ds.config.schema import EncoderRecipe
from arvideo_ds.config.settings import PositiveTriple, Settings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple


class StartSettings(Settings):
    """The weights that a run starts from, and the positions of their encoder."""

    init_from: str | None = None
    """Initial weights: a run, an exported encoder, a public checkpoint; null: from scratch."""
    positions: Literal["recomputed", "interpolated"] | None = None
    """Position table: recomputed for the clip's token grid, or interpolated from that of the clips
    in pretraining. null: interpolated if known and different; recipe.yaml records the choice."""
    pretrained_clip: PositiveTriple | None = None
    """Frames, height and width of the clips in pretraining; read from --init-from where given."""


class TransferSettings(StartSettings):
    """How a pretrained encoder is loaded and trained further; defaults of VideoMAE for ViT-B."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """The learning rate of layer i of n is that of the head x layer_decay^(n + 1 - i)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth: share of the last block's branches that are skipped."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Moving average of the weights, saved beside them; such as 0.9999."""


class StartRecipe(EncoderRecipe):
    """A run that may start from other weights; its `StartSettings` are named like the task."""

    @property
    def start(self) -> StartSettings:
        return getattr(self, self.task)

    @property
    def pretrained_clip(self) -> Triple | None:
        """Errors: `UserError` where interpolation is requested and the clip is not known."""
        if self.start.positions != "interpolated":
            return None
        clip: Triple | None = self.start.pretrained_clip
        key = f"{self.task}.pretrained_clip"
        if clip is None:
            raise UserError(
                f"{self.task}.positions=interpolated needs the clip shape of pretraining, which "
                f"the weights do not give: set {key}=[FRAMES,HEIGHT,WIDTH], such as [16,224,224]."
            )
        if any(side % step for side, step in zip(clip, self.patch, strict=True)):
            raise UserError(
                f"{key}={list(clip)} is not a multiple of model.patch={list(self.patch)}; give the "
                "frames, height and width of the clips in pretraining."
            )
        return clip


class TransferRecipe(StartRecipe):
    """A run on labels; its section of `TransferSettings` has the name of the task."""

    learns_labels: ClassVar[bool] = True

    @property
    def transfer(self) -> TransferSettings:
        return getattr(self, self.task)

    @property
    def ema_decay(self) -> float | None:
        return self.transfer.ema_decay
