"""Shards in s3-like storage, behind a real server: the folder's samples, and errors in seconds."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from arvideo_ds.benchmark.loader import LoaderOptions, measure_loader
from arvideo_ds.cli import verify
from arvideo_ds.errors import UserError
from arvideo_ds.shards import store as store_module
from arvideo_ds.shards.manifest import ShardSet
from tests.conftest import ROOT
from tests.shards.s3_server import KEY, SECRET, S3Server, serve_s3

ANONYMOUS = {"s3": {"anon": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="module")
def url(server: S3Server, textured_shards: Path) -> str:
    return server.put(textured_shards, "bucket")


@pytest.fixture(autouse=True)
def cache(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("ARVIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.01)
    # As a process that starts: connections are opened with the environment of this test.
    store_module._file_system.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.gets.clear()
    return tmp_path / "cache"


def everything(where: str | Path) -> list[bytes]:
    shards = ShardSet(where)
    return [
        shards.read(number, sample)
        for number in range(len(shards.manifest.shards))
        for sample in shards.index(number).samples
    ]


def require_everything(url: str, folder: Path) -> None:
    assert everything(url) == everything(folder)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_started_after_a_use_of_the_url_read_it_and_fetch_each_shard_once(
    method: str,
    url: str,
    server: S3Server,
    textured_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """s3fs has a thread with an event loop, which a forked process does not have: no hang."""
    monkeypatch.syspath_prepend(str(ROOT))  # of spawned processes too
    shards = ShardSet(url)
    shards.check_sizes()
    context: Any = multiprocessing.get_context(method)
    options = {"target": require_everything, "args": (url, textured_shards), "daemon": True}
    processes = [context.Process(**options) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    shards.check_sizes()  # the parent's connection still works
    assert {server.gets[entry.name] for entry in shards.manifest.shards} == {1}


@pytest.mark.parametrize(
    ("where", "environment", "message"),
    [
        ("s3://no-bucket/sets", {}, "specified bucket does not exist"),
        ("s3://bucket/nothing", {}, "there are no shards in s3://bucket/nothing"),
        ("s3://bucket/sets", {"AWS_ACCESS_KEY_ID": ""}, "Unable to locate credentials"),
        ("s3://bucket/sets", {"AWS_PROFILE": "nobody"}, r"\(nobody\) could not be found"),
        ("s3://bucket/sets", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        ("s3://bucket/sets", {"AWS_ENDPOINT_URL_S3": "127.0.0.1:9"}, "Invalid endpoint"),
    ],
)
def test_a_mistake_about_s3_is_a_sentence_after_at_most_six_tries(
    where: str,
    environment: dict[str, str],
    message: str,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """botocore's own tries inside of each of ours would take most of a minute."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    if "AWS_ACCESS_KEY_ID" in environment:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    begun = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        ShardSet(where)
    assert time.monotonic() - begun < 5
    text = str(caught.value)
    assert where in text and SECRET not in text and KEY not in text
    if where != "s3://bucket/nothing":
        assert "AWS_ENDPOINT_URL_S3" in text and "AWS_ACCESS_KEY_ID" in text


def test_credentials_in_the_url_are_refused_without_repeating_them() -> None:
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as caught:
        ShardSet(f"s3://{KEY}:{SECRET}@bucket/sets")
    assert KEY not in str(caught.value) and SECRET not in str(caught.value)


def test_a_public_bucket_needs_no_credentials_and_a_private_one_refuses_at_once(
    server: S3Server, url: str, textured_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(fsspec.config, "conf", ANONYMOUS)  # as FSSPEC_S3='{"anon": true}' does
    public = server.put(textured_shards, "public", public=True)
    assert everything(public) == everything(textured_shards)
    with pytest.raises(UserError, match=r"PermissionError: [^,]*\); check the bucket"):
        ShardSet(url)


def test_a_server_that_accepts_and_is_silent_ends_in_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARVIDEO_FETCH_TIMEOUT_S", "0.3")
    monkeypatch.setenv("ARVIDEO_FETCH_TRIES", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        begun = time.monotonic()
        with pytest.raises(UserError, match="2 tries"):
            ShardSet(url)
    assert time.monotonic() - begun < 10


@pytest.mark.slow
def test_verify_checks_what_the_server_has_now(
    server: S3Server,
    textured_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not what the cache has from an earlier use."""
    url = server.put(textured_shards, "verified")
    everything(url)
    monkeypatch.setattr(sys, "argv", ["verify", url, "--workers=1", "--decode=all"])
    assert verify.main() == 0
    output = capsys.readouterr().out
    assert f"{url}: sound" in output and "3 shards, 9 samples" in output
    first, second, _ = ShardSet(url).manifest.shards
    altered = bytearray((textured_shards / first.name).read_bytes())
    altered[700] ^= 1
    server.client.put_object(Bucket="verified", Key=f"sets/{first.name}", Body=bytes(altered))
    server.client.delete_object(Bucket="verified", Key=f"sets/{second.name}")
    assert verify.main() == verify.EXIT_UNSOUND
    output = capsys.readouterr().out
    assert f"{first.name}: has another SHA-256" in output
    assert f"{second.name}: the manifest names it, the folder lacks it" in output


@pytest.mark.slow
def test_the_loader_is_measured_from_a_url(url: str, cache: Path) -> None:
    measured = measure_loader(
        LoaderOptions(
            url, None, None, repeats=1, frames=16, stride=4, batch=3, workers=0, cores=1,
            seconds=0.5, decoder="auto", planes=False,
        )
    )  # fmt: skip
    assert measured["ours"]["clips_per_s_per_core"] > 0
    assert len(list(cache.rglob("*.tar"))) == 3
