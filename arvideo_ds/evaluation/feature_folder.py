"""The folder of extracted features: what is done, what was left out, and by which settings.

<output>/
  config.json       settings, recipe, hash of the weights, commit
  index.jsonl       a line a video that is done: key, path, label, windows, frames, fps, shape, file
  rejects.jsonl     every video left out, with the reason
  features/         a file a video (feature_files.py)

The line in the index is written last and says that the video is done. Once a run is through, index
and rejects are in the order of their keys, so the same videos and settings give the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from arvideo_ds.data.windows import Windows
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.feature_files import FeatureFile, file_name
from arvideo_ds.files.atomic import PARTIAL, write_bytes
from arvideo_ds.files.json_lines import read_json_lines
from arvideo_ds.shards.inputs import Video
from arvideo_ds.shards.manifest import REJECTS, Reject

CONFIG, INDEX, FEATURES = "config.json", "index.jsonl", "features"
_RANGES = ("start_frame", "stop_frame", "start_s", "stop_s")


class FeatureFolder:
    """Features on their way into the folder; entered while they are written.

    done: lines of the index by key. rejects: what was left out in this run. Errors: `UserError`
    where the folder was made with other `config["settings"]`.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        videos: Iterable[Video],
        rejects: Iterable[Reject],
        *,
        kind: str,
    ) -> None:
        self._folder, self._kind = folder, kind
        (folder / FEATURES).mkdir(parents=True, exist_ok=True)
        _require_same(folder / CONFIG, config)
        for leftover in (folder / FEATURES).glob(f"*{PARTIAL}"):
            leftover.unlink()
        self.done = _read_index(folder, {video.key: video.num_bytes for video in videos})
        self.rejects = list(rejects)
        self._open: dict[str, FeatureFile] = {}

    def __enter__(self) -> FeatureFolder:
        self._write_lists()
        self._index = (self._folder / INDEX).open("a", encoding="utf-8")
        self._rejects_file = (self._folder / REJECTS).open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._index.close()
        self._rejects_file.close()
        for file in self._open.values():
            file.discard()
        if error is None:
            self._write_lists()

    def append(self, video: Video, features: Tensor) -> None:
        """Features of the video's next windows."""
        if video.key not in self._open:
            self._open[video.key] = FeatureFile(self._path(video), self._kind)
        self._open[video.key].append(features)

    def finish(self, video: Video, windows: Windows) -> None:
        """The video is through: its file is completed, then it counts as done."""
        arrays: dict[str, np.ndarray] = {name: getattr(windows, name) for name in _RANGES}
        shape = self._open.pop(video.key).finish(arrays)
        line = {
            "key": video.key,
            "path": video.path,
            "label": video.label,
            "windows": shape[0],
            "frames": windows.num_frames,
            "fps": windows.fps,
            "shape": shape,
            "file": self._path(video).relative_to(self._folder).as_posix(),
            "video_bytes": video.num_bytes,
        }
        self.done[video.key] = line
        self._index.write(_line(line))
        self._index.flush()

    def reject(self, video: Video, reason: str, message: str) -> None:
        """The video is left out, whatever was appended of it."""
        if video.key in self._open:
            self._open.pop(video.key).discard()
        reject = Reject(source_path=video.key, reason=reason, message=message)
        self.rejects.append(reject)
        self._rejects_file.write(_line(reject.model_dump()))
        self._rejects_file.flush()

    def _path(self, video: Video) -> Path:
        return self._folder / FEATURES / file_name(video.key, self._kind)

    def _write_lists(self) -> None:
        done = [self.done[key] for key in sorted(self.done)]
        rejects = sorted(self.rejects, key=lambda reject: reject.source_path)
        for name, lines in ((INDEX, done), (REJECTS, [r.model_dump() for r in rejects])):
            write_bytes(self._folder / name, "".join(map(_line, lines)).encode())


def _require_same(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, or compare its settings where there is one."""
    text = json.dumps(config, indent=1) + "\n"
    if not path.exists():
        write_bytes(path, text.encode())
        return
    before, now = (json.loads(said)["settings"] for said in (path.read_text(), text))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise UserError(
            f"{path.parent} holds features made with other settings ({listed}). Choose another "
            "--output, or the settings it was begun with."
        )


def _read_index(folder: Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Lines of videos that are done and unchanged; torn ones are skipped (json_lines.py)."""
    return {
        line["key"]: line
        for line in read_json_lines(folder / INDEX)
        if sizes.get(line["key"]) == line["video_bytes"] and (folder / line["file"]).exists()
    }


def _line(facts: Mapping[str, Any]) -> str:
    # ASCII: names of files need not be valid text.
    return json.dumps(facts) + "\n"
