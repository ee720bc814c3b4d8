"""UCF101: the folder ucfTrainTestlist, videos `<Class>/v_<Class>_g01_c01.avi` or flat."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import ClipRows, Listing, Reader, Source, text_lines

_CLASSES = 101
_ROWS = {
    "train1": 9537, "test1": 3783, "train2": 9586, "test2": 3734, "train3": 9624, "test3": 3696,
}  # fmt: skip


def read_ucf101(source: Source) -> Listing:
    """`--split train1` reads trainlist01.txt; classInd.txt numbers the classes from 1."""
    folder = source.need_annotations("the folder ucfTrainTestlist")
    if source.split not in _ROWS:
        raise UserError(f"--dataset ucf101 needs --split, one of {', '.join(_ROWS)}.")
    path = folder / f"{source.split[:-1]}list0{source.split[-1]}.txt"
    labels = _labels(folder / "classInd.txt")
    rows = ClipRows(source, path)
    lines = text_lines(path)
    for line, text in lines:
        with rows.at(line):
            name, label = _row(text, labels)
            rows.find(line, name.stem, label, folder=label, name=str(name))
    rows.compare("classes", len(labels), _CLASSES)
    rows.compare(f"rows in {path.name}", len(lines), _ROWS[source.split])
    return rows.listing(labels)


def _labels(path: Path) -> list[str]:
    labels: list[str] = []
    for line, text in text_lines(path):
        number, _, name = text.partition(" ")
        if number != str(len(labels) + 1) or not name:
            raise UserError(f"{path} line {line}: expected '{len(labels) + 1} <Class>'.")
        labels.append(name)
    return labels


def _row(text: str, labels: list[str]) -> tuple[PurePosixPath, str]:
    """Name and label of `Class/v_Class_g01_c01.avi [number]`; test lists have no number."""
    match = re.fullmatch(r"([^/]+)/(\S+)(?: (\d+))?", text)
    if match is None or match[1] not in labels:
        raise ValueError(f"expected '<Class>/<name>.avi [number]', found '{text}'")
    label, number = match[1], match[3]
    if number is not None and int(number) != labels.index(label) + 1:
        raise ValueError(f"number {number} is not that of class {label} in classInd.txt")
    return PurePosixPath(label, match[2]), label


UCF101 = Reader(
    read_ucf101, split="train1 ... test3", url="https://www.crcv.ucf.edu/data/UCF101.php"
)
