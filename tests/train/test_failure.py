"""The thread that ends a rank whose collective would wait forever for a failed one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arvideo_ds.engine.world import World
from arvideo_ds.host import pid_namespace
from arvideo_ds.train import failure, heartbeat
from arvideo_ds.train.failure import EXIT_CRASH, Peers
from arvideo_ds.train.heartbeat import Heartbeat

HOST, NAMESPACE = socket.gethostname(), pid_namespace()
ELSEWHERE = ("elsewhere", 1, 4242)
Start = Callable[..., Peers]


def world(size: int) -> World:
    return World(0, size, 0, size, torch.device("cpu"), "torchrun", 1)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended; short waits."""
    codes: list[int] = []

    def leave(code: int, text: str) -> None:
        print(text, file=sys.stderr)
        codes.append(code)

    monkeypatch.setattr(failure, "_leave", leave)
    monkeypatch.setattr(failure, "_WATCH_S", 0.02)
    monkeypatch.setattr(failure, "_GRACE_S", 0.1)
    return codes


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """The peers of rank 0 of a start whose other ranks are the given processes."""

    def start(*others: tuple[str, int, int]) -> Peers:
        monkeypatch.setattr(failure, "gather_objects", lambda mine: [mine, *others])
        return Peers(tmp_path, world(1 + len(others)))

    return start


def ended(peers: Peers, codes: list[int], *, within_s: float) -> bool:
    limit = time.monotonic() + within_s
    with peers.watched():
        while not codes and time.monotonic() < limit:
            time.sleep(0.01)
    return bool(codes)


def test_another_rank_s_failure_ends_this_one_and_is_named_in_one_line(
    start: Start, codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    peers = start(ELSEWHERE, ELSEWHERE)
    peers.report(2, "Traceback:\n  line\nValueError: of this test\n")
    assert ended(peers, codes, within_s=10)
    assert codes[0] == EXIT_CRASH
    assert "stops, since rank 2 failed: ValueError: of this test (see " in capsys.readouterr().err


def test_a_main_thread_that_ends_by_itself_is_left_alone(start: Start, codes: list[int]) -> None:
    peers = start(ELSEWHERE)
    peers.report(1, "error")
    assert not ended(peers, codes, within_s=0.05)
    time.sleep(0.2)
    assert not codes


def test_failures_of_other_starts_end_nothing(start: Start, codes: list[int]) -> None:
    """An earlier start, also with more ranks, and a second one that the folder's lock refused."""
    start(ELSEWHERE, ELSEWHERE).report(2, "of more ranks")
    start(("elsewhere", 1, 1)).report(1, "of another process")
    start(ELSEWHERE).report(0, "of this rank, in an earlier start")
    peers = start(ELSEWHERE)
    assert peers.failed() is None
    assert not ended(peers, codes, within_s=0.3)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("namespace", [NAMESPACE, NAMESPACE + 1])
def test_a_process_of_this_host_that_is_gone_has_failed(
    start: Start, codes: list[int], namespace: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays a zombie, as long as its launcher does not look; other containers count anew."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peers = start((HOST, namespace, process.pid))
    try:
        assert not ended(peers, codes, within_s=0.3)
        with peers.watched():
            time.sleep(0.05)
            process.kill()
            time.sleep(1)
    finally:
        process.communicate()
    assert bool(codes) == (namespace == NAMESPACE)
    if codes:
        assert "rank 1 failed: ended without a report" in capsys.readouterr().err
        assert peers.failed() == 1, "the ranks of other hosts learn it from the file"


def test_a_rank_without_heartbeats_is_lost_and_one_with_a_wrong_clock_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_SHORTEST_LOSS_S", 0)
    lost: list[int] = []
    beats = Heartbeat(tmp_path, world(2), stall_s=60, lost=lambda rank, _: lost.append(rank))
    written = tmp_path / heartbeat.FOLDER / "rank-00001.json"
    for second in range(20):  # 20 own beats, 15 s apart; the other clock is years behind
        written.touch()
        os.utime(written, (second, second))
        beats._follow()
    assert not lost
    for _ in range(4):
        beats._follow()
    assert not lost
    beats._follow()
    assert lost == [1]
