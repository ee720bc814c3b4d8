"""A billion videos: the manifest of two million shards opens and is planned within bounds."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from arvideo_ds.data.order import SampleOrder
from arvideo_ds.shards import table
from arvideo_ds.shards.manifest import MANIFEST, Manifest, Shard, ShardSet, dump_json
from arvideo_ds.shards.table import read_table
from tests.conftest import run_command

SAMPLES = 500  # of a shard, make_shards.py's default

MEASURE = """
import json, re, sys, time
from pathlib import Path
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.data.order import SampleOrder

begun, cpu = time.perf_counter(), time.process_time()
shards = ShardSet(sys.argv[1])
opened = time.perf_counter()
order = SampleOrder(shards.samples_of_shards, seed=0, num_streams=1024, window_shards=4)
order.place(123_456_789)
planned, used = time.perf_counter(), time.process_time() - cpu
status = Path("/proc/self/status").read_text()
# The same machine, as busy: what the json module takes for a fortieth of these shards.
text = json.dumps([shards.manifest.shards[0].model_dump()] * 50_000, indent=1)
cpu = time.process_time()
json.loads(text)
print(json.dumps({
    "samples": shards.num_samples,
    "open_s": opened - begun,
    "plan_s": planned - opened,
    "cpu_s": used,
    "json_s": 40 * (time.process_time() - cpu),
    "private_mib": int(re.search("RssAnon:[^0-9]*([0-9]+)", status)[1]) / 1024,
    # getrusage counts what the process was before it became this program.
    "peak_mib": int(re.search("VmHWM:[^0-9]*([0-9]+)", status)[1]) / 1024,
}))
"""


def write_manifest(folder: Path, num_shards: int) -> None:
    """As make_shards.py writes it, with hashes of nothing."""
    empty = Manifest(
        dataset="large",
        split="train",
        labels=None,
        settings={},
        num_samples=SAMPLES * num_shards,
        num_rejects=0,
        shards=(),
    )
    head, tail = dump_json(empty).split(b' "shards": []')
    with (folder / MANIFEST).open("wb") as file:
        file.write(head + b' "shards": [')
        entry = {"name": "%s", "samples": SAMPLES, "bytes": 0, "sha256": "%s", "index_sha256": "%s"}
        text = json.dumps([entry], indent=1)[2:-2].replace("\n", "\n ")
        text = text.replace('"bytes": 0', '"bytes": %d')
        for number in range(num_shards):
            tar, index = (hashlib.sha256(b"%s%d" % (of, number)) for of in (b"tar", b"index"))
            size = 10240 * (40_000 + number % 20_000)
            name = f"large-train-{number:06d}.tar"
            shard = text % (name, size, tar.hexdigest(), index.hexdigest())
            file.write(b",\n " * bool(number) + b"\n " * (not number) + shard.encode())
        file.write(b"\n ]" + tail)


def test_a_shard_of_the_manifest_takes_a_hundred_bytes(tmp_path: Path) -> None:
    write_manifest(tmp_path, 20_000)
    text = (tmp_path / MANIFEST).read_bytes()
    order = partial(SampleOrder, seed=0, num_streams=8, window_shards=4)
    order(np.ones(8, np.int32)).place(0)  # its imports are not part of the table
    tracemalloc.start()
    try:
        shards = ShardSet(tmp_path)
        order(shards.samples_of_shards).place(0)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / 20_000 < 150
    assert peak < 16 * 2**20
    entries = json.loads(text)["shards"]
    for number in (0, 1, 4_500, 19_999):  # also beside the cuts of the blocks
        assert shards.manifest.shards[number] == Shard(**entries[number])
    assert [shard.name for shard in shards.manifest.shards] == [e["name"] for e in entries]


def open_in_process(folder: Path, parsed: Path, queue: Any) -> None:
    def counted(file: BinaryIO) -> Any:
        with parsed.open("a") as log:
            log.write("parsed\n")
        return read_table(file)

    table.read_table = counted
    shards = pickle.loads(pickle.dumps(ShardSet(folder)))
    queue.put((shards.num_samples, shards.manifest.shards[4_500].model_dump()))


@pytest.mark.parametrize("damage", ["none", "one column lost", "head cut", "no cache"])
def test_the_processes_of_a_machine_parse_a_large_manifest_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (tmp_path / "shards").mkdir()
    write_manifest(tmp_path / "shards", 5_000)
    parsed, cache = tmp_path / "parsed", tmp_path / "cache"
    parsed.touch()
    monkeypatch.setenv("ARVIDEO_CACHE", str(cache))
    monkeypatch.setattr(table, "_LARGE", 1)
    if damage == "no cache":
        cache.write_text("a file where the folder should be")
    elif damage != "none":
        ShardSet(tmp_path / "shards")
        [head] = cache.glob("tables/*/head.json")
        if damage == "head cut":
            head.write_bytes(head.read_bytes()[:10])
        else:
            (head.parent / "names.npy").unlink()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=open_in_process, args=(tmp_path / "shards", parsed, queue))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    expected = json.loads((tmp_path / "shards" / MANIFEST).read_text())["shards"][4_500]
    assert results == [(5_000 * SAMPLES, expected)] * 4
    assert len(parsed.read_text().splitlines()) == (4 if damage == "no cache" else 1)


def test_tables_of_former_manifests_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARVIDEO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "_LARGE", 1)
    opened = []
    for number in range(1, 8):
        (folder := tmp_path / f"{number}").mkdir()
        write_manifest(folder, number)
        opened.append(ShardSet(folder))
    assert len(list(tmp_path.glob("cache/tables/*/head.json"))) == 4
    assert [len(list(each.manifest.shards)) for each in opened] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_two_million_shards_are_planned_in_300_mib_and_a_few_times_what_json_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path, 2_000_000)
    monkeypatch.setenv("ARVIDEO_CACHE", str(tmp_path / "cache"))
    done = run_command(sys.executable, "-c", MEASURE, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print(json.dumps(figures))
    assert figures["samples"] == 10**9
    assert figures["peak_mib"] <= 300
    assert figures["cpu_s"] <= 4 * figures["json_s"]  # 2.5 is usual
    # The other ranks of the node map what the first one parsed.
    again = json.loads(run_command(sys.executable, "-c", MEASURE, tmp_path).stdout)
    print(json.dumps(again))
    assert again["samples"] == 10**9
    assert max(again["private_mib"], figures["private_mib"]) <= 100  # 220 MiB are shared
    assert again["cpu_s"] < figures["cpu_s"]
