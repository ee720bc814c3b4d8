"""A billion videos: the manifest of two million shards opens and is planned within bounds."""

from __future__ import annotations

import hashlib
import json
import sys
import tracemalloc
from pathlib import Path

import pytest

from arvideo_ds.data.order import SampleOrder
from arvideo_ds.shards.manifest import MANIFEST, Manifest, Shard, ShardSet, dump_json
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
status = Path("/proc/self/status").read_text()
print(json.dumps({
    "samples": shards.num_samples,
    "open_s": opened - begun,
    "plan_s": time.perf_counter() - opened,
    "cpu_s": time.process_time() - cpu,
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
        for number in range(num_shards):
            shard = {
                "name": f"large-train-{number:06d}.tar",
                "samples": SAMPLES,
                "bytes": 10240 * (40_000 + number % 20_000),
                "sha256": hashlib.sha256(b"tar%d" % number).hexdigest(),
                "index_sha256": hashlib.sha256(b"index%d" % number).hexdigest(),
            }
            text = json.dumps([shard], indent=1)[2:-2].replace("\n", "\n ")
            file.write(b",\n " * bool(number) + b"\n " * (not number) + text.encode())
        file.write(b"\n ]" + tail)


def test_a_shard_of_the_manifest_takes_a_hundred_bytes(tmp_path: Path) -> None:
    write_manifest(tmp_path, 20_000)
    text = (tmp_path / MANIFEST).read_bytes()
    tracemalloc.start()
    try:
        shards = ShardSet(tmp_path)
        SampleOrder(shards.samples_of_shards, seed=0, num_streams=8, window_shards=4).place(0)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / 20_000 < 150
    assert peak < 16 * 2**20
    entries = json.loads(text)["shards"]
    for number in (0, 1, 4_500, 19_999):  # also beside the cuts of the blocks
        assert shards.manifest.shards[number] == Shard(**entries[number])
    assert [shard.name for shard in shards.manifest.shards] == [e["name"] for e in entries]


@pytest.mark.slow
def test_two_million_shards_open_and_are_planned_within_five_seconds_and_300_mib(
    tmp_path: Path,
) -> None:
    write_manifest(tmp_path, 2_000_000)
    done = run_command(sys.executable, "-c", MEASURE, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print(json.dumps(figures))
    assert figures["samples"] == 10**9
    assert figures["peak_mib"] <= 300
    # Of the processor's time: other tests may run beside. About 3.5 s are usual.
    assert figures["cpu_s"] <= 7
