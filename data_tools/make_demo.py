#!/usr/bin/env python3
"""Make videos and shards of a synthetic set in data/, where they are missing.

python data_tools/make_demo.py                eight directions of motion: the demo, the ablations
python data_tools/make_demo.py --set events   128 frames; the class is the order of two events
"""

from __future__ import annotations

import sys

from arvideo_ds.arguments import CommandParser
from arvideo_ds.data.demo_set import DEMO, DEMO_FOLDER
from arvideo_ds.data.events_set import EVENTS, EVENTS_FOLDER
from arvideo_ds.data.synthetic import ensure_shards
from arvideo_ds.errors import command

SETS = {"demo": (DEMO, DEMO_FOLDER), "events": (EVENTS, EVENTS_FOLDER)}


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, default="demo")
    videos, folder = SETS[parser.parse_args().set]
    ensure_shards(videos, folder)
    print(f"{videos.name} shards: {' and '.join(str(folder / split) for split in videos.splits)}")


if __name__ == "__main__":
    sys.exit(main())
