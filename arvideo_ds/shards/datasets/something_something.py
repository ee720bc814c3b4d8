"""Something-Something V2: the release's JSON files, videos `<id>.webm`.

A row's `template` has brackets, [something]; the names in labels.json do not.
"""

from __future__ import annotations

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import LABELS, ClipRows, Listing, Reader, Source, json_file

_CLASSES = 174
_ROWS = {"train": 168_913, "validation": 24_777, "test": 27_157}


def read_ssv2(source: Source) -> Listing:
    """train.json, validation.json or test.json (without labels), and --labels labels.json."""
    path = source.need_annotations("something-something-v2-train.json, -validation or -test")
    objects = json_file(path, list)
    labelled = any(isinstance(row, dict) and "template" in row for row in objects)
    numbers = _label_numbers(source) if labelled else {}
    rows = ClipRows(source, path, unit="entry")
    for number, row in enumerate(objects, 1):
        with rows.at(number):
            if not isinstance(row, dict) or not str(row.get("id", "")).isdigit():
                raise ValueError("no object with a numeric 'id'")
            video_id = str(row["id"])
            label = _label(row, numbers) if labelled else None
            rows.find(number, video_id, label, video_id=video_id)
    published = next((n for name, n in _ROWS.items() if path.stem.endswith(f"-{name}")), None)
    rows.compare(f"rows in {path.name}", len(objects), published)
    if not labelled:
        return rows.listing(None)
    rows.compare("classes", len(numbers), _CLASSES)
    return rows.listing(sorted(numbers, key=numbers.__getitem__))


def _label_numbers(source: Source) -> dict[str, int]:
    path = source.get(LABELS)
    if path is None:
        raise UserError("--dataset ssv2 needs --labels something-something-v2-labels.json.")
    try:
        numbers = {name: int(number) for name, number in json_file(path, dict).items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a label's number is not an integer ({error}).") from None
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise UserError(f"{path}: the numbers are not 0..{len(numbers) - 1}, each once.")
    return numbers


def _label(row: dict[str, str], numbers: dict[str, int]) -> str:
    template = str(row.get("template", ""))
    name = template.replace("[", "").replace("]", "")
    if name not in numbers:
        raise ValueError(f"the template '{template}' is not in the labels file")
    return name


SSV2 = Reader(
    read_ssv2,
    (LABELS,),
    flip=False,
    sampling="uniform",
    stride=2,
    url="https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
)
