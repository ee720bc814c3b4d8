"""Augmentation for fine-tuning: alike on all frames, drawn from its number, nothing global."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from arvideo_ds.config.schema import DataSettings
from arvideo_ds.data.augment import Augment, jitter_hsv, seeded
from arvideo_ds.data.transforms import random_resized_crop
from arvideo_ds.errors import UserError

RANDAUGMENT = "rand-m7-n4-mstd0.5-inc1"


def still(frames: int = 4, size: int = 32) -> Tensor:
    """A clip in which nothing moves."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator)
    return frame.expand(frames, -1, -1, -1).contiguous()


def augment(**settings: object) -> Augment:
    return Augment(DataSettings.model_validate({"size": 32, **settings}))


def test_randaugment_is_the_same_on_every_frame() -> None:
    changed = 0
    for number in range(20):
        clip = augment(randaugment=RANDAUGMENT)(still(), number)
        assert clip.shape == still().shape
        assert clip.dtype == torch.uint8
        assert (clip == clip[0]).all()
        changed += not torch.equal(clip, still())
    assert changed > 10


def test_a_number_decides_all_draws_and_others_differ() -> None:
    both = augment(randaugment=RANDAUGMENT, erase=1.0)
    clips = [both(still(), number) for number in (3, 3, 4)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_erasing_takes_one_box_out_of_all_frames() -> None:
    differs = (augment(erase=1.0)(still(), 5) != still()).any(-1)
    rows, columns = differs.any(0).any(1).nonzero(), differs.any(0).any(0).nonzero()
    box = differs[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert 0.02 * 32 * 32 <= box[0].numel() <= 0.4 * 32 * 32
    assert box.float().mean() > 0.97, "noise may hit the old value here and there"
    assert not torch.equal(differs[0] * 1, torch.zeros_like(differs[0]) * 1)


def test_erasing_happens_as_often_as_asked() -> None:
    erase = augment(erase=0.25)
    hits = sum(not torch.equal(erase(still(2, 16), number), still(2, 16)) for number in range(400))
    assert 70 <= hits <= 130


def test_nothing_asked_changes_nothing() -> None:
    assert torch.equal(augment()(still(), 1), still())


def test_global_generators_are_left_alone() -> None:
    before = random.getstate(), np.random.get_state()[1], torch.get_rng_state()
    augment(randaugment=RANDAUGMENT, erase=1.0)(still(), 5)
    with seeded(2**63 - 1):
        torch.rand(1)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("wrong", ["rand-m7-x4", "augmix-m3", "nonsense"])
def test_an_unknown_configuration_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"data\.randaugment"):
        augment(randaugment=wrong)


def test_random_resized_crops_lie_inside_and_vary_in_area_and_aspect() -> None:
    generator = np.random.default_rng(0)
    crops = [random_resized_crop(120, 160, (0.08, 1.0), generator) for _ in range(500)]
    areas = np.array([crop.height * crop.width / (120 * 160) for crop in crops])
    aspects = np.array([crop.width / crop.height for crop in crops])
    for crop in crops:
        assert 0 <= crop.top <= 120 - crop.height
        assert 0 <= crop.left <= 160 - crop.width
    assert areas.min() >= 0.07
    assert areas.min() < 0.15
    assert areas.max() > 0.8
    assert aspects.min() >= 0.72
    assert aspects.max() <= 1.4


def test_a_video_too_flat_for_any_crop_is_cropped_at_the_centre() -> None:
    crop = random_resized_crop(10, 400, (0.9, 1.0), np.random.default_rng(0))
    assert (crop.height, crop.width) == (10, 13)
    assert crop.left == (400 - 13) // 2


def test_colour_jitter_shifts_a_whole_clip_alike_by_its_number() -> None:
    jitter = augment(hsv_jitter=[20.0, 0.1, 0.1])
    clips = [jitter(still(), number) for number in range(6)]
    assert all((clip == clip[0]).all() and clip.dtype == torch.uint8 for clip in clips)
    assert torch.equal(jitter(still(), 3), clips[3])
    assert len({clip.sum().item() for clip in clips}) == 6


def test_colour_jitter_stays_within_the_asked_shifts() -> None:
    """A colour of hue 120, saturation and value 0.6, and its hue, saturation and value after."""
    colour = torch.tensor([61, 153, 61], dtype=torch.uint8).expand(1, 2, 2, 3).contiguous()
    seen = []
    for number in range(200):
        moved = jitter_hsv(colour, (20.0, 0.1, 0.1), np.random.default_rng(number))
        seen.append(colorsys.rgb_to_hsv(*(moved[0, 0, 0] / 255).tolist()))
    shifts = np.array(seen) * (360, 1, 1) - (120, 0.6, 0.6)
    assert (np.abs(shifts) <= np.array([22, 0.11, 0.11])).all()
    assert (shifts.min(0) < (-15, -0.08, -0.08)).all()
    assert (shifts.max(0) > (15, 0.08, 0.08)).all()
    # The three are drawn apart.
    assert np.abs(np.corrcoef(shifts.T) - np.eye(3)).max() < 0.25


def test_a_shift_of_nothing_changes_colours_by_rounding_alone() -> None:
    same = jitter_hsv(still(), (0.0, 0.0, 0.0), np.random.default_rng(0))
    assert (same.int() - still().int()).abs().max() <= 6  # 256 hues
    red = torch.tensor([255, 0, 10], dtype=torch.uint8).expand(1, 1, 1, 3).contiguous()
    around = [jitter_hsv(red, (20.0, 0.0, 0.0), np.random.default_rng(n)) for n in range(30)]
    assert min(int(clip[..., 0].min()) for clip in around) == 255  # hue is a circle
