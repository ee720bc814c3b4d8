#!/usr/bin/env python3
"""`arvideo probe`, as a file for launchers and checkouts."""

from arvideo_ds.cli.probe import main

if __name__ == "__main__":
    raise SystemExit(main())
