"""The folder of extracted features.

<output>/
  config.json       settings, recipe, hash of the weights, commit
  index.jsonl       a line per finished video: key, path, label, windows, frames, fps, shape, file
  rejects.jsonl     every rejected video, with the reason
  features/         a file per video (feature_files.py)

The line in the index is written last and marks the video as done. At the end of a run, index and
rejects are sorted by key, so the same videos and settings give the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from arvideo_ds.data.windows import Windows
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.feature_files import FeatureFile, file_name
from arvideo_ds.files.atomic import PARTIAL, write_json, write_text
from arvideo_ds.files.json_lines import append_json_lines, read_json_lines
from arvideo_ds.shards.inputs import Video, VideoList
from arvideo_ds.shards.manifest import REJECTS, Reject

CONFIG, INDEX, FEATURES = "config.json", "index.jsonl", "features"
_RANGES = ("start_frame", "stop_frame", "start_s", "stop_s")


class FeatureFolder:
    """Writer of features; a context manager.

    done: lines of the index by key. rejects: videos rejected in this run. Errors: `UserError`
    where the folder was made with other `config["settings"]`.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], listing: VideoList, *, kind: str
    ) -> None:
        self._folder, self._kind = folder, kind
        (folder / FEATURES).mkdir(parents=True, exist_ok=True)
        _require_same(folder / CONFIG, config)
        for leftover in (folder / FEATURES).glob(f"*{PARTIAL}"):
            leftover.unlink()
        sizes = {video.key: video.num_bytes for video in listing.videos}
        # Videos that changed or whose file is missing are done again.
        self.done: dict[str, dict[str, Any]] = {
            line["key"]: line
            for line in read_json_lines(folder / INDEX)
            if sizes.get(line["key"]) == line["video_bytes"] and (folder / line["file"]).exists()
        }
        self.rejects = list(listing.rejects)
        self._open: dict[str, FeatureFile] = {}

    def __enter__(self) -> FeatureFolder:
        self._write_lists()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for file in self._open.values():
            file.discard()
        if error is None:
            self._write_lists()

    def append(self, video: Video, features: Tensor) -> None:
        """Add the features of the video's next windows."""
        if video.key not in self._open:
            self._open[video.key] = FeatureFile(self._path(video), self._kind)
        self._open[video.key].append(features)

    def finish(self, video: Video, windows: Windows) -> None:
        """Complete the video's file, then mark the video as done."""
        arrays: dict[str, np.ndarray] = {name: getattr(windows, name) for name in _RANGES}
        shape = self._open.pop(video.key).finish(arrays)
        self.done[video.key] = {
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
        append_json_lines(self._folder / INDEX, [self.done[video.key]])

    def reject(self, video: Video, reason: str, message: str) -> None:
        """Reject the video and discard the features it has so far."""
        if video.key in self._open:
            self._open.pop(video.key).discard()
        self.rejects.append(Reject(source_path=video.key, reason=reason, message=message))
        append_json_lines(self._folder / REJECTS, [self.rejects[-1].model_dump()])

    def _path(self, video: Video) -> Path:
        return self._folder / FEATURES / file_name(video.key, self._kind)

    def _write_lists(self) -> None:
        done = [self.done[key] for key in sorted(self.done)]
        rejects = sorted(self.rejects, key=lambda reject: reject.source_path)
        for name, lines in ((INDEX, done), (REJECTS, [r.model_dump() for r in rejects])):
            # ASCII: names of files need not be valid text.
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(self._folder / name, text)


def _require_same(path: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, or compare its settings if it exists."""
    if not path.exists():
        write_json(path, config)
        return
    before = json.loads(path.read_text())["settings"]
    now = json.loads(json.dumps(config["settings"]))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise UserError(
            f"{path.parent} contains features made with other settings ({listed}). Choose another "
            "--output, or the original settings."
        )
