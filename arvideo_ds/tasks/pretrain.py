"""Pretraining with any objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.evaluation.pretrained import build_objective
from arvideo_ds.models.cubes import to_cubes
from arvideo_ds.models.encoder import encode_clips
from arvideo_ds.models.objective import Draw
from arvideo_ds.models.positions import interpolated_positions
from arvideo_ds.tasks.teacher import load_teacher


class Pretrain(nn.Module):
    """While training the mean loss over clips that decoded (0 if none did), else tokens B N D."""

    compilable = ("model.losses", "features")
    positions: Tensor | None

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.model = build_objective(recipe)
        self.patch = recipe.patch
        # In a phase: of the recipe's own clips, which the online probe evaluates on.
        table, grid = None, recipe.whole_grid
        if grid is not None:
            scheme, pretrained = recipe.model.positions, recipe.pretrained_grid or grid
            table = interpolated_positions(scheme, pretrained, grid, recipe.size.width)
        self.register_buffer("positions", table, persistent=False)
        # After the model, whose initial weights it must not change.
        self.teacher = load_teacher(recipe)

    def forward(self, batch: Batch) -> Tensor:
        if not self.training:
            encoder, table = self.model.encoder, self.positions
            return encode_clips(encoder, batch.clips, self.patch, positions=table)
        per_clip = self.model(batch.clips, batch.keys, batch.scores, self._codes(batch))
        valid = batch.valid.to(per_clip.dtype)
        return (per_clip * valid).sum() / valid.sum().clamp(min=1)

    def followers(self) -> dict[str, Tensor]:
        """The weights of an EMA teacher, by the names of the parameters that they average."""
        assert self.teacher is not None
        weights = self.teacher.model.named_parameters()
        return {f"model.encoder.{name}": weight for name, weight in weights}

    def features(self, clips: Tensor, draw: Draw | None = None) -> Tensor:
        """The teacher's features of clips, B N D; of the encoded tokens of a draw, B E D."""
        assert self.teacher is not None
        if draw is None:
            return encode_clips(self.teacher.model, clips, self.patch)
        return self.model.encode(self.teacher.model, to_cubes(clips, self.patch), draw)

    @torch.no_grad()  # outside the compiled `features`, which would be compiled for each mode
    def _codes(self, batch: Batch) -> Tensor | None:
        """Codes of the clips' tokens: from data.scores, or the teacher's features."""
        if self.teacher is None:
            return batch.codes
        self.teacher.move_to(batch.clips.device)
        draw = self.model.draw(batch.keys, batch.scores) if self.model.aligned else None
        return self.features(batch.clips, draw)

    @torch.no_grad()
    def baseline(self, batch: Batch) -> Tensor:
        """The loss of predicting the mean of the targets: its sum over clips, and their number, 2.

        The best prediction without seeing the clip (of a teacher's features nearly so: their
        smooth L1 is squared up to 1). The mean is 0 where targets are normalised per cube, else
        that of each predicted value over the batch. With normalised targets of cubes of P pixels
        the loss is (P - 1) / P, since the variance is unbiased, and 0 in channels of one colour.
        Clips that did not decode do not count.
        """
        codes = self._codes(batch)
        targets = self.model.target_values(batch.clips, batch.keys, batch.scores, codes)
        valid = batch.valid.to(targets.dtype)
        mean = torch.zeros_like(targets)
        if not self.model.zero_mean:
            total = (targets * valid[:, None, None]).sum(dim=(0, 1))
            mean = mean + total / (targets.shape[1] * valid.sum().clamp(min=1))
        per_clip = self.model.errors(mean, targets).mean(dim=(1, 2))
        return torch.stack([(per_clip * valid).sum(), valid.sum()])
