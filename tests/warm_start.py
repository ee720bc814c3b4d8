"""Processes that run a script with torch and DeepSpeed already imported.

An import of both takes longer than most runs of the tests. So the first `start` starts a server
which imports them once, stays single-threaded, and forks a process for every later call. That is a
real process: own pid and session, own environment and working folder, real signals and exit codes,
atexit and all. Tests of the real launchers, of imports, or of light commands use `subprocess`.
All forks share the seed of `hash`, so tests of what must not depend on it do too.

    pytest  --request, files-->  server  --fork-->  keeper  --fork-->  the script (or its ranks)
            <------------------ pid, exit code ------'
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy

ROOT = Path(__file__).parent.parent
PRELOADED = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports the compiler, at each ZeRO start
    "timm",
    "decord",
    "arvideo_ds.train.run",
    "arvideo_ds.train.command_line",
)
NUMBER = struct.Struct("i")
MAX_REQUEST_BYTES = 1 << 18
_PR_SET_CHILD_SUBREAPER = 36
ORPHANS_S = 10
GRACE_S = 30  # for ranks whose neighbour failed, as long as DeepSpeed's launcher grants


# -- in pytest ------------------------------------------------------------------------------------


class Process:
    """A started script, with the part of `subprocess.Popen`'s interface that the tests use."""

    def __init__(self, status: socket.socket, stdout: IO[str] | None) -> None:
        self._status, self.stdout = status, stdout
        self.returncode: int | None = None
        self.pid = self._receive()

    def _receive(self) -> int:
        data = self._status.recv(NUMBER.size)
        assert data, "the server of tests/warm_start.py has ended"
        return int(NUMBER.unpack(data)[0])

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = self._receive()
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """The rest of the output, once the process and its children have closed it."""
        assert self.stdout is not None
        output: list[str] = []
        reader = threading.Thread(
            target=lambda: output.append(self.stdout.read()),  # type: ignore[union-attr]
            daemon=True,
        )
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        self.wait(timeout)
        return output[0], None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def show_where_it_hangs(self) -> None:
        """Have the script and its children print the stacks of their threads, and end."""
        os.killpg(self.pid, signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(ORPHANS_S)

    def kill_session(self) -> None:
        """Kill it and its children, if it has not ended."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def start(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str],
    ranks: int = 1,
    cores: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Process:
    """Start `command`, a script and its arguments; `ranks` > 1 starts it as often, on `cores`.

    Output goes to the given file descriptors; without them, both streams to the pipe `stdout` of
    the result. Ranks meet as under DeepSpeed's launcher. When one fails, the others are ended, and
    its exit code is that of the whole.
    """
    ours, theirs = socket.socketpair()
    pipe = None
    if stdout is None:
        reading, stdout = os.pipe()
        pipe = os.fdopen(reading, "r")
        stderr = stdout
    assert stderr is not None
    request = {
        "command": [str(part) for part in command],
        "cwd": str(cwd),
        "env": dict(env),
        "ranks": ranks,
        "cores": cores,
    }
    message = json.dumps(request).encode()
    assert len(message) < MAX_REQUEST_BYTES
    socket.send_fds(_server(), [message], [theirs.fileno(), stdout, stderr])
    theirs.close()
    if pipe is not None:
        os.close(stdout)
    return Process(ours, pipe)


@functools.cache
def _server() -> socket.socket:
    """Started at the first call; ends with the process that called."""
    # Messages, not a stream of bytes: one is one request.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        # Read when the library of threads is loaded, not by each process.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    theirs.close()

    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)  # closing would do less: a forked process may have it too
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# -- in the server, and in what it forks ----------------------------------------------------------


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork until the other side closes. Returns None in the server, in a fork its request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while True:
        message, files, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 3)
        if not message:
            return None
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request: dict[str, Any] = json.loads(message)
            keep(socket.socket(fileno=files[0]), files[1], files[2])
            return request
        for file in files:
            os.close(file)


def keep(status: socket.socket, stdout: int, stderr: int) -> None:
    """Fork once more; the parent reports the exit code, and only the child returns."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
    for file in {stdout, stderr}:
        os.close(file)
    if child == 0:
        status.send(NUMBER.pack(os.getpid()))
        status.close()
        return
    os.closerange(0, 3)
    with contextlib.suppress(AttributeError):  # Linux: orphans of the child become ours
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _, ended = os.waitpid(child, 0)
    wait_for_orphans()
    with contextlib.suppress(BrokenPipeError):
        status.send(NUMBER.pack(os.waitstatus_to_exitcode(ended)))
    os._exit(0)


def wait_for_orphans() -> None:
    """Ranks that were killed with their parent have their locks and ports until they are gone."""
    deadline = time.monotonic() + ORPHANS_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.005)


def run(command: list[str], cwd: str, env: dict[str, str], ranks: int, cores: int | None) -> None:
    os.chdir(cwd)
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ.clear()
    os.environ.update(env)
    faulthandler.enable()
    numpy.random.seed()  # unlike that of `random`, the same in every fork
    if ranks > 1:
        fork_ranks(ranks)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    try:
        runpy.run_path(command[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            raise
    # As the interpreter ends, but for freeing all modules, which takes two seconds after a fork.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork_ranks(ranks: int) -> None:
    """Returns in every rank; the parent waits for all of them and exits as the first to fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
            os.environ.update({name: str(value) for name, value in own.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return
        running.add(pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole session: for the ranks
    os._exit(wait_for_ranks(running))


def wait_for_ranks(running: set[int]) -> int:
    code, deadline = 0, float("inf")
    while running:
        pid, ended = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.remove(pid)
            if ended and not code:
                code = abs(os.waitstatus_to_exitcode(ended))
                deadline = time.monotonic() + GRACE_S
                end_all(running, signal.SIGTERM)
        elif time.monotonic() > deadline:
            end_all(running, signal.SIGKILL)
        time.sleep(0.02)
    return code


def end_all(running: set[int], number: signal.Signals) -> None:
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    for name in PRELOADED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError, RuntimeError):  # it is optional, and needs FFmpeg
        importlib.import_module("torchcodec.decoders")
    importlib.import_module("deepspeed.ops").__compatible_ops__  # runs the C compiler  # noqa: B018
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not survive a fork"
    gc.freeze()  # else every fork would look through, and so copy, what is there already
    request = serve(control)
    if request is None:
        os._exit(0)
    run(**request)


if __name__ == "__main__":
    main()
