"""Verb and noun in real runs: trained together, tested, predicted, compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, run_script
from tests.epic_set import NOUNS, VERBS
from tests.train.conftest import metrics_of


def options(shards: Path) -> list[str]:
    return [
        "--recipe=finetune_demo",
        f"data.shards={shards / 'train'}",
        f"evaluation.shards={shards / 'test'}",
        "data.num_streams=12",
        "data.workers=0",
        "data.sampling=uniform",
        "train.total_batch=8",
        "train.micro_batch=4",
        "train.max_steps=4",
        "train.log_every=1",
        "optim.warmup_steps=1",
        "finetune.heads=[verb,noun]",
        "finetune.num_classes=null",
        "finetune.mixup=0.8",
        "finetune.drop_tokens=0.25",
        "finetune.pooling=attention",
        "evaluation.views=[1,2]",
    ]


@pytest.mark.slow
def test_a_run_of_two_heads_is_trained_tested_and_predicts_actions(
    epic_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    script = ROOT / "scripts"
    done = run_script(script / "finetune.py", *options(epic_shards), f"--output={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    names = {"verb": list(VERBS), "noun": list(NOUNS)}
    assert json.loads((folder / "labels.json").read_text()) == names
    judged = metrics_of(folder)[-1]
    # Both right is never more often than one.
    for name in names:
        assert judged["validation/top1"] <= judged[f"validation/top1_{name}"] <= 100
    assert "validation top-1" in done.stdout
    tested = run_script(script / "evaluate.py", folder, "--weights=last")
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert "8 videos, 0 unreadable" in tested.stdout
    assert "verb top-1" in tested.stdout and "noun top-1" in tested.stdout
    (path,) = (folder / "evaluation").glob("test-last-1x2.json")
    result, scores = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    assert list(result["label_sets"]) == ["verb", "noun"]
    assert list(result["label_sets"]["noun"]["per_class"]) == list(NOUNS)
    for name in names:
        sums = scores[f"probabilities-{name}"].sum(1)
        torch.testing.assert_close(sums, torch.ones(8))
        assert path.with_name(f"{path.stem}-{name}.png").stat().st_size > 1000
    film = epic_shards / "test-films" / "test_00.MP4"
    said = run_script(script / "predict.py", film, "--model", folder, "--top=2")
    assert said.returncode == 0, said.stderr[-3000:]
    actions = {f"{verb} {noun}" for verb in VERBS for noun in NOUNS}
    assert all(part.rsplit(" ", 1)[0] in actions for part in said.stdout.strip().split("   ")[1:])
