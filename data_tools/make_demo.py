#!/usr/bin/env python3
"""Make the demo's videos and shards in data/demo, where they are missing.

python data_tools/make_demo.py
"""

from __future__ import annotations

import argparse
import sys

from arvideo_ds.data.demo_set import DEMO_FOLDER, ensure_demo_shards
from arvideo_ds.errors import command


@command
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    ensure_demo_shards()
    print(f"demo shards: {DEMO_FOLDER}/train and {DEMO_FOLDER}/test")


if __name__ == "__main__":
    sys.exit(main())
