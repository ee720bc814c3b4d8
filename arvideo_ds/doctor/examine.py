"""Everything that is looked at: by one process, and by all ranks together."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arvideo_ds.doctor import machine, software
from arvideo_ds.doctor.report import Finding, of_other_hosts

if TYPE_CHECKING:
    from arvideo_ds.engine.world import World


def examine(folder: Path) -> list[Finding]:
    """What one process can see by itself."""
    versions = software.installed()
    findings = [
        *software.check_packages(versions),
        *software.check_declared(versions),
        *software.check_pairs(versions),
        software.check_compilers(),
    ]
    try:
        from arvideo_ds.decoding.decoders import available_decoders

        findings += software.check_decoders(available_decoders())
    except ImportError as error:
        findings.append(Finding("decoders", "problem", str(error), "make setup"))
    return findings + machine.examine(folder)


def measure(world: World, findings: list[Finding]) -> list[Finding]:
    """Speed of every rank and of all together; other hosts add what is not ok. Collective."""
    import torch.distributed as dist

    from arvideo_ds.doctor import speed

    gpus = speed.check_gpus()
    here = (socket.gethostname(), world.local_rank, [*findings, gpus])
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, (*here, speed.matmul_gflops(world.device)))
    report = [*findings, gpus]
    # One process speaks for its host.
    for host, local_rank, found, _ in everywhere[1:]:
        report += of_other_hosts(host, found) if local_rank == 0 and host != here[0] else []
    report.append(speed.check_matmul([gflops for *_, gflops in everywhere], world.device))
    if world.size > 1:
        report.append(speed.check_all_reduce(world.device))
    dist.destroy_process_group()
    return report
