"""Probes: perfect on features that tell the classes, at chance on labels that mean nothing."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation.features import Features, change, course, mean, motion
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.evaluation.probes import DEFAULT_PROBES, probe_names
from arvideo_ds.evaluation.probing import linear_probe, nearest_neighbours
from arvideo_ds.runs import run_folder

CLASSES, WIDTH = 4, 16
SCRIPT = Path(__file__).parents[2] / "scripts" / "probe.py"
PLUGIN = '''
from arvideo_ds.evaluation.probes import POOLINGS, PROBES, Probe

@PROBES.register("majority")
class Majority(Probe):
    """The class that most training videos have."""

    label = "largest class"

    def accuracy(self, frozen):
        train, test = frozen.features
        return float((test.labels == train.labels.mode().values).float().mean())

@POOLINGS.register("first_token")
def first_token(tokens, times):
    """First token."""
    return tokens[:, 0]
'''
PROBES = [linear_probe, nearest_neighbours]
Probe = Callable[[Features, Features], float]


def clusters(count: int, seed: int, *, spread: float = 0.1) -> Features:
    """A cloud per class, far from zero and with columns of very different scale."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    values = centres[labels] + spread * torch.randn(count, WIDTH, generator=generator)
    return Features(values * torch.logspace(-1, 1, WIDTH) + 100, labels, skipped=0)


def noise(count: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Features(torch.randn(count, WIDTH, generator=generator), labels, skipped=0)


@pytest.mark.parametrize("probe", PROBES)
def test_classes_that_stand_apart_are_all_recognised(probe: Probe) -> None:
    assert probe(clusters(200, 1), clusters(100, 2)) == 1.0


@pytest.mark.parametrize("probe", PROBES)
def test_labels_that_mean_nothing_are_guessed(probe: Probe) -> None:
    # 2000 guesses of 1 in 4: five standard deviations are 0.05.
    assert probe(noise(1000, 1), noise(2000, 2)) == pytest.approx(1 / CLASSES, abs=0.05)


def test_the_linear_probe_finds_a_weak_direction_among_loud_ones() -> None:
    def weak(count: int, seed: int) -> Features:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(count, WIDTH, generator=generator)
        labels = (values[:, 0] > 0).long()
        return Features(values * torch.tensor([0.01] + [10.0] * (WIDTH - 1)), labels, skipped=0)

    assert linear_probe(weak(1000, 1), weak(1000, 2)) > 0.95


@pytest.mark.parametrize("probe", PROBES)
def test_the_number_is_the_same_every_time(probe: Probe) -> None:
    train, test = clusters(120, 1, spread=1.5), clusters(80, 2, spread=1.5)
    first = probe(train, test)
    torch.manual_seed(17)
    assert probe(train, test) == first
    assert 1 / CLASSES < first < 1


@pytest.mark.parametrize("probe", PROBES)
def test_few_clips_and_classes_that_only_the_test_has_count_as_wrong(probe: Probe) -> None:
    train = clusters(8, 1)
    test = clusters(40, 2)
    moved = Features(test.values, test.labels.where(test.labels != 0, CLASSES + 1), skipped=0)
    assert probe(train, moved) == pytest.approx(probe(train, test) - 0.25, abs=1e-4)


def test_one_neighbour_of_the_training_clips_is_themselves() -> None:
    train = noise(300, 3)
    assert nearest_neighbours(train, train, neighbours=1) == 1.0


@pytest.mark.parametrize("times", [2, 3, 8])
def test_change_sees_what_moves_and_not_what_stands_still(times: int) -> None:
    tokens = torch.randn(5, times, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    still = torch.randn(5, 1, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    flat, above_still = tokens.flatten(1, 2), (tokens + still).flatten(1, 2)
    torch.testing.assert_close(change(above_still, times), change(flat, times))
    torch.testing.assert_close(change(tokens.flip(1).flatten(1, 2), times), -change(flat, times))
    assert change(flat, times).shape == mean(flat, times).shape == (5, WIDTH)
    assert not torch.allclose(mean(above_still, times), mean(flat, times))


@pytest.mark.parametrize("times", [2, 5])
def test_motion_sees_what_returns_and_not_what_stands_still(times: int) -> None:
    still = torch.randn(2, 1, 3, WIDTH).expand(2, times, 3, WIDTH)
    swinging = torch.arange(times).remainder(2).view(1, times, 1, 1).expand_as(still)
    torch.testing.assert_close(
        motion((still + swinging).flatten(1, 2), times), torch.ones(2, WIDTH)
    )
    assert torch.equal(motion(still.flatten(1, 2), times), torch.zeros(2, WIDTH))


@pytest.mark.parametrize("times", [2, 8, 32])
def test_course_knows_when_and_not_what_stands_still(times: int) -> None:
    still = torch.randn(1, 1, 3, 5).expand(4, times, 3, 5)
    event = torch.zeros(4, times, 3, 5)
    event[torch.arange(4), torch.tensor([0, times // 2, -1, -1]), 0] = 1.0
    features = course((still + event).flatten(1, 2), times)
    assert features.shape == (4, min(8, times) * 5)
    assert torch.allclose(course(still.flatten(1, 2), times), torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(features[2], features[3], atol=1e-6)
    assert len({tuple(row.round(decimals=4).tolist()) for row in features[:3]}) == min(3, times)


def test_a_plugin_adds_a_probe_and_features_to_the_command(
    demo_shards: Path,
    tiny: Callable[..., PretrainRecipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One file; its results are beside those of the others, of the trained encoder and not."""
    plugin, run = tmp_path / "probes_plugin.py", tmp_path / "run"
    plugin.write_text(PLUGIN)
    run.mkdir()
    monkeypatch.setenv("ARVIDEO_PLUGINS", str(plugin))
    splits = {f"{split}_shards": str(demo_shards / split) for split in ("train", "test")}
    recipe = tiny(probe={"features": "first_token", **splits})
    run_folder.write_recipe(run, recipe)
    save_file(untrained(recipe).state_dict(), run / run_folder.MODEL)
    monkeypatch.setattr(sys, "argv", ["probe.py", str(run), "--probe", "majority"])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    summary = json.loads((run / run_folder.SUMMARY).read_text())
    assert summary["majority_accuracy"] == summary["untrained_majority_accuracy"] == 0.125
    assert probe_names(summary) == [*DEFAULT_PROBES, "majority"]
    assert summary["probe_features"] == "first_token"
    said = capsys.readouterr()
    assert json.loads(said.out).items() <= summary.items()
    words = "majority 12.5 % (untrained 12.5); chance 12.5 %; trained on 48 videos, tested on 48"
    assert said.err.splitlines()[-1].endswith(words)
