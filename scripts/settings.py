#!/usr/bin/env python3
"""`arvideo settings`, as a file for launchers and checkouts."""

from arvideo_ds.cli.settings import main

if __name__ == "__main__":
    raise SystemExit(main())
