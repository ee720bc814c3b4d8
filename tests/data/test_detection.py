"""Clips of keyframes: pixels, boxes and actions belong together, and each box is judged once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.detection import (
    DetectionBatch,
    EvaluationKeyframes,
    TrainKeyframes,
    collate_keyframes,
    training_boxes,
)
from arvideo_ds.data.loader import TrainLoader
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet
from tests.ava_set import BLUE, RED, AvaSet

MakeRecipe = Callable[..., DetectRecipe]


def colour_in(clip: Tensor, box: Tensor) -> int:
    """Which square fills the box in the keyframe: RED or BLUE; there is one."""
    left, top, right, bottom = (box + torch.tensor([1.5, 1.5, -1.5, -1.5])).round().int().tolist()
    red, _, blue = clip[len(clip) // 2, top:bottom, left:right].float().mean((0, 1)).tolist()
    assert max(red, blue) > 140, box
    assert min(red, blue) < 70, box
    return RED if red > blue else BLUE


@pytest.fixture
def clips(ava: AvaSet, ava_recipe: MakeRecipe) -> TrainKeyframes:
    return TrainKeyframes(ShardSet(ava.shards), ava_recipe())


def test_in_every_training_clip_the_square_lies_in_its_box(clips: TrainKeyframes) -> None:
    seen, judged = set(), 0
    for position in range(3 * clips.order.num_samples):
        made = clips[position]
        (clip,), (boxes,) = made.clips, made.boxes
        seen.add(made.keyframe)
        for box, targets in zip(boxes.boxes, boxes.targets, strict=True):
            if (box[2:] - box[:2]).min() > 6:  # not cut off by the crop
                judged += 1
                assert targets[colour_in(clip, box) - 1], (made.keyframe, box)
                assert targets[RED - 1] != targets[BLUE - 1]
    assert len(seen) == clips.order.num_samples
    assert judged > clips.order.num_samples


def test_a_position_is_the_same_clip_and_boxes_every_time(clips: TrainKeyframes) -> None:
    one, other = clips[5], clips[5]
    assert torch.equal(one.clips[0], other.clips[0])
    assert torch.equal(one.boxes[0].boxes, other.boxes[0].boxes)
    later = clips[5 + clips.order.num_samples * 2]
    assert one.keys != later.keys


def test_crops_of_one_decode_have_boxes_of_their_own(ava: AvaSet, ava_recipe: MakeRecipe) -> None:
    clips = TrainKeyframes(ShardSet(ava.shards), ava_recipe(data={"repeats": 2}))
    pairs = [clips[position].boxes for position in range(8)]
    assert all(len(pair) == 2 for pair in pairs)
    assert any(not torch.equal(one.boxes, other.boxes) for one, other in pairs)


def test_a_video_that_does_not_decode_has_no_boxes(ava: AvaSet, ava_recipe: MakeRecipe) -> None:
    shards = ShardSet(ava.shards)
    keys = [sample.key for sample in shards.index(0).samples]
    clips = TrainKeyframes(shards, ava_recipe(), left_out=dict.fromkeys(keys, "hang"))
    batch = collate_keyframes([clips[position] for position in range(4)])
    assert not batch.valid.any()
    assert (batch.num_skipped, batch.boxes.shape, batch.targets.shape) == (4, (0, 4), (0, 3))


def test_a_test_judges_every_box_once_in_the_crop_that_shows_most_of_it(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    recipe, shards = ava_recipe(), ShardSet(ava.shards)
    source = training_boxes(shards, recipe)
    clips = EvaluationKeyframes(shards, recipe, source)
    assert len(clips) == shards.num_samples
    views = []
    for number in range(len(clips)):
        made, known = clips[number], source(*clips.places[number])
        assert made.keys == [number] * 2
        judged = torch.cat([own.in_frame for own in made.boxes])
        assert sorted(judged.tolist()) == sorted(known.boxes.tolist())
        for view, (clip, own) in enumerate(zip(made.clips, made.boxes, strict=True)):
            for box, targets in zip(own.boxes, own.targets, strict=True):
                views.append(view)
                # 80 x 48: a square of 14 lies whole in the left or the right crop of 48.
                assert (box[2:] - box[:2]).min() > 6
                assert targets[colour_in(clip, box) - 1]
    assert {0, 1} <= set(views)


def test_a_batch_says_whose_each_box_is(clips: TrainKeyframes) -> None:
    made = [clips[position] for position in range(4)]
    batch = collate_keyframes(made)
    for place, own in enumerate(made):
        mine = batch.clip_of == place
        assert torch.equal(batch.boxes[mine], own.boxes[0].boxes)
        assert torch.equal(batch.targets[mine], own.boxes[0].targets)
        assert batch.keyframes[place] == own.keyframe
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, DetectionBatch)
    assert moved.keyframes == batch.keyframes
    assert moved.first_key == batch.first_key


def test_the_loader_deals_boxes_as_it_deals_clips(ava: AvaSet, ava_recipe: MakeRecipe) -> None:
    recipe, shards = ava_recipe(), ShardSet(ava.shards)
    plan = make_plan(recipe, world_size=1, num_videos=shards.num_samples)
    loaded = [
        list(
            TrainLoader(
                shards,
                recipe,
                plan,
                rank=0,
                first_step=0,
                num_workers=workers,
                pin_memory=False,
                clips=TrainKeyframes,
                together=collate_keyframes,
            )
        )
        for workers in (0, 2)
    ]
    assert len(loaded[0]) == plan.steps
    for alone, shared in zip(*loaded, strict=True):
        assert isinstance(shared, DetectionBatch)
        assert torch.equal(alone.clips, shared.clips)
        assert torch.equal(alone.boxes, shared.boxes)  # type: ignore[attr-defined]
    keyframes = [k for batch in loaded[0] for k in batch.keyframes]  # type: ignore[attr-defined]
    assert len(set(keyframes)) == shards.num_samples == 16


def test_the_picture_of_a_keyframe_is_the_frame_that_the_boxes_are_of(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    shards = ShardSet(ava.shards)
    recipe = ava_recipe(detect={"detections": None})
    clips = EvaluationKeyframes(shards, recipe, training_boxes(shards, recipe))
    known, picture = clips.keyframe(3)
    assert picture.shape == (48, 80, 3)
    box = torch.tensor(known.boxes[0] * np.array([80, 48, 80, 48]))
    assert known.targets[0, colour_in(torch.tensor(picture)[None], box) - 1]


def test_kept_boxes_outside_the_crop_are_lines_on_its_edge_and_dropped_ones_are_gone(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    shards = ShardSet(ava.shards)
    crop = {"crop": "short_side", "short_side": 64}  # a box of half the short side
    dropped = TrainKeyframes(shards, ava_recipe(data=crop))
    kept = TrainKeyframes(shards, ava_recipe(data=crop, detect={"outside": "kept"}))
    outside = 0
    for position in range(32):
        (few,), (all_,) = dropped[position].boxes, kept[position].boxes
        place, _ = kept.sample(position)
        assert len(all_.boxes) == len(kept.boxes(place.shard, place.member).boxes)
        narrow = (all_.boxes[:, 2:] - all_.boxes[:, :2]).amin(1) < 1
        torch.testing.assert_close(all_.boxes[~narrow], few.boxes)
        outside += int(narrow.sum())
    assert outside > 5


def test_jitter_moves_boxes_alone_by_the_position_and_they_stay_in_the_clip(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    shards = ShardSet(ava.shards)
    plain = TrainKeyframes(shards, ava_recipe(detect={"outside": "kept"}))
    jitter = {"outside": "kept", "jitter": [0.2, 0.1, 0.1, 0.05]}
    made = [TrainKeyframes(shards, ava_recipe(detect=jitter)) for _ in range(2)]
    moved = set()
    for position in range(32):
        still, (one, again) = plain[position], (own[position] for own in made)
        assert torch.equal(still.clips[0], one.clips[0])
        assert torch.equal(still.boxes[0].in_frame, one.boxes[0].in_frame)
        assert torch.equal(one.boxes[0].boxes, again.boxes[0].boxes)
        assert one.boxes[0].boxes.min() >= 0
        assert one.boxes[0].boxes.max() <= 32
        moved.add(float((one.boxes[0].boxes - still.boxes[0].boxes)[0, 0]))
    assert len(moved) > 20  # the same keyframe is moved otherwise in another epoch


def test_boxes_of_the_annotations_alone_are_trained_on_where_asked(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    recipe = ava_recipe(detect={"train_on": "annotated", "detections": None})
    boxes = training_boxes(ShardSet(ava.shards), recipe)
    assert all(boxes(0, member).scores.tolist() == [1.0] for member in range(16))
    with pytest.raises(UserError, match=r"train_on=annotated does not train on"):
        ava_recipe(detect={"train_on": "annotated"})


def test_whole_frames_keep_their_aspect_and_are_filled_up_to_whole_tokens(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    """80 x 48 with a short side of 40: 66 x 40, of tokens of 4 pixels: 68 x 40."""
    shards = ShardSet(ava.shards)
    recipe = ava_recipe(detect={"detections": None}, evaluation={"short_side": 40})
    assert recipe.patch[1:] == (4, 4)
    clips = EvaluationKeyframes(shards, recipe, training_boxes(shards, recipe))
    for number in range(len(clips)):
        made = clips[number]
        (clip,), (own,) = made.clips, made.boxes
        assert clip.shape == (8, 40, 68, 3)
        assert (clip[:, :, 66:] == torch.tensor([124, 116, 104])).all()
        sides = own.boxes / torch.tensor([66, 40, 66, 40])
        torch.testing.assert_close(sides.double(), own.in_frame, atol=1e-6, rtol=0)
        assert own.targets[0, colour_in(clip, own.boxes[0]) - 1]


def test_in_a_test_the_model_reads_extended_boxes(ava: AvaSet, ava_recipe: MakeRecipe) -> None:
    shards = ShardSet(ava.shards)
    for frames in ({"short_side": 40}, {"views": 1}):
        made = []
        for by in ([0.0, 0.0], [0.1, 0.05]):
            recipe = ava_recipe(evaluation={**frames, "extend": by})
            (boxes,) = EvaluationKeyframes(shards, recipe, training_boxes(shards, recipe))[3].boxes
            made.append(boxes)
        plain, grown = made
        torch.testing.assert_close(plain.in_frame, grown.in_frame)
        (wide, tall), (wider, taller) = (
            (own.boxes[:, 2:] - own.boxes[:, :2]).unbind(1) for own in (plain, grown)
        )
        torch.testing.assert_close(wider / wide, torch.full_like(wide, 1.1))
        torch.testing.assert_close(taller / tall, torch.full_like(tall, 1.05))
