"""CPU time of turning the videos of a folder into samples of shards, stage by stage, as JSON.

    arvideo benchmark_ingest VIDEOS [--layers 4]

In ms per 10 s of video: whole samples, transcoded and copied, then stages that run alone.
"""

from __future__ import annotations

import io
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from arvideo_ds.arguments import CommandParser
from arvideo_ds.decoding.decoders import count_frames, decisive_decoders, decode, load_decoders
from arvideo_ds.decoding.video import RejectedError, TranscodeSettings, probe, transcode
from arvideo_ds.errors import UserError, command
from arvideo_ds.host import cpu_name
from arvideo_ds.shards.ingest import ingest
from arvideo_ds.shards.video_files import find_videos


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("videos", type=Path, help="a folder")
    parser.add_number("layers", 1, "as of arvideo shards")
    parser.add_number("rounds", 3, "the fastest counts")
    args = parser.parse_args()
    settings = TranscodeSettings(layers=args.layers, gop=TranscodeSettings.gop * args.layers)
    decoders = decisive_decoders()
    load_decoders(decoders)
    seconds, total = 0.0, defaultdict[str, float](float)
    for path in find_videos(args.videos):
        try:
            seconds += ingest(path, settings).facts["duration_s"]
            for stage, function in _stages(path, settings, decoders):
                total[stage] += min(_cpu_s(function) for _ in range(args.rounds))
        except RejectedError as error:
            raise UserError(f"{path}: {error.reason} ({error.message}); remove it.") from None
    if not seconds:
        raise UserError(f"{args.videos} has no videos.")
    rows = {stage: round(10_000 * s / seconds, 1) for stage, s in total.items()}
    machine = {"cpu": cpu_name(), "python": platform.python_version(), "av": av.__version__}
    result = {"seconds": round(seconds, 1), "cpu_ms_per_10_s": rows, "machine": machine}
    print(json.dumps(result, indent=1))


def _stages(
    path: Path, settings: TranscodeSettings, decoders: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "sample, transcoded", partial(ingest, path, settings, decoders=decoders)
    yield "sample, copied", partial(ingest, path, None, decoders=decoders)
    source = path.read_bytes()
    yield "decode the source", lambda: probe(io.BytesIO(source))
    yield "decode, scale and encode it", lambda: transcode(io.BytesIO(source), settings)
    copy, info = transcode(io.BytesIO(source), settings)
    yield "decode the copy", lambda: probe(io.BytesIO(copy))
    numbers = np.unique(np.linspace(0, info.num_frames - 1, 8).astype(int))
    for name in decoders:
        yield f"{name}: count the copy's frames", partial(count_frames, name, copy)
        yield f"{name}: its last frame", partial(decode, name, copy, numbers[-1:])
        yield f"{name}: 8 of its frames", partial(decode, name, copy, numbers)


def _cpu_s(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
