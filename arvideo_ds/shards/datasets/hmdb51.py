"""HMDB51: the folder testTrainMulti_7030_splits, videos `<name>.avi` in class folders or flat."""

from __future__ import annotations

import re
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import ClipRows, Listing, Reader, Source, text_lines

_CLASSES = 51
_ROWS = {"train": 3570, "test": 1530}
# 0 marks clips that are in neither part of a split.
_FLAGS = {"train": "1", "test": "2"}


def read_hmdb51(source: Source) -> Listing:
    """`--split train1` is the training part of split 1; test3 the test part of split 3."""
    folder = source.need_annotations("the folder testTrainMulti_7030_splits")
    match = re.fullmatch(r"(train|test)([123])", source.split or "")
    if match is None:
        raise UserError("--dataset hmdb51 needs --split train1, test1, train2, ... or test3.")
    part, number = match.groups()
    suffix = f"_test_split{number}.txt"
    files = {path.name.removesuffix(suffix): path for path in folder.glob(f"*{suffix}")}
    if not files:
        raise UserError(f"{folder} has no files <class>{suffix}.")
    clips = ClipRows(source, folder)
    for label, path in sorted(files.items()):
        rows = ClipRows(source, path, tree=clips.tree)
        for line, text in text_lines(path):
            name, _, flag = text.rpartition(" ")
            with rows.at(line):
                if flag not in ("0", "1", "2") or not name:
                    raise ValueError(f"expected '<name>.avi 0|1|2', found '{text}'")
                if flag == _FLAGS[part]:
                    rows.find(line, Path(name).stem, label, folder=label, name=f"{label}/{name}")
        clips.entries += rows.entries
        clips.rejects += [*rows.rejects, *rows.finish()]
    clips.compare("classes", len(files), _CLASSES)
    clips.compare(f"clips in {source.split}", len(clips.entries + clips.rejects), _ROWS[part])
    return clips.listing(sorted(files))


HMDB51 = Reader(
    read_hmdb51,
    split="train1 ... test3",
    stride=2,
    url="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database",
)
