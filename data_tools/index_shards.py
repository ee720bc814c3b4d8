#!/usr/bin/env python3
"""`arvideo index`, as a file for launchers and checkouts."""

from arvideo_ds.cli.index import main

if __name__ == "__main__":
    raise SystemExit(main())
