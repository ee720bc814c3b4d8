"""Frame mAP: the ends of its scale, an example by hand, and the official rules one by one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arvideo_ds.data.keyframes import Keyframe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.detection import AVA_ACTIONS, read_actions
from arvideo_ds.evaluation.detection_map import (
    MOST_ROWS,
    ActionRows,
    average_precision,
    match_rows,
    mean_average_precision,
)

EVALUATED = read_actions(AVA_ACTIONS)
Table = dict[Keyframe, ActionRows]
SIT, STAND, CRAWL = 11, 12, 2  # the last is not evaluated
BOX, SHIFTED, OTHER = (0.0, 0.0, 0.4, 0.4), (0.2, 0.0, 0.6, 0.4), (0.5, 0.5, 0.9, 0.9)


def rows(*listed: tuple[tuple[float, ...], int, float]) -> ActionRows:
    """Rows of (box, action, score)."""
    boxes, actions, scores = zip(*listed, strict=True)
    return ActionRows(np.array(boxes), np.array(actions), np.array(scores, dtype=float))


def random_table(seed: int, keyframes: int = 12, most: int = 6) -> Table:
    generator = np.random.default_rng(seed)
    table = {}
    for second in range(keyframes):
        count = int(generator.integers(1, most))
        corners = generator.uniform(0, 0.5, (count, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(0.2, 0.5, (count, 2))], 1)
        actions = generator.choice([SIT, STAND, 80, CRAWL], count)
        table["film", 902 + second] = ActionRows(boxes.round(3), actions, np.ones(count))
    return table


def shaken(truth: Table, seed: int, by: float) -> Table:
    """Every box three times, moved by up to `by`, with random scores and some wrong actions."""
    generator = np.random.default_rng(seed)
    found = {}
    for keyframe, own in truth.items():
        boxes = np.repeat(own.boxes, 3, axis=0)
        boxes = boxes + generator.uniform(-by, by, boxes.shape)
        actions = np.repeat(own.actions, 3)
        actions = np.where(generator.random(len(actions)) < 0.2, SIT, actions)
        found[keyframe] = ActionRows(boxes, actions, generator.random(len(boxes)).round(2))
    return found


def precisions_of(
    truth: Table, found: Table, *, most_rows: int | None = MOST_ROWS, **options: Any
) -> dict[int, float]:
    return match_rows(truth, found, EVALUATED, **options).average_precisions(most_rows)


def mean_ap(truth: Table, found: Table, **options: Any) -> float:
    return mean_average_precision(precisions_of(truth, found, **options))


def test_ground_truth_as_detections_is_perfect() -> None:
    truth = random_table(0)
    assert mean_ap(truth, truth) == 1.0


def test_boxes_moved_below_half_of_the_union_are_all_wrong() -> None:
    def table(box: tuple[float, ...]) -> Table:
        return {("film", second): rows((box, SIT, 1.0)) for second in range(902, 910)}

    assert mean_ap(table(BOX), table(SHIFTED)) == 0.0  # IoU 1/3
    truth = random_table(1)
    away = {k: ActionRows(r.boxes + 2, r.actions, r.scores) for k, r in truth.items()}
    assert mean_ap(truth, away) == 0.0


def test_half_of_the_union_is_enough() -> None:
    truth = {("film", 902): rows(((0.0, 0.0, 0.5, 0.5), SIT, 1.0))}
    assert mean_ap(truth, {("film", 902): rows(((0.0, 0.0, 0.5, 0.25), SIT, 1.0))}) == 1.0


def test_an_example_by_hand() -> None:
    """Sit: three boxes, of which two are found, at places 1 and 3 of four; stand: found second.

    Sit: precision 1, 1/2, 2/3, 2/4 over recall 1/3, 1/3, 2/3, 2/3; area 1/3 x 1 + 1/3 x 2/3 = 5/9.
    Stand: precision 0, 1/2; area 1/2. Crawl does not count. Mean 19/36.
    """
    first, second = ("film-a", 902), ("film-b", 902)
    truth = {
        first: rows((BOX, SIT, 1.0), (OTHER, SIT, 1.0), (OTHER, STAND, 1.0)),
        second: rows((BOX, SIT, 1.0), (BOX, CRAWL, 1.0)),
    }
    found = {
        first: rows((BOX, SIT, 0.9), (BOX, SIT, 0.8), (OTHER, STAND, 0.3), (BOX, STAND, 0.6)),
        second: rows((BOX, SIT, 0.7), (OTHER, SIT, 0.1), (OTHER, CRAWL, 1.0)),
    }
    precisions = precisions_of(truth, found)
    assert precisions[SIT] == pytest.approx(5 / 9)
    assert precisions[STAND] == pytest.approx(1 / 2)
    assert mean_average_precision(precisions) == pytest.approx(19 / 36)
    assert [a for a, value in precisions.items() if not math.isnan(value)] == [SIT, STAND]


def test_a_detection_whose_best_box_is_taken_does_not_get_the_second_best() -> None:
    """COCO's measure would give it the other box: this is why its libraries are not used."""
    near = (0.05, 0.0, 0.45, 0.4)
    truth = {("film", 902): rows((BOX, SIT, 1.0), (near, SIT, 1.0))}
    found = {("film", 902): rows((BOX, SIT, 0.9), (BOX, SIT, 0.8))}
    assert mean_ap(truth, found) == pytest.approx(1 / 2)


def official(truth: Table, found: Table, action: int) -> float:
    """The official rules written down as loops."""
    labels: list[tuple[float, bool]] = []
    for keyframe, own in found.items():
        real = [b for b, a in zip(*_columns(truth.get(keyframe)), strict=True) if a == action]
        taken: set[int] = set()
        listed = [i for i in np.argsort(-own.scores, kind="stable") if own.actions[i] == action]
        for i in listed:
            overlaps = [overlap(own.boxes[i], box) for box in real]
            best = int(np.argmax(overlaps)) if overlaps else -1
            is_right = best >= 0 and overlaps[best] >= 0.5 and best not in taken
            taken |= {best} if is_right else set()
            labels.append((float(own.scores[i]), is_right))
    count = sum(int((r.actions == action).sum()) for r in truth.values())
    labels.sort(key=lambda label: -label[0])
    curve = [(0.0, 0.0)]
    for place in range(1, len(labels) + 1):
        hits = sum(is_right for _, is_right in labels[:place])
        curve.append((hits / count, hits / place))
    return sum(
        (recall - before) * max(p for r, p in curve if r >= recall)
        for (before, _), (recall, _) in itertools.pairwise(curve)
        if recall > before
    )


def _columns(own: ActionRows | None) -> tuple[list[np.ndarray], list[int]]:
    return ([], []) if own is None else (list(own.boxes), own.actions.tolist())


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - shared)


@pytest.mark.parametrize("seed", range(8))
def test_it_equals_the_rules_written_down_as_loops(seed: int) -> None:
    truth = random_table(seed)
    found = shaken(truth, seed, 0.08)
    found["film", 1700] = rows((BOX, SIT, 0.5))  # nobody is there
    precisions = precisions_of(truth, found, most_rows=None)
    for action in (SIT, STAND, 80):
        assert precisions[action] == pytest.approx(official(truth, found, action))
    assert 0 < mean_average_precision(precisions) < 1


def test_the_order_of_keyframes_and_rows_does_not_matter() -> None:
    truth = random_table(3)
    found = shaken(truth, 3, 0.1)
    for number, own in enumerate(found.values()):  # no two scores alike
        own.scores[:] += np.arange(len(own.scores)) * 1e-4 + number * 1e-6
    turned = {k: found[k].pick(np.arange(len(found[k].scores))[::-1]) for k in reversed(found)}
    assert mean_ap(truth, found) == pytest.approx(mean_ap(truth, turned))


def test_excluded_keyframes_count_neither_as_found_nor_as_missed() -> None:
    truth = {("film", s): rows((BOX, SIT, 1.0)) for s in (902, 903)}
    found = {("film", 902): rows((BOX, SIT, 0.5)), ("film", 903): rows((OTHER, SIT, 0.9))}
    assert mean_ap(truth, found) == pytest.approx(1 / 4)
    assert mean_ap(truth, found, excluded={("film", 903)}) == 1.0


def test_a_keyframe_counts_with_its_fifty_best_rows() -> None:
    truth = {("film", 902): rows((BOX, SIT, 1.0))}
    listed = [(OTHER, STAND, 0.9)] * 50
    assert mean_ap(truth, {("film", 902): rows(*listed, (BOX, SIT, 0.8))}) == 0.0
    assert mean_ap(truth, {("film", 902): rows(*listed[1:], (BOX, SIT, 0.8))}) == 1.0
    # Rows of classes that are not evaluated take no place.
    crawling = [(OTHER, CRAWL, 0.9)] * 50
    assert mean_ap(truth, {("film", 902): rows(*crawling, (BOX, SIT, 0.8))}) == 1.0


def test_the_cap_costs_what_stands_behind_fifty_better_rows_and_both_numbers_come_of_one_pass() -> (
    None
):
    """By hand. Film a: 50 wrong rows of stand, better than its right row of sit; film b: sit found.

    Sit has two boxes: all rows find both, AP 1; with the cap one, AP 1/2. Stand: one box, in b,
    behind the 50 wrong rows of a: AP 1/51 either way. Means 52/102 and 53/204.
    """
    one, other = ("film-a", 902), ("film-b", 902)
    truth = {one: rows((BOX, SIT, 1.0)), other: rows((BOX, SIT, 1.0), (BOX, STAND, 1.0))}
    wrong = [(OTHER, STAND, 0.9)] * 50
    found = {
        one: rows(*wrong, (BOX, SIT, 0.8)),
        other: rows((BOX, SIT, 0.7), (BOX, STAND, 0.1)),
    }
    held = match_rows(truth, found, EVALUATED)
    capped, uncapped = held.average_precisions(50), held.average_precisions()
    assert (capped[SIT], uncapped[SIT]) == pytest.approx((1 / 2, 1))
    assert (capped[STAND], uncapped[STAND]) == pytest.approx((1 / 51, 1 / 51))
    assert mean_average_precision(uncapped) == pytest.approx(52 / 102)
    assert mean_average_precision(capped) == pytest.approx(53 / 204)


@pytest.mark.parametrize("seed", range(3))
def test_a_cap_is_as_if_only_the_best_rows_had_been_given(seed: int) -> None:
    truth = random_table(seed)
    found = shaken(truth, seed, 0.08)
    evaluated = {k: own.pick(np.isin(own.actions, list(EVALUATED))) for k, own in found.items()}
    best = {k: own.pick(np.argsort(-own.scores, kind="stable")[:4]) for k, own in evaluated.items()}
    capped = precisions_of(truth, found, most_rows=4)
    assert capped == pytest.approx(precisions_of(truth, best, most_rows=None), nan_ok=True)


def test_boxes_without_an_area_are_no_detections() -> None:
    truth = {("film", 902): rows((BOX, SIT, 1.0))}
    empty = (0.3, 0.3, 0.3, 0.4)
    assert mean_ap(truth, {("film", 902): rows((empty, SIT, 0.9), (BOX, SIT, 0.8))}) == 1.0


def test_nothing_found_is_zero_and_nothing_to_find_is_no_number() -> None:
    truth = random_table(4)
    assert mean_ap(truth, {}) == 0.0
    assert math.isnan(mean_ap({}, truth))
    assert math.isnan(average_precision(np.zeros(0), np.zeros(0, dtype=bool), 0))


def test_the_60_actions_are_those_of_the_genuine_list(real_videos: Path) -> None:
    path = real_videos / "annotations" / "ava" / "ava_action_list_v2.1_for_activitynet_2018.pbtxt"
    assert read_actions(path) == EVALUATED
    assert len(EVALUATED) == 60


def test_an_action_list_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.pbtxt"
    path.write_text('label {\n  name: "left"\n  label_id: 1\n}\nitem {\n  name: "up"\n  id: 3\n}\n')
    assert read_actions(path) == {1: "left", 3: "up"}
    for text in ("", 'item { name: "left" }', 'item { name: "a" id: 1 } item { name: "b" id: 1 }'):
        path.write_text(text)
        with pytest.raises(UserError, match="the action list"):
            read_actions(path)
    with pytest.raises(UserError, match="cannot read"):
        read_actions(tmp_path / "none.pbtxt")
