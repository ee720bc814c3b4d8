"""A real S3 server (moto) in this process: buckets of folders, counts of requests, outages."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIDTESTSONLY", "secret-of-the-tests"


class S3Server:
    """A WSGI application in front of moto's.

    gets: how often each file was requested. outage_at: the next request of this file is dropped,
    and the server is gone for `outage_s`.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._moto: Any = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self.gets: Counter[str] = Counter()
        self.outage_at, self.outage_s, self.outages = "", 0.0, 0
        self._start()

    def _start(self) -> None:
        from moto.moto_server.werkzeug_app import MotoRequestHandler
        from werkzeug.serving import make_server

        self._server = make_server(
            "127.0.0.1", self._port, self, threaded=True, request_handler=MotoRequestHandler
        )
        self._port = self._server.server_port
        poll = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=poll)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _fail(self) -> None:
        self.stop()
        time.sleep(self.outage_s)
        self._start()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        name = Path(environ["PATH_INFO"]).name
        if environ["REQUEST_METHOD"] == "GET":
            self.gets[name] += 1
            if name == self.outage_at:
                self.outage_at, self.outages = "", self.outages + 1
                threading.Thread(target=self._fail).start()
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return self._moto(environ, start_response)

    @property
    def environment(self) -> dict[str, str]:
        """What a user would set."""
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @functools.cached_property
    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL_S3"],
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )

    def put(self, folder: Path, bucket: str, *, public: bool = False) -> str:
        """The files of a folder in a new bucket; their URL."""
        self.client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            if path.is_file():
                self.client.put_object(
                    Bucket=bucket,
                    Key=f"sets/{path.name}",
                    Body=path.read_bytes(),
                    ACL="public-read" if public else "private",
                )
        return f"s3://{bucket}/sets"


@contextlib.contextmanager
def serve_s3() -> Iterator[S3Server]:
    """The server, until the block ends. Skips the test where a package is missing."""
    for package in ("s3fs", "moto", "flask", "flask_cors"):
        pytest.importorskip(package, reason=f"no {package}: pip install -e '.[dev]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()
