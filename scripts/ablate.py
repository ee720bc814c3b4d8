#!/usr/bin/env python3
"""`arvideo ablate`, as a file for launchers and checkouts."""

from arvideo_ds.cli.ablate import main

if __name__ == "__main__":
    raise SystemExit(main())
