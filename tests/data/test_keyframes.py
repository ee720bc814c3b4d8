"""Boxes of keyframes: those that samples refer to, those of a detector, and wrong files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data import keyframes
from arvideo_ds.data.detection import training_boxes
from arvideo_ds.data.keyframes import (
    BoxSource,
    Detected,
    read_annotations,
    read_detections,
    read_excluded,
)
from arvideo_ds.data.sampling import keyframe_frames
from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import IndexedSample, ShardSet
from arvideo_ds.shards.members import Facts, read_facts
from tests.ava_set import DOWN, AvaSet

MakeRecipe = Callable[..., DetectRecipe]
NAME, KEY = ("film", 902), "detect.detections"


def written(folder: Path, *rows: str) -> str:
    path = folder / "rows.csv"
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def test_the_clip_is_centred_on_the_keyframe_and_stays_in_the_video() -> None:
    assert keyframe_frames(90, 16, 4, 45).tolist() == list(range(13, 77, 4))
    for keyframe in range(0, 90, 7):
        frames = keyframe_frames(90, 16, 4, keyframe)
        assert frames[8] == keyframe
        assert frames.min() >= 0
        assert frames.max() < 90
        assert (np.diff(frames) >= 0).all()


def test_detected_boxes_are_read_with_and_without_the_column_of_actions(tmp_path: Path) -> None:
    plain = ("film,0902,0.1,0.2,0.3,0.4,0.91", "film,0902,0.5,0.2,0.9,0.4,0.95", "f,3,0,0,1,1,0.8")
    found = read_detections(written(tmp_path, *plain), KEY, 0.9)
    assert found.keys() == {NAME}
    assert found[NAME].boxes.tolist() == [[0.5, 0.2, 0.9, 0.4], [0.1, 0.2, 0.3, 0.4]]  # best first
    eight = ("film,0902,0.1,0.2,0.3,0.4,12,0.91", "film,0902,0.1,0.2,0.3,0.4,80,0.91")
    again = read_detections(written(tmp_path, *eight, "film,902,0.5,0.2,0.9,0.4,,0.95"), KEY, 0.9)
    assert again[NAME].boxes.tolist() == found[NAME].boxes.tolist()
    assert again[NAME].scores.tolist() == found[NAME].scores.tolist() == [0.95, 0.91]
    lower = read_detections(written(tmp_path, *plain), KEY, 0.8)["f", 3]
    assert (lower.boxes.tolist(), lower.scores.tolist()) == ([[0, 0, 1, 1]], [0.8])


def test_detected_boxes_end_with_the_frame(tmp_path: Path) -> None:
    found = read_detections(written(tmp_path, "film,0902,-0.1,0.2,0.3,1.01,0.9"), KEY, 0.9)
    assert found[NAME].boxes.tolist() == [[0, 0.2, 0.3, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("film,0902,0.1,0.2,0.3,0.4", "6 fields"),
        ("film,0902,0.1,0.2,0.3,0.4,12,0.9,1", "9 fields"),
        ("film,soon,0.1,0.2,0.3,0.4,0.9", "'soon'"),
        ("film,0902,0.1,0.2,0.3,much,0.9", "'much'"),
        ("film,0902,0.1,0.2,0.3,0.4,nan", "is not finite"),
        ("film,0902,0.3,0.2,0.1,0.4,0.9", "is empty"),
        ("film,0902,1.1,0.2,1.3,0.4,0.9", "is empty"),
    ],
)
def test_a_wrong_row_of_a_detector_is_named(row: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, "film,0902,0.1,0.2,0.3,0.4,0.9", row)
    with pytest.raises(UserError, match=rf"detect\.detections=.*line 2: .*{message}"):
        read_detections(path, KEY, 0.9)


def test_a_detector_without_a_sure_box_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no box with a score of"):
        read_detections(written(tmp_path, "film,0902,0.1,0.2,0.3,0.4,0.5"), KEY, 0.9)
    with pytest.raises(UserError, match="cannot read"):
        read_detections(str(tmp_path / "none.csv"), KEY, 0.9)


def test_genuine_annotations_are_read_by_line(real_videos: Path) -> None:
    path = real_videos / "annotations" / "ava" / "ava_val_v2.2_head.csv"
    read = read_annotations(str(path), "detect.annotations")
    for number, line in enumerate(path.read_text().splitlines()):
        film, second, *box, action, _person = line.split(",")
        assert read.boxes[number].tolist() == [float(side) for side in box]
        assert read.actions[number] == int(action)
        assert number in read.keyframes[film, int(second)]
    assert read.bad_rows == 0


def test_bad_rows_of_annotations_are_counted_and_empty_lines_are_none(tmp_path: Path) -> None:
    rows = ("film,0902,0.1,0.2,0.3,0.4,12,0", "", "broken", "film,0902,0.1,0.2,0.3,0.4,80,0")
    read = read_annotations(written(tmp_path, *rows), "x")
    assert read.bad_rows == 1
    assert read.actions.tolist() == [12, 0, 0, 80]
    with pytest.raises(UserError, match="has no row"):
        read_annotations(written(tmp_path, "broken"), "x")
    with pytest.raises(UserError, match=r"detect\.annotations is not given"):
        read_annotations(None, "detect.annotations")


def test_excluded_seconds_are_read_or_named(tmp_path: Path) -> None:
    assert read_excluded(None) == set()
    assert read_excluded(written(tmp_path, "film,0902", "film,1000")) == {NAME, ("film", 1000)}
    with pytest.raises(UserError, match="line 1"):
        read_excluded(written(tmp_path, "film"))


def source(ava: AvaSet, **options: object) -> BoxSource:
    arguments = {"detections": None, "truth": True, "num_actions": 3, **options}
    annotations = read_annotations(str(ava.annotations), "detect.annotations")
    return BoxSource(ShardSet(ava.shards), annotations, **arguments)  # type: ignore[arg-type]


def test_every_sample_has_the_boxes_and_actions_of_its_second(ava: AvaSet) -> None:
    shards, boxes = ShardSet(ava.shards), source(ava)
    expected: dict[tuple[str, int], set[tuple[object, ...]]] = {}
    for line in ava.annotations.read_text().splitlines():
        film, second, *box, action, _person = line.split(",")
        expected.setdefault((film, int(second)), set()).add((*map(float, box), int(action)))
    seen = {}
    for member in range(shards.manifest.shards[0].samples):
        known = boxes(0, member)
        seen[known.keyframe] = {
            (*box, int(action) + 1)
            for box, targets in zip(known.boxes.tolist(), known.targets, strict=True)
            for action in np.flatnonzero(targets)
        }
        assert known.frame == 8  # the middle of two seconds
    assert seen == expected


def test_detected_boxes_take_the_actions_of_what_they_overlap(
    ava: AvaSet, ava_recipe: MakeRecipe
) -> None:
    shards, plain = ShardSet(ava.shards), source(ava)
    both = training_boxes(shards, ava_recipe())
    for member in range(shards.num_samples):
        known, more = plain(0, member), both(0, member)
        assert len(more.boxes) == len(known.boxes) + 1  # the junk's score is too low
        assert (more.targets[-1] == known.targets[0]).all()
        assert more.scores.tolist() == [1.0] * len(known.boxes) + [0.95]
    junk = training_boxes(shards, ava_recipe(detect={"min_score": 0.2}))
    assert any(not junk(0, member).targets[-1].any() for member in range(shards.num_samples))
    strict = training_boxes(shards, ava_recipe(detect={"match_iou": 1.0}))
    assert not strict(0, 0).targets[-1].any()


def test_tests_see_detected_boxes_alone(ava: AvaSet) -> None:
    detections = read_detections(str(ava.detections), KEY, 0.8)
    known = source(ava, detections=detections, truth=False)(0, 0)
    np.testing.assert_array_equal(known.boxes, detections[known.keyframe].boxes)
    assert known.scores.tolist() == [0.95]
    elsewhere = {NAME: Detected(np.ones((1, 4)), np.ones(1))}
    nothing = source(ava, detections=elsewhere, truth=False)(0, 0)
    shapes = (nothing.boxes.shape, nothing.targets.shape, nothing.scores.shape)
    assert shapes == ((0, 4), (0, 3), (0,))


def test_shards_of_another_file_and_actions_beyond_the_last_are_refused(
    ava: AvaSet, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"has action {DOWN}, above detect.num_actions=2"):
        source(ava, num_actions=2)
    other = tmp_path / "other.csv"
    other.write_text(ava.annotations.read_text() + "film_train0,0990,0.1,0.1,0.2,0.2,1,0\n")
    with pytest.raises(UserError, match=r"was made from another ava_train\.csv"):
        BoxSource(
            ShardSet(ava.shards),
            read_annotations(str(other), "x"),
            detections=None,
            truth=True,
            num_actions=3,
        )


def test_shards_without_boxes_are_refused(ava: AvaSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_boxes(path: Path, samples: Sequence[IndexedSample]) -> list[Facts]:
        return [f.model_copy(update={"boxes": None}) for f in read_facts(path, samples)]

    monkeypatch.setattr(keyframes, "read_facts", without_boxes)
    with pytest.raises(UserError, match="has no boxes; detection needs shards of"):
        source(ava)
