"""A real run of attentive heads on a frozen encoder: any ranks, one head chosen and tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, run_script
from tests.train.conftest import metrics_of

OPTIONS = (
    "--recipe=probe_own",
    "model.size=nano",
    "model.patch=[2,8,8]",
    "data.frames=4",
    "data.size=32",
    "data.stride=1",
    "data.num_streams=12",
    "data.workers=0",
    "data.randaugment=null",
    "train.precision=fp32",
    "train.total_batch=16",
    "train.micro_batch=8",
    "train.max_steps=3",
    "train.log_every=1",
    "finetune.pooling_depth=2",
    "finetune.head_lrs=[0.16,0.016]",
    "finetune.head_weight_decays=[0.01]",
    "evaluation.every_epochs=1",
)


@pytest.mark.dist
def test_one_rank_and_two_ranks_train_and_choose_the_same_heads(
    demo_shards: Path, tmp_path: Path
) -> None:
    shards = (f"data.shards={demo_shards / 'train'}", f"evaluation.shards={demo_shards / 'test'}")
    found: dict[int, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]] = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        options = (*OPTIONS, *shards, f"--output={folder}")
        done = run_script(ROOT / "scripts" / "finetune.py", *options, ranks=ranks, cores=1)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 heads (2 learning rates x 1 weight decays)" in done.stdout
        found[ranks] = metrics_of(folder), load_file(folder / "best.safetensors")
    for alone, shared in zip(found[1][0], found[2][0], strict=True):
        assert shared["loss/finetune"] == pytest.approx(alone["loss/finetune"], rel=1e-4)
        for name in alone:
            if name.startswith("validation/top1"):
                assert shared[name] == alone[name], name
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[2][1][name], value, rtol=0, atol=1e-4)
    best = json.loads((tmp_path / "1" / "best.json").read_text())
    each = [best["top1_lr0.16_decay0.01"], best["top1_lr0.016_decay0.01"]]
    assert best["top1"] == max(each)
    assert each.index(best["top1"]) == best["head"]
    tested = run_script(ROOT / "scripts" / "evaluate.py", tmp_path / "1", "--views=2x1", cores=1)
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert "the head was chosen on these videos" in tested.stdout
    # One spatial view: the validation's clips.
    (path,) = (tmp_path / "1" / "evaluation").glob("*.json")
    assert json.loads(path.read_text())["top1"] == pytest.approx(best["top1"])
