#!/usr/bin/env python3
"""`arvideo doctor`, as a file for launchers and checkouts."""

from arvideo_ds.cli.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
