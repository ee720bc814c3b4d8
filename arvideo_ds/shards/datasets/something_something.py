"""Something-Something V2: the release's JSON files, videos `<id>.webm`.

A row's `template` holds brackets, [something], that the names in labels.json do not.
"""

from __future__ import annotations

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    LABELS,
    BadRows,
    Entry,
    Listing,
    Reader,
    Source,
    VideoTree,
    compare_count,
    json_file,
    missing,
)
from arvideo_ds.shards.manifest import Reject

_CLASSES = 174
_ROWS = {"train": 168_913, "validation": 24_777, "test": 27_157}


def read_ssv2(source: Source) -> Listing:
    """train.json, validation.json or test.json (without labels), and --labels labels.json."""
    path = source.need_annotations("something-something-v2-train.json, -validation or -test")
    rows = json_file(path, list)
    labelled = any(isinstance(row, dict) and "template" in row for row in rows)
    numbers = _label_numbers(source) if labelled else {}
    bad_rows = BadRows(path, skip=source.skip_bad_rows, unit="entry")
    tree = VideoTree(source.videos)
    entries: list[Entry] = []
    rejects: list[Reject] = []
    for number, row in enumerate(rows, 1):
        try:
            video_id = _video_id(row)
            label = _label(row, numbers) if labelled else None
            found = tree.find(video_id)
            bad_rows.require_new(number, video_id)
        except ValueError as error:
            bad_rows.add(number, error)
            continue
        if found is None:
            rejects.append(missing(video_id, number))
        else:
            entries.append(tree.entry(found, label, video_id=video_id))
    rejects += bad_rows.finish()
    published = next((n for name, n in _ROWS.items() if path.stem.endswith(f"-{name}")), None)
    notes = compare_count(f"rows in {path.name}", len(rows), published)
    names = tuple(sorted(numbers, key=numbers.__getitem__)) if labelled else None
    if names is not None:
        notes += compare_count("classes", len(names), _CLASSES)
    return Listing(
        tuple(entries), names, tuple(rejects), tuple(notes), passed_over=tree.passed_over
    )


def _label_numbers(source: Source) -> dict[str, int]:
    if source.labels is None:
        raise UserError("--dataset ssv2 needs --labels something-something-v2-labels.json.")
    try:
        numbers = {name: int(number) for name, number in json_file(source.labels, dict).items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.labels}: a label's number is no number ({error}).") from None
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError(f"{source.labels}: the numbers are not 0..{len(numbers) - 1}, each once.")
    return numbers


def _video_id(row: object) -> str:
    if not isinstance(row, dict) or not str(row.get("id", "")).isdigit():
        raise ValueError("no object with a numeric 'id'")
    return str(row["id"])


def _label(row: dict[str, str], numbers: dict[str, int]) -> str:
    template = str(row.get("template", ""))
    name = template.replace("[", "").replace("]", "")
    if name not in numbers:
        raise ValueError(f"the template '{template}' is no label of the labels file")
    return name


SSV2 = Reader(
    read_ssv2,
    (LABELS,),
    flip=False,
    sampling="uniform",
    url="https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
)
