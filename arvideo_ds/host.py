"""Cores and memory of this host, on Linux and macOS.

The only module that reads /proc, core masks and resource usage. What a system does not provide is
None, or 0 where it is added to a sum, and never an error.
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
    """Memory of a process with its shared pages (RSS); 0 if it has ended or is unknown."""
    pages = read_text(_PROC / str(pid) / "statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def proportional_bytes(pid: int) -> int:
    """Memory of a process with its share of shared pages (PSS); 0 if unknown."""
    return _field_bytes(_PROC / str(pid) / "smaps_rollup", "Pss") or 0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with its threads, user and system; 0 if it has ended or is unknown."""
    fields = read_text(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def peak_resident_bytes() -> int:
    """Peak memory of this process (RSS)."""
    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory() -> int | None:
    """Bytes available to new programs; None if unknown."""
    return _field_bytes(_PROC / "meminfo", "MemAvailable")


def limit_memory(gib: float) -> None:
    """Let allocations fail beyond so many GiB more than now: a `MemoryError` in most libraries.
    Without such a limit in the system, nothing happens."""
    allocated = _field_bytes(_PROC / "self" / "status", "VmData")
    if allocated is None:
        return
    limit = allocated + int(gib * 2**30)
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def pid_namespace() -> int:
    """A number of a process has a meaning within its namespace only; 0 if unknown."""
    try:
        return (_PROC / "self" / "ns" / "pid").stat().st_ino
    except OSError:
        return 0


def cpu_name() -> str:
    return _field(_PROC / "cpuinfo", "model name") or platform.machine()


def _field(path: Path, name: str) -> str | None:
    """Value of the first line `name: value`."""
    lines = (line.partition(":") for line in read_text(path).splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)


def _field_bytes(path: Path, name: str) -> int | None:
    """The same of a field in KiB."""
    kib = _field(path, name)
    return int(kib.split()[0]) * 1024 if kib else None


def read_text(path: Path) -> str:
    """The stripped text of a file; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
