#!/usr/bin/env python3
"""A command of the room long_video, as a file for launchers and checkouts."""

import sys

from arvideo_ds.long_video.score_tokens import main

if __name__ == "__main__":
    sys.exit(main())
