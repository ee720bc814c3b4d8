"""The recipes that come with the project: all resolve, say what they are, and cover the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, Recipe, load_recipe, recipe_names
from arvideo_ds.config.load import recipes_dir
from arvideo_ds.config.sizes import DecoderShape
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.train.settle import RunOptions, settle

ROOT = Path(__file__).parent.parent
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
FILES = sorted(recipes_dir().rglob("*.yaml"))
# For one machine.
SMALL = {"demo", "demo_phases", "demo_small", "lvmae_events", "videomae_demo"}
SMALL |= {"pretrain_figures", "pretrain_weizmann"}
REAL = [name for name in recipe_names("pretrain") if name not in SMALL]
BASE = "ablation_base"

# Tables 1 and 6-10 of the paper (arXiv 2405.15160): what each variant changes, and nothing else.
ABLATIONS: dict[str, dict[str, Any]] = {
    **{
        f"cluster_{t}x{h}x{w}": {"objective.cluster": (t, h, w)}
        for t, h, w in [(1, 1, 1), (1, 14, 14), (1, 7, 7), (8, 1, 1), (2, 1, 1), (4, 7, 7)]
    },
    **{
        f"order_{order}": {"objective.order": order}
        for order in ("spatial_first", "temporal_first")
    },
    **{f"drop_{percent}": {"objective.drop_ratio": percent / 100} for percent in (75, 90, 95)},
    "decoder_self_attention": {"decoder.self_attention": True},
    **{f"decoder_width_{width}": {"decoder.width": width} for width in (384, 768)},
    **{f"decoder_depth_{depth}": {"decoder.depth": depth} for depth in (2, 8)},
    "pixels": {
        "model.patch": (1, 1, 1),
        "objective.cluster": (1, 1, 1),
        "objective.normalize_targets": False,
        "data.frames": 8,
        "data.size": (14, 14),
        "data.stride": 4,
    },
}


def flat(recipe: PretrainRecipe) -> dict[str, Any]:
    sections = recipe.model_dump(exclude={"task", "phases"})
    return {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_with_every_deepspeed_json(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no shards lie here
    assert JSONS
    for path in JSONS:
        ranks = json.loads(path.read_text()).get("sequence_parallel_size", 1)
        if ranks > 1 and (name in recipe_names("tokenizer") or name.startswith("probe_")):
            continue  # refused: no tokens to share, or a frozen encoder
        settled = settle(RunOptions(name, path), Recipe, world_size=ranks)
        assert settled.shards is None
        # One recipe, one curve: what the JSON may change is memory and speed.
        assert settled.deepspeed["train_batch_size"] == settled.recipe.train.total_batch
        assert settled.deepspeed["gradient_clipping"] == settled.recipe.optim.clip
        assert '"auto"' not in str(settled.deepspeed).replace("'", '"')


@pytest.mark.parametrize("world_size", [8, 16, 32, 64])
def test_real_recipes_can_be_dealt_to_whole_nodes(world_size: int) -> None:
    for name in REAL:
        plan = settle(RunOptions(name, JSONS[0]), PretrainRecipe, world_size=world_size).plan
        assert plan.micro_batch * plan.accumulation * world_size == plan.total_batch


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_file_opens_with_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_no_two_recipes_share_a_name() -> None:
    assert len({path.stem for path in FILES}) == len(FILES)


def test_the_ablation_base_is_the_papers_setting() -> None:
    recipe = load_recipe(BASE)
    assert (recipe.model.size, recipe.train.epochs) == ("B", 200)
    assert (recipe.data.sampling, recipe.data.stride) == ("dense", 2)
    assert recipe.data.num_videos == load_recipe("pretrain_vit_b_ssv2").data.num_videos
    assert recipe.objective.cluster == (2, 7, 7)
    assert (recipe.objective.order, recipe.objective.drop_ratio) == ("random", 0.8)
    assert recipe.decoder_shape == DecoderShape(512, 4, 8, crosses=True, self_attention=False)
    assert not recipe.decoder.self_attention


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_of_the_tables_differs_from_the_base_in_its_cell_alone(name: str) -> None:
    base, variant = flat(load_recipe(BASE)), flat(load_recipe(f"ablation_{name}"))
    assert {key: variant[key] for key in base if variant[key] != base[key]} == ABLATIONS[name]


def test_there_is_no_ablation_beside_the_tables() -> None:
    named = {name.removeprefix("ablation_") for name in REAL if name.startswith("ablation_")}
    assert named == {"base", *ABLATIONS}


@pytest.mark.parametrize("data", ["k400", "ssv2"])
def test_pretraining_follows_the_published_protocol(data: str) -> None:
    for size in ("s", "b", "l", "h", "g"):
        recipe = load_recipe(f"pretrain_vit_{size}_{data}")
        assert recipe.model.size.lower() == size
        stride = {"k400": 4, "ssv2": 2}[data]
        assert (recipe.data.sampling, recipe.data.stride) == ("dense", stride)
        assert (recipe.data.frames, recipe.data.size, recipe.data.flip) == (16, (224, 224), False)
        assert (recipe.train.epochs, recipe.train.total_batch) == (800, 1024)
        assert recipe.optim.warmup_epochs == 40
        assert (recipe.optim.base_lr, recipe.optim.min_lr) == (1.5e-4, 1e-5)
        assert (recipe.optim.betas, recipe.optim.weight_decay) == ((0.9, 0.95), 0.05)
        assert recipe.geometry.num_clusters == 16
    paper = load_recipe(f"pretrain_vit_b_{data}_paper")
    assert (paper.objective.targets, paper.decoder.target_ratio) == ("paper", 1.0)


def test_every_pretraining_on_ssv2_takes_16_frames_of_stride_2() -> None:
    names = [n for n in REAL if n.endswith("_ssv2") or n.startswith("ablation_")]
    assert len(names) > 30
    for name in names:
        data = load_recipe(name).data
        assert data.sampling == "dense", name
        # The elements of Table 1 that are single pixels: 8 frames over the same 32.
        assert data.frames * data.stride == 32, name


LONG = sorted(path.stem for path in (recipes_dir() / "long").glob("finetune_*.yaml"))


@pytest.mark.parametrize("name", LONG)
def test_long_fine_tuning_follows_the_text(name: str) -> None:
    """LVMAE (arXiv 2411.13683): what is dropped at which length, pooling, views, heads."""
    recipe = load_recipe(name, [], FinetuneRecipe)
    settings, frames = recipe.finetune, int(name.rsplit("_", 1)[1].removesuffix("f"))
    large = recipe.model.size == "L"
    assert recipe.data.frames == frames
    assert settings.drop_tokens == (0 if frames < 128 else 0.25 if large else 0.2)
    assert settings.pooling == ("attention" if large else "mean")
    assert recipe.evaluation.views[0] == 1
    if "diving48" in name:
        assert (settings.num_classes, recipe.train.epochs) == (48, 50 if large else 200)
    else:
        assert settings.heads == ("verb", "noun")


def test_there_are_long_recipes_of_every_length() -> None:
    assert len(LONG) == 7


# Peak, start of the warm-up and end of the schedule: those that the figures in docs/ were measured
# with, or our own choice. Exactly: another last digit gives other figures.
OWN_RATES: dict[str, tuple[float, float, float]] = {
    "demo": (1e-3, 1e-6, 1e-5),
    "videomae_demo": (1e-3, 1e-6, 1e-5),
    "demo_small": (7.5e-4, 1e-6, 1e-5),
    "lvmae_events": (1.5e-3, 1e-6, 1e-5),
    "pretrain_weizmann": (1e-3, 1e-6, 1e-5),
    "pretrain_figures": (1e-3, 1e-6, 1e-5),
    "tokenizer_demo": (1e-3, 1e-6, 1e-5),
    "tokenizer_events": (1e-3, 1e-6, 1e-5),
    "tokenizer_weizmann": (1e-3, 1e-6, 1e-5),
    "tokenizer_b_k600": (1e-4, 1e-6, 1e-6),
    "finetune_demo": (1e-3, 1e-6, 1e-6),
    "finetune_weizmann": (5e-4, 1e-6, 1e-6),
    "probe_weizmann": (3e-3, 0.0, 0.0),
    "finetune_own": (9.375e-5, 1e-6, 1e-6),
    "finetune_vit_b_hmdb51": (5e-4, 1e-6, 1e-6),
    "finetune_vit_b_diving48_128f": (2.5e-4, 1e-6, 1e-6),
    "lvmae_vit_b_diving48": (1.5e-4, 1e-6, 1e-5),
    "pretrain_vit_b_k400_32f": (6e-4, 1e-6, 1e-5),
    "pretrain_vit_b_k400_128f": (6e-4, 1e-6, 1e-5),
}


@pytest.mark.parametrize("name", OWN_RATES)
def test_recipes_of_our_own_keep_the_rates_that_they_were_measured_with(name: str) -> None:
    recipe = load_recipe(name, [], Recipe)
    plan = make_plan(recipe, world_size=1, num_videos=recipe.data.num_videos or 1000)
    assert (plan.lr, plan.warmup_lr, plan.min_lr) == OWN_RATES[name]
