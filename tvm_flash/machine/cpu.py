"""The host processor: which instructions it has, and how many threads a call uses."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path

from tvm_flash.errors import InvalidArgumentError

_CPUINFO = Path("/proc/cpuinfo")

#: The variable that names the most capable instruction set which packs, builds and tests may use.
MAX_ISA_VARIABLE = "TVM_FLASH_MAX_ISA"

#: Names how many threads a call on the processor uses.
THREADS_VARIABLE = "TVM_FLASH_NUM_THREADS"
#: By instruction set, the least capable first: how the flags begin that it adds to those before it.
_ADDED_FLAGS = {
    "baseline": (),
    "avx2": ("avx", "fma", "f16c"),
    "avx512": ("avx512",),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_",),
}

#: How the name of the runtime in a CPU pack begins.
RUNTIME_STEM = "libtvm_flash_threads"


@functools.cache
def _processors() -> tuple[dict[str, str], ...]:
    """``/proc/cpuinfo``, one dict for each logical processor; empty where there is no such file."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return ()
    blocks = (block.splitlines() for block in text.strip().split("\n\n"))
    return tuple(
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block)} for block in blocks
    )


@functools.cache
def features() -> frozenset[str]:
    """Processor flags with the names of ``/proc/cpuinfo`` (``avx2``, ``avx512f``, …), of what this process may use.

    Raises
    ------
    InvalidArgumentError: the variable ``TVM_FLASH_MAX_ISA`` names no instruction set.
    """
    processors = _processors()
    flags = frozenset(processors[0].get("flags", "").split()) if processors else frozenset()
    flags = _restricted(flags, os.environ.get(MAX_ISA_VARIABLE, ""))
    if "amx_tile" in flags and not _may_use_tiles():
        flags = frozenset(flag for flag in flags if not flag.startswith("amx_"))
    return flags


def _restricted(flags: frozenset[str], isa: str) -> frozenset[str]:
    """The flags without those of instruction sets beyond one; all of them if its name is empty."""
    if not isa:
        return flags
    if isa not in _ADDED_FLAGS:
        expected = ", ".join(_ADDED_FLAGS)
        raise InvalidArgumentError(f"{MAX_ISA_VARIABLE}: is {isa!r}, expected one of {expected}, or unset")
    names = list(_ADDED_FLAGS)
    beyond = tuple(flag for name in names[names.index(isa) + 1 :] for flag in _ADDED_FLAGS[name])
    return frozenset(flag for flag in flags if not flag.startswith(beyond)) if beyond else flags


def check_threads() -> None:
    """Check what the environment says of the number of threads, which the pool of threads reads.

    Raises
    ------
    InvalidArgumentError: the variable ``TVM_FLASH_NUM_THREADS`` is no number of threads.
    """
    text = os.environ.get(THREADS_VARIABLE, "")
    if text and not (text.isdecimal() and int(text)):
        raise InvalidArgumentError(f"{THREADS_VARIABLE}: is {text!r}, expected a whole number from 1 on, or unset")


def _may_use_tiles() -> bool:
    """Ask Linux for AMX's tile registers, which a process has only then (Documentation/arch/x86/xstate.rst)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


#: Microarchitecture by vendor, family and first model; a model belongs to the last that isn't above it (AMD's and
#: Intel's processor programming references, and Linux's intel-family.h).
_MICROARCHITECTURES = {
    ("AuthenticAMD", 23): {0x00: "Zen", 0x30: "Zen 2"},
    ("AuthenticAMD", 25): {0x00: "Zen 3", 0x10: "Zen 4", 0x20: "Zen 3", 0x60: "Zen 4"},
    ("AuthenticAMD", 26): {0x00: "Zen 5"},
}
_INTEL_SERVERS = {
    0x4F: "Broadwell",
    0x55: "Skylake",
    0x6A: "Ice Lake",
    0x6C: "Ice Lake",
    0x8F: "Sapphire Rapids",
    0xCF: "Emerald Rapids",
    0xAD: "Granite Rapids",
    0xAE: "Granite Rapids",
}


def name() -> str:
    """Model name of the processor, or its architecture where the kernel doesn't say.

    A hypervisor may hide the model's number; then the microarchitecture stands for it: ``"AMD EPYC (Zen 4)"``.
    """
    processors = _processors()
    model = (processors[0].get("model name") if processors else None) or os.uname().machine
    if processors and not re.search(r"\d", model):
        model += f" ({_microarchitecture(processors[0])})"
    return model


def _microarchitecture(processor: dict[str, str]) -> str:
    family, model = (int(processor.get(key, -1)) for key in ("cpu family", "model"))
    known = _MICROARCHITECTURES.get((processor.get("vendor_id", ""), family), {})
    if processor.get("vendor_id") == "GenuineIntel" and family == 6 and model in _INTEL_SERVERS:
        return _INTEL_SERVERS[model]
    below = [first for first in known if first <= model]
    return known[max(below)] if below else f"family {family} model {model}"


def threads(runtime: Path) -> int:
    """How many threads a call uses if torch doesn't lend its own: what ``runtime``, the one in a CPU pack, has found.

    Raises
    ------
    OSError: the file isn't there, can't be loaded, or is of a version that can't say.
    """
    library = ctypes.CDLL(str(runtime.absolute()))
    if not hasattr(library, "tvm_flash_threads"):
        raise OSError(f"{runtime} is of another version of this package")
    return library.tvm_flash_threads()
