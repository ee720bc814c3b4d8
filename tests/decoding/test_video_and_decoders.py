"""Probe, transcode and decode: what is counted is there, and a number means the same frame."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from arvideo_ds.decoding import decoders
from arvideo_ds.decoding.decoders import (
    DecodeError,
    choose_decoder,
    decisive_decoders,
    decode,
    first_usable,
    usable_decoders,
)
from arvideo_ds.decoding.video import (
    RejectedError,
    TranscodeSettings,
    VideoInfo,
    decodable_frames,
    encode,
)
from arvideo_ds.decoding.video import probe as probe_file
from arvideo_ds.decoding.video import transcode as transcode_file
from arvideo_ds.errors import UserError
from arvideo_ds.shards.ingest import ingest, ingest_bytes

LEVELS = np.arange(20, 240, 20)
SMALL = TranscodeSettings(short_side=64)
IDENTITY = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000")
QUARTER_TURN = bytes.fromhex("00000000 00010000 00000000 ffff0000 00000000 00000000")
TWICE_AS_WIDE = bytes.fromhex("00020000 00000000 00000000 00000000 00010000 00000000")


def gray_frames() -> np.ndarray:
    """One frame per level, wholly of that level: a frame's brightness is its number."""
    return np.broadcast_to(LEVELS[:, None, None, None], (len(LEVELS), 48, 64, 3)).astype(np.uint8)


def h264(frames: Iterable[np.ndarray], gop: int = 4) -> bytes:
    pictures = (av.VideoFrame.from_ndarray(frame).reformat(format="yuv420p") for frame in frames)
    return encode(pictures, rate=Fraction(10), settings=TranscodeSettings(gop=gop, crf=10))


def with_matrix(data: bytes, matrix: bytes) -> bytes:
    """The same MP4, shown through another matrix of its track (all but its last column)."""
    at = data.index(IDENTITY, data.index(b"tkhd"))
    return data[:at] + matrix + data[at + len(IDENTITY) :]


def with_index_first(data: bytes, folder: Path) -> bytes:
    """The same MP4 with its index before the pictures, so that a cut file still opens."""
    path = folder / "index_first.mp4"
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return path.read_bytes()


def odd_video(num_frames: int) -> bytes:
    """A 4:4:4 video of 37 x 51 pixels in Matroska, which promises no number of frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 37, 51, "yuv444p"
        for number in range(num_frames):
            picture = np.full((51, 37, 3), 10 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    return buffer.getvalue()


def probe(data: bytes) -> VideoInfo:
    return probe_file(io.BytesIO(data))


def transcode(data: bytes, settings: TranscodeSettings) -> bytes:
    return transcode_file(io.BytesIO(data), settings)[0]


def rejection(path: Path, data: bytes, settings: TranscodeSettings | None = None) -> str:
    path.write_bytes(data)
    with pytest.raises(RejectedError) as caught:
        ingest(path, settings)
    assert caught.value.message
    return caught.value.reason


@pytest.mark.parametrize("settings", [None, SMALL])
def test_unusable_files_are_rejected_with_the_reason(
    tmp_path: Path, settings: TranscodeSettings | None
) -> None:
    path, video = tmp_path / "x.mp4", h264(gray_frames())
    assert rejection(path, b"", settings) == "empty"
    assert rejection(path, bytes(range(256)) * 40, settings) == "cannot_open"
    assert rejection(path, video[: len(video) // 2], settings) == "cannot_open"
    assert rejection(path, sound(), settings) == "no_video_stream"
    with pytest.raises(RejectedError) as caught:
        ingest(tmp_path / "missing.mp4", settings)
    assert caught.value.reason == "unreadable"


def test_a_file_cut_behind_its_index_is_called_truncated(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    whole = with_index_first(h264(noise), tmp_path)
    assert probe(whole).num_frames == 12
    assert rejection(tmp_path / "x.mp4", whole[: len(whole) // 2]) == "truncated"


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("part", "found"),
    [
        ((0.0, 1.1), 11),
        ((0.5, 1.1), 6),
        # One frame, or a tenth of the part, beyond the end: the sample ends with the video.
        ((0.9, 1.2), 2),
        ((0.1, 1.2), 10),
        ((0.0, 1.3), "past_end"),
        ((0.9, 1.4), "past_end"),
        ((5.0, 6.0), "past_end"),
    ],
)
def test_a_part_ends_with_the_video_or_is_said_to_lie_past_its_end(
    tmp_path: Path, suffix: str, part: tuple[float, float], found: int | str
) -> None:
    data, path = h264(gray_frames()), tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    if isinstance(found, int):
        assert ingest(path, SMALL, part).facts["num_frames"] == found
        return
    with pytest.raises(RejectedError) as caught:
        ingest(path, SMALL, part)
    assert caught.value.reason == found
    assert "of a video of 1.1" in caught.value.message


def test_a_part_of_a_cut_file_is_truncated_and_not_past_its_end(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    whole = with_index_first(h264(noise), tmp_path)
    (tmp_path / "x.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RejectedError) as caught:
        ingest(tmp_path / "x.mp4", SMALL, (0.0, 1.1))
    assert caught.value.reason == "truncated"


def test_probe_counts_the_frames_that_decode_not_the_promised_ones(
    tmp_path: Path,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    whole = with_index_first(h264(noise), tmp_path)
    info = probe(whole[: len(whole) // 2])
    assert info.promised_frames == 12
    assert 0 < info.num_frames < 12
    assert probe(odd_video(7)).num_frames == 7


def test_copied_files_keep_their_bytes_and_say_the_facts(tmp_path: Path) -> None:
    data = h264(gray_frames())
    path = tmp_path / "x.MP4"
    path.write_bytes(data)
    sample = ingest(path, None)
    assert (sample.video, sample.suffix) == (data, "mp4")
    facts = {name: sample.facts[name] for name in ("num_frames", "fps", "width", "height", "bytes")}
    assert facts == {
        "num_frames": len(LEVELS),
        "fps": 10.0,
        "width": 64,
        "height": 48,
        "bytes": len(data),
    }


@pytest.mark.parametrize("short_side", [0, 33, 64])
def test_transcoding_gives_h264_of_even_sizes_and_as_many_frames(short_side: int) -> None:
    settings = TranscodeSettings(short_side=short_side)
    data = transcode(odd_video(9), settings)
    info = probe(data)
    assert (info.codec, info.num_frames, len(info.sizes)) == ("h264", 9, 1)
    assert info.width % 2 == info.height % 2 == 0
    assert abs(info.width - (short_side or 37)) <= 1
    assert abs(info.height - 51 / 37 * (short_side or 37)) <= 1
    assert transcode(odd_video(9), settings) == data


def test_transcoding_makes_pixels_square() -> None:
    data = with_matrix(h264(gray_frames()), TWICE_AS_WIDE)
    info = probe(transcode(data, TranscodeSettings(short_side=0)))
    assert (info.width, info.height) == (128, 48)


def test_the_same_video_transcodes_to_the_same_bytes_every_time(demo_shards: Path) -> None:
    paths = sorted((demo_shards / "videos" / "train").rglob("*.mp4"))[::3]
    # In changing company: what lay in freed memory before must not reach the bytes.
    rounds = [
        {path: transcode(path.read_bytes(), TranscodeSettings(short_side=32)) for path in order}
        for order in (paths, paths[::-1], paths[::2] + paths[1::2], paths)
    ]
    for path in paths:
        assert len({transcoded[path] for transcoded in rounds}) == 1, path.name


def test_transcoded_key_frames_are_at_most_a_gop_apart() -> None:
    data = transcode(h264(gray_frames(), gop=100), TranscodeSettings(short_side=0, gop=3))
    with av.open(io.BytesIO(data)) as container:
        keys = [frame.key_frame for frame in container.decode(video=0)]
    assert all(any(keys[i : i + 3]) for i in range(len(keys) - 2))


def test_rotated_videos_become_upright_and_are_not_copied(tmp_path: Path) -> None:
    frames = gray_frames().copy()
    frames[:, :, :32], frames[:, :, 32:] = 220, 30
    turned = with_matrix(h264(frames), QUARTER_TURN)
    assert rejection(tmp_path / "x.mp4", turned) == "rotated"
    with pytest.raises(RejectedError, match="use --video transcode"):
        ingest(tmp_path / "x.mp4", None)
    # Where there is nothing to transcode with, nobody is told to.
    with pytest.raises(RejectedError, match=r"rotated by -?90 degrees'"):
        ingest_bytes(turned, "mp4")
    upright = decode("pyav", transcode(turned, TranscodeSettings(short_side=0)), np.array([0]))[0]
    assert upright.shape == (64, 48, 3)
    # A clockwise quarter turn takes the bright left half to the top.
    assert upright[:28].mean() > 200
    assert upright[36:].mean() < 50


@pytest.mark.parametrize("wanted", [[0], [10], [0, 5, 10], [3, 4, 5, 6], [2, 2, 7, 7], [10, 10]])
def test_a_frame_number_means_that_frame_on_every_decoder(wanted: list[int]) -> None:
    data = h264(gray_frames())
    for name in usable_decoders():
        found = decode(name, data, np.array(wanted))
        assert found.shape == (len(wanted), 48, 64, 3)
        assert found.dtype == np.uint8
        assert np.abs(found.mean(axis=(1, 2, 3)) - LEVELS[wanted]).max() < 6


def assert_decoders_agree(data: bytes, num_frames: int) -> None:
    every = np.arange(num_frames)
    some = np.unique(np.linspace(0, num_frames - 1, 5).round().astype(int))
    reference = decode("pyav", data, every)
    for name in usable_decoders():
        for frames in (every, some):
            found = decode(name, data, frames).astype(int)
            error = np.abs(found - reference[frames]).mean(axis=(1, 2, 3))
            assert error.max() <= 2, name


def test_decoders_give_equal_frames_of_demo_videos(demo_shards: Path) -> None:
    for path in sorted((demo_shards / "videos" / "train").rglob("*.mp4"))[::12]:
        data = path.read_bytes()
        assert_decoders_agree(data, probe(data).num_frames)


@pytest.mark.parametrize("folder", ["hmdb51", "kinetics", "ssv2", "ucf101"])
def test_decoders_give_equal_frames_of_transcoded_real_videos(
    real_videos: Path, folder: str
) -> None:
    path = min((real_videos / "clips" / folder).iterdir(), key=lambda p: p.stat().st_size)
    sample = ingest(path, SMALL)
    assert sample.facts["num_frames"] == probe(path.read_bytes()).num_frames
    assert min(sample.facts["width"], sample.facts["height"]) == SMALL.short_side
    assert_decoders_agree(sample.video, sample.facts["num_frames"])


def test_every_decoder_refuses_garbage_and_frames_that_are_not_there() -> None:
    data = h264(gray_frames())
    for name in usable_decoders():
        for bad, frames in ((bytes(5000), [0]), (data[:500], [0]), (data, [0, len(LEVELS)])):
            with pytest.raises(DecodeError) as caught:
                decode(name, bad, np.array(frames))
            assert caught.value.kind


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Calls leave only the named decoders working."""

    def broken(data: bytes, frames: np.ndarray) -> np.ndarray:
        raise OSError("libsomething.so is missing")

    def leave(*names: str) -> None:
        for name in decoders.DECODERS.keys() - set(names):
            monkeypatch.setitem(decoders.DECODERS, name, broken)

    monkeypatch.setattr(decoders, "_load_problem", decoders._load_problem.__wrapped__)
    monkeypatch.setattr(decoders, "_note", decoders._note.__wrapped__)
    yield leave


def test_a_decoder_that_does_not_work_is_refused_with_those_that_do(
    only: Callable[..., None],
) -> None:
    only("pyav")
    assert choose_decoder("auto") == "pyav"
    with pytest.raises(UserError, match=r"libsomething.*Usable: pyav"):
        choose_decoder("decord")


def test_auto_takes_decord_last_and_says_how_to_get_torchcodec(
    only: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only("pyav", "decord")
    assert choose_decoder("auto") == "pyav"
    assert "apt-get install ffmpeg" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert choose_decoder("auto") == "pyav"
    assert capsys.readouterr().err == ""


def test_ranks_with_other_decoders_take_one_that_all_have() -> None:
    assert first_usable([["torchcodec", "pyav"]] * 2) == "torchcodec"
    assert first_usable([["torchcodec", "pyav", "decord"], ["decord", "pyav"]]) == "pyav"
    assert first_usable([["torchcodec", "pyav"]] * 2, layers=4) == "pyav", "it alone skips"
    with pytest.raises(UserError, match="no decoder works on every rank"):
        first_usable([["torchcodec"], ["pyav"]])


def test_decord_does_not_decide_which_videos_become_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, frames: np.ndarray) -> np.ndarray:
        raise OSError("refused")

    (tmp_path / "x.mp4").write_bytes(h264(gray_frames()))
    assert "decord" not in decisive_decoders()
    monkeypatch.setitem(decoders.DECODERS, "decord", broken)
    assert ingest(tmp_path / "x.mp4", None).facts["num_frames"] == len(LEVELS)
    monkeypatch.setitem(decoders.DECODERS, "pyav", broken)
    with pytest.raises(RejectedError, match="refused"):
        ingest(tmp_path / "x.mp4", None, decoders=["pyav"])


def test_pyav_decodes_from_the_key_frame_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long video few frames are decoded, and they are those of a decode from the start."""
    frames = (np.full((48, 64, 3), 20 + 2 * number, np.uint8) for number in range(100))
    data = h264(frames)
    whole = decode("pyav", data, np.arange(100))
    decoded = 0

    def counted(*arguments: Any) -> Iterator[av.VideoFrame]:
        nonlocal decoded
        for frame in decodable_frames(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(decoders, "decodable_frames", counted)
    for wanted in ([0], [99], [7, 8], [50, 52, 61], [90, 40]):
        decoded = 0
        assert (decode("pyav", data, np.array(wanted)) == whole[wanted]).all()
        assert decoded < max(wanted) - min(wanted) + 1 + 8


def with_latin1_title(data: bytes) -> bytes:
    """The same file with a title that is not UTF-8, as old cameras and encoders write them."""
    assert b"TITLE" in data
    return data.replace(b"TITLE", b"\xe9\xe8\xfc\xdfX")


@pytest.mark.parametrize("kind", ["avi", "mp4", "matroska"])
def test_metadata_that_are_not_utf8_do_not_make_a_video_unreadable(
    tmp_path: Path, kind: str
) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as output:
        output.metadata["title"] = "TITLE"
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in gray_frames():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format="yuv420p")))
        output.mux(stream.encode(None))
    data = with_latin1_title(buffer.getvalue())
    (tmp_path / f"x.{kind}").write_bytes(data)
    assert ingest(tmp_path / f"x.{kind}", SMALL).facts["num_frames"] == len(LEVELS)
    assert len(decode("pyav", data, np.arange(len(LEVELS)))) == len(LEVELS)


def test_no_module_opens_a_video_but_through_the_one_function() -> None:
    """Reading with other options would accept other files, or let a playlist reach the network."""
    root = Path(decoders.__file__).parent.parent
    readers = [
        path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*.py"))
        if "av.open(" in path.read_text()
    ]
    assert readers == ["decoding/video.py"]


def test_a_full_range_video_keeps_its_colours() -> None:
    """Such as MJPEG and the videos of some phones; levels were 8 off on average (of 0..255)."""
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack([np.broadcast_to(ramp, (48, 64))] * 3, axis=-1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as output:
        stream = output.add_stream("mjpeg", rate=10, options={"q:v": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        output.mux(stream.encode(None))
    made = transcode(buffer.getvalue(), TranscodeSettings(short_side=0, crf=5))
    for video in (buffer.getvalue(), made):
        found = decode("pyav", video, np.array([0]))[0]
        assert np.abs(found.astype(int) - picture).mean() < 3
