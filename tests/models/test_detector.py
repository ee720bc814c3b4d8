"""The detector: a box reads its own place of its own clip, and nothing of other boxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import DetectRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.models import detector
from arvideo_ds.models.detector import Detector
from arvideo_ds.optim.groups import parameter_groups

SIZE, PATCH, ACTIONS = (32, 48), (2, 4, 8), 5


def recipe(**model: Any) -> DetectRecipe:
    """Neither the grid (4 x 8 x 6) nor the patch is square."""
    return validate(
        {
            "task": "detect",
            "model": {"size": "tiny", "patch": PATCH, **model},
            "data": {"frames": 8, "size": SIZE},
            "train": {"max_steps": 1, "total_batch": 2, "micro_batch": 2},
            "detect": {"num_actions": ACTIONS},
        },
        "test recipe",
        DetectRecipe,
    )


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    made = Detector(recipe()).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


def clips(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 8, *SIZE, 3), dtype=torch.uint8, generator=generator)


BOXES = torch.tensor([[0, 0, 20, 20], [10, 5, 48, 32], [30, 2, 40, 30.0]])
CLIP_OF = torch.tensor([0, 1, 1])


@torch.no_grad()
def test_a_box_has_its_logits_whatever_stands_beside_it(model: Detector) -> None:
    logits = model(clips(), BOXES, CLIP_OF)
    assert logits.shape == (3, ACTIONS)
    assert len(logits.unique(dim=0)) == 3
    turned = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(clips(), BOXES[turned], CLIP_OF[turned]), logits[turned])
    alone = model(clips()[1:], BOXES[1:2], torch.tensor([0]))
    torch.testing.assert_close(alone, logits[1:2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_box_reads_the_tokens_that_it_covers(
    model: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, h, w = model.grid
    assert (t, h, w) == (4, 8, 6)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    # Features: row and column of the token, with opposite signs at the halves of the time.
    here = torch.stack([rows, columns, -rows, -columns], dim=-1).float()
    later = torch.tensor([1.0, 2.0, 1.0, 0.0])[:, None, None, None]
    tokens = (here * later).reshape(1, t * h * w, 4)
    monkeypatch.setattr(detector, "encode_clips", lambda *_: tokens)
    # Rows 2 to 5 (4 pixels each), columns 1 to 3 (8 pixels each).
    box = torch.tensor([[8.0, 8.0, 32.0, 24.0]])
    top, right, bottom, left = model.features(clips(1), box, torch.tensor([0]))[0].tolist()
    assert top == pytest.approx(5, abs=0.5)  # the largest row
    assert right == pytest.approx(3, abs=0.5)
    assert -bottom == pytest.approx(2, abs=0.5)
    assert -left == pytest.approx(1, abs=0.5)


def test_no_boxes_give_no_logits_and_a_gradient_of_zeros(model: Detector) -> None:
    logits = model(clips(), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0, ACTIONS)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()


def test_half_precision_keeps_its_type(model: Detector) -> None:
    logits = model.to(torch.bfloat16)(clips(), BOXES, CLIP_OF)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_layers_learn_at_rates_of_their_own(model: Detector) -> None:
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.5**power for power in range(6)}  # 4 blocks, the embedding and the head
    head = [g for g in groups if any(p is model.head.weight for p in g["params"])]
    assert head[0]["lr_scale"] == 1
