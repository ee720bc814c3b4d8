"""The emulated cluster: what it writes, what it may end, and that two of them run side by side."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import HOSTS, NODES, Daemon, choose_network


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that belongs to no cluster."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_the_folder_decides_the_subnet(tmp_path: Path) -> None:
    one, same = choose_network(tmp_path / "one"), choose_network(tmp_path / "one")
    other = choose_network(tmp_path / "other", taken={one.number})
    assert one == same
    assert not one.subnet.overlaps(other.subnet)
    addresses = {network.address(host) for network in (one, other) for host in HOSTS}
    assert len(addresses | {one.bridge_address, other.bridge_address}) == 2 * (len(HOSTS) + 1)


def test_a_subnet_in_use_is_not_chosen(tmp_path: Path) -> None:
    last = cluster.NUM_SUBNETS - 1
    assert choose_network(tmp_path, taken=set(range(last))).number == last
    taken = choose_network(tmp_path).number
    assert choose_network(tmp_path, taken={taken}).number == (taken + 1) % cluster.NUM_SUBNETS


def test_every_name_of_a_device_fits(tmp_path: Path) -> None:
    longest = cluster.Network(cluster.NUM_SUBNETS - 1)
    assert longest.subnet.subnet_of(cluster.ADDRESSES)
    assert max(len(longest.device(host)) for host in HOSTS) <= 15  # Linux: IFNAMSIZ - 1


def test_the_configuration_stays_in_its_folder(tmp_path: Path) -> None:
    network = choose_network(tmp_path)
    cluster.write_configuration(tmp_path, network)
    lines = (tmp_path / "slurm.conf").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines)
    nodes = [dict(x.split("=") for x in line.split()) for line in lines if "NodeAddr" in line]
    assert [(node["NodeName"], node["NodeAddr"]) for node in nodes] == [
        (node, network.address(node)) for node in NODES
    ]
    paths = [value for name, value in settings.items() if name.endswith(("PidFile", "Location"))]
    assert all(path.startswith(str(tmp_path)) for path in [*paths, settings["SlurmdSpoolDir"]])
    assert f"socket={tmp_path}/" in settings["AuthInfo"]
    assert "cgroup" not in "\n".join(lines)  # which few containers let slurmd write
    hosts = dict(line.split()[::-1] for line in (tmp_path / "hosts").read_text().splitlines())
    assert {host: hosts[host] for host in HOSTS} == {host: network.address(host) for host in HOSTS}


def test_the_configuration_written_again_is_the_same(tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        cluster.write_configuration(tmp_path, choose_network(tmp_path))
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = content()
    assert content() == first
    assert (tmp_path / "munge.key").stat().st_mode & 0o077 == 0


def test_only_the_process_that_was_started_is_ended(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Its id now belongs to another process: the start times differ."""
    daemon = Daemon(tmp_path, "munged")
    daemon.record.write_text(f"{sleeper.pid} {cluster.start_time(sleeper.pid) - 1}\n")  # type: ignore[operator]
    assert daemon.pid() is None
    daemon.end(signal.SIGTERM, signal.SIGKILL)
    assert sleeper.poll() is None
    assert not daemon.record.exists()


def test_a_daemon_is_ended_and_runs_in_a_session_of_its_own(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "sleeper")
    daemon.start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    pid = daemon.pid()
    assert pid is not None
    assert os.getsid(pid) == pid
    assert cluster.wait_until(lambda: "ready" in daemon.log.read_text(), 5)
    os.kill(pid, signal.SIGTERM)
    assert daemon.pid() == pid
    daemon.end(signal.SIGKILL)
    assert daemon.pid() is None


def test_a_cluster_that_was_never_started_is_stopped(tmp_path: Path) -> None:
    cluster.stop(tmp_path)
    cluster.stop(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_the_reason_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(cluster.ENVIRONMENT, "PATH", str(tmp_path))
    reason = cluster.why_not()
    assert reason is not None
    assert "slurmctld" in reason
    assert "as root: apt-get update && apt-get install" in reason
    with pytest.raises(cluster.ClusterError, match="apt-get install"):
        cluster.start(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    """Two folders with short paths; the clusters in them are stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="slurm") as one, tempfile.TemporaryDirectory() as two:
        found = [Path(one), Path(two)]
        yield found
        for folder in found:
            cluster.stop(folder)


@pytest.mark.slurm
def test_two_clusters_run_side_by_side(folders: list[Path]) -> None:
    reason = cluster.why_not()
    if reason:
        pytest.skip(reason)
    for folder in folders:
        cluster.start(folder)
    daemons = [Daemon(folder, name) for folder in folders for name in ("munged", *HOSTS)]
    first = [daemon.pid() for daemon in daemons]
    cluster.start(folders[0])
    assert [daemon.pid() for daemon in daemons] == first, "a second start changed something"
    for folder in folders:
        environment = {**cluster.ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
        where = cluster.call("srun", "--nodes=2", "hostname", environment=environment)
        assert sorted(where.split()) == list(NODES)
    cluster.stop(folders[0])
    assert [daemon.pid() is None for daemon in daemons] == 4 * [True] + 4 * [False]
    network = cluster.network_of(folders[0])
    left = cluster.call("ip", "link") + cluster.call("ip", "netns")
    assert not re.findall(rf"\b{network.bridge}(?:h\d+)?\b", left)  # slurm4 is not slurm47
