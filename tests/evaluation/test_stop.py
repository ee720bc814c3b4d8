"""What a pass over many videos makes of signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from arvideo_ds.evaluation.stop import Stop


@pytest.fixture
def stop() -> Iterator[Stop]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_ctrl_c_after_it_ends_at_once(
    stop: Stop, first: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not stop.requested()
    signal.raise_signal(first)
    assert stop.requested()
    assert "Ctrl-C again" in capfd.readouterr().err
    # Schedulers send it more than once.
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
