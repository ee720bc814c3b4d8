#!/usr/bin/env python3
"""`arvideo export`, as a file for launchers and checkouts."""

from arvideo_ds.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
