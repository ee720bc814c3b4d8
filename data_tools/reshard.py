#!/usr/bin/env python3
"""`arvideo reshard`, as a file for launchers and checkouts."""

import sys

from arvideo_ds.cli.reshard import main

if __name__ == "__main__":
    sys.exit(main())
