"""Batches: the same whatever the workers, ranks or the step begun at; bad samples cost no other."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.data import clips as clips_module
from arvideo_ds.data import loader as loader_module
from arvideo_ds.data.clips import EvaluationClips, TrainClips, for_labels
from arvideo_ds.data.loader import (
    Batch,
    TrainLoader,
    evaluation_batches,
    evaluation_loader,
    worker_count,
)
from arvideo_ds.decoding.decoders import DecodeError, decode
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import MANIFEST, ShardSet

MakeRecipe = Callable[..., PretrainRecipe]


@pytest.fixture(scope="module")
def shards(demo_shards: Path) -> ShardSet:
    return ShardSet(demo_shards / "train")


def train_loader(
    shards: ShardSet,
    recipe: PretrainRecipe,
    *,
    world: int = 1,
    rank: int = 0,
    first: int = 0,
    workers: int,
    left_out: dict[str, str] | None = None,
) -> TrainLoader:
    plan = make_plan(recipe, world_size=world, num_videos=shards.num_samples)
    return TrainLoader(
        shards,
        recipe,
        plan,
        rank=rank,
        first_step=first,
        num_workers=workers,
        pin_memory=False,
        left_out=left_out,
    )


def load(
    shards: ShardSet,
    recipe: PretrainRecipe,
    *,
    world: int = 1,
    rank: int = 0,
    first: int = 0,
    workers: int = 0,
) -> list[Batch]:
    return list(train_loader(shards, recipe, world=world, rank=rank, first=first, workers=workers))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in ("clips", "keys", "labels", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def clips_by_key(batches: list[Batch]) -> dict[int, bytes]:
    return {
        int(key): clip.numpy().tobytes()
        for batch in batches
        for key, clip in zip(batch.keys, batch.clips, strict=True)
    }


def damaged(shards: ShardSet, folder: Path) -> tuple[ShardSet, str]:
    """A copy of the shards with the bytes of one video overwritten, and that video's key."""
    shutil.copytree(shards.folder, folder)
    sample = shards.index(0).samples[5]
    with (folder / shards.manifest.shards[0].name).open("r+b") as file:
        file.seek(sample.offset)
        file.write(b"\xa5" * sample.bytes)
    return ShardSet(folder), sample.key


def test_clips_are_uint8_with_frames_first_and_colours_last(
    shards: ShardSet, tiny: MakeRecipe
) -> None:
    recipe = tiny(data={"size": [32, 24], "frames": 6}, objective={"cluster": [1, 1, 1]})
    for batch in load(shards, recipe):
        assert batch.clips.shape == (8, 6, 32, 24, 3)
        assert batch.clips.dtype == torch.uint8
        assert batch.keys.dtype == batch.labels.dtype == torch.int64
        assert batch.valid.all()
        assert batch.clips.float().std() > 10


def test_every_core_of_a_rank_has_a_worker(tiny: MakeRecipe) -> None:
    """Where there are many, one is left to the trainer."""
    counts = {
        cores: worker_count(tiny(data={"workers": "auto"}), cores=cores)
        for cores in (1, 2, 8, 9, 26, 128)
    }
    assert counts == {1: 1, 2: 2, 8: 8, 9: 8, 26: 25, 128: 127}
    assert worker_count(tiny(data={"workers": 0}), cores=26) == 0
    # Clips of 8 x 32 x 32 x 3 bytes: 12 batches of 100 in 30 MiB.
    little = {"workers": "auto", "prefetch_mib": 30}
    recipe = tiny(data=little, train={"total_batch": 100, "micro_batch": 100})
    assert [worker_count(recipe, cores=cores) for cores in (4, 64)] == [4, 12]


def test_workers_change_nothing(shards: ShardSet, tiny: MakeRecipe) -> None:
    recipe = tiny(data={"flip": True}, train={"max_steps": 8})
    assert_same(load(shards, recipe, workers=0), load(shards, recipe, workers=2))


def test_ranks_share_the_clips_of_every_step(shards: ShardSet, tiny: MakeRecipe) -> None:
    # Eight steps of eight videos: past the end of the first epoch.
    recipe = tiny(data={"flip": True}, train={"max_steps": 8})
    alone = load(shards, recipe)
    ranks = [load(shards, recipe, world=2, rank=rank) for rank in range(2)]
    for step, batch in enumerate(alone):
        parts = [clips_by_key([rank[step]]) for rank in ranks]
        assert [len(part) for part in parts] == [4, 4]
        assert parts[0] | parts[1] == clips_by_key([batch])


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_a_run_begun_at_a_step_is_the_tail_of_the_whole_run(
    shards: ShardSet, tiny: MakeRecipe, micro_batch: int
) -> None:
    recipe = tiny(train={"max_steps": 8, "micro_batch": micro_batch})
    whole = load(shards, recipe)
    assert_same(load(shards, recipe, first=5), whole[5 * 8 // micro_batch :])
    assert load(shards, recipe, first=8) == []


def test_epochs_and_seeds_cut_clips_of_their_own(shards: ShardSet, tiny: MakeRecipe) -> None:
    train = {"max_steps": 12, "total_batch": 8}
    clips = clips_by_key(load(shards, tiny(train=train)))
    assert len(clips) == 96  # two epochs of 48, no key twice
    other = clips_by_key(load(shards, tiny(train={**train, "seed": 1})))
    assert not clips.keys() & other.keys()


def test_repeats_cut_a_video_several_times_into_one_batch(
    shards: ShardSet, tiny: MakeRecipe
) -> None:
    recipe = tiny(
        data={"repeats": 3, "crop_scales": [0.8, 0.5]},
        train={"total_batch": 12, "micro_batch": 6, "max_steps": 12},
    )
    batches = load(shards, recipe)
    assert all(batch.clips.shape[0] == 6 for batch in batches)
    assert len(clips_by_key(batches)) == 12 * 12
    differing = 0
    for batch in batches:
        for video in range(2):
            own = slice(3 * video, 3 * video + 3)
            assert len(set(batch.labels[own].tolist())) == 1
            differing += len({clip.numpy().tobytes() for clip in batch.clips[own]}) > 1
    # Two scales and 25 places: three equal crops are rare.
    assert differing >= 44
    # The first epoch has every video once: the labels are those of the data set, thrice each.
    labels = torch.cat([batch.labels for batch in batches])
    assert torch.bincount(labels).tolist() == [18] * 8


@pytest.mark.parametrize("data", [{"planes": True}, {"sampling": "uniform"}])
def test_segments_cut_clips_from_parts_of_a_video_anew_in_each_epoch(
    data: dict[str, object], shards: ShardSet, tiny: MakeRecipe
) -> None:
    """Frames, crops and flips are functions of seed, epoch and position."""
    settings = {"repeats": 2, "segments": True, "frames": 2, "flip": True, **data}

    def epochs(seed: int) -> list[Batch]:
        train = {"total_batch": 96, "micro_batch": 96, "max_steps": 2, "seed": seed}
        recipe = tiny(data=settings, objective={"cluster": [1, 1, 1]}, train=train)
        return load(shards, recipe)

    def contents(batch: Batch) -> set[bytes]:
        return {clip.numpy().tobytes() for clip in batch.clips}

    first, second = epochs(0)
    assert_same([first, second], epochs(0))
    assert torch.equal(first.labels[::2], first.labels[1::2])
    assert not torch.equal(first.labels, second.labels)  # another order
    for other in (second, epochs(1)[0]):
        assert len(contents(first) & contents(other)) < 10


def test_segments_of_uncropped_clips_are_in_the_order_of_the_video(
    shards: ShardSet, tiny: MakeRecipe
) -> None:
    plain: dict[str, object] = {"crop_scales": [1.0], "frames": 2, "stride": 1, "size": 40}
    recipe = tiny(
        data={"repeats": 3, "segments": True, **plain},
        objective={"cluster": [1, 1, 1]},
        train={"total_batch": 6, "micro_batch": 6, "max_steps": 1},
    )
    loader = train_loader(shards, recipe, workers=0)
    (batch,) = loader
    for video in range(2):
        place, sample = loader._dataset.sample(video)  # type: ignore[union-attr]
        frames = decode("pyav", shards.read(place.shard, sample), np.arange(sample.num_frames))
        clips = batch.clips[3 * video : 3 * video + 3, 0].float()
        whole = torch.from_numpy(frames).float()
        starts = [int((whole - clip).abs().mean((1, 2, 3)).argmin()) for clip in clips]
        assert starts == sorted(starts)
        assert starts[0] < sample.num_frames / 2 <= starts[2] + 2


def test_a_video_that_does_not_decode_is_black_invalid_counted_and_named(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path
) -> None:
    bad, key = damaged(shards, tmp_path / "bad")
    recipe = tiny(data={"repeats": 2}, train={"total_batch": 16, "micro_batch": 16, "max_steps": 6})
    clean, found = load(shards, recipe), load(bad, recipe, workers=1)
    hit = [batch for batch in found if batch.num_skipped]
    assert len(hit) == 1
    (skipped,) = hit[0].skipped
    assert (skipped.key, skipped.kind) == (key, "altered")
    assert hit[0].num_skipped == 2
    assert sum(int((~batch.valid).sum()) for batch in found) == 2
    for one, other in zip(clean, found, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.clips[other.valid], other.clips[other.valid])
        assert not other.clips[~other.valid].any()


def test_a_byte_altered_in_a_shard_costs_that_video_and_says_so(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tiny()
    place, sample = TrainClips(shards, recipe).sample(13)
    folder = shutil.copytree(shards.folder, tmp_path / "altered")
    with (folder / shards.manifest.shards[place.shard].name).open("r+b") as tar:
        tar.seek(sample.offset + sample.bytes // 2)
        byte = tar.read(1)[0]
        tar.seek(-1, os.SEEK_CUR)
        tar.write(bytes([byte ^ 1]))
    skipped = [s for batch in load(ShardSet(folder), recipe) for s in batch.skipped]
    assert [(s.key, s.kind) for s in skipped] == [(sample.key, "altered")]


def test_a_video_that_no_decoder_reads_is_skipped_with_the_decoders_word(
    shards: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    key, video = key_at(shards, recipe, 13)

    def refuse() -> None:
        raise DecodeError("RuntimeError", "no picture")

    monkeypatch.setattr(clips_module, "decode", victim_of(video, refuse))
    skipped = [s for batch in load(shards, recipe) for s in batch.skipped]
    assert [(s.key, s.kind, s.message) for s in skipped] == [(key, "RuntimeError", "no picture")]


def test_evaluation_visits_every_sample_once_in_order(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path
) -> None:
    bad, key = damaged(shards, tmp_path / "bad")
    loader = evaluation_loader(bad, tiny(), evaluation_batches(bad.num_samples, 10), num_workers=1)
    batches = list(loader)
    assert [len(batch.keys) for batch in batches] == [10, 10, 10, 10, 8]
    assert batches[-1].clips.shape == (8, 8, 32, 32, 3)
    assert torch.cat([batch.keys for batch in batches]).tolist() == list(range(48))
    samples = [
        sample for number in range(len(bad.manifest.shards)) for sample in bad.index(number).samples
    ]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [s.label for s in samples]
    valid = torch.cat([batch.valid for batch in batches]).tolist()
    assert valid == [sample.key != key for sample in samples]
    again = list(
        evaluation_loader(bad, tiny(), evaluation_batches(bad.num_samples, 10), num_workers=0)
    )
    assert_same(batches, again)


def called(shards: ShardSet, folder: Path, dataset: str) -> ShardSet:
    """The same shards under the name of another data set."""
    shutil.copytree(shards.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_bytes()) | {"dataset": dataset}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ShardSet(folder)


SSV2 = ["ssv2", "folder+ssv2", "ssv2+kinetics400", "a+ssv2+b"]


@pytest.mark.parametrize("wrong", [{"flip": True}, {"sampling": "dense"}])
@pytest.mark.parametrize("dataset", SSV2)
def test_fine_tuning_on_ssv2_is_never_flipped_and_samples_uniformly_also_when_merged(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path, wrong: dict[str, object], dataset: str
) -> None:
    ssv2 = called(shards, tmp_path / "ssv2", dataset)

    def clips(**data: object) -> list[object]:
        recipe = finetuning(tiny(data={"flip": False, "sampling": "uniform"} | data))
        return [TrainClips(ssv2, recipe), EvaluationClips(ssv2, recipe)]

    assert clips()
    with pytest.raises(UserError, match=f"data.{next(iter(wrong))}"):
        clips(**wrong)


def test_pretraining_on_ssv2_samples_densely(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path
) -> None:
    """VideoMAE pretrains on 16 frames x stride 2 of SSv2 (scripts/ssv2/*/pretrain.sh)."""
    ssv2 = called(shards, tmp_path / "ssv2", "ssv2")
    recipe = tiny(data={"sampling": "dense"})
    assert load(ssv2, recipe)
    assert list(evaluation_loader(ssv2, recipe, [[0]], num_workers=0))
    with pytest.raises(UserError, match=r"data\.flip"):
        load(ssv2, tiny(data={"flip": True}))


@pytest.mark.parametrize("dataset", SSV2)
def test_probes_of_a_dense_pretraining_sample_ssv2_over_the_whole_video(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path, dataset: str
) -> None:
    """A probe compares labels, so the rule of the data set holds; other sets keep the recipe's."""
    recipe = tiny(data={"sampling": "dense"})
    probed = for_labels(called(shards, tmp_path / "ssv2", dataset), recipe)
    assert probed.data == recipe.data.model_copy(update={"sampling": "uniform"})
    assert probed.model_copy(update={"data": recipe.data}) == recipe
    assert for_labels(shards, recipe) == recipe


def finetuning(recipe: PretrainRecipe) -> FinetuneRecipe:
    """The same model, clips and training for labels."""
    tree = recipe.model_dump(include={"model", "data", "optim", "train"})
    return FinetuneRecipe.model_validate(tree)


def key_at(shards: ShardSet, recipe: PretrainRecipe, position: int) -> tuple[str, bytes]:
    """Key and bytes of the video at a run position."""
    place, sample = TrainClips(shards, recipe).sample(position)
    return sample.key, shards.read(place.shard, sample)


def victim_of(video: bytes, act: Callable[[], None]) -> Callable[..., object]:
    """The real decoder, but for one video, on which it does something else."""

    def decode_or_act(name: str, data: bytes, frames: object) -> object:
        if data == video:
            act()
        return decode(name, data, frames)  # type: ignore[arg-type]

    return decode_or_act


def hang() -> None:
    time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "kind"), [pytest.param(hang, "hang", marks=pytest.mark.slow), (die, "crash")]
)
def test_a_video_on_which_workers_are_lost_is_named_left_out_and_costs_no_other(
    shards: ShardSet,
    tiny: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    act: Callable[[], None],
    kind: str,
) -> None:
    recipe = tiny(data={"timeout_s": 2})
    whole = load(shards, recipe)
    key, video = key_at(shards, recipe, 13)  # the sixth video of the second step
    monkeypatch.setattr(clips_module, "decode", victim_of(video, act))
    before = set(multiprocessing.active_children())
    batches = load(shards, recipe, workers=2)
    assert f"on video {key}" in capsys.readouterr().out
    assert [(s.key, s.kind) for batch in batches for s in batch.skipped] == [(key, kind)]
    assert len(batches) == len(whole)
    for found, expected in zip(batches, whole, strict=True):
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.clips[found.valid], expected.clips[found.valid])
    assert sum(int((~batch.valid).sum()) for batch in batches) == recipe.data.repeats
    for child in set(multiprocessing.active_children()) - before:
        child.join(5)
        assert not child.is_alive()


def test_a_worker_killed_once_costs_nothing(shards: ShardSet, tiny: MakeRecipe) -> None:
    recipe = tiny(train={"max_steps": 12})
    whole = load(shards, recipe)
    loader = train_loader(shards, recipe, workers=2)
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == 3:
            loader._workers[0].kill()
    assert_same(batches, whole)


def test_a_worker_killed_while_it_looks_for_the_end_costs_nothing(
    shards: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trainer does not wait for a lock that the dead worker has."""
    recipe = tiny(train={"max_steps": 4})
    whole = load(shards, recipe)
    event, died = type(loader_module._context().Event()), tmp_path / "died"
    is_set = event.is_set

    def dying(self: Any) -> bool:
        with getattr(self, "_cond", nullcontext()):
            worker = get_worker_info()
            if worker is not None and worker.id == 0 and not died.exists():
                died.touch()
                die()
            return bool(is_set(self))

    monkeypatch.setattr(event, "is_set", dying)
    assert_same(load(shards, recipe, workers=2), whole)
    assert died.exists()


def test_videos_left_out_by_an_earlier_start_are_not_tried(
    shards: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    key, video = key_at(shards, recipe, 13)
    monkeypatch.setattr(clips_module, "decode", victim_of(video, die))
    loader = train_loader(shards, recipe, workers=0, left_out={key: "hang"})
    assert [s.key for batch in loader for s in batch.skipped] == [key]


@pytest.mark.slow
def test_a_decoder_that_hangs_on_everything_ends_the_run_with_the_settings_to_change(
    shards: ShardSet, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips_module, "decode", lambda *_: hang())
    with pytest.raises(UserError, match=r"data\.timeout_s=1"):
        load(shards, tiny(data={"timeout_s": 1}), workers=2)


def test_a_loader_that_ends_leaves_the_workers_of_another_alone(
    shards: ShardSet, tiny: MakeRecipe
) -> None:
    recipe = tiny(data={"prefetch": 1}, train={"max_steps": 8})
    whole = load(shards, recipe)
    other = iter(train_loader(shards, recipe, workers=1))
    first = next(other)
    load(shards, recipe, first=7)
    assert_same([first, *other], whole)


def test_test_views_are_temporal_by_spatial_and_the_single_one_is_among_them(
    shards: ShardSet, tiny: MakeRecipe
) -> None:
    one, many = EvaluationClips(shards, tiny()), EvaluationClips(shards, tiny(), views=(3, 3))
    for number in (0, 17):
        views = many[number]
        assert len(views.clips) == len(views.keys) == 9
        assert set(views.keys) == {number}
        assert torch.equal(views.clips[4], one[number].clips[0])
        assert not torch.equal(views.clips[0], views.clips[8])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_in_a_worker_reaches_the_user_as_its_sentence(
    shards: ShardSet, tiny: MakeRecipe, tmp_path: Path, workers: int
) -> None:
    folder = shutil.copytree(shards.folder, tmp_path / "shards")
    opened, name = ShardSet(folder), shards.manifest.shards[0].index_name
    (folder / name).unlink()
    batches = evaluation_loader(opened, tiny(), [[0, 1]], num_workers=workers)
    for use in (lambda: load(opened, tiny(), workers=workers), lambda: list(batches)):
        with pytest.raises(UserError, match=name) as error:
            use()
        assert str(error.value).startswith("cannot open")
        assert "\n" not in str(error.value)
