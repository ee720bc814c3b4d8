"""scripts/evaluate.py: the same scores on any number of ranks; nothing unreadable goes unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.demo_set import DEMO
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.synthetic import make_shards
from tests.conftest import run_script

VIDEOS = 20
EVALUATE = "scripts/evaluate.py"


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, and 20 videos of which one was altered."""
    folder = tmp_path_factory.mktemp("run")
    make_shards(DEMO, folder, "test", VIDEOS)
    shards = ShardSet(folder / "test")
    sample = shards.index(0).samples[3]
    path = folder / "test" / shards.manifest.shards[0].name
    content = bytearray(path.read_bytes())
    content[sample.offset + sample.bytes // 2] ^= 1
    path.write_bytes(content)
    recipe = load_recipe("finetune_demo", [f"evaluation.shards={folder}/test"], FinetuneRecipe)
    run_folder.write_recipe(folder, recipe)
    labels = list(shards.manifest.labels or ())
    (folder / run_folder.LABELS).write_text(json.dumps(labels))
    torch.manual_seed(0)
    model = Classifier(recipe.encoder, len(labels))
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), folder / run_folder.MODEL)
    return folder


def results(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    (path,) = (folder / "evaluation").glob("test-last-2x3.json")
    assert path.with_suffix(".png").stat().st_size > 5000
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


@pytest.mark.dist
def test_any_number_of_ranks_gives_the_same_scores(finetuned: Path) -> None:
    found = {}
    for ranks in (1, 2, 3):
        # One core whatever the number of ranks: sums depend on the number of threads.
        done = run_script(EVALUATE, finetuned, "--views=2x3", ranks=ranks, cores=1)
        assert done.returncode == 0, done.stderr[-3000:]
        found[ranks] = results(finetuned)
        assert "20 videos, 1 unreadable" in done.stdout
    for result, scores in found.values():
        assert result["unreadable"] == 1
        assert result["unreadable_videos"][0]["kind"] == "altered"
        assert result["videos"] == VIDEOS
        assert sum(row["videos"] for row in result["per_class"].values()) == VIDEOS - 1
        assert int((~scores["valid"].bool()).sum()) == 1
        assert torch.equal(scores["probabilities"], found[1][1]["probabilities"])
    assert {key: found[3][0][key] for key in ("ranks", "views")} == {"ranks": 3, "views": [2, 3]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--views=2by3"], "TEMPORALxSPATIAL"),
        (["--weights=ema"], "ema.safetensors"),
        (["--shards=nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_paragraph(options: list[str], words: str, finetuned: Path) -> None:
    done = run_script(EVALUATE, finetuned, *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_pretraining_run_is_refused(tmp_path: Path) -> None:
    run_folder.write_recipe(tmp_path, load_recipe("demo"))
    done = run_script(EVALUATE, tmp_path)
    assert done.returncode == 2
    assert "is a pretraining run" in done.stderr
