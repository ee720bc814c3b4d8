#!/usr/bin/env python3
"""`arvideo verify`, as a file for launchers and checkouts."""

from arvideo_ds.cli.verify import main

if __name__ == "__main__":
    raise SystemExit(main())
