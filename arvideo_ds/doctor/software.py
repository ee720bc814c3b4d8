"""Installed packages, pairs of versions that do not work together, compilers and decoders."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from arvideo_ds.decoding.decoders import HOW_TO_GET_TORCHCODEC
from arvideo_ds.doctor.report import Finding

NEEDED = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "av", "numpy", "pydantic")
OPTIONAL = ("torchcodec", "decord", "wandb")


@dataclass(frozen=True)
class Pair:
    """Versions of a package that do not work with versions of another one, and who says so."""

    package: str
    versions: str
    other: str
    other_versions: str
    fix: str
    source: str


# Only what packages do not declare themselves; what they do declare is checked anyway.
_TORCHCODEC_TABLE = "torchcodec's README, table of torch versions"
KNOWN_BAD = (
    Pair("torchcodec", "<0.11", "torch", ">=2.11", "torchcodec>=0.12", _TORCHCODEC_TABLE),
    Pair("torchcodec", "==0.11.*", "torch", "!=2.11.*", "torchcodec>=0.12", _TORCHCODEC_TABLE),
    Pair("torchcodec", ">=0.12", "torch", "<2.11", "torch>=2.11", _TORCHCODEC_TABLE),
)


def installed(packages: Iterable[str] = NEEDED + OPTIONAL) -> dict[str, str]:
    """Package -> version, of those that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_packages(versions: Mapping[str, str]) -> list[Finding]:
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    findings = [Finding("packages", "ok", f"Python {platform.python_version()}, {listed}")]
    missing = [package for package in NEEDED if package not in versions]
    if missing:
        findings.append(
            Finding("packages", "problem", f"missing: {', '.join(missing)}", "make setup")
        )
    return findings


def check_declared(
    versions: Mapping[str, str],
    requires: Callable[[str], list[str] | None] = metadata.requires,
) -> list[Finding]:
    """What the packages say of each other, e.g. torchvision of torch."""
    findings = []
    for package in versions:
        for line in requires(package) or []:
            requirement = Requirement(line)
            version = versions.get(requirement.name)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if version and wanted and not requirement.specifier.contains(version, True):
                says = f"{package} {versions[package]} needs {requirement}, here is {version}"
                findings.append(Finding("versions", "problem", says, "make setup, in a new .venv"))
    return findings


def check_pairs(versions: Mapping[str, str]) -> list[Finding]:
    """Pairs known not to work."""
    return [
        Finding(
            "versions",
            "warning",
            f"{pair.package} {versions[pair.package]} does not work with {pair.other} "
            f"{versions[pair.other]} ({pair.source})",
            f"pip install '{pair.fix}', or pip uninstall {pair.package}",
        )
        for pair in KNOWN_BAD
        if _is(versions, pair.package, pair.versions)
        and _is(versions, pair.other, pair.other_versions)
    ]


def _is(versions: Mapping[str, str], package: str, specifier: str) -> bool:
    version = versions.get(package)
    # A local part such as +cu130 is no part of the comparison.
    return version is not None and SpecifierSet(specifier).contains(version.partition("+")[0], True)


def check_compilers() -> Finding:
    found = [path for path in map(shutil.which, ("gcc", "g++", "nvcc", "ninja")) if path]
    says = ", ".join(found) or "none; only operators that DeepSpeed compiles would need one"
    return Finding("compilers", "ok", says)


def check_decoders(problems: Mapping[str, str]) -> list[Finding]:
    """`problems` as of `available_decoders`: each has decoded a tiny video or not."""
    usable = [name for name, problem in problems.items() if not problem]
    findings = [
        Finding("decoders", "ok", f"{name} does not decode here ({problem}); others do")
        for name, problem in problems.items()
        if problem and usable
    ]
    if not usable:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        return [Finding("decoders", "problem", f"none decodes ({reasons})", "make setup")]
    first = f"a tiny video decoded by {', '.join(usable)}; data.decoder=auto takes {usable[0]}"
    if usable[0] != "torchcodec":
        return [Finding("decoders", "warning", first, HOW_TO_GET_TORCHCODEC), *findings]
    return [Finding("decoders", "ok", first), *findings]
