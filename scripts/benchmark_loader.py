#!/usr/bin/env python3
"""`arvideo benchmark_loader`, as a file for launchers and checkouts."""

from arvideo_ds.cli.benchmark_loader import main

if __name__ == "__main__":
    raise SystemExit(main())
