"""The CUDA compiler of the PyPI wheels (or of an installed toolkit): device code to a device image."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from schedules.toolchain.process import ToolchainError, run

#: Flags that decide what machine code a source becomes, apart from the arch.
COMPILE_FLAGS = ("-std=c++17", "-O3", "--use_fast_math")

#: Warnings of what generated code always has: unused variables, empty statements, constants of many digits.
_QUIET = ("-diag-suppress", "174,177,550,1046")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler: the program (of NVRTC the library), the folders of its headers, its version (``"13.0.88"``)."""

    compiler: Path
    include: tuple[Path, ...]
    version: str


@lru_cache(maxsize=1)
def find_toolkit() -> Toolkit:
    """The CUDA compiler: of the PyPI wheels, else of ``CUDA_HOME``, else on ``PATH``.

    Raises
    ------
    ToolchainError: there is none.
    """
    homes = [*_wheel_homes()]
    if os.environ.get("CUDA_HOME"):
        homes.append(Path(os.environ["CUDA_HOME"]))
    if on_path := shutil.which("nvcc"):
        homes.append(_home_of(on_path))
    for home in homes:
        nvcc = home / "bin" / "nvcc"
        if nvcc.exists():
            include = tuple(p for p in (home / "include", home / "include" / "cccl") if p.is_dir())
            return Toolkit(nvcc, include, _version_of(nvcc))
    raise ToolchainError('no CUDA compiler found; pip install "tvm-flash[build]", or set CUDA_HOME')


def _wheel_homes():
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        yield from sorted(Path(root).glob("cu[0-9]*"), reverse=True)


def _home_of(nvcc: str) -> Path:
    """The toolkit's folder: nvcc tells where it lives, also behind a link or a wrapper script."""
    found = re.search(r"^#\$ TOP=(.*)$", run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], "asking nvcc"), re.M)
    return Path(nvcc).parent / found.group(1).strip() if found else Path(nvcc).resolve().parent.parent


def _version_of(nvcc: Path) -> str:
    found = re.search(r"\bV(\d+\.\d+\.\d+)", run([nvcc, "--version"], "asking nvcc for its version"))
    if not found:
        raise ToolchainError(f"{nvcc} --version names no version")
    return found.group(1)


def compiler_version() -> str:
    """Version of the compiler, for hashes and manifests."""
    return find_toolkit().version


def virtual(arch: str) -> str:
    """The PTX target of an arch: ``"compute_80"``."""
    return arch.replace("sm_", "compute_")


def generation(arch: str) -> int:
    """Compute capability times 10."""
    return int(re.sub(r"\D", "", arch))


def code_for(arch: str, run_on: str = "", recompile_for: str = "") -> str:
    """The ``-gencode`` value: machine code for ``arch`` alone, plus its PTX if it shall also run on ``run_on``.

    With ``recompile_for`` the machine code is that of another arch: made of the same PTX where that arch is newer,
    else of the same source.
    """
    if recompile_for:
        return f"arch={min(virtual(arch), virtual(recompile_for), key=generation)},code={recompile_for}"
    if not run_on:
        return f"arch={virtual(arch)},code={arch}"
    if arch.endswith("a"):
        raise ToolchainError(f"{arch} code runs on {arch} only; --run-on {run_on} is for archs without the suffix 'a'")
    return f"arch={virtual(arch)},code=[{arch},{virtual(arch)}]"


def image(device: Path, arch: str, *, run_on: str = "", recompile_for: str = "") -> tuple[Path, str]:
    """Compile device code to an image beside it; its path, and what ptxas reported.

    Parameters
    ----------
    device: path of a ``.cu`` file without host code.
    arch, run_on, recompile_for: as for :func:`code_for`.

    Raises
    ------
    ToolchainError: there is no compiler, or it fails.
    """
    kit, target = find_toolkit(), device.with_suffix(".image")
    command = [kit.compiler, "-fatbin" if run_on else "-cubin", "-gencode=" + code_for(arch, run_on, recompile_for)]
    command += [*COMPILE_FLAGS, *_QUIET, "-Xptxas", "-v", *(f"-I{p}" for p in kit.include), device, "-o", target]
    return target, run(command, f"compiling {device.name} for {recompile_for or arch}")


def ptx(device: Path, arch: str) -> str:
    """The PTX of device code, for people to read.

    Raises
    ------
    ToolchainError: there is no compiler, or it fails.
    """
    kit, target = find_toolkit(), device.with_suffix(".ptx")
    command = [kit.compiler, "-ptx", f"-arch={virtual(arch)}", *COMPILE_FLAGS, *_QUIET]
    run([*command, *(f"-I{p}" for p in kit.include), device, "-o", target], f"compiling {device.name} for {arch}")
    return target.read_text()
