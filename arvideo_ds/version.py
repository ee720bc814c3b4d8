"""Which code this is."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit() -> str:
    """Hash of the checkout's commit, marked where files were changed; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
