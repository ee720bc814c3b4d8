"""Mixtures: which source a position belongs to, what each source keeps, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.sources import LONGEST_PERIOD, SourceSettings, source_names, whole_weights
from arvideo_ds.data.clips import EvaluationClips, MixedClips, TrainClips, for_labels
from arvideo_ds.data.loader import TrainLoader
from arvideo_ds.data.order import SourceOrder, rank_positions
from arvideo_ds.errors import UserError
from arvideo_ds.exports.source import public_recipe
from arvideo_ds.planning.plan import make_plan, notes, source_lines
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import MANIFEST, ShardSet
from arvideo_ds.shards.mix import ShardMix

MakeRecipe = Callable[..., PretrainRecipe]
THREE = (5, 3, 2)
WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


def sources_of(weights: list[float]) -> list[SourceSettings]:
    return [SourceSettings(shards=f"s{n}", weight=weight) for n, weight in enumerate(weights)]


def assert_quota(order: SourceOrder, weights: tuple[int, ...], positions: range) -> None:
    """The count of every source is its share, rounded down or up."""
    total = sum(weights)
    for position in positions:
        counts = order.counts(position)
        assert sum(counts) == position
        for count, weight in zip(counts, weights, strict=True):
            exact = position * weight
            assert exact // total <= count <= -(-exact // total)


@given(weights=WEIGHTS)
@settings(deadline=None)
def test_counts_are_the_weights_rounded_down_or_up_at_every_position(weights: list[int]) -> None:
    whole = whole_weights(sources_of([float(weight) for weight in weights]))
    assert_quota(SourceOrder(whole), whole, range(2 * sum(whole) + 1))


def test_weights_5_3_2_are_met_within_one_at_every_tenth_position_of_a_billion() -> None:
    order = SourceOrder(THREE)
    assert_quota(order, THREE, range(0, 10**9, 10**6))
    for position in range(0, 1000, 10):
        assert order.counts(position) == [position * weight // 10 for weight in THREE]


@given(weights=WEIGHTS, start=st.integers(0, 10**12))
@settings(deadline=None)
def test_the_positions_of_a_source_are_0_1_2_without_a_gap_from_any_place(
    weights: list[int], start: int
) -> None:
    whole = whole_weights(sources_of([float(weight) for weight in weights]))
    order = SourceOrder(whole)
    counts = order.counts(start)
    for position in range(start, start + 300):
        source, own = order.place(position)
        assert own == counts[source]
        counts[source] += 1


def test_the_sequence_of_sources_is_the_one_that_checkpoints_count_in() -> None:
    assert [SourceOrder(THREE).place(position) for position in range(11)] == [
        (0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 3), (1, 2), (0, 4), (2, 1), (0, 5),
    ]  # fmt: skip


def test_weights_are_ratios_as_written() -> None:
    assert whole_weights(sources_of([0.5, 0.3, 0.2])) == THREE
    assert whole_weights(sources_of([0.1, 1e-3])) == (100, 1)
    assert whole_weights(sources_of([0.056, 0.188, 0.318, 0.188, 0.25])) == (28, 94, 159, 94, 125)
    with pytest.raises(UserError, match=r"658340:168913 .* for example to 796:204"):
        whole_weights(sources_of([658340, 168913]))
    assert sum(whole_weights(sources_of([LONGEST_PERIOD - 1, 1]))) == LONGEST_PERIOD


def test_names_of_sources_differ() -> None:
    sources = [
        SourceSettings(shards="/data/a", weight=1),
        SourceSettings(shards="/more/a", weight=1),
        SourceSettings(shards="b", weight=1, name="a-2"),
    ]
    assert source_names(sources) == ("a", "a-3", "a-2")
    assert source_names(sources, ["ssv2", "ssv2", "ssv2"]) == ("ssv2", "ssv2-2", "a-2")


@pytest.fixture(scope="module")
def folders(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three folders of shards; the third calls itself SSv2."""
    ssv2 = tmp_path_factory.mktemp("mixture") / "ssv2"
    shutil.copytree(demo_shards / "test", ssv2)
    manifest = json.loads((ssv2 / MANIFEST).read_bytes()) | {"dataset": "ssv2"}
    (ssv2 / MANIFEST).write_text(json.dumps(manifest))
    return [str(demo_shards / "train"), str(demo_shards / "test"), str(ssv2)]


@pytest.fixture
def mixed(tiny: MakeRecipe, folders: list[str]) -> MakeRecipe:
    """A recipe of three sources, 5:3:2. own: of each source; data, train: of the recipe."""

    def make(
        *own: dict[str, Any],
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
    ) -> PretrainRecipe:
        sources = [
            {"shards": folder, "weight": weight, **more}
            for folder, weight, more in zip(folders, THREE, own or ({}, {}, {}), strict=True)
        ]
        above = {"sources": sources, "num_videos": None, **(data or {})}
        return tiny(data=above, train={"max_steps": 5, "total_batch": 12, **(train or {})})

    return make


def clips_of(recipe: PretrainRecipe, **options: Any) -> MixedClips:
    return MixedClips(ShardMix(recipe.data), recipe, **options)


def test_a_source_keeps_its_order_whatever_else_is_in_the_mixture(mixed: MakeRecipe) -> None:
    """Each video of a source once per epoch of that source, in the order of its own seed."""
    clips = clips_of(mixed())
    keys: dict[str, list[str]] = {name: [] for name in clips.names}
    for position in range(960):
        source, _, key = clips.key_at(position).partition(":")
        keys[source].append(key)
    assert {name: len(read) for name, read in keys.items()} == clips.videos_by_source(960)
    for read in keys.values():
        epochs = [read[start : start + 48] for start in range(0, len(read) - 47, 48)]
        assert len(epochs) >= 4
        assert all(len(set(epoch)) == 48 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_sources_share_no_draws_and_a_run_without_sources_keeps_its_own(
    mixed: MakeRecipe, tiny: MakeRecipe, folders: list[str]
) -> None:
    same = {"shards": folders[0]}
    clips = clips_of(mixed(same, same, same))
    keys = [key for position in range(200) for key in clips[position].keys]
    assert len(set(keys)) == 200
    # Two sources of the same shards are two orders.
    orders = [[part.order.place(p) for p in range(48)] for part in clips.sources]
    assert orders[0] != orders[1] != orders[2]
    assert not {part.seed for part in clips.sources} & {tiny().train.seed}


def test_ssv2_in_the_mixture_keeps_its_protocol(
    mixed: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never flipped, at its own stride, while the other sources follow data."""
    with pytest.raises(UserError, match=r"data\.sources\.2 \(ssv2\): data\.flip=true, but .* ssv2"):
        clips_of(mixed(data={"flip": True}))
    protocol = {"flip": False, "stride": 2, "crop": "random_resized", "crop_area": [0.5, 1.0]}
    clips = clips_of(mixed({}, {}, protocol, data={"flip": True}))
    flips: dict[str, set[bool]] = {name: set() for name in clips.names}
    for name, part in zip(clips.names, clips.sources, strict=True):
        assert part.data.stride == (2 if name == "ssv2" else 1)
        assert part.data.crop == ("random_resized" if name == "ssv2" else "multi_scale")
        numbers = part.order.place(0)
        pictures = part.frames(numbers.shard, part._sample(numbers), torch.arange(8).numpy())
        for position in range(40):
            place = part.order.place(position)
            flips[name].add(part._cropped(pictures, place, 0)[2])
    assert flips["ssv2"] == {False}
    assert all(drawn == {False, True} for name, drawn in flips.items() if name != "ssv2")


def test_a_mixture_that_flips_other_sources_can_be_probed_on_ssv2(
    mixed: MakeRecipe, folders: list[str]
) -> None:
    """A probe flips nothing; it would be refused in the middle of the run."""
    recipe = mixed({}, {}, {"flip": False}, data={"flip": True})
    ssv2 = ShardSet(folders[2])
    assert not EvaluationClips(ssv2, for_labels(ssv2, recipe))[0].skipped


def test_a_source_alone_has_the_settings_of_data_that_it_does_not_override(
    mixed: MakeRecipe, folders: list[str]
) -> None:
    recipe = mixed({"flip": True}, {"sampling": "uniform"}, {}, data={"stride": 3})
    alone = recipe.data.of_source(0)
    same = recipe.data.model_copy(update={"sources": None, "flip": True, "shards": folders[0]})
    assert alone == same
    assert recipe.data.of_source(1).sampling == "uniform"
    # Each overridable setting is one of data.
    own = SourceSettings.model_fields.keys() - {"weight", "name"}
    assert own <= type(recipe.data).model_fields.keys()


def test_a_source_replaces_the_stride_of_data_by_fps_and_the_reverse(mixed: MakeRecipe) -> None:
    recipe = mixed({"fps": 5}, {}, {"stride": 2}, data={"stride": 3})
    times = [(data.stride, data.fps) for data in map(recipe.data.of_source, range(3))]
    assert times == [(None, 5), (3, None), (2, None)]
    recipe = mixed({}, {}, {"stride": 2}, data={"stride": None, "fps": 4})
    times = [(data.stride, data.fps) for data in map(recipe.data.of_source, range(3))]
    assert times == [(None, 4), (None, 4), (2, None)]
    assert all(not clips_of(recipe)[position].skipped for position in range(10))
    protocol = make_plan(recipe, world_size=1, num_videos=dict.fromkeys("abc", 48)).sources
    assert [(p.protocol.get("stride"), p.protocol.get("fps")) for p in protocol] == times


def steps_of(recipe: PretrainRecipe, world: int, first: int = 0) -> list[list[int]]:
    """Keys of the clips of each step over all ranks, sorted."""
    shards = ShardMix(recipe.data)
    plan = make_plan(recipe, world_size=world, num_videos=shards.videos)
    steps: list[list[int]] = [[] for _ in range(plan.steps - first)]
    for rank in range(world):
        loader = TrainLoader(
            shards,
            recipe,
            plan,
            rank=rank,
            first_step=first,
            num_workers=0,
            pin_memory=False,
            clips=MixedClips,
        )
        for number, batch in enumerate(loader):
            assert batch.valid.all()
            steps[number // plan.accumulation] += batch.keys.tolist()
    return [sorted(step) for step in steps]


def test_any_number_of_ranks_and_any_first_step_see_the_same_clips(mixed: MakeRecipe) -> None:
    """Also numbers of ranks that do not divide data.num_streams: here every rank reads them all."""
    recipe = mixed(data={"num_streams": 5})
    alone = steps_of(recipe, 1)
    for world, first in ((2, 0), (3, 2)):
        assert steps_of(recipe, world, first) == alone[first:]


def test_every_rank_gets_videos_of_every_source(mixed: MakeRecipe) -> None:
    """Dealt in turn, a source of every 8th position would be the work of one of 8 ranks."""
    recipe = mixed(train={"total_batch": 800, "micro_batch": 100, "max_steps": 3})
    plan = make_plan(recipe, world_size=8, num_videos=dict.fromkeys("abc", 48))
    order = SourceOrder((6, 1, 1))
    counts = [Counter[int]() for _ in range(8)]
    for rank, count in enumerate(counts):
        for batch in rank_positions(plan, rank=rank, first_step=0):
            count.update(order.place(position)[0] for position in batch)
    assert all(20 < count[source] < 60 for count in counts for source in (1, 2))


def test_failures_name_the_source_and_two_sources_may_have_the_same_keys(
    mixed: MakeRecipe, folders: list[str]
) -> None:
    """data.sources 1 and 2 are copies of the same shards."""
    recipe = mixed()
    clips = clips_of(recipe)
    position = next(p for p in range(100) if clips.key_at(p).startswith("ssv2:"))
    key = clips.key_at(position).removeprefix("ssv2:")
    other = next(p for p in range(500) if clips.key_at(p) == f"{clips.names[1]}:{key}")
    # As the loader does when a worker hung, and as a later start reads it from the quarantine.
    clips.left_out[f"ssv2:{key}"] = "hang"
    skipped = clips[position].skipped
    assert skipped is not None
    assert (skipped.key, skipped.kind) == (f"ssv2:{key}", "hang")
    assert clips[other].skipped is None
    again = clips_of(recipe, left_out={f"ssv2:{key}": "hang"})
    assert again[position].skipped is not None


def test_the_watch_records_run_positions(
    mixed: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = clips_of(mixed())
    seen = []
    monkeypatch.setattr(TrainClips, "at", lambda self, own: seen.append(clips.watch.position(0)))
    for position in (3, 70):
        clips[position]
    assert seen == [3, 70]


def test_a_remote_source_is_fetched_ahead_in_its_own_order(
    mixed: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, fetched = clips_of(mixed()), []
    part = clips.sources[1]
    monkeypatch.setattr(type(part.shards), "is_remote", property(lambda self: self is part.shards))
    monkeypatch.setattr(part.shards, "fetch_ahead", fetched.append)
    position = next(p for p in range(10) if clips.order.place(p)[0] == 1)
    clips[position]
    assert fetched == [part.order.place(32 * part.data.num_streams).shard]


def test_the_identity_of_a_mixture_covers_manifests_weights_and_order(
    mixed: MakeRecipe, folders: list[str], tmp_path: Path
) -> None:
    def identity(*own: dict[str, Any]) -> str:
        return ShardMix(mixed(*own).data).hash

    a, _, c = ({"shards": folder} for folder in folders)
    moved = tmp_path / "moved"
    shutil.copytree(folders[0], moved)
    original = identity()
    assert identity({"shards": str(moved), "num_videos": 9}, {}, {}) == original
    assert identity({"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2}) == original
    changed = [
        identity({"weight": 4}, {}, {}),
        identity(c, {}, a),
        identity(a, a, {}),
    ]
    assert len({original, *changed}) == 4


def test_a_run_resumes_with_moved_sources_and_refuses_others(
    mixed: MakeRecipe, tmp_path: Path, folders: list[str]
) -> None:
    run_folder.write_recipe(tmp_path, mixed())
    run_folder.require_same_mathematics(tmp_path, mixed({"shards": "/elsewhere"}, {}, {}))
    for changed in (
        mixed({"weight": 4}, {}, {}),
        mixed({"flip": True}, {}, {}),
        mixed(data={"sources": [{"shards": folders[0], "weight": 1}]}),
        mixed(data={"sources": None, "shards": folders[0]}),
    ):
        with pytest.raises(UserError, match=r"other settings \(data\.sources was"):
            run_folder.require_same_mathematics(tmp_path, changed)


def test_the_plan_has_every_source(mixed: MakeRecipe) -> None:
    recipe = mixed({}, {"flip": False, "stride": 2}, {}, train={"max_steps": 400})
    plan = make_plan(recipe, world_size=1, num_videos={"a": 48, "b": 480, "c": 2})
    assert plan.num_videos == 530
    assert [source.share for source in plan.sources] == [0.5, 0.3, 0.2]
    assert [source.epochs for source in plan.sources] == [50.0, 3.0, 480.0]
    assert plan.sources[1].protocol["stride"] == 2
    lines = source_lines(plan)
    assert lines[1] == (
        "source b: 480 videos, 30.0% of the clips, 3 epochs; sampling dense, stride 2, "
        "crop multi_scale, flip false"
    )
    repeated = [note for note in notes(recipe, plan) if "repeated" in note]
    assert len(repeated) == 1
    assert "source c is repeated 480 times" in repeated[0]
    tree = json.loads(json.dumps(plan.as_dict()))
    assert tree["sources"][2]["videos"] == 2


def test_a_plan_without_a_mixture_is_what_it_was(tiny: MakeRecipe) -> None:
    assert "sources" not in make_plan(tiny(), world_size=1).as_dict()
    assert source_lines(make_plan(tiny(), world_size=1)) == []


def test_a_mixture_is_planned_before_its_shards_exist(mixed: MakeRecipe) -> None:
    counts = [{"shards": f"/none/{n}", "num_videos": 10 ** (3 + n)} for n in range(3)]
    plan = make_plan(mixed(*counts), world_size=1)
    assert [source.name for source in plan.sources] == ["0", "1", "2"]
    assert plan.num_videos == 111_000
    with pytest.raises(UserError, match="a source has none"):
        make_plan(mixed(), world_size=1)


@pytest.mark.parametrize(
    ("data", "train", "reason"),
    [
        ({"shards": "A"}, {}, r"data.shards=A and data.sources exclude each other"),
        ({"scores": "S", "crop": "grid"}, {}, r"data.scores=S and data.sources exclude"),
        ({"sources": []}, {}, "data.sources is empty"),
        ({}, {"max_steps": None, "epochs": 3}, "data.sources needs train.max_steps"),
        ({"sources": [{"shards": "A"}]}, {}, r"'data.sources.0.weight' is missing"),
        ({"sources": [{"shards": "A", "weight": 0}]}, {}, r"data.sources.0.weight=0: must be gr"),
        ({"sources": [{"shards": "A", "weight": 1, "flp": 1}]}, {}, r"unknown key 'data.sources.0"),
        ({"sources": [{"shards": "A", "weight": 1, "name": "a:b"}]}, {}, "data.sources.0.name"),
        (
            {"sources": [{"shards": "A", "weight": 1, "crop": "short_side", "short_side": 9}]},
            {},
            "data.sources.0: data.short_side=9 is smaller",
        ),
        (
            {"sources": [{"shards": "A", "weight": 1, "name": "a"}] * 2},
            {},
            "two of data.sources have the same name",
        ),
    ],
)
def test_contradictions_are_explained(
    mixed: MakeRecipe, data: dict[str, Any], train: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        mixed(data=data, train=train)


def test_tasks_that_learn_labels_refuse_sources(
    tiny_finetune: Callable[..., Any], folders: list[str]
) -> None:
    sources = [{"shards": folders[0], "weight": 1}]
    with pytest.raises(UserError, match=r"learn no labels, and task=finetune does.*reshard"):
        tiny_finetune(data={"sources": sources, "num_videos": None})


def test_a_source_is_changed_by_its_number_on_the_command_line(tmp_path: Path) -> None:
    from arvideo_ds.config import load_recipe

    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: pretrain_vit_b_k400\ntrain: {max_steps: 9}\ndata:\n  num_videos: null\n"
        "  sources: [{shards: A, weight: 2}, {shards: B, weight: 1}]\n"
    )
    sources = load_recipe(str(path), ["data.sources.1.shards=C", "data.sources.0.flip=true"])
    changed = sources.data.sources
    assert changed is not None
    assert [(s.shards, s.weight, s.flip) for s in changed] == [("A", 2, True), ("C", 1, None)]
    with pytest.raises(
        UserError, match=r"sources\.2 is not a section: .* sources\.0 to sources\.1"
    ):
        load_recipe(str(path), ["data.sources.2.shards=C"])


def test_an_exported_recipe_has_no_folders_of_its_sources(mixed: MakeRecipe) -> None:
    sources = public_recipe(mixed())["data"]["sources"]
    assert [source["shards"] for source in sources] == ["train", "test", "ssv2"]


def test_place_takes_no_time_that_depends_on_the_position() -> None:
    order = SourceOrder((LONGEST_PERIOD - 1, 1))
    assert math.isclose(order.place(10**15)[1], 10**15, rel_tol=1e-3)
