"""Splits by group: no source of videos is ever on both sides, and equal videos are reported."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.ingest import Sample
from arvideo_ds.shards.manifest import ShardIndex, ShardSet
from arvideo_ds.shards.reshard import Pool, equal_videos, open_pool, split
from arvideo_ds.shards.writer import write_manifest, write_shard
from tests.conftest import ROOT, run_script

ACTIONS, ACTORS = ("bend", "jump", "run", "walk"), tuple("abcdefghi")


def make(folder: Path, samples: Iterable[tuple[str, str, bytes, dict[str, Any]]]) -> Path:
    """Shards of (source path, label, video, further facts); nobody here decodes the videos."""
    samples = list(samples)
    labels = tuple(sorted({label for _, label, _, _ in samples}))
    folder.mkdir()
    known = {"fps": 25.0, "width": 2, "height": 2, "duration_s": 1.0, "codec": "h264"}

    def pairs() -> Iterable[tuple[str, Sample]]:
        for path, label, video, extra in samples:
            video_id = path.removesuffix(".avi")
            facts = {
                "video_id": video_id,
                "source_path": path,
                "label": labels.index(label),
                "label_name": label,
                **extra,
                "num_frames": 25,
                **known,
                "bytes": len(video),
                "sha256": hashlib.sha256(video).hexdigest(),
            }
            yield video_id.replace("/", "__"), Sample(video, "mp4", facts)

    write_shard(folder, "csv-000000.tar", pairs(), "inputs")
    index = ShardIndex.model_validate_json((folder / "csv-000000.index.json").read_bytes())
    write_manifest(
        folder,
        {"csv-000000.tar": index},
        (),
        dataset="csv",
        split=None,
        labels=labels,
        settings={"video": "copy"},
    )
    return folder


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four actions by nine actors, as Weizmann has them; one actor has no name in the facts."""
    return make(
        tmp_path_factory.mktemp("actors") / "shards",
        (
            (
                f"{action}/{actor}_{action}.avi",
                action,
                f"{actor}{action}".encode(),
                {"actor": actor, "take": 1, "tags": [1]} | ({} if actor == "i" else {"named": 1}),
            )
            for action in ACTIONS
            for actor in ACTORS
        ),
    )


def pool_of(folder: Path, group_by: str, seed: int = 0) -> Pool:
    return open_pool([folder], seed, group_by=group_by)


@pytest.mark.parametrize("group_by", ["actor", r"/([a-z])_", r"__([a-z])_[a-z]+$"])
@pytest.mark.parametrize("seed", range(3))
def test_a_group_is_on_one_side_and_every_label_has_its_share(
    actors: Path, tmp_path: Path, group_by: str, seed: int
) -> None:
    parts = split(pool_of(actors, group_by, seed), Fraction("0.78"), tmp_path, ("train", "test"))
    groups = [{item.key.split("__")[1][0] for item in part.items} for part in parts]
    assert groups[0].isdisjoint(groups[1])
    assert [len(found) for found in groups] == [len(part.groups) for part in parts] == [7, 2]
    # Whole actors: of each label as many as there are actors.
    assert Counter(i.label_name for i in parts[0].items) == dict.fromkeys(ACTIONS, 7)
    again = split(pool_of(actors, group_by, seed), Fraction("0.78"), tmp_path, ("train", "test"))
    assert [part.items for part in again] == [part.items for part in parts]


def test_groups_of_unequal_size_come_near_the_share(tmp_path: Path) -> None:
    sizes = [40, 25, 10, 8, 5, 4, 3, 2, 1, 1, 1]
    shards = make(
        tmp_path / "shards",
        (
            (f"{group}/{n}.avi", "xy"[n % 2], f"{group}/{n}".encode(), {})
            for group, size in enumerate(sizes)
            for n in range(size)
        ),
    )
    for share in ("0.5", "0.75", "0.9"):
        pool = pool_of(shards, r"^(\d+)/")
        first, _ = split(pool, Fraction(share), tmp_path, ("a", "b"))
        assert abs(len(first.items) - float(share) * 100) <= 2


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("named", r"4 of the 36 samples have no 'named'.*bend__i_bend"),
        ("nobody", r"36 of the 36 samples have no 'nobody'.*'actor'"),
        ("tags", r"tags: this is a list"),
        (r"^(jump)/", r"27 of the 36 samples do not match"),
        (r"^jump/", "exactly one group"),
        (r"^(a)(b)", "exactly one group"),
        (r"^(a", "nor a regular expression"),
        ("label_name", None),
    ],
)
def test_a_group_that_cannot_be_determined_is_an_error(
    actors: Path, group_by: str, message: str | None
) -> None:
    if message is None:
        assert pool_of(actors, group_by).items
        return
    with pytest.raises(UserError, match=message):
        pool_of(actors, group_by)


def test_one_group_cannot_be_split(actors: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 group.*without any"):
        split(pool_of(actors, "take"), Fraction("0.9"), tmp_path, ("a", "b"))


def test_equal_videos_under_two_keys_are_counted_and_named(tmp_path: Path) -> None:
    rows = [(f"x/{n}.avi", "x", bytes([n]), {}) for n in range(4)]
    first = make(tmp_path / "first", rows)
    second = make(tmp_path / "second", [("y/copy.avi", "y", bytes([2]), {})])
    pool = open_pool([first, second], 0)
    (note,) = equal_videos(pool.items)
    assert "1 video" in note
    assert "x__2" in note
    assert "y__copy" in note
    assert not list(equal_videos(open_pool([first], 0).items))


def test_the_command_says_groups_and_equal_videos_on_both_sides(tmp_path: Path) -> None:
    shards = make(
        tmp_path / "shards",
        (
            (f"{group}/{n}.avi", "x", b"same" if n == 0 else f"{group}/{n}".encode(), {})
            for group in range(4)
            for n in range(3)
        ),
    )
    command = (ROOT / "data_tools" / "reshard.py", shards, "--output")
    options = ("--split_share", "0.5", "a", "b", "--group_by")
    done = run_script(*command, tmp_path / "out", *options, r"^(\d)/")
    assert done.returncode == 0, done.stderr
    assert "a: 6 videos" in done.stdout
    assert re.search(r"in 2 groups \(\d, \d\)", done.stdout)
    assert "both in a and in b" in done.stdout
    assert ShardSet(tmp_path / "out" / "a").manifest.settings["resharded"] == (
        r"0.5 as a, the rest as b, by group ^(\d)/"
    )
    # Equal videos as groups: then none is on both sides.
    done = run_script(*command, tmp_path / "equal", *options, "sha256")
    assert done.returncode == 0, done.stderr
    assert "both in a and in b" not in done.stdout
    done = run_script(*command, tmp_path / "none", "--max_samples", "3", "--group_by", "sha256")
    assert done.returncode == 2
    assert "--split_share" in done.stderr


@pytest.mark.parametrize("dataset", ["csv", "jsonl"])
def test_columns_can_be_kept_in_the_facts_to_group_by(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "1.mp4").write_bytes(b"x")
    path = tmp_path / f"list.{dataset}"
    rows = {"csv": "path,actor,take\n1.mp4,ann,2\n", "jsonl": '{"path":"1.mp4","actor":"ann"}\n'}
    path.write_text(rows[dataset])

    def facts(*columns: str) -> dict[str, Any]:
        source = Source(tmp_path / "videos", path, keep_columns=columns)
        return read_listing(dataset, source).entries[0].facts

    assert facts() == {}
    assert facts("actor") == {"actor": "ann"}
    with pytest.raises(UserError, match="nobody"):
        facts("actor", "nobody")
    with pytest.raises(UserError, match=r"'label'.*another name"):
        facts("label")
