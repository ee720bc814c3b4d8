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
from arvideo_ds.host import available_cores, available_memory

_GIB = 2**30
# One rank of the demo, the smallest run there is, takes 1.0 GiB (memory/peak_gib).
_LEAST_MEMORY = 2 * _GIB
# Docker's default; no batch of a real recipe fits.
_LEAST_SHM = 64 * 2**20
# data.prefetch_mib of one rank, at its default.
_GOOD_SHM = 4 * _GIB
_GOOD_FILES = 4096
_GOOD_DISK = 10 * _GIB
_SLOW_FSYNC_S = 1.0
_SHM = Path("/dev/shm")
_CGROUPS = Path("/sys/fs/cgroup")


def check_cores(seen: int, quota: float | None) -> Finding:
    """`seen` cores in the affinity mask, `quota` cores' worth of time (cgroup), if limited."""
    says = f"{seen} core(s)" + ("" if quota is None else f", time limit of {quota:g}")
    if quota is not None and quota < seen:
        fix = f"threads beyond the limit are stopped, not run: data.workers={max(1, int(quota))}"
        return Finding("cores", "warning", says, fix)
    return Finding("cores", "ok", says)


def check_memory(available: int | None, limit: int | None) -> Finding:
    """Bytes: free for new programs on the host, and the most that this job may take (cgroup)."""
    if available is None:
        return Finding("memory", "ok", "this system does not tell how much is available")
    usable = available if limit is None else min(available, limit)
    says = f"{available / _GIB:.1f} GiB available" + (
        "" if limit is None else f", limit of {limit / _GIB:.1f} GiB"
    )
    if usable < _LEAST_MEMORY:
        return Finding("memory", "problem", says, "ask for more (Slurm: --mem or --mem-per-gpu)")
    return Finding("memory", "ok", says)


def check_shm(free: int | None) -> Finding:
    """Bytes free; None where the system has no /dev/shm and torch shares memory in other ways."""
    if free is None:
        return Finding("/dev/shm", "ok", "not used on this system")
    says = f"{free / _GIB:.2f} GiB free in /dev/shm, where batches wait for the trainer"
    fix = "containers: --shm-size=16g or --ipc=host; else lower data.prefetch_mib"
    if free <= _LEAST_SHM:
        return Finding("/dev/shm", "problem", says, fix)
    if free < _GOOD_SHM:
        return Finding("/dev/shm", "warning", says, fix)
    return Finding("/dev/shm", "ok", says)


def check_open_files(soft: int, hard: int) -> Finding:
    """Limits as of getrlimit: negative means none."""
    if 0 <= soft < _GOOD_FILES:
        more = _GOOD_FILES if hard < 0 else min(hard, _GOOD_FILES)
        return Finding("open files", "warning", f"{soft} allowed", f"ulimit -n {more}")
    return Finding("open files", "ok", f"{soft} allowed" if soft >= 0 else "no limit")


def check_host_name(host: str, address: str | None, interfaces: list[str]) -> Finding:
    """`address` that the host's own name resolves to: where other nodes would look for it."""
    among = f"interfaces: {', '.join(interfaces)}"
    fix = "name the network: export GLOO_SOCKET_IFNAME=NAME NCCL_SOCKET_IFNAME=NAME"
    if address is None:
        return Finding("network", "warning", f"{host} does not resolve its own name; {among}", fix)
    says = f"{host} is {address}; {among}"
    if ipaddress.ip_address(address).is_loopback:
        return Finding("network", "warning", f"{says}; other nodes cannot reach that", fix)
    return Finding("network", "ok", says)


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
        fix = "choose another --output, on a disk that is mounted with locks"
        return Finding(
            "disk", "problem", f"{folder}: write, flock, fsync or rename failed: {error}", fix
        )
    finally:
        for left in (probe, renamed):
            with contextlib.suppress(OSError):
                left.unlink()
    free = shutil.disk_usage(folder).free
    took = f"write, flock, fsync and rename in {elapsed_s * 1e3:.0f} ms"
    says = f"{folder}: {free / _GIB:.0f} GiB free; {took}"
    if free < _GOOD_DISK:
        return Finding("disk", "warning", says, "three checkpoints of ViT-B take about 4 GiB")
    if elapsed_s > _SLOW_FSYNC_S:
        return Finding("disk", "warning", says, "a slow disk; choose another --output")
    return Finding("disk", "ok", says)


def cgroup_cores(root: Path = _CGROUPS) -> float | None:
    """Cores' worth of time that the cgroup allows, in version 2 or 1; None without a limit."""
    for group in _groups(root, "cpu"):
        both = _read(group / "cpu.max").split() or [
            _read(group / "cpu.cfs_quota_us"),
            _read(group / "cpu.cfs_period_us"),
        ]
        if len(both) == 2 and all(part.isdigit() for part in both):
            return int(both[0]) / int(both[1])
    return None


def cgroup_memory(root: Path = _CGROUPS) -> int | None:
    """Bytes that the cgroup allows; None without a limit."""
    limits = [
        int(text)
        for group in _groups(root, "memory")
        for text in (_read(group / "memory.max"), _read(group / "memory.limit_in_bytes"))
        # Version 1 writes "no limit" as nearly 2^63.
        if text.isdigit() and int(text) < 2**60
    ]
    return min(limits, default=None)


def _groups(root: Path, controller: str, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's groups and their parents, innermost first."""
    groups = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", controller) and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        inner = top / path.lstrip("/")
        groups += [inner, *(p for p in inner.parents if p == top or top in p.parents)]
    return groups


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def examine(folder: Path) -> list[Finding]:
    """All of the above on this host."""
    host = socket.gethostname()
    return [
        check_cores(len(available_cores()), cgroup_cores()),
        check_memory(available_memory(), cgroup_memory()),
        check_shm(_free_shm()),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_host_name(host, _address(host), [name for _, name in socket.if_nameindex()]),
        check_disk(folder),
    ]


def _free_shm() -> int | None:
    if _SHM.is_dir():
        return shutil.disk_usage(_SHM).free
    return 0 if sys.platform == "linux" else None


def _address(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None
