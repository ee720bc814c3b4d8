"""A real Slurm cluster of two emulated nodes on one machine, for tests and for trying out a job.

    python tests/slurm/cluster.py start DIR        # prints the setting that Slurm's commands need
    python tests/slurm/cluster.py stop DIR         # the whole cluster
    python tests/slurm/cluster.py stop DIR node2   # one node loses its power; start brings it back

The controller (slurmctld) and each node (slurmd) are emulated hosts: own network (a veth pair into
a bridge), host name, process ids, /dev/shm and /etc/hosts; the file system is shared. All files
are in DIR. Each cluster has its own subnet, so several can run at once. Needs root, namespaces,
and the packages in `INSTALL`; nothing here installs them.
"""

from __future__ import annotations

import argparse
import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

INSTALL = (
    "apt-get update && "
    "apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client iproute2"
)
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")
NODES = ("node1", "node2")
HOSTS = ("controller", *NODES)
CPUS_PER_NODE = 4
# Meant for tests of networks (RFC 2544): no real host is shadowed while a cluster runs.
ADDRESSES = ipaddress.IPv4Network("198.18.0.0/15")
SUBNET_PREFIX = 28  # 14 addresses in each of the 8192 subnets
NUM_SUBNETS = 2 ** (SUBNET_PREFIX - ADDRESSES.prefixlen)
# What the daemons see of the environment; users often have no sbin in their PATH.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
MAX_FOLDER_LENGTH = 80  # of bytes; the path of a Unix socket has at most 107

# The first process of a host: NAME FOLDER DAEMON. The shell also reaps the host's orphans.
HOST = """
set -e
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
"$3" -D &
wait
"""
HOST_NAMESPACES = "--uts --ipc --mount --pid --fork --kill-child --mount-proc".split()
# Does the machine allow all that a cluster needs? Leaves nothing behind.
PROBE = """
mount -t tmpfs tmpfs /dev/shm && ip link add name bridge0 type bridge &&
    ip link add name veth0 type veth peer name veth1
"""


class ClusterError(Exception):
    """What went wrong, and where the daemon's own words are."""


def why_not() -> str | None:
    """What this machine lacks for a cluster, with the remedy; None if nothing."""
    missing = [name for name in COMMANDS if not shutil.which(name, path=ENVIRONMENT["PATH"])]
    if missing:
        return f"{', '.join(missing)} not found; install as root: {INSTALL}"
    if os.geteuid() != 0:
        return "emulated hosts need root"
    try:
        call("unshare", "--net", *HOST_NAMESPACES, "sh", "-c", PROBE)
    except ClusterError as error:
        return f"this machine does not allow emulated hosts: {error}"
    return None


# -- network and configuration --------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A subnet, known by its number; the number also names the cluster's network devices."""

    number: int

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        first = int(ADDRESSES.network_address) + (self.number << (32 - SUBNET_PREFIX))
        return ipaddress.IPv4Network((first, SUBNET_PREFIX))

    @property
    def bridge(self) -> str:
        return f"slurm{self.number}"

    @property
    def bridge_address(self) -> str:
        """The machine's own address in the subnet."""
        return str(self.subnet[1])

    def address(self, host: str) -> str:
        return str(self.subnet[2 + HOSTS.index(host)])

    def device(self, host: str) -> str:
        """Name of the host's network namespace, and of the bridge's end of its cable."""
        return f"{self.bridge}h{HOSTS.index(host)}"


def choose_network(folder: Path, taken: Container[int] = ()) -> Network:
    """The first free subnet from the one that a hash of the folder selects."""
    digest = hashlib.sha256(os.fsencode(folder)).digest()
    first = int.from_bytes(digest[:4], "big")
    numbers = ((first + i) % NUM_SUBNETS for i in range(NUM_SUBNETS))
    return Network(next(number for number in numbers if number not in taken))


def networks_in_use() -> set[int]:
    """Numbers of the subnets in which this machine has an address: those of other clusters."""
    shown = re.findall(r"inet ([\d.]+)", call("ip", "-4", "-oneline", "address"))
    inside = [a for a in map(ipaddress.IPv4Address, shown) if a in ADDRESSES]
    return {(int(a) - int(ADDRESSES.network_address)) >> (32 - SUBNET_PREFIX) for a in inside}


def slurm_conf(folder: Path, network: Network) -> str:
    """Content of slurm.conf: nothing in it needs cgroups, systemd or a database."""
    settings = {
        "ClusterName": "emulated",
        "SlurmctldHost": f"controller({network.address('controller')})",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        # A requeued job waits until its first credential has expired: 120 s by default.
        "AuthInfo": f"socket={folder}/munge.sock,cred_expire=5",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MailProg": "/bin/true",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=100000,bf_interval=5",
        "SlurmdParameters": "config_overrides",  # a node may have more CPUs than the machine
        "ReturnToService": 2,  # a node that comes back is used again
        "SlurmdTimeout": 15,
        "TCPTimeout": 2,
        "MessageTimeout": 10,
        "KillWait": 10,
        "MinJobAge": 3600,  # `scontrol show job` also describes ended jobs
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool-%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
    }
    nodes = [
        f"NodeName={node} NodeAddr={network.address(node)} CPUs={CPUS_PER_NODE}" for node in NODES
    ]
    partition = "PartitionName=main Nodes=ALL Default=YES DefaultTime=60 MaxTime=INFINITE State=UP"
    lines = [f"{name}={value}" for name, value in settings.items()]
    return "\n".join([*lines, *nodes, partition, ""])


def write_configuration(folder: Path, network: Network) -> None:
    """Write what the daemons read; again with the same arguments, it changes nothing."""
    (folder / "slurm.conf").write_text(slurm_conf(folder, network))
    addresses = {"localhost": "127.0.0.1"} | {host: network.address(host) for host in HOSTS}
    (folder / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in addresses.items()))
    # Refused at once. A name server out of reach costs torch 10 s per connection.
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    key = folder / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))


# -- processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Daemon:
    """A process of the cluster, known by its id and start time: ids are used again by others."""

    folder: Path
    name: str

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.process"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def pid(self) -> int | None:
        """Its process id while it runs."""
        if not self.record.exists():
            return None
        pid, started = map(int, self.record.read_text().split())
        return pid if start_time(pid) == started else None

    def start(self, *command: str) -> None:
        """Start in the background: own session, no input, output to `log`."""
        output = (str(self.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        pid = os.posix_spawnp(
            command[0],
            command,
            {**ENVIRONMENT, "SLURM_CONF": str(self.folder / "slurm.conf")},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, *output),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        self.record.write_text(f"{pid} {start_time(pid)}\n")

    def end(self, *signals: signal.Signals) -> None:
        """Send one signal after the other until it is gone."""
        for number in signals:
            pid = self.pid()
            if pid is None:
                break
            os.kill(pid, number)
            wait_until(lambda: self.pid() is None, 5)
        if self.pid() is not None:
            raise ClusterError(f"{self.name} (process {self.pid()}) does not end")
        self.record.unlink(missing_ok=True)


def start_time(pid: int) -> int | None:
    """In clock ticks since boot; None if it has ended, even if nobody has read its exit code."""
    try:
        # The second field, a command in brackets, may itself contain both.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def call(*command: str, environment: Mapping[str, str] = ENVIRONMENT) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(command[:4])}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# -- the cluster ----------------------------------------------------------------------------------


def start(folder: Path) -> None:
    """Start what does not run yet; returns when all nodes take jobs."""
    reason = why_not()
    if reason:
        raise ClusterError(reason)
    folder = folder.resolve()
    if len(os.fsencode(folder)) > MAX_FOLDER_LENGTH:
        raise ClusterError(f"{folder} is too long for Unix sockets; use a shorter path")
    folder.mkdir(parents=True, exist_ok=True)
    network = network_of(folder)
    write_configuration(folder, network)
    start_munged(folder)
    start_bridge(network)
    for host in HOSTS:
        start_host(folder, network, host)
    wait_until_ready(folder)


def network_of(folder: Path) -> Network:
    """Chosen at the first start, and kept."""
    record = folder / "network"
    if not record.exists():
        record.write_text(f"{choose_network(folder, networks_in_use()).number}\n")
    return Network(int(record.read_text()))


def start_munged(folder: Path) -> None:
    """One for all hosts, which share its socket by the file system."""
    munged, socket = Daemon(folder, "munged"), folder / "munge.sock"
    if munged.pid():
        return
    files = {"key": "key", "pid": "pid", "seed": "seed", "log": "syslog"}
    options = [f"--{name}-file={folder}/munge.{ending}" for name, ending in files.items()]
    socket.unlink(missing_ok=True)  # of a munged that was killed
    # --force: the folder may be in one that others may write to, such as /tmp.
    munged.start("munged", "--foreground", "--force", f"--socket={socket}", *options)
    if not wait_until(socket.is_socket, 10):
        raise ClusterError(f"munged did not start, see {munged.log}")


def start_bridge(network: Network) -> None:
    if not has_device(network.bridge):
        call("ip", "link", "add", "name", network.bridge, "type", "bridge")
        address = f"{network.bridge_address}/{SUBNET_PREFIX}"
        call("ip", "address", "add", address, "dev", network.bridge)
        call("ip", "link", "set", network.bridge, "up")


def start_host(folder: Path, network: Network, host: str) -> None:
    daemon, device = Daemon(folder, host), network.device(host)
    if daemon.pid():
        return
    unplug(network, host)
    call("ip", "netns", "add", device)
    cable = ("name", device, "master", network.bridge, "up")
    call("ip", "link", "add", *cable, "type", "veth", "peer", "name", "eth0", "netns", device)
    address = f"{network.address(host)}/{SUBNET_PREFIX}"
    call("ip", "-netns", device, "address", "add", address, "dev", "eth0")
    for name in ("lo", "eth0"):
        call("ip", "-netns", device, "link", "set", name, "up")
    binary = "slurmd" if host in NODES else "slurmctld"
    # Not `ip netns exec`: it mounts a /sys without cgroups, which slurmd insists on.
    enter = ("nsenter", f"--net=/run/netns/{device}", "unshare", *HOST_NAMESPACES)
    daemon.start(*enter, "sh", "-c", HOST, "host", host, str(folder), binary)


def wait_until_ready(folder: Path, timeout_s: float = 30) -> None:
    environment = {**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}

    def ready() -> bool:
        for daemon in (Daemon(folder, host) for host in HOSTS):
            if not daemon.pid():
                raise ClusterError(f"{daemon.name} ended, see {daemon.log}")
        try:
            answer = call("sinfo", "-h", "-N", "-r", "-o", "%n %T", environment=environment)
        except ClusterError:  # the controller does not listen yet
            return False
        states = dict(line.split() for line in answer.splitlines())  # of nodes that respond
        return set(states) == set(NODES) and not any("down" in x for x in states.values())

    if not wait_until(ready, timeout_s):
        raise ClusterError(f"the nodes are not ready after {timeout_s} s, see {folder}/*.log")


def stop(folder: Path, node: str | None = None) -> None:
    """End the cluster, or one node as if its power failed; whatever has ended is no error."""
    folder = folder.resolve()
    if not (folder / "network").exists():
        return
    network = network_of(folder)
    for host in [node] if node else HOSTS:
        end_host(Daemon(folder, host))
        unplug(network, host)
    if node is None:
        Daemon(folder, "munged").end(signal.SIGTERM, signal.SIGKILL)
        if has_device(network.bridge):
            call("ip", "link", "delete", network.bridge)


def end_host(daemon: Daemon) -> None:
    """Kill the host's first process and with it all others; unshare ends after the last."""
    pid = daemon.pid()
    if pid is not None:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        wait_until(lambda: daemon.pid() is None, 5)
    daemon.end(signal.SIGKILL)


def unplug(network: Network, host: str) -> None:
    device = network.device(host)
    if has_device(device):
        call("ip", "link", "delete", device)
    if device in call("ip", "netns", "list").split():
        call("ip", "netns", "delete", device)


def has_device(name: str) -> bool:
    return Path("/sys/class/net", name).exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("node", choices=NODES, nargs="?", help="only this node; for stop")
    options = parser.parse_args()
    try:
        if options.action == "stop":
            stop(options.folder, options.node)
        else:
            start(options.folder)
            print(f"export SLURM_CONF={options.folder.resolve()}/slurm.conf")
    except ClusterError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
