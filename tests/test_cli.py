"""scripts/pretrain.py as people meet it: a dry run in JSON, and wrong input in one paragraph."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Pretrain = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
VIT_B = ("--recipe", "pretrain_vit_b_k400")


@pytest.fixture
def pretrain(run: Run, tmp_path: Path) -> Pretrain:
    """The script in an empty folder, where no shards lie."""

    def start(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, ROOT / "scripts" / "pretrain.py", *arguments, cwd=tmp_path)

    return start


@pytest.fixture
def refused(pretrain: Pretrain, tmp_path: Path) -> Callable[..., str]:
    """What a command says that is wrong: exit code 2, one paragraph, nothing written."""

    def start(*arguments: str | Path) -> str:
        before = set(tmp_path.rglob("*"))
        done = pretrain(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        paragraphs = done.stderr.strip().split("\n")
        assert len(paragraphs) == 1, done.stderr
        assert paragraphs[0].startswith("error: ")
        assert set(tmp_path.rglob("*")) == before
        return paragraphs[0]

    return start


def test_a_dry_run_prints_one_document_of_recipe_plan_and_deepspeed(pretrain: Pretrain) -> None:
    json_file = ROOT / "ds_configs" / "zero3.json"
    done = pretrain(
        "--dry_run",
        *VIT_B,
        "train.total_batch=512",
        "--world_size",
        "4",
        "--deepspeed_config",
        json_file,
        "optim.base_lr=1e-3",
    )
    assert done.returncode == 0, done.stderr
    *words, note = done.stderr.splitlines()
    assert re.match(r"note: data.shards is not set; the plan assumes \d+ videos", note)
    assert words[0].startswith("recipe pretrain_vit_b_k400: ")
    assert "step 512 videos x 1 clips = 512 clips = 4 rank(s) x 64 x 2 acc" in words[3]
    assert '"cluster": [2, 7, 7],' in done.stdout, "numbers of a list are on one line"
    said = json.loads(done.stdout)
    assert set(said) == {"recipe", "plan", "deepspeed"}
    # Overrides may stand between options.
    assert said["recipe"]["train"]["total_batch"] == said["plan"]["total_batch"] == 512
    assert said["plan"]["lr"] == pytest.approx(2e-3)
    assert said["plan"]["world_size"] == 4
    assert said["deepspeed"]["train_batch_size"] == 512
    assert said["deepspeed"]["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(said["deepspeed"])


def test_a_dry_run_says_on_the_side_what_is_hardly_meant(pretrain: Pretrain) -> None:
    done = pretrain("--dry_run", *VIT_B, "data.num_videos=100")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["num_videos"] == 100
    assert "note: a step takes 1024 videos, and there are 100" in done.stderr


def test_an_unknown_key(refused: Callable[..., str]) -> None:
    assert "train.total_batch'" in refused(*VIT_B, "train.total_batchs=64", "--dry_run")


def test_an_unknown_recipe(refused: Callable[..., str]) -> None:
    assert "'pretrain_vit_b_k400'" in refused("--recipe", "pretrain_vitb_k400", "--dry_run")


def test_indivisible_frames(refused: Callable[..., str]) -> None:
    assert "frames 15 is not a multiple of 2" in refused(*VIT_B, "data.frames=15")


def test_a_contradiction_of_recipe_and_json(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"train_batch_size": 96}')
    message = refused(*VIT_B, "--deepspeed_config", "my.json")
    assert all(word in message for word in ("my.json", "96", "1024", "train.total_batch"))


def test_a_json_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"train_batch_size": ')
    assert "cannot read --deepspeed_config my.json" in refused(
        *VIT_B, "--deepspeed_config", "my.json"
    )


@pytest.mark.parametrize("where", [None, "nowhere/k400"])
def test_missing_shards_are_answered_with_the_command_that_makes_them(
    where: str | None, refused: Callable[..., str]
) -> None:
    message = refused(*VIT_B, *([] if where is None else [f"data.shards={where}"]))
    assert "arvideo shards " in message
    assert f"--output {where or 'SHARDS'}" in message


def test_a_folder_of_videos_is_no_place_for_shards(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "run").mkdir(parents=True)
    (tmp_path / "mine" / "run" / "1.MP4").write_bytes(b"x")
    message = refused(*VIT_B, "data.shards=mine")
    assert "--videos mine --output SHARDS" in message


def test_an_impossible_number_of_ranks(refused: Callable[..., str]) -> None:
    assert "world_size" in refused(*VIT_B, "--dry_run", "--world_size", "-8")
