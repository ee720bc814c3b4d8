"""Damage that a decoder conceals is counted, and no video may take memory without bound."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from arvideo_ds.decoding.video import MAX_PIXELS, RejectedError, TranscodeSettings, encode
from arvideo_ds.shards import ingest as ingest_module
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.ingest import ingest
from arvideo_ds.shards.inspection import inspect_shards, table
from arvideo_ds.shards.manifest import REJECTS
from arvideo_ds.shards.writer import ShardJob, ShardReport, write_shards
from tests.conftest import command_environment

SMALL = TranscodeSettings(short_side=32)
GOP, FRAMES = 5, 40
# The matrix of a track in an MP4 through which its pictures are shown.
IDENTITY = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000")


def noise(width: int = 64, height: int = 48, num_frames: int = FRAMES) -> bytes:
    """H.264 with much to damage in every packet."""
    pictures = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)
    frames = (av.VideoFrame.from_ndarray(p).reformat(format="yuv420p") for p in pictures)
    return encode(frames, rate=Fraction(10), settings=TranscodeSettings(gop=GOP))


def with_damaged_packets(data: bytes, count: int) -> bytes:
    """Bytes in the middle of some packets are others; the container stays whole."""
    damaged = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[1 :: max(1, (len(packets) - 1) // count)][:count]:
        middle = packet.pos + packet.size // 2
        damaged[middle : middle + 40] = bytes(40)
    return bytes(damaged)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_concealed_damage_is_counted_in_the_facts(tmp_path: Path) -> None:
    whole = noise()
    clean = ingest(write(tmp_path / "clean.mp4", whole), SMALL)
    # The facts, and so the bytes, of sound videos are what they were before damage was counted.
    assert "decoder_errors" not in clean.facts
    damaged = ingest(write(tmp_path / "damaged.mp4", with_damaged_packets(whole, 3)), SMALL)
    assert damaged.facts["num_frames"] == FRAMES
    assert damaged.facts["decoder_errors"] == 3


def test_a_video_of_much_concealed_damage_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mp4", with_damaged_packets(noise(), FRAMES // 5))
    with pytest.raises(RejectedError) as caught:
        ingest(path, SMALL)
    assert caught.value.reason == "damaged"
    assert f"errors in 8 of {FRAMES}" in caught.value.message


def test_only_errors_within_a_part_count(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mp4", with_damaged_packets(noise(), 1))
    assert ingest(path, SMALL, (0.0, 2.0)).facts["decoder_errors"] == 1
    assert "decoder_errors" not in ingest(path, SMALL, (2.0, 4.0)).facts


def job(folder: Path, **changes: object) -> ShardJob:
    settings: dict[str, object] = {
        "dataset": "folder",
        "split": None,
        "listing": read_listing("folder", Source(folder / "videos")),
        "output": folder / "shards",
        "transcode": SMALL,
        "samples_per_shard": 5,
        "seed": 0,
        "workers": 1,
        "timeout_s": 60.0,
    }
    return ShardJob(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with videos/: a sound, a damaged and a large one."""
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "sound.mp4", noise())
    write(tmp_path / "videos" / "damaged.mp4", with_damaged_packets(noise(), 2))
    write(tmp_path / "videos" / "large.mp4", noise(96, 96, 2))
    return tmp_path


def test_damage_and_size_are_reported_where_shards_are_made_and_inspected(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report: ShardReport = write_shards(job(three, max_pixels=64 * 48))
    assert report.rejects_by_reason == {"too_large": 1}
    (reject,) = map(json.loads, (three / "shards" / REJECTS).read_text().splitlines())
    assert "96 x 96" in reject["message"]
    assert "--max_pixels" in reject["message"]
    report.print_rejects(three / "shards")
    assert "1 with decoder errors, such as damaged.mp4" in capsys.readouterr().out
    rows = dict(table(inspect_shards(three / "shards"), clip_frames=1))
    assert rows["decoder errors"] == "in 1 video, up to 2 packets"


def test_the_size_is_known_before_a_frame_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arvideo_ds.decoding.video.decodable_frames", lambda *_: 1 / 0)
    with pytest.raises(RejectedError) as caught:
        ingest(write(tmp_path / "x.mp4", noise()), SMALL, max_pixels=64 * 48 - 1)
    assert caught.value.reason == "too_large"
    assert MAX_PIXELS >= 8192 * 4320


@pytest.mark.parametrize("side", [80, 640])
def test_frames_that_the_header_does_not_announce_are_not_decoded_at_any_size(
    tmp_path: Path, side: int
) -> None:
    """A transport stream may change its size at any time: also to a hundred times as much."""
    stream = b""
    for number, (width, height) in enumerate(((64, 48), (side, side))):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mpegts") as output:
            video = output.add_stream("libx264", rate=10, options={"bf": "0", "g": "5"})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            for index in range(10):
                picture = np.full((height, width, 3), 20 * index, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p")
                frame.pts, frame.time_base = index + 10 * number, Fraction(1, 10)
                output.mux(video.encode(frame))
            output.mux(video.encode(None))
        stream += buffer.getvalue()
    path = write(tmp_path / "x.ts", stream)
    assert ingest(path, SMALL).facts["num_frames"] == 20
    with pytest.raises(RejectedError) as caught:
        ingest(path, SMALL, max_pixels=64 * 48)
    assert caught.value.reason in ("too_large", "damaged")


def test_a_pixel_aspect_cannot_make_pictures_of_any_size(tmp_path: Path) -> None:
    wide = bytes.fromhex("00020000") + IDENTITY[4:]
    data = noise(num_frames=2)
    at = data.index(IDENTITY, data.index(b"tkhd"))
    data = data[:at] + wide + data[at + len(IDENTITY) :]
    with pytest.raises(RejectedError) as caught:
        # 64 x 48 before, 128 x 48 after.
        ingest(write(tmp_path / "x.mp4", data), TranscodeSettings(short_side=0), max_pixels=64 * 48)
    assert caught.value.reason == "too_large"


def test_memory_that_runs_out_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ingest_module, "transcode", hungry)
    with pytest.raises(RejectedError) as caught:
        ingest(write(tmp_path / "x.mp4", noise()), SMALL)
    assert caught.value.reason == "too_large"
    assert "--memory_gib" in caught.value.message


def test_a_process_gets_the_memory_that_it_may_have_and_no_more() -> None:
    code = (
        "import numpy as np; from arvideo_ds.host import limit_memory\n"
        "limit_memory(0.25); few = np.ones(2**24, np.uint8)\n"
        "try: np.ones(2**29, np.uint8)\n"
        "except MemoryError: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "refused\n", done.stderr
