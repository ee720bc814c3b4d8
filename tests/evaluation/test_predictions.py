"""Predictions: the clip that a test would see, a line for each video, and what cannot be read."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.clips import EvaluationClips
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.predictions import central_clip, top_labels
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from tests.conftest import ROOT, run_script

LABELS = [f"direction {number}" for number in range(8)]
# How a track of an MP4 is shown: as it is stored, and turned clockwise by a quarter.
PLAIN = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000")
QUARTER_TURN = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000")


@pytest.fixture
def videos(demo_shards: Path, tmp_path: Path) -> list[Path]:
    """Three video files, the first of the test shards in their order."""
    first = sorted((demo_shards / "test").glob("*.tar"))[0]
    with tarfile.open(first) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".mp4")][:3]
        for member in members:
            content = tar.extractfile(member)
            assert content is not None
            (tmp_path / member.name).write_bytes(content.read())
    return [tmp_path / member.name for member in members]


@pytest.fixture
def model(tiny_finetune: Callable[..., FinetuneRecipe], tmp_path: Path) -> Path:
    """The folder of a fine-tuned run with random weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(0)
    classifier = Classifier(tiny_finetune().encoder, len(LABELS))
    torch.nn.init.normal_(classifier.head.weight)
    save_file(classifier.state_dict(), folder / "model.safetensors")
    run_folder.write_recipe(folder, tiny_finetune())
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


def test_the_clip_of_a_file_is_the_one_that_an_evaluation_sees(
    videos: list[Path], demo_shards: Path, tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    evaluation = EvaluationClips(ShardSet(str(demo_shards / "test")), tiny_finetune())
    for number, path in enumerate(videos):
        assert torch.equal(central_clip(path, tiny_finetune().data), evaluation[number].clips[0])


def test_a_video_stored_on_its_side_is_seen_upright(
    videos: list[Path], tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    upright = central_clip(videos[0], tiny_finetune().data)
    before, track, after = videos[0].read_bytes().partition(b"tkhd")
    assert PLAIN in after
    videos[0].write_bytes(before + track + after.replace(PLAIN, QUARTER_TURN, 1))
    seen = central_clip(videos[0], tiny_finetune().data).float()
    turned = upright.rot90(-1, dims=(1, 2)).float()
    # It is encoded once more on the way.
    assert (seen - turned).abs().mean() < 0.25 * (seen - upright.float()).abs().mean()


def test_labels_come_best_first_with_probabilities(
    tiny_finetune: Callable[..., FinetuneRecipe],
) -> None:
    torch.manual_seed(0)
    classifier = Classifier(tiny_finetune().encoder, len(LABELS)).eval()
    torch.nn.init.normal_(classifier.head.weight)
    clip = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    ranked = top_labels(classifier, LABELS, clip, count=100)
    assert {label for label, _ in ranked} == set(LABELS)
    scores = [score for _, score in ranked]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
    with torch.no_grad():
        assert ranked[0][0] == LABELS[classifier(clip[None])[0].argmax()]
    assert top_labels(classifier, LABELS, clip, count=2) == ranked[:2]


def test_what_is_no_video_is_said_to_be(
    tmp_path: Path, tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    with pytest.raises(UserError, match=r"cannot read .*there\.mp4: No such file"):
        central_clip(tmp_path / "there.mp4", tiny_finetune().data)
    for content in (b"", b"<html>", bytes(5000)):
        (tmp_path / "page.mp4").write_bytes(content)
        with pytest.raises(UserError, match=r"page\.mp4 does not decode as a video"):
            central_clip(tmp_path / "page.mp4", tiny_finetune().data)


@pytest.mark.slow
def test_the_script_prints_a_line_for_each_video_and_passes_over_what_it_cannot_read(
    videos: list[Path], model: Path
) -> None:
    broken = videos[0].with_name("broken.mp4")
    broken.write_bytes(b"no video")
    script = ROOT / "scripts" / "predict.py"
    done = run_script(script, videos[0], broken, videos[1], "--model", model, "--top", "3")
    lines = done.stdout.splitlines()
    assert [line.split("   ")[0] for line in lines] == [str(videos[0]), str(videos[1])]
    assert all(line.count("direction") == 3 for line in lines)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "broken.mp4 does not decode" in done.stderr
    assert "1 of 3 videos could not be read" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_model_that_was_not_fine_tuned_is_refused(videos: list[Path], model: Path) -> None:
    (model / "labels.json").unlink()
    done = run_script(ROOT / "scripts" / "predict.py", videos[0], "--model", model)
    assert done.returncode == 2 and done.stdout == ""
    assert "has no labels.json" in done.stderr and done.stderr.count("\n") == 1


def test_of_a_verb_and_a_noun_the_likeliest_actions_are_named(
    tiny_finetune: Callable[..., FinetuneRecipe],
) -> None:
    recipe = tiny_finetune(finetune={"heads": ["verb", "noun"]})
    model = Classifier(recipe.encoder, 5)
    model.head.weight.data.zero_()
    # take 0.75, put 0.25; cup 0.5, lid 0.3, pan 0.2
    model.head.bias.data = torch.tensor([0.75, 0.25, 0.5, 0.3, 0.2]).log()
    names = {"verb": ["take", "put"], "noun": ["cup", "lid", "pan"]}
    clip = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    ranked = top_labels(model.eval(), names, clip, count=100)
    assert [name for name, _ in ranked[:3]] == ["take cup", "take lid", "take pan"]
    assert ranked[0][1] == pytest.approx(0.375)
    assert len(ranked) == 6
    assert sum(score for _, score in ranked) == pytest.approx(1)
