"""Keyframes to batches with boxes: the data of action detection.

Order, workers and lost workers are those of clips.py and loader.py; a position is the clip around a
keyframe, with the boxes that its crop shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.boxes import extended, is_there, jittered, to_clip, visible
from arvideo_ds.data.clips import NO_LABEL, EvaluationClips, TrainClips, VideoClips
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
from arvideo_ds.decoding.decoders import DecodeError
from arvideo_ds.shards.manifest import IndexedSample, ShardSet


@dataclass(frozen=True)
class ClipBoxes:
    """Boxes of one clip: boxes n 4 in its pixels (x1 y1 x2 y2), targets n A (bool), in_frame n 4 as
    shares of the whole frame, and scores n of the person detector (both float64)."""

    boxes: Tensor
    targets: Tensor
    in_frame: Tensor
    scores: Tensor


Views = tuple[list[Tensor], list[ClipBoxes]]


@dataclass(frozen=True)
class KeyframeClips(VideoClips):
    """Clips of one keyframe and the boxes of each; none where the video did not decode."""

    keyframe: Keyframe = ("", 0)
    boxes: list[ClipBoxes] = field(default_factory=list)


@dataclass(kw_only=True)
class DetectionBatch(Batch):
    """A `Batch` with the R boxes of all its clips.

    boxes: R 4, pixels of the clip (float32). clip_of: R, the clip's index in the batch (int64).
    targets: R A (bool). in_frame: R 4, shares of the frame, and person_scores: R, scores of the
    person detector (float64; both stay on the host). keyframes: film and second of each clip.
    """

    on_host: ClassVar[tuple[str, ...]] = ("in_frame", "person_scores")

    boxes: Tensor
    clip_of: Tensor
    targets: Tensor
    in_frame: Tensor
    person_scores: Tensor
    keyframes: list[Keyframe]


class TrainKeyframes(TrainClips):
    """Run position -> clips around a keyframe and their boxes, cropped and flipped alike.
    recipe.detect decides on annotated and detected boxes, on those outside the crop, and on jitter.
    All draws are functions of the position."""

    def __init__(self, shards: ShardSet, recipe: DetectRecipe, **options: Any) -> None:
        super().__init__(shards, recipe, **options)
        self.boxes, self.settings = training_boxes(shards, recipe), recipe.detect

    def _decoded(self, place: Place, sample: IndexedSample, keys: list[int]) -> KeyframeClips:
        known, data = self.boxes(place.shard, place.member), self.data
        stride = self.stride(place.shard, sample)
        numbers = keyframe_frames(sample.num_frames, data.frames, stride, known.frame)
        frames = self.frames(place.shard, sample, numbers)
        clips, boxes = [], []
        for repeat in range(data.repeats):
            clip, crop, flip, generator = self._cropped(frames, place, repeat)
            moved = to_clip(known.boxes, frames.shape[1:3], crop, data.size, flip=flip)
            inside, _ = visible(moved, data.size)
            which = is_there(inside)
            if self.settings.outside == "kept":
                which = torch.ones_like(which)
            if any(self.settings.jitter):
                inside = jittered(inside, data.size, self.settings.jitter, generator)
            clips.append(clip)
            boxes.append(_clip_boxes(known, inside, which))
        return KeyframeClips(clips, keys, NO_LABEL, None, known.keyframe, boxes)

    def _black(self, sample: IndexedSample, keys: list[int], error: DecodeError) -> KeyframeClips:
        return _without_boxes(super()._black(sample, keys, error), self.boxes.nothing())


class EvaluationKeyframes(EvaluationClips):
    """Sample number -> clips of one keyframe as `evaluation` says, every keyframe once. Crops along
    its longer side, where each box belongs to the (first) crop that shows most of it, so it is
    judged once; or the whole frame. Boxes are extended; `in_frame` is not."""

    def __init__(self, shards: ShardSet, recipe: DetectRecipe, boxes: BoxSource) -> None:
        super().__init__(shards, recipe)
        self.boxes, self.settings = boxes, recipe.evaluation

    def keyframe(self, number: int) -> tuple[KeyframeBoxes, np.ndarray]:
        """Boxes of a keyframe and its picture H W 3. Errors: `DecodeError`."""
        shard, member = self.places[number]
        sample, known = self.shards.index(shard).samples[member], self.boxes(shard, member)
        return known, self.frames(shard, sample, np.array([known.frame]))[0]

    def __getitem__(self, number: int) -> KeyframeClips:
        shard, member = self.places[number]
        sample, known = self.shards.index(shard).samples[member], self.boxes(shard, member)
        data, keys = self.data, [number] * self.settings.crops
        try:
            stride = self.stride(shard, sample)
            numbers = keyframe_frames(sample.num_frames, data.frames, stride, known.frame)
            frames = self.frames(shard, sample, numbers)
        except DecodeError as error:
            return _without_boxes(self._black(sample, keys, error), known)
        short_side = self.settings.short_side
        if short_side is None:
            clips, boxes = self._crops(frames, known)
        else:
            clips, boxes = self._whole(frames, known, short_side)
        return KeyframeClips(clips, keys, NO_LABEL, None, known.keyframe, boxes)

    def _whole(self, frames: np.ndarray, known: KeyframeBoxes, short_side: int) -> Views:
        height, width = frame = frames.shape[1:3]
        everything = Crop(0, 0, height, width)
        size, missing = whole_frame(height, width, short_side, self.patch[1:])
        clip = fill_up(cut(frames, everything, size, flip=False), missing)
        boxes = to_clip(known.boxes, frame, everything, size, flip=False)
        inside = extended(boxes, size, self.settings.extend)
        return [clip], [_clip_boxes(known, inside, torch.ones(len(boxes), dtype=torch.bool))]

    def _crops(self, frames: np.ndarray, known: KeyframeBoxes) -> Views:
        (height, width), size, views = frames.shape[1:3], self.data.size, self.settings.views
        crops = [view_crop(height, width, size, view, views) for view in range(views)]
        clips = [cut(frames, crop, size, flip=False) for crop in crops]
        moved = [to_clip(known.boxes, (height, width), crop, size, flip=False) for crop in crops]
        shares = torch.stack([visible(boxes, size)[1] for boxes in moved])
        best, by = shares.argmax(dim=0), self.settings.extend
        grown = [extended(boxes, size, by) for boxes in moved]
        return clips, [_clip_boxes(known, boxes, best == v) for v, boxes in enumerate(grown)]


def training_boxes(shards: ShardSet, recipe: DetectRecipe) -> BoxSource:
    """The boxes to train on: annotated ones and, if there is a file of them, detected ones. Errors:
    `UserError` for files that are missing, wrong or of other shards."""
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


def collate_keyframes(videos: list[KeyframeClips], memory: Tensor | None = None) -> DetectionBatch:
    """Clips of several keyframes as one batch; the clips of a keyframe stay together. memory: as in
    `collate`."""
    batch = collate(list(videos), memory)
    boxes = [own for video in videos for own in video.boxes]
    counts = torch.tensor([len(own.boxes) for own in boxes], dtype=torch.int64)
    return DetectionBatch(
        **vars(batch),
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


def _without_boxes(black: VideoClips, known: KeyframeBoxes) -> KeyframeClips:
    none = torch.zeros(len(known.boxes), dtype=torch.bool)
    boxes = [_clip_boxes(known, torch.zeros(len(known.boxes), 4), none)] * len(black.keys)
    return KeyframeClips(black.clips, black.keys, NO_LABEL, black.skipped, known.keyframe, boxes)
