#!/usr/bin/env python3
"""`arvideo attention`, as a file for launchers and checkouts."""

from arvideo_ds.cli.attention import main

if __name__ == "__main__":
    raise SystemExit(main())
