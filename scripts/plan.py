#!/usr/bin/env python3
"""`arvideo plan`, as a file for launchers and checkouts."""

from arvideo_ds.cli.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
