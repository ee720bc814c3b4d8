#!/usr/bin/env python3
"""`arvideo predict`, as a file for launchers and checkouts."""

from arvideo_ds.cli.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
