#!/usr/bin/env python3
"""`arvideo benchmark`, as a file for launchers and checkouts."""

from arvideo_ds.cli.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
