"""The store of token scores: what goes in comes out, or the file that was altered is named."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.long_video.score_store import (
    SCORES,
    ScoreContents,
    ScoreFile,
    ScoreSpec,
    TokenScores,
    VideoScores,
    file_bytes,
    open_file,
    read_video,
    require_same,
    stored,
)
from arvideo_ds.shards.manifest import AlteredError

SPEC = ScoreSpec(
    manifest="a" * 64,
    scorer="tokenizer",
    settings={"step": 7},
    tokenizer="b" * 64,
    levels=(8, 8),
    stride=4,
    size=(32, 32),
    patch=(2, 8, 8),
)


def videos() -> dict[str, VideoScores]:
    generator = np.random.default_rng(0)
    shapes = {"é/2 of": (3, 4, 5), "b": (1, 4, 4), "c": (9, 6, 4)}
    return {
        key: VideoScores(
            generator.random(shape).astype(np.float16),
            generator.integers(0, 64, shape).astype(np.int32),
        )
        for key, shape in shapes.items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "shard-000000.safetensors"
    path.write_bytes(file_bytes(SPEC, {**videos(), "d": "short (frame 3 is not there)"}))
    return path


def holds(path: Path, spec: ScoreSpec, keys: list[str]) -> bool:
    return [key for key, _ in stored(path, spec, keys)] == keys


def test_what_is_written_is_read_and_equal_content_is_equal_bytes(path: Path) -> None:
    file, header = open_file(path)
    assert header.spec == SPEC
    assert list(header.unreadable) == ["d"]
    for key, video in videos().items():
        found = read_video(file, header, key, path.name)
        assert found.codes is not None
        assert video.codes is not None
        assert np.array_equal(found.scores, video.scores)
        assert np.array_equal(found.codes, video.codes)
    other_order = dict(reversed(videos().items()))
    assert file_bytes(SPEC, {**header.unreadable, **other_order}) == path.read_bytes()
    assert holds(path, SPEC, [*videos(), "d"])


def test_a_file_is_not_whole_without_a_video_cut_short_or_with_a_bit_changed(path: Path) -> None:
    keys = [*videos(), "d"]
    assert not holds(path, SPEC, [*keys, "e"])
    data = path.read_bytes()
    for place in (len(data) - 1, len(data) // 2, 40, 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert not holds(path, SPEC, keys), place
    for length in (len(data) - 1, 20, 0):
        path.write_bytes(data[:length])
        assert not holds(path, SPEC, keys), length
    path.unlink()
    assert not holds(path, SPEC, keys)


def test_an_altered_entry_is_named_and_costs_no_other(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(np.ascontiguousarray(videos()["c"].scores).tobytes())
    data[place + 7] ^= 1
    path.write_bytes(data)
    file, header = open_file(path)
    with pytest.raises(AlteredError, match=r"c\.scores in S/shard-000000"):
        read_video(file, header, "c", f"S/{path.name}")
    assert np.array_equal(read_video(file, header, "b", "").scores, videos()["b"].scores)
    assert {key for key, _ in stored(path, SPEC, [*videos(), "d"])} == {*videos(), "d"} - {"c"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"manifest": "c" * 64}, "manifest was aaaaaaaaaaaa, is cccccccccccc"),
        ({"tokenizer": "c" * 64}, "tokenizer was bbbbbbbbbbbb, is cccccccccccc"),
        ({"scorer": "flow"}, 'scorer was "tokenizer", is "flow"'),
        ({"settings": {"step": 8}}, 'settings was {"step": 7}, is {"step": 8}'),
        ({"stride": 2}, "stride was 4, is 2"),
        ({"size": (32, 64)}, r"size was \[32, 32\], is \[32, 64\]"),
    ],
)
def test_scores_of_other_things_are_refused_with_both_values(
    path: Path, change: dict[str, object], said: str
) -> None:
    other = SPEC.model_copy(update=change)
    with pytest.raises(UserError, match=said):
        require_same(SPEC, other, "S")
    with pytest.raises(UserError, match=said):
        holds(path, other, list(videos()))


def test_scores_follow_a_clip_in_time_and_place() -> None:
    scores = np.arange(3 * 4 * 5, dtype=np.float16).reshape(3, 4, 5)
    box = VideoScores(scores).over(1, 4).within(1, 2, 2, 3)
    assert np.array_equal(box.scores[:2], scores[1:3, 1:3, 2:5])
    flat, codes = box.flat()
    assert codes is None
    assert flat.dtype == np.float32
    # Time outermost, columns innermost.
    assert flat[: 2 * 3].tolist() == scores[1, 1:3, 2:5].ravel().tolist()


def test_a_clip_longer_than_its_video_repeats_codes_and_finds_nothing_new_there() -> None:
    """Else a last time that moves would fill the budget with pictures that stand still."""
    scores = np.array([1, 5, 9], np.float16).reshape(3, 1, 1)
    codes = np.array([4, 2, 7], np.int32).reshape(3, 1, 1)
    part = VideoScores(scores, codes).over(1, 4)
    assert part.codes is not None
    assert part.codes.ravel().tolist() == [2, 7, 7, 7]
    assert part.scores.ravel().tolist() == [5, 9, 1, 1]
    assert scores.ravel().tolist() == [1, 5, 9]  # the store's own stays


def test_a_store_of_a_scorer_that_was_deleted_opens(tmp_path: Path) -> None:
    """The scorers uniform and random existed until they became selection rules."""
    spec = SPEC.model_copy(update={"scorer": "uniform", "tokenizer": None, "levels": None})
    video = VideoScores(videos()["b"].scores)
    data = file_bytes(spec, {"b": video})
    (tmp_path / "shard-000000.safetensors").write_bytes(data)
    file = ScoreFile(
        name="shard-000000.safetensors", bytes=len(data), sha256=sha256(data).hexdigest(), videos=1
    )
    contents = ScoreContents(spec=spec, files=(file,), unreadable={})
    (tmp_path / SCORES).write_text(contents.model_dump_json())
    store = TokenScores(tmp_path)
    store.check_sizes()
    found = store.read(0, "b")
    assert found is not None
    assert np.array_equal(found.scores, video.scores)
