"""A real HTTP server of a folder that fails when it is asked to, and counts what it gave."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

# Answers of a server in trouble; "drop" ends the connection in the middle of the body, "stall"
# stops for `stall_s` there.
STATUS = {"500": HTTPStatus.INTERNAL_SERVER_ERROR, "503": HTTPStatus.SERVICE_UNAVAILABLE}


class FaultyServer(http.server.ThreadingHTTPServer):
    """faults: of a file's next GETs, in order. whole: how often each file was given to its end."""

    daemon_threads = True

    def __init__(self, folder: Path, stall_s: float) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, folder))
        self.stall_s = stall_s
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.gets: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/shards"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what the tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer

    def __init__(self, folder: Path, *args: Any) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        name = Path(self.path).name
        with self.server.counting:
            self.server.gets[name] += 1
            faults = self.server.faults[name]
            fault = faults.pop(0) if faults else ""
        if fault in STATUS:
            self.send_error(STATUS[fault])
            return
        data = self._head()
        if data is None:
            return
        half = len(data) // 2
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == "drop":
            self.connection.close()
            return
        if fault == "stall":
            time.sleep(self.server.stall_s)
        # A client that has all of it also sees it counted.
        self.wfile.write(data[half:-1])
        self.wfile.flush()
        with self.server.counting:
            self.server.whole[name] += 1
        self.wfile.write(data[-1:])
        self.wfile.flush()

    def _head(self) -> bytes | None:
        path = self.folder / Path(self.path).name
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        data = path.read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data

    def log_message(self, *args: Any) -> None:
        """The tests count; nobody reads."""


@contextlib.contextmanager
def serve(folder: Path, *, stall_s: float = 60) -> Iterator[FaultyServer]:
    """The files of a folder at `url`, until the block ends."""
    with FaultyServer(folder, stall_s) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
