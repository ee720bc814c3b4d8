"""Real and broken videos: each a sample that all decoders read, or a reject with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from arvideo_ds.decoding.decoders import decisive_decoders, decode, usable_decoders
from arvideo_ds.shards.manifest import REJECTS, ShardSet
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES
from tests.conftest import ROOT, run_script

LARGEST_DIFFERENCE = 2.0
# What the files are, as their names say; both modes must find it out.
UNUSABLE = {
    "zero_bytes.webm": "empty",
    "all_zero_bytes.mp4": "cannot_open",
    "truncated_no_moov.mp4": "cannot_open",
    "html_error_page.mp4": "cannot_open",
    "header_only.avi": "cannot_open",
    "audio_only.mp4": "no_video_stream",
    "truncated_half.avi": "truncated",
    "bitflips.webm": "damaged",
}


@pytest.fixture(scope="module", params=["copy", "transcode"])
def made(
    request: pytest.FixtureRequest, real_videos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, set[str], ShardSet]:
    """Mode, the names of all videos, and the shards made of them."""
    folder = tmp_path_factory.mktemp(request.param)
    source = [path for name in ("odd", "clips") for path in (real_videos / name).rglob("*")]
    names = {path.name for path in source if path.suffix.lower() in VIDEO_SUFFIXES}
    table = folder / "videos.jsonl"
    rows = [{"path": str(p.relative_to(real_videos))} for p in source if p.name in names]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_script(
        *(ROOT / "data_tools" / "make_shards.py", "--dataset", "jsonl"),
        *("--videos", real_videos, "--annotations", table, "--output", folder / "shards"),
        *("--video", request.param, "--samples_per_shard", "16", "--max_reject_share", "1"),
    )
    assert done.returncode == 0, done.stderr
    return request.param, names, ShardSet(folder / "shards")


def rejects(shards: ShardSet) -> dict[str, str]:
    lines = (shards.folder / REJECTS).read_text(encoding="utf-8").splitlines()
    return {Path(line["source_path"]).name: line["reason"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_every_file_is_a_sample_or_a_reject_with_the_true_reason(
    made: tuple[str, set[str], ShardSet],
) -> None:
    mode, names, shards = made
    left_out = rejects(shards)
    tars = sorted(map(str, shards.folder.glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    facts = [json.loads(sample["json"]) for sample in samples]
    kept = {Path(fact["source_path"]).name for fact in facts}
    assert len(kept) == len(samples) == shards.num_samples
    assert kept.isdisjoint(left_out)
    assert kept | set(left_out) == names
    assert {name: left_out.get(name) for name in UNUSABLE} == UNUSABLE
    if mode == "transcode":
        assert set(left_out) == set(UNUSABLE)


@pytest.mark.slow
def test_the_same_numbers_are_the_same_frames_on_every_decoder(
    made: tuple[str, set[str], ShardSet],
) -> None:
    """Transcoded videos on all decoders; copied ones on those that decide, read alone or not."""
    mode, _, shards = made
    usable = usable_decoders() if mode == "transcode" else decisive_decoders()
    for number in range(len(shards.manifest.shards)):
        for sample in shards.index(number).samples:
            data, last = shards.read(number, sample), sample.num_frames - 1
            spread = np.unique(np.linspace(0, last, 8).round().astype(int))
            together = decode(usable[0], data, spread)
            alone = decode(usable[0], data, spread[-1:])
            assert (alone[0] == together[-1]).all(), sample.key
            for name in usable[1:]:
                for places in (slice(None), slice(-1, None)):
                    other = decode(name, data, spread[places]).astype(int)
                    difference = np.abs(other - together[places]).mean(axis=(1, 2, 3)).max()
                    assert difference <= LARGEST_DIFFERENCE, (sample.key, name, spread[places])
