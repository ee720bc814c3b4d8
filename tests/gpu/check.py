r"""Everything that only a GPU can show, in one command and a limited time.

    make gpu PYTHON=python3                  or, without make:
    python3 tests/gpu/check.py [--minutes 10] [--output FOLDER] [--stages doctor,tests]

Each stage is a process of its own with a share of the time that is left. Its JSON and its log are
in the output folder at once; a stage that fails or takes too long does not stop the others. At the
end, also after Ctrl-C: summary.json, and a table. Exit code 1: a stage did not pass.

Any interpreter with these packages will do, on Python 3.10 or later with torch 2.11 or later for
CUDA; nothing is downloaded. For a machine without a package index, fill a folder elsewhere (47 MB)

    pip wheel --no-deps -c constraints.txt -w wheels deepspeed hjson     (they have no wheels)
    pip download --no-deps --only-binary :all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux_2_12_x86_64 -c constraints.txt -d wheels -r tests/gpu/packages.txt

and install from it on the machine, which has torch, torchvision and numpy:

    pip install --no-index --no-deps --find-links wheels deepspeed hjson -r tests/gpu/packages.txt
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# For the end of a stage that has been interrupted, and the least time to start one with.
GRACE_S, LEAST_S = 10.0, 5.0
PASSED = "passed"


@dataclass(frozen=True)
class Stage:
    """A command that writes its results to the JSON file that is its last argument.

    share: of the time that is left when it starts, as its limit.
    """

    name: str
    share: float
    command: Sequence[str]


# The most valuable first: time may run out.
SHARES = {
    "doctor": 0.2,
    "benchmark_eager": 0.3,
    "benchmark_compiled": 0.4,
    "traces": 0.25,
    "tests": 0.4,
    "attention": 0.3,
    "memory": 0.4,
    "demo": 0.5,
    "shards": 1.0,
}


def run_stages(stages: Sequence[Stage], output: Path, seconds: float) -> dict[str, Any]:
    """Run the stages in turn; returns the summary, which it also writes."""
    ends = time.monotonic() + seconds
    records: dict[str, dict[str, Any]] = {}
    interrupted = False
    for stage in stages:
        left = ends - time.monotonic()
        if interrupted or left < LEAST_S:
            records[stage.name] = {"status": "not started"}
        else:
            print(f"{stage.name}: at most {stage.share * left:.0f} s", flush=True)
            records[stage.name] = run_stage(stage, output, stage.share * left)
            print(f"{stage.name}: {records[stage.name]['status']}", flush=True)
            interrupted = records[stage.name]["status"] == "interrupted"
        write(output / f"{stage.name}.json", records[stage.name])
        summary = summarize(records, interrupted=interrupted)
        write(output / "summary.json", summary)
    return summary


def run_stage(stage: Stage, output: Path, limit_s: float) -> dict[str, Any]:
    """The stage's record: how it ended, and what it wrote until then."""
    result, log = output / f"{stage.name}.json", output / f"{stage.name}.log"
    result.unlink(missing_ok=True)
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*stage.command, str(result)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # In the background of a script SIGINT is ignored, by children too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        try:
            code = process.wait(limit_s)
            status = PASSED if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"timed out after {limit_s:.0f} s"
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            end(process)
    results = None
    with contextlib.suppress(OSError, ValueError):
        results = json.loads(result.read_text())
    return {
        "status": status,
        # Values and times mean nothing on the GPU of tests/fakecuda.
        "imaginary": imaginary(),
        "seconds": round(time.monotonic() - started, 1),
        "limit_s": round(limit_s, 1),
        "log": log.name,
        "results": results,
    }


def end(process: subprocess.Popen[Any]) -> None:
    """End the process and its children; pytest reports what it has done when interrupted."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def imaginary() -> bool:
    return "FAKECUDA" in os.environ


def summarize(records: dict[str, dict[str, Any]], *, interrupted: bool) -> dict[str, Any]:
    """How every stage ended, the machine, and a line for each row of the benchmarks."""
    doctor = (records.get("doctor", {}).get("results") or {}).get("machine")
    rows, machine = [], doctor
    for name, record in records.items():
        if name.startswith("benchmark") and record.get("results"):
            machine = machine or record["results"]["machine"]
            rows += [short(row) for row in record["results"]["rows"]]
    return {
        "imaginary": imaginary(),
        "interrupted": interrupted,
        "machine": machine,
        "stages": {name: without_results(record) for name, record in records.items()},
        "benchmark": rows,
    }


def without_results(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "results"}


def short(row: dict[str, Any]) -> dict[str, Any]:
    keys = "row micro_batch compile attention share_of_peak_pct share_of_matmul_pct peak_gib"
    medians = {key: row[key]["median"] for key in ("clips_per_s", "step_ms", "tflops")}
    return {**{key: row.get(key) for key in keys.split()}, **medians}


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = []
    if summary["imaginary"]:
        lines.append("On an imaginary GPU: values and times mean nothing.")
    for key, value in (summary["machine"] or {}).items():
        lines.append(f"  {key:10} {value}")
    for row in summary["benchmark"]:
        mode = "compiled" if row["compile"] else "eager"
        shares = [
            f"{row[key]:.1f} % of {of}"
            for key, of in (("share_of_peak_pct", "peak"), ("share_of_matmul_pct", "a product"))
            if row[key] is not None
        ]
        lines.append(
            f"  {row['row']} x {row['micro_batch']} {mode}: {row['clips_per_s']:.1f} clips/s, "
            f"{row['tflops']:.1f} TFLOP/s, {', '.join(shares)}, {row['peak_gib']:.1f} GiB"
        )
    for name, record in summary["stages"].items():
        lines.append(f"  {name:20} {record.get('seconds', 0):6.0f} s  {record['status']}")
    return "\n".join(lines)


def write(path: Path, tree: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(tree, indent=1))
    partial.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="of all stages; default 10")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="runs/gpu")
    parser.add_argument(
        "--stages", default=",".join(SHARES), help="some of them; default %(default)s"
    )
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: whether it starts")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    unknown = [name for name in args.stages if name not in SHARES]
    if unknown:
        parser.error(f"--stages {','.join(unknown)}: unknown; there are: {', '.join(SHARES)}")
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g} must be above 0")
    return args


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    args = parse_arguments()
    # As Ctrl-C; and a shell starts background processes with SIGINT ignored, for children too.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, str(HERE / "stages.py"), *(["--tiny"] if args.tiny else [])]
    stages = [
        Stage(name, share, [*program, name])
        for name, share in SHARES.items()
        if name in args.stages
    ]
    summary = run_stages(stages, output, 60 * args.minutes)
    print(f"{table(summary)}\n{output / 'summary.json'}", flush=True)
    if summary["interrupted"]:
        return 130
    return int(any(record["status"] != PASSED for record in summary["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
