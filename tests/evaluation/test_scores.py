"""Scores of videos: figures by hand, views that belong together, and nothing dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.loader import Batch
from arvideo_ds.evaluation.pictures import draw_confusion
from arvideo_ds.evaluation.scores import JointScores, Scores, best_combinations, score_videos
from arvideo_ds.shards.manifest import ShardSet


@pytest.fixture
def scores() -> Scores:
    """Five videos: right, right, wrong (second best), unreadable, unlabelled."""
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.0, 0.0, 0.0], [0.2, 0.2, 0.6]]
    )
    labels = torch.tensor([0, 1, 1, 2, -1])
    valid = torch.tensor([True, True, True, False, True])
    return Scores(probabilities, labels, valid, [Skipped("d", "damaged", "no frame")])


def test_accuracies_are_those_of_the_readable_labelled_videos(scores: Scores) -> None:
    assert scores.accuracy() == pytest.approx(2 / 3)
    assert scores.accuracy(2) == 1
    assert scores.accuracy(99) == 1
    expected = -torch.tensor([0.7, 0.8, 0.3]).log().mean()
    assert scores.loss() == pytest.approx(float(expected))


def test_the_confusion_matrix_has_labels_in_rows(scores: Scores) -> None:
    assert scores.confusion().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert draw_confusion(scores.confusion(), ["a", "b", "c"]).axes


@pytest.mark.parametrize("batch", [6, 13, 48])
def test_views_are_averaged_after_the_softmax_whatever_the_batch(
    batch: int, demo_shards: Path, tiny: Callable[..., PretrainRecipe]
) -> None:
    shards, sizes = ShardSet(demo_shards / "test"), []

    def predict(batch: Batch) -> Tensor:
        sizes.append(len(batch.clips))
        # Something of the clip itself, so that views differ.
        flat = batch.clips.float().flatten(2).mean(2) / 50
        return flat[:, :3]

    options = {"num_workers": 0, "device": torch.device("cpu")}
    scores = score_videos(predict, shards, tiny(), views=(2, 3), batch=batch, **options)
    assert len(scores.labels) == shards.num_samples
    assert scores.valid.all()
    assert all(size % 6 == 0 and size <= batch for size in sizes)
    single = [score_videos(predict, shards, tiny(), views=(2, 3), batch=6, **options).probabilities]
    assert torch.equal(scores.probabilities, single[0])
    assert torch.allclose(scores.probabilities.sum(1), torch.ones(shards.num_samples))


def of_sets(
    verbs: list[list[float]], nouns: list[list[float]], labels: list[list[int]]
) -> JointScores:
    """Readable videos, but for the last, which did not decode."""
    valid = torch.tensor([True] * (len(labels) - 1) + [False])
    values = {"verb": torch.tensor(verbs), "noun": torch.tensor(nouns)}
    by_set = zip(values.items(), torch.tensor(labels).unbind(1), strict=True)
    sets = {name: Scores(of_set, column, valid, []) for (name, of_set), column in by_set}
    whole = torch.cat(list(values.values()), dim=1)
    return JointScores(whole, torch.tensor(labels), valid, [], sets)


def test_an_actions_score_is_the_product_of_verb_and_noun_worked_by_hand() -> None:
    """Verbs take, put; nouns cup, lid, pan.

    Video 1: take 0.6, put 0.4; cup 0.5, lid 0.3, pan 0.2. In order: take cup 0.30, put cup 0.20,
    take lid 0.18, take pan 0.12, put lid 0.12, put pan 0.08. The label is take lid: third.
    Video 2: take 0.1, put 0.9; cup 0.1, lid 0.2, pan 0.7: put pan 0.63, which is the label.
    Video 3 has no noun. Video 4 did not decode.
    """
    scores = of_sets(
        [[0.6, 0.4], [0.1, 0.9], [1.0, 0.0], [0.0, 0.0]],
        [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[0, 1], [1, 2], [0, -1], [0, 0]],
    )
    values, classes = best_combinations([s.probabilities for s in scores.sets.values()], 4)
    torch.testing.assert_close(values[0], torch.tensor([0.30, 0.20, 0.18, 0.12]))
    assert classes[0, :3].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert [scores.accuracy(top) for top in (1, 2, 3)] == [0.5, 0.5, 1.0]
    # The verb alone: right in the three readable videos; the noun: right in the second of two.
    assert {name: own.accuracy() for name, own in scores.sets.items()} == {"verb": 1, "noun": 0.5}
    verb, noun = -torch.tensor([0.6, 0.9, 1.0]).log().mean(), -torch.tensor([0.3, 0.7]).log().mean()
    assert scores.loss() == pytest.approx(float(verb + noun))


def test_the_best_combinations_are_those_of_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(20, n, generator=generator).softmax(1) for n in (7, 11, 3)]
    whole = torch.einsum("va,vb,vc->vabc", *parts).flatten(1)
    for top in (1, 5, 500):
        values, classes = best_combinations(parts, top)
        expected = whole.topk(min(top, 231), dim=1)
        torch.testing.assert_close(values, expected.values)
        places = (classes[..., 0] * 11 + classes[..., 1]) * 3 + classes[..., 2]
        torch.testing.assert_close(whole.gather(1, places), expected.values)


def test_views_are_averaged_in_each_set_before_the_product(
    epic_shards: Path, tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    shards, logits = ShardSet(epic_shards / "test"), []

    def predict(batch: Batch) -> Tensor:
        flat = batch.clips.float().flatten(2).mean(2)[:, :7] / 10
        # Apart from each other: of equal products either may be the best.
        logits.append(flat * torch.linspace(1.1, 0.9, 7))
        return logits[-1]

    recipe = tiny_finetune(finetune={"heads": ["verb", "noun"]})
    options = {"num_workers": 0, "device": torch.device("cpu")}
    scores = score_videos(predict, shards, recipe, views=(1, 2), batch=4, **options)
    assert isinstance(scores, JointScores)
    every = torch.cat(logits).unflatten(0, (8, 2))
    for name, own in (("verb", every[..., :3]), ("noun", every[..., 3:])):
        torch.testing.assert_close(scores.sets[name].probabilities, own.softmax(-1).mean(1))
    assert scores.labels.shape == (8, 2)
    verbs, nouns = (own.probabilities for own in scores.sets.values())
    action = torch.einsum("va,vb->vab", verbs, nouns).flatten(1).argmax(1)
    right = (action == scores.labels[:, 0] * 4 + scores.labels[:, 1]).double().mean()
    assert scores.accuracy() == pytest.approx(float(right))
