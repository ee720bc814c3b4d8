"""`import arvideo_ds`: trained models in Python, from a checkout and from a wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import arvideo_ds
from arvideo_ds.config import EncoderRecipe, FinetuneRecipe, PretrainRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.extraction import ExtractionJob, extract_features
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.exports.source import export_encoder, read_source
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.inputs import list_videos

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]
LABELS = ["left", "right", "up"]
WITH_A_WHEEL = """
import sys
from pathlib import Path
import arvideo_ds
assert Path(arvideo_ds.__file__).is_relative_to(sys.argv[1]), arvideo_ds.__file__
assert "torch" not in sys.modules
assert arvideo_ds.load_recipe("finetune_vit_b_k400").task == "finetune"
assert "torch" not in sys.modules
encoder = arvideo_ds.load_encoder(sys.argv[2])
print(tuple(arvideo_ds.encode(encoder, sys.argv[3]).shape), encoder.clip_shape, encoder.training)
"""


@pytest.fixture
def video(demo_shards: Path, tmp_path: Path) -> Path:
    with tarfile.open(sorted((demo_shards / "test").glob("*.tar"))[0]) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".mp4"))
        content = tar.extractfile(member)
        assert content is not None
        (tmp_path / "videos").mkdir()
        path = tmp_path / "videos" / "clip.mp4"
        path.write_bytes(content.read())
    return path


@pytest.fixture
def pretrained(tiny: Callable[..., PretrainRecipe], tmp_path: Path) -> Path:
    """The folder of a pretraining run, with the weights that it began with."""
    folder, recipe = tmp_path / "pretrained", tiny()
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)
    save_file(untrained(recipe).state_dict(), folder / run_folder.MODEL)
    return folder


@pytest.fixture
def finetuned(tiny_finetune: Callable[..., FinetuneRecipe], tmp_path: Path) -> Path:
    folder, recipe = tmp_path / "finetuned", tiny_finetune()
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)
    torch.manual_seed(0)
    classifier = Classifier(recipe.encoder, len(LABELS))
    torch.nn.init.normal_(classifier.head.weight)
    save_file(classifier.state_dict(), folder / run_folder.MODEL)
    (folder / run_folder.LABELS).write_text(json.dumps(LABELS))
    return folder


def exported(run: Path, folder: Path) -> Path:
    """As `arvideo export --format encoder` writes it."""
    folder.mkdir()
    export_encoder(read_source(run, run_folder.read_recipe(run, EncoderRecipe)), folder)
    return folder


@pytest.mark.parametrize("features", ["clip", "time", "token"])
def test_a_video_is_encoded_as_the_command_writes_its_features(
    features: str, pretrained: Path, video: Path, tmp_path: Path
) -> None:
    recipe = run_folder.read_recipe(pretrained, PretrainRecipe)
    job = ExtractionJob(list_videos(str(video.parent)), tmp_path / "out", features=features, hop=4)
    extract_features(recipe, pretrained / run_folder.MODEL, job, torch.device("cpu"))
    (written,) = (np.load(path)["features"] for path in (tmp_path / "out").rglob("*.npz"))
    encoder = arvideo_ds.load_encoder(pretrained)
    found = arvideo_ds.encode(encoder, video, features=features, hop=4, batch=16)
    assert len(found) > 1 and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(written), rtol=0, atol=1e-5)


def test_an_encoder_knows_its_clips(pretrained: Path, video: Path) -> None:
    encoder = arvideo_ds.load_encoder(str(pretrained))
    assert not encoder.training
    assert next(encoder.parameters()).device.type == "cpu"
    clip = encoder.clip(video)
    assert tuple(clip.shape) == (*encoder.clip_shape, 3) == (8, 32, 32, 3)
    tokens = encoder(clip[None])
    times, rows, columns = encoder.grid
    assert tuple(tokens.shape) == (1, times * rows * columns, encoder.width)
    # Clips in memory are encoded as they are.
    torch.testing.assert_close(arvideo_ds.encode(encoder, clip[None]), tokens.mean(1).detach())


def test_an_export_opens_as_its_run(
    pretrained: Path, finetuned: Path, video: Path, tmp_path: Path
) -> None:
    for run in (pretrained, finetuned):
        again = exported(run, tmp_path / f"of_{run.name}")
        encoders = [arvideo_ds.load_encoder(folder) for folder in (run, again)]
        first, second = (arvideo_ds.encode(encoder, video) for encoder in encoders)
        assert torch.equal(first, second)
    classifiers = [arvideo_ds.load_classifier(folder) for folder in (finetuned, again)]
    first_labels, second_labels = (classifier.predict(video) for classifier in classifiers)
    assert first_labels == second_labels
    assert {name for name, _ in first_labels} == set(LABELS)
    assert sum(share for _, share in first_labels) == pytest.approx(1)
    logits = classifiers[0](classifiers[0].clip(video)[None])
    assert LABELS[int(logits.argmax())] == first_labels[0][0]


def test_mistakes_are_explained(pretrained: Path, video: Path, tmp_path: Path) -> None:
    encoder = arvideo_ds.load_encoder(pretrained)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for call, words in (
        (lambda: arvideo_ds.load_encoder(tmp_path / "nowhere"), "there is no .*nowhere"),
        (lambda: arvideo_ds.load_encoder(pretrained, "best"), "there is no .*best"),
        (lambda: arvideo_ds.load_encoder(pretrained, "newest"), "one of: best, last, ema"),
        (lambda: arvideo_ds.load_classifier(pretrained), "expected a fine-tuned run"),
        (lambda: arvideo_ds.encode(encoder, video, features="mean"), "one of: clip, token, time"),
        (lambda: arvideo_ds.encode(encoder, tmp_path / "nothing.mp4"), "nothing.mp4"),
        (lambda: arvideo_ds.encode(encoder, tmp_path / "broken.mp4"), "cannot decode .*broken.mp4"),
        (lambda: arvideo_ds.encode(encoder, torch.zeros(1, 3, 8, 32, 32)), "B', 8, 32, 32, 3"),
        (lambda: arvideo_ds.load_recipe("no_such_recipe"), "there is no recipe"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    with pytest.raises(AttributeError):
        _ = arvideo_ds.load_everything


@pytest.mark.slow
def test_a_wheel_works_away_from_the_checkout(
    run: Run, pretrained: Path, video: Path, tmp_path: Path
) -> None:
    """The command, recipes, DeepSpeed configurations by name, and an encoder from its export."""
    source, target, away = (tmp_path / name for name in ("source", "target", "away"))
    source.mkdir()
    away.mkdir()
    for name in ("arvideo_ds", "ds_configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copyfile(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    for command in (
        (*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path),
        (*pip, "install", *("--no-deps", "--no-index", "--find-links", tmp_path),
         "--target", target, "arvideo_ds"),
    ):  # fmt: skip
        done = run(*command, cwd=away)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(*words: str | Path) -> str:
        done = run(*words, cwd=away, PYTHONPATH=str(target))
        assert done.returncode == 0, done.stderr
        return done.stdout

    arvideo = target / "bin" / "arvideo"
    assert "pretrain " in start(arvideo, "--help")
    assert (target / "arvideo_ds" / "evaluation" / "ava_actions.pbtxt").is_file()
    options = ("--recipe", "pretrain_vit_b_k400", "--deepspeed_config", "zero3")
    planned = json.loads(start(arvideo, "pretrain", "--dry_run", *options))
    assert planned["deepspeed"]["zero_optimization"]["stage"] == 3
    assert json.loads(start(arvideo, "pretrain", "--dry_run", *options[:2]))["plan"]
    folder = exported(pretrained, tmp_path / "exported")
    said = start(sys.executable, "-c", WITH_A_WHEEL, target, folder, video).splitlines()[-1]
    assert said.endswith("(8, 32, 32) False")
