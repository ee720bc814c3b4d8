#!/usr/bin/env python3
"""`arvideo inspect`, as a file for launchers and checkouts."""

from arvideo_ds.cli.inspect import main

if __name__ == "__main__":
    raise SystemExit(main())
