"""The host processor: which instructions it has, and how many threads a call uses."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


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


def features() -> frozenset[str]:
    """Processor flags with the names of ``/proc/cpuinfo`` (``avx2``, ``avx512f``, …)."""
    processors = _processors()
    return frozenset(processors[0].get("flags", "").split()) if processors else frozenset()


def name() -> str:
    """Model name of the processor, or its architecture where the kernel doesn't say."""
    processors = _processors()
    return (processors[0].get("model name") if processors else None) or os.uname().machine


def threads(runtime: Path) -> int:
    """How many threads a call uses if torch doesn't lend its own: what ``runtime``, the one in a CPU pack, has found.

    Raises
    ------
    OSError: the file isn't there or can't be loaded.
    """
    return ctypes.CDLL(str(runtime.absolute())).tvm_flash_threads()
