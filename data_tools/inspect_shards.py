#!/usr/bin/env python3
"""`arvideo inspect`, as a file for launchers and checkouts."""

import sys

from arvideo_ds.cli.inspect import main

if __name__ == "__main__":
    sys.exit(main())
