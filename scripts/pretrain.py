#!/usr/bin/env python3
"""`arvideo pretrain`, as a file for launchers and checkouts."""

from arvideo_ds.cli.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
