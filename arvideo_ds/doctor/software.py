"""Installed packages, versions that do not work together, compilers and decoders."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from arvideo_ds.doctor.report import Finding

NEEDED = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "av", "numpy", "pydantic")
OPTIONAL = ("torchcodec", "decord", "wandb", "tensorboard", "trackio")
# torchcodec, torch that it does not work with, and what to install instead: torchcodec declares no
# requirement of torch. Source: its README, table of torch versions.
TORCHCODEC_CONFLICTS = (
    ("<0.11", ">=2.11", "torchcodec>=0.12"),
    ("==0.11.*", "!=2.11.*", "torchcodec>=0.12"),
    (">=0.12", "<2.11", "torch>=2.11"),
)


def installed(packages: Iterable[str] = NEEDED + OPTIONAL) -> dict[str, str]:
    """Package -> version of the installed ones."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def check_packages(versions: Mapping[str, str]) -> list[Finding]:
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    findings = [Finding("packages", "ok", f"Python {platform.python_version()}, {listed}")]
    missing = [package for package in NEEDED if package not in versions]
    if missing:
        says = f"missing: {', '.join(missing)}"
        findings.append(Finding("packages", "problem", says, "make setup"))
    return findings


def check_declared(
    versions: Mapping[str, str],
    requires: Callable[[str], list[str] | None] = metadata.requires,
) -> list[Finding]:
    """What packages declare about each other, e.g. torchvision about torch."""
    findings = []
    for package in versions:
        for line in requires(package) or []:
            requirement = Requirement(line)
            version = versions.get(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if version and applies and not requirement.specifier.contains(version, True):
                says = f"{package} {versions[package]} needs {requirement}, here is {version}"
                findings.append(Finding("versions", "problem", says, "make setup, in a new .venv"))
    return findings


def check_torchcodec(versions: Mapping[str, str]) -> list[Finding]:
    """Whether torchcodec and torch, if installed, work together."""
    if not {"torchcodec", "torch"} <= versions.keys():
        return []
    # Without a local part such as +cu130.
    torchcodec, torch = (versions[name].partition("+")[0] for name in ("torchcodec", "torch"))
    says = f"torchcodec {versions['torchcodec']} does not work with torch {versions['torch']} "
    says += "(torchcodec's README, table of torch versions)"
    return [
        Finding("versions", "warning", says, f"pip install '{fix}', or pip uninstall torchcodec")
        for bad_torchcodec, bad_torch, fix in TORCHCODEC_CONFLICTS
        if SpecifierSet(bad_torchcodec).contains(torchcodec, True)
        and SpecifierSet(bad_torch).contains(torch, True)
    ]


def check_compilers() -> Finding:
    paths = [path for path in map(shutil.which, ("gcc", "g++", "nvcc", "ninja")) if path]
    says = ", ".join(paths) or "none; only operators that DeepSpeed compiles would need one"
    return Finding("compilers", "ok", says)


def check_decoders(problems: Mapping[str, str]) -> list[Finding]:
    """problems: as of `available_decoders`."""
    from arvideo_ds.decoding.decoders import HOW_TO_GET_TORCHCODEC

    usable = [name for name, problem in problems.items() if not problem]
    if not usable:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        return [Finding("decoders", "problem", f"none decodes ({reasons})", "make setup")]
    says = f"a tiny video decoded by {', '.join(usable)}; data.decoder=auto takes {usable[0]}"
    first = Finding("decoders", "ok", says)
    if usable[0] != "torchcodec":
        first = Finding("decoders", "warning", says, HOW_TO_GET_TORCHCODEC)
    failing = {name: problem for name, problem in problems.items() if problem}
    others = (f"{name} does not decode here ({failing[name]}); others do" for name in failing)
    return [first, *(Finding("decoders", "ok", text) for text in others)]
