"""Action detection: binary cross-entropy of every action in every box."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.augment import seeded
from arvideo_ds.data.detection import DetectionBatch
from arvideo_ds.models.detector import Detector


class Detect(nn.Module):
    """While training the loss per clip that decoded, else logits R x A of the batch's boxes.

    A box's loss is the mean over the actions, a clip's the sum over its boxes: every box has the
    same weight, whatever micro-batch or rank its clip is in. Drop path is a function of the key of
    the micro-batch's first clip, so a resumed run repeats it.
    """

    # Not what follows: the number of boxes changes from step to step.
    compilable = ("model.maps",)

    def __init__(self, recipe: DetectRecipe) -> None:
        super().__init__()
        self.model = Detector(recipe.encoder, recipe.detect, drop_path=recipe.detect.drop_path)

    def forward(self, batch: DetectionBatch) -> Tensor:
        if not self.training:
            return self._logits(batch)
        with seeded(batch.first_key):
            if batch.clips.is_cuda:
                torch.cuda.manual_seed(batch.first_key)
            logits = self._logits(batch).float()
        losses = F.binary_cross_entropy_with_logits(
            logits, batch.targets.to(logits.dtype), reduction="none"
        )
        # A clip with boxes may be invalid: ranks that share its tokens agree on that.
        per_box = losses.mean(dim=1) * batch.valid[batch.clip_of]
        return per_box.sum() / batch.valid.sum().clamp(min=1)

    def _logits(self, batch: DetectionBatch) -> Tensor:
        return self.model(batch.clips, batch.boxes, batch.clip_of)
