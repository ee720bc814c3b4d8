#!/usr/bin/env python3
"""`arvideo tokenizer`, as a file for launchers and checkouts."""

from arvideo_ds.cli.tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
