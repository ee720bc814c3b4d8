#!/usr/bin/env python3
"""`arvideo shards`, as a file for launchers and checkouts."""

from arvideo_ds.cli.shards import main

if __name__ == "__main__":
    raise SystemExit(main())
