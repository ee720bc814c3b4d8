"""Keyframes to batches with boxes: the loader's side of action detection.

The order, the workers and what happens to lost ones are those of clips.py and loader.py; only what
a position is differs: the clip around a keyframe, with the boxes that its crop shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.boxes import extended, is_there, jittered, to_clip, visible
from arvideo_ds.data.clips import (
    NO_LABEL,
    Skipped,
    TrainClips,
    VideoClips,
    black_clip,
    decoded,
    random_crop,
    require_protocol,
    unreachable,
)
from arvideo_ds.data.keyframes import (
    BoxSource,
    Keyframe,
    KeyframeBoxes,
    read_annotations,
    read_detections,
)
from arvideo_ds.data.loader import Batch, collate
from arvideo_ds.data.order import Place
from arvideo_ds.data.sampling import keyframe_frames
from arvideo_ds.data.transforms import Crop, cut, fill_up, view_crop, whole_frame
from arvideo_ds.decoding.decoders import DecodeError, choose_decoder
from arvideo_ds.randomness import clip_generator, draw_key
from arvideo_ds.shards.manifest import IndexedSample, ShardSet, UnreachableError


@dataclass(frozen=True)
class ClipBoxes:
    """Boxes of one clip: boxes n 4 in its pixels (x1 y1 x2 y2), targets n A (bool), as shares of
    the whole frame n 4 (float64), and scores n of the person detector (float64)."""

    boxes: Tensor
    targets: Tensor
    in_frame: Tensor
    scores: Tensor


@dataclass(frozen=True)
class KeyframeClips(VideoClips):
    """Clips of one keyframe and the boxes of each; none where the video did not decode."""

    keyframe: Keyframe = ("", 0)
    boxes: list[ClipBoxes] = field(default_factory=list)


@dataclass(kw_only=True)
class DetectionBatch(Batch):
    """A `Batch` with the boxes of its clips, all in one list of R.

    boxes: R 4, pixels of the clip (float32). clip_of: R, the clip's place in the batch (int64).
    targets: R A (bool). in_frame: R 4, shares of the frame, and person_scores: R, those of the
    boxes in the person detector's eyes (float64, both stay on the host).
    keyframes: of each clip, film and second.
    """

    boxes: Tensor
    clip_of: Tensor
    targets: Tensor
    in_frame: Tensor
    person_scores: Tensor
    keyframes: list[Keyframe]

    def _map(self, change: Any) -> DetectionBatch:
        names = ("clips", "keys", "labels", "valid", "boxes", "clip_of", "targets")
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})


class TrainKeyframes(TrainClips):
    """Run position -> clips around a keyframe and their boxes, cropped and flipped alike.

    Boxes of the annotations and detected ones, those that the crop does not show dropped or kept,
    and jittered: all as recipe.detect says. All draws are functions of the position.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: DetectRecipe,
        *,
        num_workers: int = 0,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(shards, recipe, num_workers=num_workers, left_out=left_out)
        self.boxes, self.settings = training_boxes(shards, recipe), recipe.detect

    def _clips(self, run_position: int) -> KeyframeClips:
        data, place = self.data, self.order.place(run_position)
        keys = [
            draw_key(self.seed, place.epoch, place.position, repeat)
            for repeat in range(data.repeats)
        ]
        try:
            sample, known = self._sample(place), self.boxes(place.shard, place.member)
        except UnreachableError as error:
            sample, known = self._unknown(place), self.boxes.nothing()
            return _undecoded(sample, known, keys, black_clip(data), unreachable(error))
        wanted = keyframe_frames(sample.num_frames, data.frames, data.stride, known.frame)
        try:
            if sample.key in self.left_out:
                raise DecodeError(self.left_out[sample.key], "left out: see an earlier start")
            frames = decoded(self.shards, self.decoder, place.shard, sample, wanted)
        except DecodeError as error:
            return _undecoded(sample, known, keys, black_clip(data), error)
        made = [self._cropped(frames, known, place, repeat) for repeat in range(data.repeats)]
        clips, boxes = zip(*made, strict=True)
        return KeyframeClips(list(clips), keys, NO_LABEL, None, known.keyframe, list(boxes))

    def _cropped(
        self, frames: np.ndarray, known: KeyframeBoxes, place: Place, repeat: int
    ) -> tuple[Tensor, ClipBoxes]:
        height, width = frames.shape[1:3]
        generator = clip_generator(self.seed, place.epoch, place.position, 1 + repeat)
        crop = random_crop(height, width, self.data, generator)
        flip = self.data.flip and bool(generator.integers(2))
        clip = cut(frames, crop, self.data.size, flip=flip)
        clip = self.augment(clip, int(generator.integers(2**63)))
        moved = to_clip(known.boxes, (height, width), crop, self.data.size, flip=flip)
        inside, _ = visible(moved, self.data.size)
        which = is_there(inside)
        if self.settings.outside == "kept":
            which = torch.ones_like(which)
        if any(self.settings.jitter):
            inside = jittered(inside, self.data.size, self.settings.jitter, generator)
        return clip, _clip_boxes(known, inside, which)


class EvaluationKeyframes(Dataset[KeyframeClips]):
    """Sample number -> clips of one keyframe as `evaluation` says, every keyframe once.

    Crops along its longer side, where each box belongs to the crop that shows most of it (the first
    of equals), so it is judged once; or the whole frame. Boxes are extended; `in_frame` stays.
    """

    def __init__(self, shards: ShardSet, recipe: DetectRecipe, boxes: BoxSource) -> None:
        require_protocol(shards, recipe)
        self.shards, self.data, self.boxes = shards, recipe.data, boxes
        self.settings, self.patch = recipe.evaluation, recipe.patch[1:]
        self.decoder = choose_decoder(recipe.data.decoder)
        self.places = [
            (number, member)
            for number, shard in enumerate(shards.manifest.shards)
            for member in range(shard.samples)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def keyframe(self, number: int) -> tuple[KeyframeBoxes, np.ndarray]:
        """What is known of a keyframe, and its picture H W 3. Errors: `DecodeError`."""
        shard, member = self.places[number]
        sample, known = self.shards.index(shard).samples[member], self.boxes(shard, member)
        wanted = np.array([known.frame])
        return known, decoded(self.shards, self.decoder, shard, sample, wanted)[0]

    def __getitem__(self, number: int) -> KeyframeClips:
        shard, member = self.places[number]
        sample, known = self.shards.index(shard).samples[member], self.boxes(shard, member)
        data, keys = self.data, [number] * self.settings.crops
        wanted = keyframe_frames(sample.num_frames, data.frames, data.stride, known.frame)
        try:
            frames = decoded(self.shards, self.decoder, shard, sample, wanted)
        except DecodeError as error:
            return _undecoded(sample, known, keys, black_clip(data), error)
        short_side = self.settings.short_side
        if short_side is not None:
            clips, boxes = self._whole(frames, known, short_side)
        else:
            clips, boxes = self._crops(frames, known)
        return KeyframeClips(clips, keys, NO_LABEL, None, known.keyframe, boxes)

    def _whole(
        self, frames: np.ndarray, known: KeyframeBoxes, short_side: int
    ) -> tuple[list[Tensor], list[ClipBoxes]]:
        height, width = frame = frames.shape[1:3]
        everything = Crop(0, 0, height, width)
        size, missing = whole_frame(height, width, short_side, self.patch)
        clip = fill_up(cut(frames, everything, size, flip=False), missing)
        boxes = to_clip(known.boxes, frame, everything, size, flip=False)
        inside = extended(boxes, size, self.settings.extend)
        return [clip], [_clip_boxes(known, inside, torch.ones(len(boxes), dtype=torch.bool))]

    def _crops(
        self, frames: np.ndarray, known: KeyframeBoxes
    ) -> tuple[list[Tensor], list[ClipBoxes]]:
        (height, width), size, views = frames.shape[1:3], self.data.size, self.settings.views
        crops = [view_crop(height, width, size, view, views) for view in range(views)]
        clips = [cut(frames, crop, size, flip=False) for crop in crops]
        moved = [to_clip(known.boxes, (height, width), crop, size, flip=False) for crop in crops]
        shares = torch.stack([visible(boxes, size)[1] for boxes in moved])
        best, by = shares.argmax(dim=0), self.settings.extend
        boxes = [
            _clip_boxes(known, extended(boxes, size, by), best == view)
            for view, boxes in enumerate(moved)
        ]
        return clips, boxes


def training_boxes(shards: ShardSet, recipe: DetectRecipe) -> BoxSource:
    """Boxes that are trained on: annotated ones, and detected ones where there is a file of them.

    Errors: `UserError` for files that are missing, wrong or of other shards.
    """
    settings = recipe.detect
    detections = None
    if settings.detections is not None:
        detections = read_detections(settings.detections, "detect.detections", settings.min_score)
    return BoxSource(
        shards,
        read_annotations(settings.annotations, "detect.annotations"),
        detections=detections,
        truth=True,
        num_actions=settings.num_actions,
        match_iou=settings.match_iou,
    )


def collate_keyframes(videos: list[KeyframeClips]) -> DetectionBatch:
    """Clips of several keyframes as one batch; the clips of a keyframe stay together."""
    batch = collate(list(videos))
    boxes = [own for video in videos for own in video.boxes]
    counts = torch.tensor([len(own.boxes) for own in boxes], dtype=torch.int64)
    return DetectionBatch(
        **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)},
        boxes=torch.cat([own.boxes for own in boxes]),
        clip_of=torch.arange(len(boxes)).repeat_interleave(counts),
        targets=torch.cat([own.targets for own in boxes]),
        in_frame=torch.cat([own.in_frame for own in boxes]),
        person_scores=torch.cat([own.scores for own in boxes]),
        keyframes=[video.keyframe for video in videos for _ in video.keys],
    )


def _clip_boxes(known: KeyframeBoxes, inside: Tensor, which: Tensor) -> ClipBoxes:
    return ClipBoxes(
        inside[which],
        torch.as_tensor(known.targets)[which],
        torch.as_tensor(known.boxes, dtype=torch.float64).reshape(-1, 4)[which],
        torch.as_tensor(known.scores, dtype=torch.float64)[which],
    )


def _undecoded(
    sample: IndexedSample, known: KeyframeBoxes, keys: list[int], black: Tensor, error: DecodeError
) -> KeyframeClips:
    none = torch.zeros(len(known.boxes), dtype=torch.bool)
    boxes = _clip_boxes(known, torch.zeros(len(known.boxes), 4), none)
    skipped = Skipped(sample.key, error.kind, error.message)
    count = len(keys)
    return KeyframeClips([black] * count, keys, NO_LABEL, skipped, known.keyframe, [boxes] * count)
