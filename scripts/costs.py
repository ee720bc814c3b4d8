#!/usr/bin/env python3
"""`arvideo costs`, as a file for launchers and checkouts."""

from arvideo_ds.cli.costs import main

if __name__ == "__main__":
    raise SystemExit(main())
