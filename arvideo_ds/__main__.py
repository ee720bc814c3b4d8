"""`python -m arvideo_ds COMMAND`: the command `arvideo` for launchers that start modules.

Must not know anything but the room cli.
"""

import sys

from arvideo_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
