"""Build the imaginary GPU (runtime.cpp, driver.c) and the environment of a process that sees it.

    python tests/fakecuda/build.py PROGRAM [ARGUMENT ...]

runs a program in that environment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, DRIVER = "libfakecuda.so", "libcuda.so.1"


def unavailable() -> str | None:
    """Why it cannot be built here, or None."""
    import torch

    if torch.version.cuda is None:
        return "a build of PyTorch without CUDA"
    if not shutil.which("g++") or not shutil.which("gcc"):
        return "no C++ compiler (g++) is installed"
    if _headers() is None:
        return "no CUDA headers: neither Triton nor the nvidia wheels are installed"
    return None


def environment() -> dict[str, str]:
    """Variables for a child process. Builds on first use, once per version of the sources."""
    sources = [HERE / "runtime.cpp", HERE / "driver.c"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"arvideo_fakecuda_{os.getuid()}_{digest[:12]}"
    if not (folder / DRIVER).exists():
        _build(folder)
    return {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "DS_ACCELERATOR": "cuda",
        "FAKECUDA": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # each other one would be a process with PyTorch
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_LIBCUDA_PATH": str(folder),
    }


def _headers() -> Path | None:
    """A folder with driver_types.h and all that it includes."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends/nvidia/include"
    return folder if (folder / "driver_types.h").exists() else None


def _build(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary)
        _compile("g++", "-std=c++17", "-I", _headers(), HERE / "runtime.cpp", made / RUNTIME)
        _compile("gcc", HERE / "driver.c", made / DRIVER)
        (made / "libcuda.so").symlink_to(DRIVER)
        # The driver last: `environment` takes it for a sign that all is there.
        for name in (RUNTIME, "libcuda.so", DRIVER):
            (made / name).replace(folder / name)


def _compile(*arguments: object) -> None:
    *command, target = map(str, arguments)
    subprocess.run([*command, "-O1", "-fPIC", "-shared", "-o", target, "-ldl"], check=True)


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **environment()})
