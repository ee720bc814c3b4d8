"""A run to a folder in one of the formats: written whole, opened anew, compared, described.

DIR/
  ...            the model in the format's own files (a module of this room each)
  parity.json    how far its outputs are from ours, on which clips, with which versions
  README.md      model card
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.exports.card import model_card
from arvideo_ds.exports.formats import FORMATS, UNSPECIFIED
from arvideo_ds.exports.parity import Clips, compare
from arvideo_ds.exports.source import Source


def export(
    source: Source,
    format_name: str,
    output: Path,
    clips: Clips,
    *,
    license_id: str = UNSPECIFIED,
) -> dict[str, object]:
    """Export into `output`, which appears when the model is there and does what ours does.

    license_id: of the weights, for the model card.

    Returns what parity.json holds. Errors: `UserError` where the folder is in use, the format
    cannot hold this model, or what was exported computes something else.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; choose another --output, or remove it.")
    partial = output.parent / f".partial-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        opened = FORMATS[format_name](source, partial)
        parity = compare(source, opened, clips)
        (partial / "parity.json").write_text(json.dumps(parity, indent=1) + "\n")
        card = model_card(source, output.name, opened, parity, license_id=license_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parity
