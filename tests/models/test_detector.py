"""The detector: a box reads its own place of its own clip, and nothing of other boxes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arvideo_ds.config.detect import DetectSettings
from arvideo_ds.config.sizes import SIZES, EncoderSpec
from arvideo_ds.geometry import Geometry
from arvideo_ds.models import detector as detector_module
from arvideo_ds.models.detector import Detector
from arvideo_ds.models.encoder import encode_clips
from arvideo_ds.optim.groups import parameter_groups

SIZE, PATCH, ACTIONS = (32, 48), (2, 4, 8), 5


# Neither the grid (4 x 8 x 6) nor the patch is square.
ENCODER = EncoderSpec(Geometry.whole((8, *SIZE), PATCH), SIZES["tiny"])


def detector(encoder: EncoderSpec = ENCODER, **settings: object) -> Detector:
    return Detector(encoder, DetectSettings.model_validate({"num_actions": ACTIONS, **settings}))


@pytest.fixture
def model() -> Detector:
    torch.manual_seed(0)
    made = detector().eval()
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
    monkeypatch.setattr(detector_module, "encode_clips", lambda *_, **__: tokens)
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


def test_the_norm_is_the_encoders_own_or_after_the_pooling_as_the_weights_names_say() -> None:
    pooled, tokens = detector(), detector(norm="tokens")
    own = {"encoder.norm.weight", "encoder.norm.bias"}
    after = {"norm.weight", "norm.bias"}
    # Weights of earlier runs have these names, and their recipes do not say the key.
    assert pooled.state_dict().keys() - tokens.state_dict().keys() == after
    assert tokens.state_dict().keys() - pooled.state_dict().keys() == own
    groups = parameter_groups(tokens, 0.05, layer_decay=0.5)
    (norm,) = [g for g in groups if any(p is tokens.encoder.norm.weight for p in g["params"])]
    assert (norm["lr_scale"], norm["weight_decay"]) == (1, 0)


@torch.no_grad()
def test_with_the_encoders_norm_the_head_reads_the_pooled_tokens_as_they_are() -> None:
    torch.manual_seed(0)
    model = detector(norm="tokens").eval()
    torch.nn.init.normal_(model.head.weight)
    features = model.features(clips(), BOXES, CLIP_OF)
    torch.testing.assert_close(model(clips(), BOXES, CLIP_OF), model.head(features))
    tokens = encode_clips(model.encoder, clips(), PATCH)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 4 * 8 * 6), atol=1e-5, rtol=0)


@torch.no_grad()
def test_roi_align_without_alignment_reads_half_a_token_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = torch.arange(6.0).expand(4, 8, 6).reshape(1, -1, 1)
    monkeypatch.setattr(detector_module, "encode_clips", lambda *_, **__: columns)
    box, of = torch.tensor([[8.0, 8.0, 24.0, 24.0]]), torch.tensor([0])
    read = [detector(roi_aligned=aligned).features(clips(1), box, of) for aligned in (True, False)]
    torch.testing.assert_close(read[1] - read[0], torch.full((1, 1), 0.5))


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["sincos_1d", "sincos_3d"])
def test_clips_of_another_shape_have_interpolated_positions(scheme: str) -> None:
    """Grid 4 x 8 x 9 in the model of 4 x 8 x 6: as in a model of that grid, pretrained on this."""
    torch.manual_seed(0)
    model = detector(replace(ENCODER, positions=scheme)).eval()
    whole = torch.randint(256, (1, 8, 32, 72, 3), dtype=torch.uint8)
    geometry = Geometry.whole((8, 32, 72), PATCH)
    spec = EncoderSpec(geometry, SIZES["tiny"], scheme, pretrained_grid=ENCODER.geometry.grid)
    other = detector(spec).eval()
    other.load_state_dict(model.state_dict())
    read = [own.features(whole, BOXES[:2], torch.zeros(2)) for own in (model, other)]
    torch.testing.assert_close(*read)
