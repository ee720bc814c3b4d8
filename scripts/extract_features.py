#!/usr/bin/env python3
"""`arvideo features`, as a file for launchers and checkouts."""

from arvideo_ds.cli.features import main

if __name__ == "__main__":
    raise SystemExit(main())
