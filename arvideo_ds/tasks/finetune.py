"""Fine-tuning on labels, and on the class scores of a teacher, over clips mixed in pairs."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.augment import seeded
from arvideo_ds.data.loader import Batch
from arvideo_ds.models.classifier import Classifier, HeadGrid
from arvideo_ds.models.cubes import unit_pixels
from arvideo_ds.models.selection import tokens_of, tube
from arvideo_ds.models.teacher import divergence
from arvideo_ds.tasks.teacher import load_classifying_teacher


class Finetune(nn.Module):
    """While training the mean loss over clips that decoded, else logits B x classes.

    num_classes: of the one label, or of each of the recipe's heads, whose logits are concatenated;
    a clip's loss is the sum over heads, also where they learn the same label (head_lrs). All draws
    (mixing, drop path, dropout) are functions of the key of the micro-batch's first clip, those of
    tubes of each clip's own, so a resumed run repeats them.
    """

    compilable = ("loss", "taught_scores")

    def __init__(self, recipe: FinetuneRecipe, *num_classes: int) -> None:
        super().__init__()
        settings, grid = recipe.finetune, recipe.finetune.head_grid
        depth = settings.pooling_depth
        self.model: Classifier | HeadGrid
        if grid:
            num_classes *= len(grid)
            self.model = HeadGrid(recipe.encoder, num_classes[0], count=len(grid), depth=depth)
        else:
            self.model = Classifier(
                recipe.encoder,
                sum(num_classes),
                pooling=settings.pooling,
                pooling_depth=depth,
                drop_path=settings.drop_path,
                head_dropout=settings.head_dropout,
            )
        self.num_classes = num_classes
        self.smoothing = settings.label_smoothing
        mixup = Mixup(mixup_alpha=settings.mixup, cutmix_alpha=settings.cutmix)
        self.mixup = mixup if settings.mixes else None
        self.recipe = recipe
        # After the model, whose initial weights it must not change.
        self.teacher = load_classifying_teacher(recipe, sum(num_classes))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.recipe.finetune.train == "head":
            # As where features are extracted: a frozen encoder draws nothing.
            self.model.encoder.eval()
        return self

    def forward(self, batch: Batch) -> Tensor:
        if not self.training:
            return self.model(batch.clips, views=self.recipe.training_views)
        with seeded(batch.first_key):
            if batch.clips.is_cuda:
                torch.cuda.manual_seed(batch.first_key)
            clips, targets, weight = self._mixed(batch)
            taught = self._taught(clips)
            return self.loss(clips, self._seen(batch.keys), targets, weight, taught)

    def loss(
        self,
        clips: Tensor,
        tokens: Tensor | None,
        targets: list[Tensor],
        weight: Tensor,
        taught: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean over clips B T H W 3 of the cross-entropy, summed over heads.

        tokens: B M, the only ones that are encoded. targets: B x classes of each head. weight: B.
        taught: the teacher's logits B x classes; the `divergence` from them, summed over heads, has
        the share finetune.teacher_weight of the loss.
        """
        joint = self.model(clips, tokens, views=self.recipe.training_views).float()
        logits = joint.split(self.num_classes, dim=1)
        pairs = zip(logits, targets, strict=True)
        losses = torch.stack([F.cross_entropy(*pair, reduction="none") for pair in pairs]).sum(0)
        if taught is not None:
            settings, by_head = self.recipe.finetune, taught.split(self.num_classes, dim=1)
            share, temperature = settings.teacher_weight, settings.teacher_temperature
            pairs = zip(logits, by_head, strict=True)
            apart = torch.stack([divergence(*pair, temperature) for pair in pairs]).sum(0)
            losses = (1 - share) * losses + share * apart
        return (losses * weight).sum() / weight.sum().clamp(min=1)

    def taught_scores(self, clips: Tensor) -> Tensor:
        """The teacher's logits of whole clips, B x classes."""
        assert self.teacher is not None
        return self.teacher.model(clips).float()

    @torch.no_grad()  # outside the compiled `taught_scores`, which would be compiled for each mode
    def _taught(self, clips: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        self.teacher.move_to(clips.device)
        return self.taught_scores(clips)

    def _mixed(self, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor]:
        """The clips, mixed in pairs, their soft targets for each head, and their weights."""
        # Clips without a label have weight 0, but one_hot needs a class.
        by_head = batch.labels.view(len(batch.labels), -1)
        by_head = by_head.expand(-1, len(self.num_classes))
        usable = batch.valid & (by_head >= 0).all(dim=1)
        labels = by_head.clamp(min=0).unbind(1)
        heads = list(zip(labels, self.num_classes, strict=True))
        if self.mixup is None:
            clips, weight = batch.clips, usable
            targets = [
                F.one_hot(classes, count).float() * (1 - self.smoothing) + self.smoothing / count
                for classes, count in heads
            ]
        else:
            # Channels first for timm, which cuts boxes out of the last two axes.
            flat = unit_pixels(batch.clips).permute(0, 1, 4, 2, 3).flatten(1, 2)
            # In place; one draw for the clips and the labels of every head.
            share = self.mixup._mix_batch(flat)
            targets = [mixup_target(*head, share, self.smoothing) for head in heads]
            clips = flat.unflatten(1, (-1, 3)).permute(0, 1, 3, 4, 2)
            # timm mixes clip i with clip B - 1 - i.
            weight = usable & usable.flip(0)
        return clips, targets, weight

    def _seen(self, keys: Tensor) -> Tensor | None:
        """Tokens B M that the encoder sees, the same places at every time; None = all.

        Source: LVMAE (arXiv 2411.13683): fine-tuning drops random tubes of tokens.
        """
        recipe = self.recipe
        if not recipe.finetune.drop_tokens:
            return None
        tubes = tube(keys, recipe.geometry.grid, recipe.seen_places)
        return tokens_of(tubes, recipe.counts.encoded)
