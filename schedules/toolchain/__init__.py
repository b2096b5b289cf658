"""Compilers, linkers and what is known of this machine.  Nothing here imports TVM.

=============== =================================================================
``process``     running a compiler: errors that can be read, no orphans
``cuda``        CUDA C++ source → object → module
``nvcc``        its device half → device image
``nvrtc``       the same for sm_70, with NVRTC of CUDA 12
``host``        its host half and the image → object; ``launch.h`` is what that needs of CUDA
``ptxas``       registers, spills, shared memory and warnings out of a report
``cpu``         objects → module, and the thread pool that CPU modules share
``machine``     instruction sets and GPUs of this machine
``inspection``  what a module must not contain
=============== =================================================================
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from schedules.toolchain import cuda, ptxas


def compile_cuda(
    source_path: str | os.PathLike,
    so_path: str | os.PathLike,
    arch: str,
    *,
    run_on: str = "",
    spills_allowed: bool = False,
) -> ptxas.Report:
    """One exported source to one loadable module, as the tuner does it.

    Parameters
    ----------
    source_path, so_path: the ``.cu`` file that is there, and the module to write.
    arch, run_on, spills_allowed: as in :func:`schedules.toolchain.cuda.compile_object`.

    Raises
    ------
    ToolchainError: there is no compiler, it fails, or its result must not ship.
    """
    target = Path(so_path)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        part, module = Path(scratch) / "kernel.o", Path(scratch) / target.name
        report = cuda.compile_object(Path(source_path), part, arch, run_on=run_on, spills_allowed=spills_allowed)
        cuda.link_module([part], module)
        os.replace(module, target)
    return report
