"""Where the files of a shard folder are: on a disk here, or behind a URL with a cache before it.

URLs are opened by fsspec (s3://, gs://, http://, ...; its package for the protocol must be
installed). A shard is fetched whole when it is first read, checked, and kept in the cache folder:
$ARVIDEO_CACHE, else ~/.cache/arvideo_ds. Nothing is ever removed from it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import fsspec

from arvideo_ds.errors import UserError

_GIB = 2**30


class Store(Protocol):
    """The files of one folder of shards, by name; `folder` is where they are or will be cached."""

    folder: Path

    def path(self, name: str, *, fresh: bool = False) -> Path:
        """The file on a disk of this machine; `fresh` asks again behind a cache.

        Errors: `OSError`.
        """

    def size(self, name: str) -> int:
        """Bytes of the file, without reading it. Errors: `OSError`."""


def open_store(folder: str | Path) -> Store:
    """The store of a folder or URL."""
    text = str(folder)
    return RemoteStore(text) if "://" in text else LocalStore(Path(folder))


class LocalStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, *, fresh: bool = False) -> Path:  # noqa: ARG002  nothing to fetch
        return self.folder / name

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size


class RemoteStore:
    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open {url}: {error}") from None
        root = Path(os.environ.get("ARVIDEO_CACHE", Path.home() / ".cache" / "arvideo_ds"))
        readable = urlsplit(url).path.strip("/").rpartition("/")[2] or "shards"
        self.folder = root / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"

    def path(self, name: str, *, fresh: bool = False) -> Path:
        """Fetches the file where the cache lacks it; a half-fetched file never has its name."""
        cached = self.folder / name
        if cached.exists() and not fresh:
            return cached
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = self.size(name), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder} has {free / _GIB:.2f} GiB free, {name} needs {needed / _GIB:.2f}. "
                "Free some space, or set ARVIDEO_CACHE to a larger disk."
            )
        # Workers and ranks may fetch the same shard at once: each its own, the last rename stays.
        partial = cached.with_name(f"{name}.{os.getpid()}.partial")
        try:
            self._files.get_file(f"{self._root}/{name}", str(partial))
            partial.replace(cached)
        finally:
            partial.unlink(missing_ok=True)
        return cached

    def size(self, name: str) -> int:
        return int(self._files.size(f"{self._root}/{name}"))
