"""Fine-tuning on labels: soft-target cross-entropy over clips mixed in pairs."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.augment import seeded
from arvideo_ds.data.loader import Batch
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.cubes import unit_pixels


class Finetune(nn.Module):
    """While training the mean loss over clips that decoded, else logits B x classes.

    All draws (what is mixed, which branches drop out) are functions of the key of the micro-batch's
    first clip, so a resumed run makes them again.
    """

    def __init__(self, recipe: FinetuneRecipe, num_classes: int) -> None:
        super().__init__()
        settings = recipe.finetune
        self.model = Classifier(recipe, num_classes, drop_path=settings.drop_path)
        self.num_classes = num_classes
        self.smoothing = settings.label_smoothing
        self.mixup = _mixup(recipe, num_classes)

    def forward(self, batch: Batch) -> Tensor:
        if not self.training:
            return self.model(batch.clips)
        with seeded(batch.first_key):
            if batch.clips.is_cuda:
                torch.cuda.manual_seed(batch.first_key)
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        # A clip without a label teaches nothing; one_hot wants a class all the same.
        usable = batch.valid & (batch.labels >= 0)
        labels = batch.labels.clamp(min=0)
        if self.mixup is None:
            clips, weight = batch.clips, usable
            targets = F.one_hot(labels, self.num_classes).float()
            targets = targets * (1 - self.smoothing) + self.smoothing / self.num_classes
        else:
            clips, targets = self._mixed(batch, labels)
            # timm mixes each clip with its mirror place in the batch.
            weight = usable & usable.flip(0)
        losses = F.cross_entropy(self.model(clips).float(), targets, reduction="none")
        return (losses * weight).sum() / weight.sum().clamp(min=1)

    def _mixed(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mixup is not None
        # Channels first for timm, which cuts boxes out of the last two axes.
        clips = unit_pixels(batch.clips).permute(0, 1, 4, 2, 3).flatten(1, 2)
        clips, targets = self.mixup(clips, labels)
        return clips.unflatten(1, (-1, 3)).permute(0, 1, 3, 4, 2), targets


def _mixup(recipe: FinetuneRecipe, num_classes: int) -> Mixup | None:
    settings = recipe.finetune
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )
