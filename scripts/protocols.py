#!/usr/bin/env python3
"""`arvideo protocols`, as a file for launchers and checkouts."""

from arvideo_ds.cli.protocols import main

if __name__ == "__main__":
    raise SystemExit(main())
