"""Diving48: Diving48_V2_train.json or _test.json, Diving48_vocab.json, videos `<vid_name>.mp4`."""

from __future__ import annotations

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import LABELS, ClipRows, Listing, Reader, Source, json_file

_CLASSES = 48


def read_diving48(source: Source) -> Listing:
    """Rows `{"vid_name", "label", "start_frame", "end_frame"}`; --labels is the vocabulary."""
    path = source.need_annotations("Diving48_V2_train.json or Diving48_V2_test.json")
    labels = _labels(source)
    rows = ClipRows(source, path, unit="entry")
    for number, row in enumerate(json_file(path, list), 1):
        with rows.at(number):
            rows.find(number, *_row(row, labels))
    rows.compare("classes", len(labels), _CLASSES)
    return rows.listing(labels)


def _labels(source: Source) -> list[str]:
    """Names such as 'Back 15som 05Twis FREE': the four parts of a vocabulary entry."""
    path = source.get(LABELS)
    if path is None:
        raise UserError("--dataset diving48 needs --labels Diving48_vocab.json.")
    return [
        " ".join(map(str, parts)) if isinstance(parts, list) else str(parts)
        for parts in json_file(path, list)
    ]


def _row(row: object, labels: list[str]) -> tuple[str, str]:
    if not isinstance(row, dict) or not row.get("vid_name"):
        raise ValueError("no object with a 'vid_name'")
    number = row.get("label")
    if not isinstance(number, int) or not 0 <= number < len(labels):
        raise ValueError(f"label {number} is not in 0..{len(labels) - 1}")
    return str(row["vid_name"]), labels[number]


DIVING48 = Reader(
    read_diving48, (LABELS,), stride=1, url="http://www.svcl.ucsd.edu/projects/resound/dataset.html"
)
