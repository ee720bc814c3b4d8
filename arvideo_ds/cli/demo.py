"""Make the videos and shards of a synthetic set in data/, unless they exist.

arvideo demo                 eight directions of motion: the demo, the ablations
arvideo demo --set events    128 frames; the class is the order of two events
arvideo demo --set figures   jointed figures, to pretrain on before a few real videos
"""

from __future__ import annotations

from arvideo_ds.arguments import CommandParser
from arvideo_ds.errors import command
from arvideo_ds.shards.synthetic_sets import NAMES, ensure, folder_of, load


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--set", choices=NAMES, default="demo")
    name = parser.parse_args().set
    ensure(name)
    folders = [str(folder_of(name) / split) for split in load(name).splits]
    print(f"{name} shards: {' and '.join(folders)}")
