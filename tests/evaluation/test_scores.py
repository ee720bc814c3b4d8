"""Scores of videos: figures by hand, views that belong together, and nothing dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.loader import Batch
from arvideo_ds.data.manifest import ShardSet
from arvideo_ds.evaluation.confusion import draw_confusion
from arvideo_ds.evaluation.scores import Scores, score_videos


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
