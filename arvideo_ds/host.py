"""Cores and memory of this host, on Linux and where it differs on macOS.

The one module that reads /proc, core masks and resource usage. What a system does not tell is None,
or 0 where it only adds to a sum; nothing here raises for that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def available_cores() -> list[int]:
    """Numbers of the CPU cores that this process may use, ascending; at least one."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def bind_to_cores(cores: Iterable[int]) -> None:
    """Run this process on these cores only, where the system can bind processes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def resident_bytes(pid: int) -> int:
    """Memory of a process, pages that it shares included; 0 where it has ended or is not known."""
    pages = _read(_PROC / str(pid) / "statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def proportional_bytes(pid: int) -> int:
    """Memory of a process, shared pages by its share of them (PSS); 0 where it is not known."""
    kib = _field(_PROC / str(pid) / "smaps_rollup", "Pss")
    return int(kib.split()[0]) * 1024 if kib else 0


def peak_resident_bytes() -> int:
    """Most memory that this process held so far."""
    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int | None:
    """Bytes that new programs can have; None where the system does not tell."""
    kib = _field(_PROC / "meminfo", "MemAvailable")
    return int(kib.split()[0]) * 1024 if kib else None


def limit_memory(gib: float) -> None:
    """Let this process allocate so many GiB more than now; then allocations fail.

    That is a `MemoryError` in most libraries. Where the system has no such limit, nothing happens.
    """
    allocated_kib = _field(_PROC / "self" / "status", "VmData")
    if allocated_kib is None:
        return
    limit = 1024 * int(allocated_kib.split()[0]) + int(gib * 2**30)
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def cpu_name() -> str:
    return _field(_PROC / "cpuinfo", "model name") or platform.machine()


def _field(path: Path, name: str) -> str | None:
    """Value of the first line `name: value`."""
    lines = (line.partition(":") for line in _read(path).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
