#!/usr/bin/env python3
"""`arvideo evaluate_tokenizer`, as a file for launchers and checkouts."""

import sys

from arvideo_ds.cli.evaluate_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
