#!/usr/bin/env python3
"""`arvideo finetune`, as a file for launchers and checkouts."""

from arvideo_ds.cli.finetune import main

if __name__ == "__main__":
    raise SystemExit(main())
