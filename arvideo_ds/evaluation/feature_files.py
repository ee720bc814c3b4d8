"""Features of one video in one file: npz, safetensors or parquet, written batch by batch.

Arrays of a file, W windows: `features` W ..., float32; `start_frame` and `stop_frame` W, int64;
`start_s` and `stop_s` W, float64. In parquet a row is a window and `features` is flat (its shape is
in the table's metadata). Equal content gives equal bytes. npz and safetensors are written here
because their libraries need the whole array in memory; the tokens of a long video exceed it.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from arvideo_ds.errors import needs_extra
from arvideo_ds.files.atomic import PARTIAL, replacing
from arvideo_ds.shards.datasets.listing import safe_key
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

_SPOOL = ".spool" + PARTIAL
_BLOCK = 2**20
_ROW_GROUP_BYTES = 2**25
_SAFETENSORS_TYPES = {"<i8": "I64", "<f8": "F64", "<f4": "F32"}

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]


class FeatureFile:
    """Writer of one video's features to `path`: `append` them, then `finish` or `discard`."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._write = path, WRITERS[kind]
        self._spool_path = path.with_name(path.name + _SPOOL)
        self._spool = self._spool_path.open("w+b")
        self._shape: Shape = (0,)

    def append(self, features: Tensor) -> None:
        """Features of the next windows, b ..., as float32."""
        values = np.ascontiguousarray(features.float().cpu().numpy(), dtype="<f4")
        self._spool.write(values.data)
        self._shape = (self._shape[0] + len(values), *values.shape[1:])

    def finish(self, windows: Arrays) -> Shape:
        """Write the file atomically, with the arrays of its windows; the shape of the features."""
        self._spool.seek(0)
        with replacing(self._path) as partial, partial.open("wb") as file:
            self._write(file, windows, self._spool, self._shape)
        self.discard()
        return self._shape

    def discard(self) -> None:
        """Delete the appended features."""
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)


def file_name(key: str, kind: str) -> str:
    """A safe file name, unique for each key: a.mp4 -> a.mp4.npz."""
    stem, dot, suffix = key.rpartition(".")
    if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES:
        return f"{safe_key(stem)}.{suffix}.{kind}"
    return f"{safe_key(key)}.{kind}"


def require_format(kind: str) -> None:
    """Errors: `UserError` where the format's library is missing."""
    if kind == "parquet":
        with needs_extra("parquet"):
            import pyarrow.parquet  # noqa: F401


def _write_npz(file: IO[bytes], windows: Arrays, spool: IO[bytes], shape: Shape) -> None:
    # ZipInfo's default date: equal content gives equal bytes.
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            shutil.copyfileobj(spool, member, _BLOCK)
        for name, values in windows.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, values)


def _write_safetensors(file: IO[bytes], windows: Arrays, spool: IO[bytes], shape: Shape) -> None:
    header, end = {}, 0
    kinds = {name: (values.dtype, values.shape) for name, values in windows.items()}
    # Wider types first, so that every array is aligned.
    for name, (kind, lengths) in {**kinds, "features": (np.dtype("<f4"), shape)}.items():
        begin, end = end, end + math.prod(lengths) * kind.itemsize
        dtype = _SAFETENSORS_TYPES[kind.str]
        header[name] = {"dtype": dtype, "shape": lengths, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for values in windows.values():
        file.write(values.data)
    shutil.copyfileobj(spool, file, _BLOCK)


def _write_parquet(file: IO[bytes], windows: Arrays, spool: IO[bytes], shape: Shape) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = math.prod(shape[1:])
    fields = [(name, pa.from_numpy_dtype(array.dtype)) for name, array in windows.items()]
    schema = pa.schema([*fields, ("features", pa.list_(pa.float32(), values))])
    rows = max(1, _ROW_GROUP_BYTES // (4 * values))
    with pq.ParquetWriter(file, schema.with_metadata({"shape": json.dumps(shape)})) as writer:
        for start in range(0, shape[0], rows):
            columns = [pa.array(array[start : start + rows]) for array in windows.values()]
            block = np.frombuffer(spool.read(4 * values * len(columns[0])), dtype="<f4")
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(block), values))
            writer.write_table(pa.table(columns, schema=writer.schema))


WRITERS = {"npz": _write_npz, "safetensors": _write_safetensors, "parquet": _write_parquet}
