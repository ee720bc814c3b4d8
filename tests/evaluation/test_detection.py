"""Evaluation of a detector from shards to mAP: every keyframe once, every omission reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.detection import DetectionBatch
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.detection import (
    DetectionEvaluator,
    Detections,
    ScoredBoxes,
    as_json,
    write_official_csv,
)
from arvideo_ds.evaluation.detection_pictures import draw_detections, pick_keyframes
from arvideo_ds.models.detector import Detector
from arvideo_ds.shards.manifest import ShardSet
from tests.ava_set import AvaSet

MakeRecipe = Callable[..., DetectRecipe]
CPU = torch.device("cpu")


def right(batch: DetectionBatch) -> Tensor:
    """Logits of a detector that knows."""
    return 20.0 * batch.targets - 10


def evaluator_of(recipe: DetectRecipe) -> DetectionEvaluator:
    return DetectionEvaluator(ShardSet(str(recipe.evaluation.shards)), recipe)


def found_by(
    evaluator: DetectionEvaluator, predict: Callable[[DetectionBatch], Tensor] = right
) -> Detections:
    return evaluator.detect(predict, num_workers=0, device=CPU)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("detected", [False, True])
def test_a_detector_that_knows_is_perfect(
    views: int, batch: int, detected: bool, ava_recipe: MakeRecipe
) -> None:
    options = {} if detected else {"detections": None}
    evaluator = evaluator_of(ava_recipe(evaluation={"views": views, "batch": batch, **options}))
    found = found_by(evaluator)
    report = evaluator.report(found)
    assert report.mean == 1.0
    assert (report.classes, report.keyframes, report.boxes, report.notes()) == (3, 16, 16, [])
    said = as_json(evaluator, report)
    assert said["map"] == said["map_uncapped"] == 100.0
    assert said["boxes_of"].startswith("detected" if detected else "ground truth")
    assert set(said["average_precision"]) == {"red", "blue", "down"}
    json.dumps(said, allow_nan=False)


def test_a_detector_that_is_always_wrong_is_worse_than_one_that_guesses(
    ava_recipe: MakeRecipe,
) -> None:
    evaluator = evaluator_of(ava_recipe())
    wrong = evaluator.report(found_by(evaluator, lambda batch: -right(batch))).mean
    guessed = evaluator.report(
        found_by(evaluator, lambda batch: torch.zeros(len(batch.boxes), 3))
    ).mean
    assert wrong < guessed < 1


def test_boxes_that_miss_find_nothing(ava_recipe: MakeRecipe) -> None:
    evaluator = evaluator_of(ava_recipe())
    found = found_by(evaluator)
    aside = {k: ScoredBoxes(own.boxes + 0.5, own.scores) for k, own in found.by_keyframe.items()}
    assert evaluator.report(Detections(aside, [])).mean == 0.0


def test_what_is_not_there_counts_as_missed_and_is_said(
    ava: AvaSet, ava_recipe: MakeRecipe, tmp_path: Path
) -> None:
    persons = tmp_path / "persons.csv"
    persons.write_text(ava.detections.read_text() + "elsewhere,0999,0.1,0.1,0.5,0.5,0.9\n")
    recipe = ava_recipe(evaluation={"detections": str(persons)})
    evaluator = evaluator_of(recipe)
    found = found_by(evaluator)
    gone = sorted(found.by_keyframe)[0]
    kept = {keyframe: own for keyframe, own in found.by_keyframe.items() if keyframe != gone}
    report = evaluator.report(Detections(kept, []))
    assert report.mean < 1
    # Its boxes count as missed, and its detections are lost as well.
    assert (report.missed, report.unscored) == (1, 2)
    assert [note.split()[0] for note in report.notes()] == ["1", "2"]
    excluded = tmp_path / "excluded.csv"
    excluded.write_text(f"{gone[0]},{gone[1]:04d}\n")
    evaluator = evaluator_of(ava_recipe(evaluation={"excluded": str(excluded)}))
    report = evaluator.report(Detections(kept, []))
    assert (report.mean, report.missed, report.notes()) == (1.0, 0, [])


def test_videos_that_do_not_decode_count_as_missed(
    ava_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arvideo_ds.data.detection import EvaluationKeyframes
    from arvideo_ds.decoding.decoders import DecodeError

    evaluator = evaluator_of(ava_recipe())
    bad = evaluator.shards.index(0).samples[2].key

    def frames(*arguments: object) -> np.ndarray:
        if arguments[2].key == bad:  # type: ignore[attr-defined]
            raise DecodeError("broken", "it is")
        return real(*arguments)  # type: ignore[arg-type]

    real = EvaluationKeyframes.frames
    monkeypatch.setattr(EvaluationKeyframes, "frames", frames)
    found = found_by(evaluator)
    report = evaluator.report(found)
    assert (report.keyframes, report.unreadable, report.missed) == (15, 1, 1)
    assert [skipped.key for skipped in found.skipped] == [bad]
    assert report.mean < 1
    pictured = pick_keyframes(evaluator, found, 99)
    assert len(pictured) == 15


def test_the_rows_for_the_official_script_are_what_was_judged(
    ava_recipe: MakeRecipe, tmp_path: Path
) -> None:
    evaluator = evaluator_of(ava_recipe())
    found = found_by(evaluator)
    write_official_csv(tmp_path / "found.csv", found, evaluator.actions)
    rows = [line.split(",") for line in (tmp_path / "found.csv").read_text().splitlines()]
    assert len(rows) == 16 * 3
    for film, second, left, top, right_, bottom, action, score in rows:
        own = found.by_keyframe[film, int(second)]
        sides = [float(side) for side in (left, top, right_, bottom)]
        np.testing.assert_allclose(own.boxes[0], sides, atol=1e-4)
        assert float(score) == pytest.approx(own.scores[0, int(action) - 1], abs=1e-6)


def test_a_picture_shows_found_and_true_boxes_with_their_actions(ava_recipe: MakeRecipe) -> None:
    evaluator = evaluator_of(ava_recipe())
    pictured = pick_keyframes(evaluator, found_by(evaluator), 4)
    figure = draw_detections(pictured, evaluator.actions)
    for axis, own in zip(figure.axes, pictured, strict=False):
        found_box, true_box = sorted(axis.patches, key=lambda patch: patch.get_linestyle())
        width, height = 80, 48
        left, top, right_, bottom = own.detected.boxes[0] * (width, height, width, height)
        edges = [box.get_bbox().extents for box in (found_box, true_box)]  # type: ignore
        assert any(np.allclose(edge, (left, top, right_, bottom)) for edge in edges)
        assert own.truth is not None
        names = {evaluator.actions[action] for action in own.truth.actions.tolist()}
        texts = [text.get_text() for text in axis.texts]
        assert set(texts[0].split("\n")) == names
        assert {line.rsplit(" ", 1)[0] for line in texts[1].split("\n")[: len(names)]} == names
    assert draw_detections([], evaluator.actions) is not None


def test_an_action_list_of_other_actions_is_refused(ava_recipe: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"AVA evaluates action 80, above detect\.num_actions=3"):
        evaluator_of(ava_recipe(evaluation={"action_list": None}))


def test_the_report_has_both_numbers_and_only_the_capped_one_loses_what_the_cap_hides(
    ava_recipe: MakeRecipe,
) -> None:
    """51 wrong boxes are above the right one in every keyframe; `map` is the capped number."""
    evaluator = evaluator_of(ava_recipe())

    def crowded(own: ScoredBoxes) -> ScoredBoxes:
        boxes = np.concatenate([np.tile([[0.0, 0.0, 0.01, 0.01]], (51, 1)), own.boxes])
        scores = np.concatenate([np.full((51, 3), 0.9999), np.minimum(own.scores, 0.5)])
        return ScoredBoxes(boxes, scores)

    found = Detections({k: crowded(own) for k, own in found_by(evaluator).by_keyframe.items()}, [])
    report = evaluator.report(found)
    assert report.mean == 0.0
    assert 0 < report.mean_uncapped < 1
    said = as_json(evaluator, report)
    assert (said["map"], said["most_rows_of_map"]) == (0.0, 50)
    assert said["map_uncapped"] == pytest.approx(100 * report.mean_uncapped)
    assert said["average_precision_uncapped"].keys() == said["average_precision"].keys()


def test_a_score_is_the_actions_probability_times_that_of_the_person_where_asked(
    ava_recipe: MakeRecipe,
) -> None:
    """Every person in the set has 0.95; boxes of the annotations count as certain."""
    plain = found_by(evaluator_of(ava_recipe()))
    product = found_by(evaluator_of(ava_recipe(evaluation={"person_score": True})))
    for keyframe, own in plain.by_keyframe.items():
        np.testing.assert_allclose(
            product.by_keyframe[keyframe].scores, 0.95 * own.scores, rtol=1e-6
        )
    certain = {"person_score": True, "detections": None}
    for own in found_by(evaluator_of(ava_recipe(evaluation=certain))).by_keyframe.values():
        np.testing.assert_allclose(own.scores.max(), plain.by_keyframe[keyframe].scores.max())


def test_whole_frames_are_judged_too_whatever_the_batch(ava_recipe: MakeRecipe) -> None:
    evaluator = evaluator_of(
        ava_recipe(evaluation={"short_side": 32, "batch": 8, "extend": [0.1, 0.05]})
    )
    found = found_by(evaluator)
    report = evaluator.report(found)
    assert (report.mean, report.keyframes, report.boxes) == (1.0, 16, 16)
    # Extended boxes are what the model reads, not what is judged.
    plain = found_by(evaluator_of(ava_recipe()))
    for keyframe, own in plain.by_keyframe.items():
        np.testing.assert_array_equal(found.by_keyframe[keyframe].boxes, own.boxes)


def test_a_real_model_takes_whole_frames(ava_recipe: MakeRecipe) -> None:
    recipe = ava_recipe(evaluation={"short_side": 40})
    model = Detector(recipe.encoder, recipe.detect).eval()

    @torch.no_grad()
    def predict(batch: DetectionBatch) -> Tensor:
        assert len(batch.clips) == 1
        return model(batch.clips, batch.boxes, batch.clip_of)

    found = found_by(evaluator_of(recipe), predict)
    assert len(found.by_keyframe) == 16
    assert all(np.isfinite(own.scores).all() for own in found.by_keyframe.values())
