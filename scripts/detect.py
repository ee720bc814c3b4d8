#!/usr/bin/env python3
"""`arvideo detect`, as a file for launchers and checkouts."""

from arvideo_ds.cli.detect import main

if __name__ == "__main__":
    raise SystemExit(main())
