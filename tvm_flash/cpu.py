"""The host processor: which instructions it has, and how many threads a call uses."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

#: Environment variables with the number of threads; the first that is set wins.  The kernels' thread pool reads them.
THREAD_VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")


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


def threads() -> int:
    """How many threads a call uses: what the environment says, else one for each processor that is allowed."""
    for variable in THREAD_VARIABLES:
        digits = re.match(r"\s*(\d+)", os.environ.get(variable, ""))
        if digits and int(digits[1]) > 0:
            return int(digits[1])
    return len(os.sched_getaffinity(0))
