"""The C half of a call's fast path (``call.c``), which every pack brings along; ``tvm_flash/call/fast.py`` loads it.

It needs neither Python's headers nor a certain version of Python: ``python_abi.h`` declares what it uses of the stable
ABI.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from schedules.runtime_c import SOURCES
from schedules.toolchain import inspection
from schedules.toolchain.host import tvm_ffi_include
from schedules.toolchain.process import host_compiler, run
from tvm_flash.packs.manifest import CALL_STEM

_FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wl,--strip-debug")
_SOURCES = ("call.c", "call_key.h", "python_abi.h")


def call_path_name() -> str:
    """File name of the library; it changes with the source and with the compiler."""
    version = run([host_compiler(), "--version"], "asking the C compiler for its version")
    digest = hashlib.sha256(version.encode() + " ".join(_FLAGS).encode())
    for source in _SOURCES:
        digest.update((SOURCES / source).read_bytes())
    return f"{CALL_STEM}-{digest.hexdigest()[:8]}.so"


def build_call_path(target: Path) -> None:
    """Compile the library.

    Raises
    ------
    ToolchainError: there is no C compiler, or it fails.
    """
    include = (f"-I{folder}" for folder in tvm_ffi_include())
    run([host_compiler(), *_FLAGS, *include, SOURCES / "call.c", "-o", target], "compiling call.c")
    inspection.check_module(target)
