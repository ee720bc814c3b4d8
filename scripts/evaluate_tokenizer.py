#!/usr/bin/env python3
"""`arvideo evaluate_tokenizer`, as a file for launchers and checkouts."""

from arvideo_ds.cli.evaluate_tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
