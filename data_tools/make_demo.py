#!/usr/bin/env python3
"""`arvideo demo`, as a file for launchers and checkouts."""

from arvideo_ds.cli.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
