#!/usr/bin/env python3
"""`arvideo score_tokens`, as a file for launchers and checkouts."""

from arvideo_ds.cli.score_tokens import main

if __name__ == "__main__":
    raise SystemExit(main())
