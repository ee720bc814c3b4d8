#!/usr/bin/env python3
"""`arvideo reshard`, as a file for launchers and checkouts."""

from arvideo_ds.cli.reshard import main

if __name__ == "__main__":
    raise SystemExit(main())
