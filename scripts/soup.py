#!/usr/bin/env python3
"""`arvideo soup`, as a file for launchers and checkouts."""

from arvideo_ds.cli.soup import main

if __name__ == "__main__":
    raise SystemExit(main())
