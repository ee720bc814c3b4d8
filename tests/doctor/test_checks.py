"""Each check of scripts/doctor.py on facts made up for it; nothing of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.doctor import machine, software
from arvideo_ds.doctor.report import Finding, exit_code, of_other_hosts, render
from tests.conftest import free_port

GIB = 2**30
DOCTOR = Path(__file__).parent.parent.parent / "scripts" / "doctor.py"
FINE = Finding("cores", "ok", "2")
SLOW = Finding("disk", "warning", "slow", "another one")
BROKEN = Finding("memory", "problem", "none", "buy some")


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_only_problems_make_the_exit_code() -> None:
    assert exit_code([FINE, SLOW]) == 0
    assert exit_code([FINE, BROKEN]) == 1


def test_the_report_has_a_line_each_and_the_fix_below_what_is_not_ok() -> None:
    lines = render([FINE, SLOW, BROKEN]).splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "warning", "->", "problem", "->", "1"]
    assert lines[-1] == "1 problem(s), 1 warning(s)"


def test_other_hosts_add_what_is_not_ok_under_their_name() -> None:
    added = of_other_hosts("node2", [FINE, SLOW, BROKEN])
    assert [finding.about for finding in added] == ["node2: disk", "node2: memory"]
    assert exit_code(added) == 1


def test_what_a_package_declares_is_checked_against_what_is_there() -> None:
    def requires(package: str) -> list[str] | None:
        lines = ["torch (>=2.14.0)", "numpy", 'pillow>=99; extra == "fun"', "absent>=3"]
        return lines if package == "torchvision" else None

    def check(**versions: str) -> list[Finding]:
        return software.check_declared(versions, requires)

    assert check(torchvision="0.29.2", torch="2.15.0+cu132", numpy="2", pillow="1") == []
    (found,) = check(torchvision="0.29.2", torch="2.11.0")
    assert (found.level, "torchvision 0.29.2 needs torch>=2.14.0" in found.says) == (
        "problem",
        True,
    )


@pytest.mark.parametrize(
    ("torchcodec", "torch", "bad"),
    [
        ("0.17.0", "2.15.0", False),
        ("0.12.0", "2.11.0+cpu", False),
        ("0.12.0", "2.10.0", True),
        ("0.11.1", "2.11.0", False),
        ("0.11.1", "2.12.0", True),
        ("0.10.0", "2.11.0", True),
    ],
)
def test_pairs_that_do_not_work_are_known(torchcodec: str, torch: str, bad: bool) -> None:
    found = software.check_torchcodec({"torchcodec": torchcodec, "torch": torch})
    assert levels(found) == ["warning"] * bad
    assert software.check_torchcodec({"torch": torch}) == []


def test_missing_packages_are_a_problem_unless_they_are_optional() -> None:
    everything = dict.fromkeys(software.NEEDED, "1")
    assert levels(software.check_packages(everything)) == ["ok"]
    del everything["deepspeed"]
    *_, last = software.check_packages(everything)
    assert (last.level, last.says) == ("problem", "missing: deepspeed")


def test_one_decoder_is_enough_and_without_torchcodec_the_report_says_how_to_get_it() -> None:
    why = "cannot load"
    found = software.check_decoders({"torchcodec": "", "pyav": "", "decord": why})
    assert levels(found) == ["ok", "ok"]
    slow, *_ = software.check_decoders({"torchcodec": why, "pyav": "", "decord": ""})
    assert slow.level == "warning" and "ffmpeg" in slow.fix
    assert "takes pyav" in slow.says
    (none,) = software.check_decoders({"torchcodec": why, "pyav": why})
    assert none.level == "problem"


def test_a_missing_pyav_is_a_finding_and_no_traceback(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules['av'] = None; from pathlib import Path\n"
        "from arvideo_ds.doctor.examine import examine\n"
        "print([f.level for f in examine(Path(sys.argv[1])) if f.about == 'decoders'])"
    )
    done = run(sys.executable, "-c", code, tmp_path)
    assert done.stdout == "['problem']\n", done.stderr


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (machine.check_cores(64, None), "ok"),
        (machine.check_cores(64, 8.0), "warning"),
        (machine.check_memory(64 * GIB, None), "ok"),
        (machine.check_memory(64 * GIB, GIB), "problem"),
        (machine.check_memory(GIB, None), "problem"),
        (machine.check_shm(16 * GIB), "ok"),
        (machine.check_shm(GIB), "warning"),
        (machine.check_shm(64 * 2**20), "problem"),
        (machine.check_open_files(1024, 524288), "warning"),
        (machine.check_open_files(65536, 65536), "ok"),
        (machine.check_open_files(-1, -1), "ok"),
        (machine.check_host_name("n1", "10.0.0.5", ["eth0"]), "ok"),
        (machine.check_host_name("n1", "127.0.1.1", ["eth0"]), "warning"),
        (machine.check_host_name("n1", None, ["eth0"]), "warning"),
    ],
)
def test_limits_of_a_host(finding: Finding, level: str) -> None:
    assert finding.level == level
    assert bool(finding.fix) == (level != "ok")


def test_a_disk_that_serves_runs_is_left_as_it_was(tmp_path: Path) -> None:
    assert machine.check_disk(tmp_path / "new").level in ("ok", "warning")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert machine.check_disk(tmp_path / "file" / "runs").level == "problem"


def test_limits_of_nested_cgroups_are_found_in_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "cgroup"
    groups = machine._groups
    monkeypatch.setattr(machine, "_groups", lambda root, name: groups(root, name, own))

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    own.write_text("0::/job/step\n")
    assert machine.cgroup_cores(tmp_path) is None
    write("job/step/cpu.max", "max 100000\n")
    write("job/cpu.max", "250000 100000\n")
    write("job/memory.max", f"{8 * GIB}\n")
    assert machine.cgroup_cores(tmp_path) == 2.5
    assert machine.cgroup_memory(tmp_path) == 8 * GIB
    own.write_text("4:memory:/job\n1:cpu:/job\n")
    write("cpu/job/cpu.cfs_quota_us", "-1")
    write("memory/job/memory.limit_in_bytes", "9223372036854771712\n")
    assert machine.cgroup_cores(tmp_path) is None
    assert machine.cgroup_memory(tmp_path) is None
    write("cpu/job/cpu.cfs_quota_us", "400000")
    write("cpu/job/cpu.cfs_period_us", "100000")
    assert machine.cgroup_cores(tmp_path) == 4


@pytest.mark.dist
def test_the_doctor_reports_two_ranks_together(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", f"--master_port={free_port()}")
    done = run(*torchrun, "--nproc_per_node=2", DOCTOR, f"--output={tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    report = {finding["about"]: finding for finding in json.loads(done.stdout)}
    assert "16 MiB over 2 ranks by gloo" in report["all-reduce"]["says"]
    assert "(rank " in report["matmul"]["says"]
    assert str(tmp_path) in report["disk"]["says"]
