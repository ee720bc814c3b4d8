"""Runs on a mixture of three sources: killed, on other ranks, resumed, and what they record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arvideo_ds.runs.run_folder import read_of_ranks
from arvideo_ds.shards.manifest import MANIFEST, ShardSet
from tests.train.conftest import Runs
from tests.train.test_resume import trained, working_folder

pytestmark = pytest.mark.dist
WEIGHTS = (5, 3, 2)


@pytest.fixture(scope="module")
def sources(runs: Runs, demo_shards: Path) -> list[str]:
    """Folders of three sources; the last calls itself SSv2, and one of its videos is damaged."""
    ssv2 = runs.folder / "ssv2"
    shutil.copytree(demo_shards / "test", ssv2)
    manifest = json.loads((ssv2 / MANIFEST).read_bytes()) | {"dataset": "ssv2"}
    (ssv2 / MANIFEST).write_text(json.dumps(manifest))
    shards = ShardSet(ssv2)
    sample = shards.index(0).samples[0]
    with (ssv2 / shards.manifest.shards[0].name).open("r+b") as file:
        file.seek(sample.offset)
        file.write(b"\xa5" * sample.bytes)
    return [str(demo_shards / "train"), str(demo_shards / "test"), str(ssv2)]


def options(sources: list[str], weights: tuple[int, ...] = WEIGHTS) -> tuple[str, ...]:
    listed = [{"shards": s, "weight": w} for s, w in zip(sources, weights, strict=True)]
    listed[0]["name"], listed[1]["name"] = "first", "second"
    listed[2] |= {"flip": False, "stride": 2}
    return (
        "data.shards=null",
        f"data.sources={json.dumps(listed)}",
        "data.flip=true",
        "data.num_streams=4",
        "data.max_skipped_share=0.5",
        "train.total_batch=12",
        "train.micro_batch=4",
        "train.max_steps=16",
        "train.save_every=2",
    )


def test_a_mixture_that_is_killed_and_resumed_on_other_ranks_trains_on_the_same_clips(
    runs: Runs, sources: list[str]
) -> None:
    """SIGKILL on 1 and on 3 ranks (3 does not divide data.num_streams), an end on 2; another order
    or weight is refused; the counts of metrics.jsonl are exact; failures name their source."""
    whole, cut = working_folder(runs, "mixed-whole"), working_folder(runs, "mixed-cut")
    runs.run("mixed-whole", *options(sources), fault="none:0:0:0", cwd=whole)
    for ranks, killed_at in ((1, 6), (3, 11)):
        fault = f"kill:{killed_at}:{killed_at}:{ranks - 1}"
        runs.run("mixed-cut", *options(sources), ranks=ranks, fault=fault, cwd=cut, code=None)
    other = [sources[1], sources[0], sources[2]]
    for changed, reason in (
        (options(sources, (4, 3, 2)), "data.sources was"),
        (options(other), "a manifest, a weight or the order of the sources differs"),
    ):
        assert reason in runs.run("mixed-cut", *changed, ranks=2, cwd=cut, code=2)
    output = runs.run("mixed-cut", *options(sources), ranks=2, fault="none:0:0:0", cwd=cut)
    assert "going on after step 10" in output
    assert "source ssv2: 48 videos, 20.0% of the clips" in output
    assert "stride 2, crop multi_scale, flip false" in output
    # Steps that were done again, by other ranks, had the same clips.
    steps = {step: sorted(set(clips)) for step, clips in trained(cut).items()}
    assert steps == trained(whole)
    assert [len(clips) for clips in steps.values()] == 16 * [12]
    for line in runs.metrics("mixed-cut"):
        counts = [line[f"data/videos/{name}"] for name in ("first", "second", "ssv2")]
        videos = 6 * line["step"]  # two clips of each
        assert sum(counts) == videos
        assert all(abs(n - videos * w / 10) < 1 for n, w in zip(counts, WEIGHTS, strict=True))
    damaged = {line["key"] for line in read_of_ranks(runs.folder / "mixed-whole", "quarantine")}
    assert len(damaged) == 1
    assert damaged.pop().startswith("ssv2:")
    pairs = zip(runs.losses("mixed-cut"), runs.losses("mixed-whole"), strict=True)
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-4
