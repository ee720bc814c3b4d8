"""Shards behind a URL: the same samples, fetched once, checked, never half there."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from arvideo_ds.data.manifest import ShardSet
from arvideo_ds.errors import UserError

URL = "memory://bucket/shards"


@pytest.fixture
def remote(demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """The demo's shards in fsspec's memory file system, before an empty cache."""
    monkeypatch.setenv("ARVIDEO_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in (demo_shards / "train").iterdir():
        files.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    return ShardSet(URL)


def everything(shards: ShardSet) -> list[bytes]:
    return [
        shards.read(number, sample)
        for number in range(len(shards.manifest.shards))
        for sample in shards.index(number).samples
    ]


def test_a_url_gives_the_samples_of_the_folder_and_fetches_each_shard_once(
    remote: ShardSet, demo_shards: Path, tmp_path: Path
) -> None:
    local = ShardSet(demo_shards / "train")
    assert remote.hash == local.hash
    remote.check_sizes()
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert everything(remote) == everything(local)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert fetched == {p.name for p in local.folder.iterdir()} - {"rejects.jsonl"}
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")}
    assert everything(ShardSet(URL)) == everything(local)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")}


def test_a_shard_cut_behind_the_url_is_named_before_it_is_fetched(
    remote: ShardSet, tmp_path: Path
) -> None:
    name = remote.manifest.shards[0].name
    fsspec.filesystem("memory").pipe_file(f"/bucket/shards/{name}", b"half")
    with pytest.raises(UserError, match=f"{name} has 4 bytes"):
        everything(remote)
    assert not list((tmp_path / "cache").rglob("*.tar"))


@pytest.mark.parametrize("url", ["memory://bucket/nothing", "nonsense://bucket/shards"])
def test_a_url_without_shards_and_an_unknown_protocol_are_a_users_mistake(
    remote: ShardSet, url: str
) -> None:
    with pytest.raises(UserError, match=url):
        ShardSet(url)
