"""An ONNX file from uint8 clips to features and logits, with a free batch size."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arvideo_ds.errors import needs_extra
from arvideo_ds.exports.source import (
    ExportSource,
    OpenedExport,
    Outputs,
    architecture,
    logits_in_words,
    outputs,
    outputs_of,
    versions,
)
from arvideo_ds.files.atomic import write_json

OPSET = 18
_FILE = "model.onnx"
_POOLED = {
    "mean": "the mean of the tokens",
    "motion": "the mean absolute change of the tokens from one time to the next",
}


class Graph(nn.Module):
    """Clips B T H W 3, uint8, to features B D, and to the logits of a classifier."""

    def __init__(self, source: ExportSource) -> None:
        super().__init__()
        self.model, self.patch = source.model, source.recipe.patch

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        _, *values = outputs_of(self.model, clips, self.patch).values()  # without tokens
        return tuple(values)


def export(source: ExportSource, folder: Path) -> OpenedExport:
    """Errors: `UserError` without onnx, onnxscript and onnxruntime."""
    with needs_extra("export"):
        import onnx  # noqa: F401  the exporter needs both
        import onnxruntime
        import onnxscript  # noqa: F401
    clip_shape = source.recipe.geometry.clip
    names = ["features"] if source.labels is None else ["features", "logits"]
    example = torch.zeros(2, *clip_shape, 3, dtype=torch.uint8)
    # Constants that the model caches must not be made while it is traced.
    outputs(source, example)
    with _quiet():
        torch.onnx.export(
            Graph(source).eval(),
            (example,),
            str(folder / _FILE),
            input_names=["clips"],
            output_names=names,
            dynamic_shapes={"clips": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
        )
    facts = {**architecture(source), "opset": OPSET, "labels": source.labels}
    write_json(folder / "config.json", facts)
    session = onnxruntime.InferenceSession(folder / _FILE, providers=["CPUExecutionProvider"])
    pooled = _POOLED.get(
        source.recipe.pooling, "the output of the classifier's layers that attend to the tokens"
    )
    return OpenedExport(
        run=lambda clips: _run(session, names, clips),
        how_to=(
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("FOLDER/{_FILE}")\n'
            f'{", ".join(names)}, = session.run(None, {{"clips": clips}})'
        ),
        versions=versions("onnx", "onnxscript", "onnxruntime"),
        remarks=[
            f"Opset {OPSET}. `clips` is uint8, batch x {' x '.join(map(str, clip_shape))} x 3 "
            "(frames, rows, columns, colours); pixels are normalised inside. Any batch size.",
            f"`features` are {pooled}.",
            *logits_in_words(source),
        ],
    )


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide the exporter's progress and deprecation warnings, not its errors."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _run(session: Any, names: list[str], clips: Tensor) -> Outputs:
    values = session.run(names, {"clips": clips.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
