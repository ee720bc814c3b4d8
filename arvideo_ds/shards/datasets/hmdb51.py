"""HMDB51: the folder testTrainMulti_7030_splits, videos `<name>.avi` in class folders or flat."""

from __future__ import annotations

import re
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    BadRows,
    Entry,
    Listing,
    Reader,
    Source,
    VideoTree,
    compare_count,
    missing,
    text_lines,
)
from arvideo_ds.shards.manifest import Reject

_CLASSES = 51
_ROWS = {"train": 3570, "test": 1530}
# 0 marks clips that a split leaves out.
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
    entries: list[Entry] = []
    rejects: list[Reject] = []
    labels = sorted(files)
    for label in labels:
        found, lost = _class_entries(files[label], label, _FLAGS[part], tree, source)
        entries += found
        rejects += lost
    notes = compare_count("classes", len(labels), _CLASSES)
    notes += compare_count(f"clips in {source.split}", len(entries) + len(rejects), _ROWS[part])
    return Listing(
        tuple(entries), tuple(labels), tuple(rejects), tuple(notes), passed_over=tree.passed_over
    )


def _split(split: str | None) -> tuple[str, str]:
    match = re.fullmatch(r"(train|test)([123])", split or "")
    if match is None:
        raise UserError("--dataset hmdb51 needs --split train1, test1, train2, ... or test3.")
    return match[1], match[2]


def _class_entries(
    path: Path, label: str, flag: str, tree: VideoTree, source: Source
) -> tuple[list[Entry], list[Reject]]:
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    entries, rejects = [], []
    for line, text in text_lines(path):
        name, _, found_flag = text.rpartition(" ")
        if found_flag not in ("0", "1", "2") or not name:
            bad_rows.add(line, f"expected '<name>.avi 0|1|2', found '{text}'")
        elif found_flag == flag:
            try:
                video = tree.find(Path(name).stem, folder=label)
                bad_rows.require_new(line, Path(name).stem)
            except ValueError as error:
                bad_rows.add(line, error)
                continue
            if video is None:
                rejects.append(missing(f"{label}/{name}", line))
            else:
                entries.append(tree.entry(video, label))
    return entries, rejects + bad_rows.finish()


HMDB51 = Reader(
    read_hmdb51,
    split="train1 ... test3",
    url="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database",
)
