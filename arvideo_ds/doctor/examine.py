"""All checks: of one process, and of all ranks together."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arvideo_ds.doctor import machine, software
from arvideo_ds.doctor.report import Finding, of_other_hosts

if TYPE_CHECKING:
    from arvideo_ds.engine.world import World


def examine(folder: Path) -> list[Finding]:
    """Checks of one process; `folder` is that of the runs."""
    versions = software.installed()
    findings = [
        *software.check_packages(versions),
        *software.check_declared(versions),
        *software.check_torchcodec(versions),
        software.check_compilers(),
    ]
    try:
        from arvideo_ds.decoding.decoders import available_decoders

        findings += software.check_decoders(available_decoders())
    except ImportError as error:
        findings.append(Finding("decoders", "problem", str(error), "make setup"))
    return findings + machine.examine(folder)


def measure(world: World, findings: list[Finding]) -> list[Finding]:
    """Add the speed of every rank and of all together, and what is not ok on other hosts.
    Collective."""
    import torch.distributed as dist

    from arvideo_ds.doctor import speed

    findings = [*findings, speed.check_gpus()]
    here = socket.gethostname()
    everywhere: list[Any] = [None] * world.size
    speed_here = speed.matmul_gflops(world.device)
    dist.all_gather_object(everywhere, (here, world.local_rank, findings, speed_here))
    # One process per host.
    for host, local_rank, others, _ in everywhere[1:]:
        findings += of_other_hosts(host, others) if local_rank == 0 and host != here else []
    findings.append(speed.check_matmul([gflops for *_, gflops in everywhere], world.device))
    if world.size > 1:
        findings.append(speed.check_all_reduce(world.device))
    dist.destroy_process_group()
    return findings
