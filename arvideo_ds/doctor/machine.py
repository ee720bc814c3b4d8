"""One host: cores, memory, shared memory, open files, its name, and the disk of the runs."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import resource
import shutil
import socket
import sys
import time
from pathlib import Path

from arvideo_ds.doctor.report import Finding
from arvideo_ds.host import available_cores, available_memory, read_text

_GIB = 2**30
# One rank of the demo takes 1.0 GiB (memory/peak_gib).
_LEAST_MEMORY = 2 * _GIB
# Docker's default, too small for a batch of a real recipe.
_LEAST_SHM = 64 * 2**20
# Default of data.prefetch_mib, per rank.
_GOOD_SHM = 4 * _GIB
_GOOD_FILES = 4096
_GOOD_DISK = 10 * _GIB
_SLOW_FSYNC_S = 1.0
_SHM = Path("/dev/shm")
_CGROUPS = Path("/sys/fs/cgroup")


def check_cores(cores: int, quota: float | None) -> Finding:
    """cores: in the affinity mask. quota: cores' worth of time (cgroup), None without a limit."""
    says = f"{cores} core(s)" + ("" if quota is None else f", time limit of {quota:g}")
    if quota is None or quota >= cores:
        return Finding("cores", "ok", says)
    fix = f"threads beyond the limit are stopped, not run: data.workers={max(1, int(quota))}"
    return Finding("cores", "warning", says, fix)


def check_memory(available: int | None, limit: int | None) -> Finding:
    """Bytes available on the host, and the limit of this job (cgroup)."""
    if available is None:
        return Finding("memory", "ok", "this system does not tell how much is available")
    says = f"{available / _GIB:.1f} GiB available"
    if limit is not None:
        says += f", limit of {limit / _GIB:.1f} GiB"
        available = min(available, limit)
    if available < _LEAST_MEMORY:
        return Finding("memory", "problem", says, "ask for more (Slurm: --mem or --mem-per-gpu)")
    return Finding("memory", "ok", says)


def check_shm(free: int | None) -> Finding:
    """Bytes free; None without /dev/shm, where torch shares memory in other ways."""
    if free is None:
        return Finding("/dev/shm", "ok", "not used on this system")
    says = f"{free / _GIB:.2f} GiB free in /dev/shm, where batches wait for the trainer"
    if free >= _GOOD_SHM:
        return Finding("/dev/shm", "ok", says)
    fix = "containers: --shm-size=16g or --ipc=host; else lower data.prefetch_mib"
    return Finding("/dev/shm", "problem" if free <= _LEAST_SHM else "warning", says, fix)


def check_open_files(soft: int, hard: int) -> Finding:
    """Limits of getrlimit: negative means none."""
    if 0 <= soft < _GOOD_FILES:
        more = _GOOD_FILES if hard < 0 else min(hard, _GOOD_FILES)
        return Finding("open files", "warning", f"{soft} allowed", f"ulimit -n {more}")
    return Finding("open files", "ok", f"{soft} allowed" if soft >= 0 else "no limit")


def check_host_name(host: str, address: str | None, interfaces: list[str]) -> Finding:
    """address: what the host's own name resolves to, where other nodes connect to."""
    says = f"{host} is {address}" if address else f"{host} does not resolve its own name"
    says += f"; interfaces: {', '.join(interfaces)}"
    if address is not None:
        if not ipaddress.ip_address(address).is_loopback:
            return Finding("network", "ok", says)
        says += "; other nodes cannot reach that"
    fix = "name the network: export GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME"
    return Finding("network", "warning", says, fix)


def check_disk(folder: Path) -> Finding:
    """What checkpoints and the run's lock need: write, fsync, rename, flock, space."""
    probe, renamed = folder / f".doctor-{os.getpid()}", folder / f".doctor-{os.getpid()}.renamed"
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write("x")
            file.flush()
            os.fsync(file.fileno())
        probe.replace(renamed)
        elapsed_s = time.perf_counter() - started
    except OSError as error:
        says = f"{folder}: write, flock, fsync or rename failed: {error}"
        fix = "choose another --output, on a disk that is mounted with locks"
        return Finding("disk", "problem", says, fix)
    finally:
        for path in (probe, renamed):
            with contextlib.suppress(OSError):
                path.unlink()
    free = shutil.disk_usage(folder).free
    says = f"{folder}: {free / _GIB:.0f} GiB free; "
    says += f"write, flock, fsync and rename in {elapsed_s * 1e3:.0f} ms"
    if free < _GOOD_DISK:
        return Finding("disk", "warning", says, "three checkpoints of ViT-B take about 4 GiB")
    if elapsed_s > _SLOW_FSYNC_S:
        return Finding("disk", "warning", says, "a slow disk; choose another --output")
    return Finding("disk", "ok", says)


def cgroup_cores(root: Path = _CGROUPS) -> float | None:
    """Cores' worth of time that the cgroup (version 1 or 2) allows; None without a limit."""
    for group in _groups(root, "cpu"):
        parts = read_text(group / "cpu.max").split()
        parts = parts or [read_text(group / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
        if len(parts) == 2 and all(part.isdigit() for part in parts):
            return int(parts[0]) / int(parts[1])
    return None


def cgroup_memory(root: Path = _CGROUPS) -> int | None:
    """Bytes that the cgroup allows; None without a limit."""
    files = ("memory.max", "memory.limit_in_bytes")
    texts = [read_text(group / file) for group in _groups(root, "memory") for file in files]
    # Version 1 writes "no limit" as nearly 2^63.
    limits = (int(text) for text in texts if text.isdigit() and int(text) < 2**60)
    return min(limits, default=None)


def _groups(root: Path, controller: str, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's groups and their parents, innermost first."""
    groups = []
    for line in read_text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = root / controller if controllers else root
            inner = top / path.lstrip("/")
            groups += [inner, *(p for p in inner.parents if p == top or top in p.parents)]
    return groups


def examine(folder: Path) -> list[Finding]:
    """All of these checks on this host; `folder` is that of the runs."""
    host, address = socket.gethostname(), None
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(host)
    free_shm = 0 if sys.platform == "linux" else None
    if _SHM.is_dir():
        free_shm = shutil.disk_usage(_SHM).free
    return [
        check_cores(len(available_cores()), cgroup_cores()),
        check_memory(available_memory(), cgroup_memory()),
        check_shm(free_shm),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_host_name(host, address, [name for _, name in socket.if_nameindex()]),
        check_disk(folder),
    ]
