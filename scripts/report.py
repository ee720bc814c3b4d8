#!/usr/bin/env python3
"""`arvideo report`, as a file for launchers and checkouts."""

from arvideo_ds.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
