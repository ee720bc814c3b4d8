"""The files of a shard folder: on a local disk, or behind a URL with a local cache.

fsspec opens URLs (s3://, gs://, http://, ...; the package for the protocol must be installed). The
first read of a file downloads all of it into the cache:

<cache>/<last part of the URL>-<its hash>/
  manifest.json               as the server had it at the last start
  <hash of the manifest>/     the files of that manifest
    NAME, NAME.partial        complete; incomplete
    NAME.lock                 locked by the process that fetches NAME; its size reserves the space

Environment variables: ARVIDEO_CACHE (the cache, default ~/.cache/arvideo_ds), ARVIDEO_CACHE_GIB
(its largest size, default unlimited), ARVIDEO_FETCH_TRIES (default 6) and ARVIDEO_FETCH_TIMEOUT_S
(default 20, without a byte).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem

from arvideo_ds.errors import UserError, how_to_install

_GIB = 2**30
# Pauses between tries double from the first to the longest, each with jitter: by default at least
# 7.7 s in all, which outlasts an outage of 5 s.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
# The time limit of a download allows this rate, beside ARVIDEO_FETCH_TIMEOUT_S.
_SLOWEST_BYTES_PER_S = 2**20
# The size that the time limit assumes for an index.
_ASSUMED_BYTES = 2**26
# After a failed fetch, the same file is not requested for this time: its videos are skipped.
_FAILED_FOR_S = 30.0
# Length of the queue of files to fetch in the background.
_AHEAD = 2
_WAIT_FOR_ROOM_S = 0.2
_LOCK, _PARTIAL = ".lock", ".partial"
# Never removed: `newest` returns them without a lock.
_NEWEST = ("manifest.json", "scores.json")
# HTTP codes that do not change at another try, except time-outs and too many requests.
_CLIENT_ERRORS, _TRANSIENT = range(400, 500), (408, 429)
# The extra in setup.py that installs what a protocol needs.
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_CHECK_S3 = (
    "; check the bucket, the endpoint (AWS_ENDPOINT_URL_S3) and the credentials "
    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
    """FSSPEC_S3='{"anon": true}')"""
)
_DEFINITE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class FetchError(OSError):
    """A file behind a URL that could not be fetched, after all tries."""


class WrongSizeError(OSError):
    """A complete file that has `size` bytes instead of the expected number."""

    def __init__(self, size: int) -> None:
        super().__init__(f"it has {size} bytes")
        self.size = size


def cache_root() -> Path:
    return Path(os.environ.get("ARVIDEO_CACHE", Path.home() / ".cache" / "arvideo_ds"))


def open_store(folder: str | Path) -> Store:
    """The store of a folder or URL. Errors: `UserError`."""
    text = str(folder)
    return RemoteStore(text) if "://" in text else Store(Path(folder))


class Store:
    """The files of a local folder by name. `RemoteStore` has those of a URL."""

    # Files never leave `folder`, so readers may keep them open.
    permanent = True

    def __init__(self, folder: Path) -> None:
        """folder: where the files are, or where they will be cached."""
        self.folder = folder

    def newest(self, name: str) -> Path:
        """The current file, never an older copy from the cache. Errors: `OSError`."""
        return self.folder / name

    def of(self, version: str) -> Store:  # noqa: ARG002  only a cache has versions
        """The same files, cached separately for each `version`."""
        return self

    def path(self, name: str, size: int | None = None) -> Path:
        """A local path of the file; checks its `size` in bytes if given. Errors: `OSError`."""
        path = self.folder / name
        if size is not None and (actual := path.stat().st_size) != size:
            raise WrongSizeError(actual)
        return path

    def open(self, name: str, size: int | None = None) -> int:
        """A descriptor of `path`; the caller closes it. Errors: `OSError`."""
        return os.open(self.path(name, size), os.O_RDONLY)

    def size(self, name: str) -> int | None:
        """Bytes of the file, without a download; None if unknown. Errors: `OSError`."""
        return (self.folder / name).stat().st_size

    def fetch_ahead(self, name: str, size: int | None = None) -> None:
        """Fetch a file in the background. Never waits, never raises."""

    def discard(self, name: str) -> None:
        """Remove a damaged file from the cache."""


class RemoteStore(Store):
    """Files behind a URL. Any process and thread may use it; each process has its connections."""

    permanent = False

    def __init__(self, url: str, version: str | None = None) -> None:
        if _is_s3(url) and "@" in urlsplit(url).netloc:
            raise UserError(
                "the URL of the shards has credentials, which would be stored with the run. Remove "
                "them and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        self._url, self._version = url, version
        root = cache_root()
        readable = urlsplit(url).path.strip("/").rpartition("/")[2] or "shards"
        folder = root / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
        super().__init__(folder if version is None else folder / version[:12])
        self._cache = _Cache(root, _number("ARVIDEO_CACHE_GIB"))
        self._tries = int(_number("ARVIDEO_FETCH_TRIES") or 6)
        self._timeout_s = _number("ARVIDEO_FETCH_TIMEOUT_S") or 20.0
        self._failed: dict[str, tuple[float, OSError]] = {}
        # Files to fetch in the background, and the process whose thread fetches them.
        self._ahead: tuple[int, queue.Queue[tuple[str, int | None]]] = (0, queue.Queue())
        _file_system(url, os.getpid(), self._timeout_s)  # raises for an unknown protocol

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self._url, self._version)  # without threads and connections

    def of(self, version: str) -> Store:
        return RemoteStore(self._url, version)

    def newest(self, name: str) -> Path:
        called = time.time()
        path = self.folder / name
        with _locked(self.folder / (name + _LOCK)) as lock:
            # While this process waited, another one of this machine may have fetched it.
            if not (path.exists() and path.stat().st_mtime > called):
                try:
                    self._fetch(name, self.size(name), lock)
                except FetchError as error:
                    advice = _CHECK_S3 if _is_s3(self._url) else ""
                    raise FetchError(f"{error}{advice}") from None
        return path

    def path(self, name: str, size: int | None = None) -> Path:
        cached = self.folder / name
        if _is_cached(cached, size):
            return cached
        when, failure = self._failed.get(name, (0.0, None))
        if failure is not None and time.monotonic() < when + _FAILED_FOR_S:
            raise failure
        with _locked(self.folder / (name + _LOCK)) as lock:
            if not _is_cached(cached, size):
                try:
                    self._fetch(name, size, lock)
                except OSError as error:
                    self._failed[name] = (time.monotonic(), error)
                    raise
        return cached

    def open(self, name: str, size: int | None = None) -> int:
        while True:
            try:
                descriptor = super().open(name, size)
            except FileNotFoundError as error:
                if error.filename is None:
                    raise
                continue  # another process has just removed it to make room
            # The cache does not remove a file that is locked by a reader.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return descriptor

    def size(self, name: str) -> int | None:
        size = self._retry(name, lambda: self._request("size", name))
        return None if size is None else int(size)

    def fetch_ahead(self, name: str, size: int | None = None) -> None:
        if _is_cached(self.folder / name, size):
            return
        if self._ahead[0] != os.getpid():
            self._ahead = os.getpid(), queue.Queue(_AHEAD)
            threading.Thread(target=self._fetch_queued, name="fetch-ahead", daemon=True).start()
        # A longer queue would fetch files that another worker has fetched by then.
        with contextlib.suppress(queue.Full):
            self._ahead[1].put_nowait((name, size))

    def discard(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def _fetch_queued(self) -> None:
        _, files = self._ahead
        while True:
            name, size = files.get()
            # The reader of the file will get the same error and report it.
            with contextlib.suppress(Exception):
                self.path(name, size)

    def _request(self, method: str, name: str, *arguments: str, num_bytes: int = 0) -> Any:
        """Call a method of fsspec's file system, with a time limit if it accepts one."""
        files, root = _file_system(self._url, os.getpid(), self._timeout_s)
        timeout = self._timeout_s + num_bytes / _SLOWEST_BYTES_PER_S
        limit = {"timeout": timeout} if isinstance(files, AsyncFileSystem) else {}
        return getattr(files, method)(f"{root}/{name}", *arguments, **limit)

    def _fetch(self, name: str, size: int | None, lock: int) -> None:
        """Download under another name, then rename. The caller has the file's lock."""
        partial = self.folder / (name + _PARTIAL)
        self._cache.make_room(lock, size or 0, name)
        try:
            self._retry(name, lambda: self._download(name, partial, size))
            partial.replace(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
            os.ftruncate(lock, 0)

    def _download(self, name: str, partial: Path, size: int | None) -> None:
        num_bytes = _ASSUMED_BYTES if size is None else size
        self._request("get_file", name, str(partial), num_bytes=num_bytes)
        if size is not None and (actual := partial.stat().st_size) != size:
            if self._request("size", name) == actual:
                raise WrongSizeError(actual)
            raise OSError(f"the connection ended after {actual} of {size} bytes")

    def _retry(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a call, which is repeated after errors that may pass.

        Errors: FileNotFoundError if the server has no such file; `FetchError` for every other
        failure, of whatever library; `UserError` if the local disk is full.
        """
        pause = _FIRST_PAUSE_S
        for left in reversed(range(self._tries)):
            try:
                return call()
            except Exception as error:
                if isinstance(error, UserError | WrongSizeError):
                    raise
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise self._cache.full(name) from None
                definite = _is_definite(error)
                if definite and isinstance(error, FileNotFoundError) and not _lacks_bucket(error):
                    raise FileNotFoundError(f"there is no {self._url}/{name}") from None
                if definite or not left:
                    tried = "" if definite else f", {self._tries} tries"
                    raise FetchError(
                        f"cannot fetch {self._url}/{name} ({_described(error)}{tried})"
                    ) from None
            # Other processes failed at the same moment. Training's generators stay untouched.
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise AssertionError("ARVIDEO_FETCH_TRIES is 1 or more")


@functools.cache
def _file_system(url: str, _process: int, timeout_s: float) -> tuple[Any, str]:
    """The file system of a URL, and the folder in it. Errors: `UserError`.

    Per process: connections and their event loop do not survive a fork. Those of the parent are
    kept, because closing them in the child would disturb the parent's.
    """
    protocol = url.partition("://")[0]
    try:
        files, root = fsspec.core.url_to_fs(url, **_options(url, protocol, timeout_s))
    except ImportError as error:
        how = f"; {how_to_install(_EXTRAS[protocol])}" if protocol in _EXTRAS else ""
        raise UserError(f"cannot open {url}: {error}{how}.") from None
    except Exception as error:  # credentials, host names, ...: each library has its own
        raise UserError(f"cannot open {url}: {_described(error)}") from None
    if _is_s3(url):
        files.retries = 1
    return files, root.rstrip("/")


def _options(url: str, protocol: str, timeout_s: float) -> dict[str, Any]:
    """fsspec's options: a time limit per read, tries only by `_retry`, and the user's own."""
    configured = fsspec.config.conf.get(protocol, {})
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's default is five minutes for a file of any size.
        limit = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        return {"client_kwargs": {"timeout": limit, **configured.get("client_kwargs", {})}}
    if _is_s3(url):
        limits = {"read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
        # Parts in parallel would each be held in memory, 50 MB by default.
        return {
            "max_concurrency": 1,
            **configured,
            "config_kwargs": {**limits, **configured.get("config_kwargs", {})},
        }
    return {}


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _is_definite(error: Exception) -> bool:
    """Whether another try would fail in the same way."""
    # fsspec's HTTP raises FileNotFoundError for every failed request of a size; see the cause.
    for raised in (error.__cause__, error):
        status = _status(raised)
        if status is not None:
            return status in _CLIENT_ERRORS and status not in _TRANSIENT
    return isinstance(_cause(error), _DEFINITE)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of aiohttp or botocore."""
    status = getattr(error, "status", None)
    if isinstance(response := getattr(error, "response", None), dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _lacks_bucket(error: Exception) -> bool:
    return "NoSuchBucket" in str(error.__cause__)


def _cause(error: Exception) -> BaseException:
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _described(error: Exception) -> str:
    shown = _cause(error)
    text = " ".join(str(shown).split())[:300]
    return f"{type(shown).__name__}: {text}" if text else type(shown).__name__


def _number(variable: str) -> float | None:
    """A positive number in an environment variable. Errors: `UserError`."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    # NaN compares false.
    if not 0 < number < 1e9 or (variable == "ARVIDEO_FETCH_TRIES" and number != int(number)):
        raise UserError(f"{variable}={text} is not a number above 0.")
    return number


def _is_cached(path: Path, size: int | None) -> bool:
    with contextlib.suppress(FileNotFoundError):
        if size is None or path.stat().st_size == size:
            os.utime(path)  # the cache removes the least recently used file first
            return True
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Make the folder and lock a file in it; the lock also ends when its process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent} ({error.strerror}). Set ARVIDEO_CACHE to a folder of "
            "yours."
        ) from None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        # A process that was forked meanwhile has the descriptor as well; closing would not unlock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


class _Cache:
    """The cached files of all URLs below one folder, and their largest total size."""

    def __init__(self, root: Path, limit_gib: float | None) -> None:
        self._root, self._limit_gib = root, limit_gib

    def full(self, name: str, needed: int | None = None) -> UserError:
        free = shutil.disk_usage(self._root).free
        needs = "more" if needed is None else f"{needed / _GIB:.2f}"
        return UserError(
            f"{self._root} has {free / _GIB:.2f} GiB free, {name} needs {needs}. Free some space, "
            "set ARVIDEO_CACHE to a larger disk, or ARVIDEO_CACHE_GIB to what the cache may take."
        )

    def make_room(self, lock: int, needed: int, name: str) -> None:
        """Reserve space for a file in its lock; wait while all others are in use.

        Errors: `UserError` if the file does not fit.
        """
        if self._limit_gib is not None:
            limit = int(self._limit_gib * _GIB)
            if needed > limit:
                raise UserError(
                    f"{name} has {needed / _GIB:.3g} GiB, more than ARVIDEO_CACHE_GIB="
                    f"{self._limit_gib:g}. Allow more; the cache should have room for the shards "
                    "in use at a time, about data.num_streams x data.window_shards."
                )
            while not self._reserve(lock, needed, limit):
                time.sleep(_WAIT_FOR_ROOM_S)
        if needed > shutil.disk_usage(self._root).free:
            raise self.full(name, needed)

    def _reserve(self, lock: int, needed: int, limit: int) -> bool:
        with _locked(self._root / "room.lock"):
            files = []
            for path in self._root.rglob("*"):
                with contextlib.suppress(OSError):
                    if path.is_file() and path.suffix != _PARTIAL:
                        facts = path.stat()
                        files.append((facts.st_mtime, facts.st_size, path))
            used = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if used + needed <= limit:
                    break
                if size and path.name not in _NEWEST and _remove(path):
                    used -= size
            if used + needed > limit:
                return False
            os.ftruncate(lock, needed)
            return True


def _remove(path: Path) -> bool:
    """Remove a file from the cache, unless a process fetches or reads it."""
    lock = path if path.suffix == _LOCK else path.with_name(path.name + _LOCK)
    try:
        with lock.open("r+b") as locked:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock == path:  # of a process that died during a fetch
                locked.truncate(0)
                path.with_suffix(_PARTIAL).unlink(missing_ok=True)
                return True
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
    except FileNotFoundError:
        path.unlink(missing_ok=True)  # of an earlier version without locks
    except OSError:
        return False
    return True
