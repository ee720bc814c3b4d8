"""One ONNX file from the clip's bytes to features and logits; any number of clips at once."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arvideo_ds.errors import needs_extra
from arvideo_ds.exports.opened import Opened, versions
from arvideo_ds.exports.source import (
    Outputs,
    Source,
    architecture,
    logits_in_words,
    outputs,
    pooled,
)
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.encoder import encode_clips

OPSET = 18
_FILE = "model.onnx"


class Graph(nn.Module):
    """Clips B T H W 3, uint8, to features B D, and to logits where the model classifies."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.model, self.patch = source.model, source.recipe.patch

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.model, Classifier):
            return (encode_clips(self.model, clips, self.patch).mean(1),)
        features = self.model.pool(encode_clips(self.model.encoder, clips, self.patch))
        return features, self.model.classify(features)


def export(source: Source, folder: Path) -> Opened:
    """Errors: `UserError` without onnx, onnxscript and onnxruntime."""
    runtime = _libraries()
    names = ["features"] if source.labels is None else ["features", "logits"]
    example = torch.zeros(2, *source.clip_shape, 3, dtype=torch.uint8)
    # Constants that the model caches must be real ones, made before it is traced.
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
    (folder / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
    session = runtime.InferenceSession(folder / _FILE, providers=["CPUExecutionProvider"])
    return Opened(
        run=lambda clips: _run(session, names, clips),
        how_to=(
            "import onnxruntime\n"
            f'session = onnxruntime.InferenceSession("FOLDER/{_FILE}")\n'
            f'{", ".join(names)}, = session.run(None, {{"clips": clips}})'
        ),
        versions=versions("onnx", "onnxscript", "onnxruntime"),
        remarks=[
            f"Opset {OPSET}. `clips` is uint8, batch x {_by(source.clip_shape)} x 3 (frames, rows, "
            "columns, colours); pixels are normalised inside. The batch is free, the rest fixed.",
            f"`features` are {pooled(source)}.",
            *logits_in_words(source),
        ],
    )


def _libraries() -> Any:
    with needs_extra("export"):
        import onnx  # noqa: F401  the exporter needs both
        import onnxruntime
        import onnxscript  # noqa: F401
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter tells its steps and its own deprecations; its errors still come through."""
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


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
