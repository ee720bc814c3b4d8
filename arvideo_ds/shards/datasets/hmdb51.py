"""HMDB51: the folder testTrainMulti_7030_splits, videos `<name>.avi` in class folders or flat."""

from __future__ import annotations

import re
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    ClipRows,
    Listing,
    Reader,
    Source,
    VideoTree,
    compare_count,
    text_lines,
)

_CLASSES = 51
_ROWS = {"train": 3570, "test": 1530}
# 0 marks clips that are in neither part of a split.
_FLAGS = {"train": "1", "test": "2"}


def read_hmdb51(source: Source) -> Listing:
    """`--split train1` is the training part of split 1; test3 the test part of split 3."""
    folder = source.need_annotations("the folder testTrainMulti_7030_splits")
    part, number = _split(source.split)
    suffix = f"_test_split{number}.txt"
    files = {path.name.removesuffix(suffix): path for path in folder.glob(f"*{suffix}")}
    if not files:
        raise UserError(f"{folder} has no files <class>{suffix}.")
    tree = VideoTree(source.videos)
    listings = [
        _read_class(source, tree, label, files[label], _FLAGS[part]) for label in sorted(files)
    ]
    entries = tuple(entry for listing in listings for entry in listing.entries)
    rejects = tuple(reject for listing in listings for reject in listing.rejects)
    notes = compare_count("classes", len(files), _CLASSES)
    notes += compare_count(f"clips in {source.split}", len(entries) + len(rejects), _ROWS[part])
    return Listing(
        entries, tuple(sorted(files)), rejects, tuple(notes), passed_over=tree.passed_over
    )


def _split(split: str | None) -> tuple[str, str]:
    match = re.fullmatch(r"(train|test)([123])", split or "")
    if match is None:
        raise UserError("--dataset hmdb51 needs --split train1, test1, train2, ... or test3.")
    return match[1], match[2]


def _read_class(source: Source, tree: VideoTree, label: str, path: Path, flag: str) -> Listing:
    rows = ClipRows(source, path, tree=tree)
    for line, text in text_lines(path):
        name, _, row_flag = text.rpartition(" ")
        with rows.at(line):
            if row_flag not in ("0", "1", "2") or not name:
                raise ValueError(f"expected '<name>.avi 0|1|2', found '{text}'")
            if row_flag == flag:
                stem = Path(name).stem
                rows.find(line, stem, label, folder=label, name=f"{label}/{name}")
    return rows.listing(None, ())


HMDB51 = Reader(
    read_hmdb51,
    split="train1 ... test3",
    url="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database",
)
