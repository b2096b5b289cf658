"""Objects of CPU kernels to modules, and the runtime that all modules of a pack share.

Code that TVM generates for the CPU calls a runtime for parallel loops and for scratch memory, through pointers that a
loader fills in.  TVM's own runtime library can't be loaded a second time into a process (it aborts), so a copy of it in
a pack would kill every process that also imports TVM.  ``threads.c`` and ``scratch.c`` are that runtime instead.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

from schedules.runtime_c import SOURCES
from schedules.toolchain import inspection
from schedules.toolchain.process import ToolchainError, host_compiler, run
from tvm_flash.machine.cpu import RUNTIME_STEM

_RUNTIME_SOURCES = tuple(SOURCES / name for name in ("threads.c", "scratch.c", "sequences.c", "processor.c"))
_HEADERS = (SOURCES / "old_glibc.h",)
_RUNTIME_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")

#: The calls of TVM's code that it answers.
_BACKEND_CALLS = ("AllocWorkspace", "FreeWorkspace", "ParallelLaunch", "ParallelBarrier")


def runtime_name() -> str:
    """File name and soname of the runtime; it changes with the source and with the compiler."""
    version = run([host_compiler(), "--version"], "asking the C compiler for its version")
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in (*_RUNTIME_SOURCES, *_HEADERS)))
    digest.update(version.encode() + " ".join(_RUNTIME_FLAGS).encode())
    return f"{RUNTIME_STEM}-{digest.hexdigest()[:8]}.so"


def build_runtime(target: Path, soname: str) -> None:
    """Compile the runtime (parallel loops, scratch memory) to a shared library.

    Raises
    ------
    ToolchainError: there is no C compiler, or it fails.
    """
    run(
        [host_compiler(), *_RUNTIME_FLAGS, f"-Wl,-soname,{soname}", *_RUNTIME_SOURCES, "-ldl", "-o", target],
        "compiling the CPU runtime",
    )
    inspection.check_module(target)


def link_module(objects: list[Path], target: Path, runtime: Path) -> None:
    """Link objects to a module that finds ``runtime``, by its soname, in the folder that it is loaded from.

    Raises
    ------
    ToolchainError: the linker fails, or the code calls something that only TVM's runtime has.
    """
    with tempfile.TemporaryDirectory() as scratch:
        glue = Path(scratch) / "glue.c"
        glue.write_text(
            "".join(
                f"extern void tvm_flash_{call}(void);\n"
                f'__attribute__((visibility("hidden"))) void (*__TVMBackend{call})(void) = tvm_flash_{call};\n'
                for call in _BACKEND_CALLS
            )
        )
        run(
            [
                host_compiler(),
                *("-shared", "-fPIC", "-O2", "-o", target, glue, *objects, runtime),
                *("-lm", "-Wl,-rpath,$ORIGIN", "-Wl,--strip-debug"),
            ],
            f"linking {target.name}",
        )
    inspection.check_module(target, may_need=(RUNTIME_STEM,))
    symbols = run(["nm", "-D", target], f"inspecting {target.name}")
    if unresolved := re.findall(r"\b__TVM\w+", symbols):
        raise ToolchainError(
            f"{target.name}: calls {', '.join(sorted(set(unresolved)))}, which needs TVM's runtime; "
            f"a kernel may use parallel loops and local buffers only"
        )
