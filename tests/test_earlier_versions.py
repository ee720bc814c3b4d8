"""Shards, checkpoints, runs and exports of earlier commits still open and compute the same."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import arvideo_ds
from arvideo_ds.files.tensors import load_tensors
from arvideo_ds.models.layouts import load_encoder as load_into
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from tests.conftest import ROOT, run_script

ARCHIVES = sorted((Path(__file__).parent / "earlier").glob("*.tar.xz"))
pytestmark = pytest.mark.parametrize("earlier", ARCHIVES, indirect=True, ids=lambda p: p.name[:7])


@pytest.fixture(scope="module")
def earlier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(request.param) as archive:
        for member in archive.getmembers():
            assert not Path(member.name).is_absolute() and ".." not in Path(member.name).parts
        archive.extractall(folder)
    return folder


def clip() -> Tensor:
    """The clip of expected.json, 1 x 8 x 32 x 32 x 3, uint8."""
    values = torch.arange(8 * 32 * 32 * 3) * 7919 % 256
    return values.to(torch.uint8).reshape(1, 8, 32, 32, 3)


def expected(folder: Path, name: str) -> Tensor:
    return torch.tensor(json.loads((folder / "expected.json").read_text())[name])


@pytest.mark.parametrize("name", ["pretrained", "export_encoder"])
def test_an_encoder_computes_what_it_computed(earlier: Path, name: str) -> None:
    encoder = arvideo_ds.load_encoder(earlier / name)
    features = arvideo_ds.encode(encoder, clip())[0]
    torch.testing.assert_close(features, expected(earlier, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["finetuned", "export_classifier"])
def test_a_classifier_computes_what_it_computed(earlier: Path, name: str) -> None:
    classifier = arvideo_ds.load_classifier(earlier / name)
    with torch.no_grad():
        logits = classifier(clip())[0]
    torch.testing.assert_close(logits, expected(earlier, name), rtol=1e-5, atol=1e-6)
    assert list(classifier.labels) == json.loads((earlier / name / "labels.json").read_text())


def test_an_export_to_timm_begins_a_run(earlier: Path) -> None:
    encoder = arvideo_ds.load_encoder(earlier / "pretrained")
    before = {name: value.clone() for name, value in encoder.encoder.state_dict().items()}
    for value in encoder.encoder.parameters():
        torch.nn.init.zeros_(value)
    load_into(encoder.encoder, str(earlier / "export_timm"), patch=encoder.recipe.patch)
    after = encoder.encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_shards_are_whole_and_every_video_is_read(earlier: Path) -> None:
    shards = ShardSet(earlier / "data" / "train")
    assert shards.check(limit_s=60) == len(shards.manifest.shards)
    videos = [shards.read(0, sample) for sample in shards.index(0).samples]
    assert len(videos) == shards.num_samples == 16


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_run_of_two_ranks_is_continued_on_one(earlier: Path, tmp_path: Path, stage: str) -> None:
    """Its weights come from the checkpoint: a step of rate 0 leaves them as they were."""
    options = "train.max_steps=3 train.total_batch=8 train.micro_batch=4 data.num_streams=4"
    rates = "optim.base_lr=1e-30 optim.min_lr=0 optim.warmup_lr=0 optim.warmup_steps=1"
    done = run_script(
        "scripts/pretrain.py",
        f"--deepspeed_config={ROOT}/ds_configs/{stage}.json",
        "--recipe=demo",
        f"--resume={earlier / 'pretrained'}",
        f"--output={tmp_path / 'run'}",
        *f"{options} {rates} train.log_every=1 data.workers=1 data.repeats=1".split(),
        f"data.shards={earlier / 'data' / 'train'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["step"] for m in run_folder.read_metrics(tmp_path / "run")] == [3]
    before = load_tensors(earlier / "pretrained" / run_folder.MODEL)
    after = load_tensors(tmp_path / "run" / run_folder.MODEL)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
