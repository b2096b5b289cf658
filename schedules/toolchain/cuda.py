"""CUDA C++ to modules with nvcc; the source is what TVM exports for a ``cuda_host`` target: device and host code.

Every kernel is compiled to an object of its own, and the objects of a group are linked to one module, so that they
share the static CUDA runtime (about 1 MB).  Works on any machine with nvcc and the headers of tvm-ffi; no GPU, driver
or TVM.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from schedules.toolchain import inspection, ptxas
from schedules.toolchain.process import ToolchainError, host_compiler, run

#: Flags that decide what machine code a source becomes, apart from the arch.
COMPILE_FLAGS = ("-std=c++17", "-O3", "--use_fast_math")

_QUIET = ("-diag-suppress", "174,177")  # unused variables and empty statements of the generated host code

#: What a generated source may call of the driver; the driver itself is found when the module is loaded.
_DRIVER_STUB = "int cuTensorMapEncodeTiled(void) { return 0; }\nint cuGetErrorString(void) { return 0; }\n"


@dataclass(frozen=True)
class Toolkit:
    """Where nvcc is, what it needs, and its version (``"13.0.88"``)."""

    nvcc: Path
    include: tuple[Path, ...]
    lib: Path
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
            libs = [p for p in (home / "lib64", home / "lib") if (p / "libcudart_static.a").exists()]
            if not libs:
                raise ToolchainError(f"{home} has nvcc but no libcudart_static.a; pip install nvidia-cuda-runtime")
            return Toolkit(nvcc, include, libs[0], _version_of(nvcc))
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


def tvm_ffi_include() -> list[Path]:
    """Include folders of the installed apache-tvm-ffi."""
    root = importlib.metadata.distribution("apache-tvm-ffi").locate_file("tvm_ffi")
    return [Path(str(root)) / "include"]


def _virtual(arch: str) -> str:
    return arch.replace("sm_", "compute_")


def code_for(arch: str, run_on: str = "", recompile_for: str = "") -> str:
    """The ``-gencode`` value: machine code for ``arch`` alone, plus its PTX if it shall also run on ``run_on``.

    With ``recompile_for`` the machine code is that of a newer arch, made of the same PTX.
    """
    if recompile_for:
        return f"arch={_virtual(arch)},code={recompile_for}"
    if not run_on:
        return f"arch={_virtual(arch)},code={arch}"
    if arch.endswith("a"):
        raise ToolchainError(f"{arch} code runs on {arch} only; --run-on {run_on} is for archs without the suffix 'a'")
    return f"arch={_virtual(arch)},code=[{arch},{_virtual(arch)}]"


def compile_object(
    source: Path,
    target: Path,
    arch: str,
    *,
    run_on: str = "",
    recompile_for: str = "",
    spills_allowed: bool = False,
) -> ptxas.Report:
    """Compile one exported source to an object file.

    Parameters
    ----------
    source, target: path of the ``.cu`` file, and of the object to write.
    arch: what machine code is made for, e.g. ``"sm_90a"``.
    run_on: a newer arch on which the kernel shall also run, for verification: adds PTX.
    recompile_for: a newer arch whose machine code is made instead, for verification; its spills don't count.
    spills_allowed: whether a kernel may spill registers.

    Raises
    ------
    ToolchainError: there is no compiler, it fails, or ptxas reports spills or serialised wgmma.
    """
    kit = find_toolkit()
    text = run(
        [
            kit.nvcc,
            "-gencode=" + code_for(arch, run_on, recompile_for),
            *COMPILE_FLAGS,
            *_QUIET,
            *("-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *(f"-I{p}" for p in (*tvm_ffi_include(), *kit.include)),
            *("-c", source, "-o", target),
        ],
        f"compiling {source.name} for {arch}",
    )
    report = ptxas.parse(text)
    if not report.kernels:
        raise ToolchainError(f"compiling {source.name} for {arch}: the compiler reported no kernel\n{text[-2000:]}")
    ptxas.check(report, spills_allowed=spills_allowed, arch=arch)
    weaken_symbols(target)
    return report


def weaken_symbols(target: Path) -> None:
    """Let several objects define what every exported source defines: the entry of a library, and helper functions."""
    listed = run(["nm", "--extern-only", "--defined-only", "--format=posix", target], f"inspecting {target.name}")
    names = [line.split()[0] for line in listed.splitlines()]
    run(["objcopy", *(f"--weaken-symbol={name}" for name in names), target], f"preparing {target.name}")


def link_module(objects: list[Path], target: Path, *, cudart: Path | None = None) -> None:
    """Link objects to a module that needs tvm-ffi and the driver, and nothing else.

    Raises
    ------
    ToolchainError: the linker fails, or the module holds source or needs another library.
    """
    with tempfile.TemporaryDirectory() as scratch:
        stub = _driver_stub(Path(scratch))
        run(
            [
                host_compiler("c++"),
                *("-shared", "-o", target, *objects),
                *("-Wl,--as-needed", f"-L{stub}", "-lcuda"),
                *(f"-L{cudart or find_toolkit().lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"),
                *("-Wl,--exclude-libs,ALL", "-Wl,--strip-debug"),
            ],
            f"linking {target.name}",
        )
    inspection.check_module(target, may_need=("libcuda.so.1",))


def _driver_stub(folder: Path) -> Path:
    source = folder / "stub.c"
    source.write_text(_DRIVER_STUB)
    run(
        [host_compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", folder / "libcuda.so"],
        "making a stand-in for the driver",
    )
    return folder


def compiler_version() -> str:
    """Version of the compiler, for hashes and manifests."""
    return find_toolkit().version


def source_hash(source: str, arch: str, compiler: str) -> str:
    """sha256 of all that decides a kernel's machine code: source, arch, flags and compiler version."""
    parts = (source, arch, " ".join(COMPILE_FLAGS), compiler)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def dynamic_shared_memory(source: str) -> int:
    """Bytes of dynamic shared memory that the host half of an exported source asks for; the largest of its launches."""
    constants = dict(re.findall(r"^\s*auto (\w+) = (\d+);", source, re.M))
    launches = re.findall(r"\bdynamicSmemBytes = (\w+);", source)
    return max((int(constants.get(size, size)) for size in launches), default=0)
