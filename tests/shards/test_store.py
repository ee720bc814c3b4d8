"""Shards behind a URL: the same samples, fetched once, checked, never half there."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import TrainLoader
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards import store as store_module
from arvideo_ds.shards.manifest import ShardSet, UnreachableError
from arvideo_ds.shards.store import RemoteStore
from tests.shards.faulty_server import FaultyServer, serve

FIRST_PAUSE_S = store_module._FIRST_PAUSE_S
URL = "memory://bucket/shards"
MakeRecipe = Callable[..., PretrainRecipe]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARVIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ARVIDEO_FETCH_TIMEOUT_S", "1")
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def remote(demo_shards: Path, cache: Path) -> ShardSet:
    """The demo's shards in fsspec's memory file system, before an empty cache."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in (demo_shards / "train").iterdir():
        files.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    return ShardSet(URL)


@pytest.fixture
def folder(textured_shards: Path, tmp_path: Path) -> Path:
    """Three shards that a test may change."""
    return shutil.copytree(textured_shards, tmp_path / "served")


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with serve(folder) as server:
        yield server


def everything(shards: ShardSet) -> list[bytes]:
    return [
        shards.read(number, sample)
        for number in range(len(shards.manifest.shards))
        for sample in shards.index(number).samples
    ]


def cached(cache: Path, pattern: str = "*.tar") -> list[str]:
    return sorted(path.name for path in cache.rglob(pattern))


def in_processes(count: int, function: Callable[[], None]) -> list[int | None]:
    """Exit codes of forked processes that do the same at once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_url_gives_the_samples_of_the_folder_and_fetches_each_shard_once(
    remote: ShardSet, demo_shards: Path, cache: Path
) -> None:
    local = ShardSet(demo_shards / "train")
    assert remote.hash == local.hash
    remote.check_sizes()
    assert not cached(cache)
    assert everything(remote) == everything(local)
    fetched = {path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert fetched == {p.name for p in local.folder.iterdir()} - {"rejects.jsonl", ".lock"}
    nodes = {p: p.stat().st_ino for p in cache.rglob("*.tar")}
    assert everything(ShardSet(URL)) == everything(local)
    assert nodes == {p: p.stat().st_ino for p in cache.rglob("*.tar")}


def test_a_shard_cut_behind_the_url_is_named_and_never_in_the_cache(
    remote: ShardSet, cache: Path
) -> None:
    name = remote.manifest.shards[0].name
    fsspec.filesystem("memory").pipe_file(f"/bucket/shards/{name}", b"half")
    for use in (everything, ShardSet.check_sizes):
        with pytest.raises(UserError, match=f"{name} has 4 bytes"):
            use(remote)
    assert not cached(cache)


@pytest.mark.parametrize("url", ["memory://bucket/nothing", "nonsense://bucket/shards"])
def test_a_url_without_shards_and_an_unknown_protocol_are_a_users_mistake(
    remote: ShardSet, url: str
) -> None:
    with pytest.raises(UserError, match=url):
        ShardSet(url)


@pytest.mark.parametrize(
    "variable", ["ARVIDEO_CACHE_GIB", "ARVIDEO_FETCH_TRIES", "ARVIDEO_FETCH_TIMEOUT_S"]
)
@pytest.mark.parametrize("value", ["no", "-1", "nan"])
def test_settings_of_the_cache_are_numbers_above_zero(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}={value}"):
        RemoteStore(URL)


def test_every_failure_of_a_server_is_tried_again_and_ends(
    server: FaultyServer, folder: Path, cache: Path
) -> None:
    server.faults["manifest.json"] = ["503"]
    names = [shard.name for shard in ShardSet(folder).manifest.shards]
    for name, faults in zip(names, (["500", "503"], ["drop", "drop"], ["stall"]), strict=True):
        server.faults[name] = list(faults)
    begun = time.monotonic()
    assert everything(ShardSet(server.url)) == everything(ShardSet(folder))
    assert time.monotonic() - begun < 20  # a stall alone would last for a minute
    assert [server.whole[name] for name in names] == [1, 1, 1]
    assert not cached(cache, "*.partial")


def test_processes_that_want_one_shard_at_once_fetch_it_once(
    server: FaultyServer, folder: Path
) -> None:
    """Also forked ones of a process that used the URL before, as data workers are."""
    shards, expected = ShardSet(server.url), everything(ShardSet(folder))
    shards.check_sizes()

    def read() -> None:
        assert everything(shards) == expected

    assert in_processes(8, read) == [0] * 8
    assert {server.gets[shard.name] for shard in shards.manifest.shards} == {1}


def test_a_process_killed_while_it_fetches_holds_up_nobody(
    server: FaultyServer, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARVIDEO_FETCH_TIMEOUT_S", "60")
    shards = ShardSet(server.url)
    name = shards.manifest.shards[0].name
    server.faults[name] = ["stall"]
    process = multiprocessing.get_context("fork").Process(target=shards.path, args=(0,))
    process.start()
    while not cached(cache, "*.tar.partial"):
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert shards.path(0).read_bytes() == (folder / name).read_bytes()
    assert not cached(cache, "*.partial")


def test_a_lock_ends_with_its_block_although_a_process_was_forked_in_it(tmp_path: Path) -> None:
    """The child has the descriptor too: without an unlock, all would wait until the child ends."""
    with store_module._locked(tmp_path / "file.lock"):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
    try:
        with (tmp_path / "file.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        process.kill()
        process.join()


def test_the_pauses_between_tries_outlast_an_outage_of_five_seconds(
    remote: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", FIRST_PAUSE_S)
    monkeypatch.setattr(store_module.time, "sleep", slept.append)
    monkeypatch.setattr(random.SystemRandom, "uniform", lambda _self, low, _high: low)
    fsspec.filesystem("memory").store.clear()
    monkeypatch.setattr(store_module, "_DEFINITE", ())
    with pytest.raises(UnreachableError, match="tries"):
        remote.path(0)
    assert 5 < sum(slept) < 20


def test_a_server_that_is_gone_is_a_sentence_at_the_start_and_a_skip_while_training(
    server: FaultyServer, tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARVIDEO_FETCH_TRIES", "2")
    shards = ShardSet(server.url)
    clips = TrainClips(shards, tiny(data={"shards": server.url}))
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot (open|read|fetch) .*2 tries"):
        ShardSet(server.url)
    for check in (shards.check_sizes, lambda: shards.index(0)):
        with pytest.raises(UnreachableError, match=r"cannot fetch .*2 tries"):
            check()
    begun = time.monotonic()
    skipped = [clips[position].skipped for position in range(9)]
    assert {one.kind for one in skipped if one} == {"unreachable"}
    assert len(skipped) == len([one for one in skipped if one])
    # A shard that just failed is not asked for again for each of its videos.
    assert time.monotonic() - begun < 2


def test_data_workers_read_http_as_one_process_reads_the_folder(
    server: FaultyServer, folder: Path, tiny: MakeRecipe
) -> None:
    """fsspec's connections do not survive a fork; every worker opens its own."""

    def clips(where: str | Path, workers: int) -> list[torch.Tensor]:
        shards, recipe = ShardSet(where), tiny(data={"num_videos": 9, "num_streams": 2})
        shards.check_sizes()
        plan = make_plan(recipe, world_size=1, num_videos=shards.num_samples)
        options = {"rank": 0, "first_step": 0, "num_workers": workers, "pin_memory": False}
        loader = TrainLoader(shards, recipe, plan, **options)  # type: ignore[arg-type]
        batches = list(loader)
        assert not any(batch.skipped for batch in batches)
        return [batch.clips for batch in batches]

    for one, other in zip(clips(server.url, 2), clips(folder, 0), strict=True):
        assert torch.equal(one, other)
    names = [shard.name for shard in ShardSet(folder).manifest.shards]
    assert [server.gets[name] for name in names] == [1, 1, 1]


def test_the_cache_stays_within_its_bound_and_forgets_what_was_not_used(
    server: FaultyServer, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [shard.bytes for shard in ShardSet(folder).manifest.shards]
    names = [shard.name for shard in ShardSet(folder).manifest.shards]
    others = sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".json")
    limit = sum(sizes) - min(sizes) // 2 + others
    monkeypatch.setenv("ARVIDEO_CACHE_GIB", repr(limit / 2**30))
    shards = ShardSet(server.url)
    for number in (0, 1, 0, 2):  # 1 was not used for the longest time
        shards.read(number, shards.index(number).samples[0])
        time.sleep(0.02)  # file systems keep time in ticks
    assert cached(cache) == sorted([names[0], names[2]])
    assert sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) <= limit
    descriptor = RemoteStore(server.url, shards.hash).open(names[0], sizes[0])
    shards.path(2)
    shards.path(1)
    # 0 was not used for longer than 2, but somebody reads it.
    assert cached(cache) == sorted([names[0], names[1]])
    os.close(descriptor)
    monkeypatch.setenv("ARVIDEO_CACHE_GIB", repr(min(sizes) / 2 / 2**30))
    with pytest.raises(UserError, match="more than ARVIDEO_CACHE_GIB"):
        everything(ShardSet(server.url))


def test_shards_made_anew_at_the_same_url_are_fetched_anew(
    server: FaultyServer, folder: Path, demo_shards: Path
) -> None:
    first = everything(ShardSet(server.url))
    shutil.rmtree(folder)
    shutil.copytree(demo_shards / "train", folder)
    for path in folder.glob("*"):  # another set under the same names
        path.rename(path.with_name(path.name.replace("folder-train", "folder")))
    manifest = (folder / "manifest.json").read_text().replace("folder-train", "folder")
    (folder / "manifest.json").write_text(manifest)
    assert everything(ShardSet(server.url)) == everything(ShardSet(folder)) != first


def test_a_damaged_index_in_the_cache_is_fetched_again(server: FaultyServer, cache: Path) -> None:
    expected = ShardSet(server.url).index(0)
    path = next(cache.rglob("*000.index.json"), None) or next(cache.rglob("*.index.json"))
    path.write_bytes(path.read_bytes()[:-9])
    assert ShardSet(server.url).index(0) == expected


def test_a_shard_is_fetched_before_it_is_needed(server: FaultyServer, cache: Path) -> None:
    shards = pickle.loads(pickle.dumps(ShardSet(server.url)))  # as a spawned worker has it
    shards.fetch_ahead(1)
    limit = time.monotonic() + 20
    while cached(cache) != [shards.manifest.shards[1].name] and time.monotonic() < limit:
        time.sleep(0.02)
    shards.read(1, shards.index(1).samples[0])
    assert server.gets[shards.manifest.shards[1].name] == 1
