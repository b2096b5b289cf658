"""``python -m tvm_flash bench``: these kernels beside PyTorch's, in one process, on one device.

=============== ================================================================
``workloads``   what is computed: the grids of problems, and their operations
``peers``       who computes it: ours, and the backends of PyTorch
``timing``      how it is timed
``others``      other processes, which disturb a timing
``accuracy``    how far results are from float64
``measure``     one run: all workloads, the device's matmul peak, the machine
``results``     what a run found, as JSON
``recorded``    figures of a peer that was measured elsewhere
``ratios``      ours over peers: best peer, geometric mean, worst cell
``tables``      tables for a terminal and for a page
``plots``       pictures
``processor``   a CPU's table: each template beside torch on the template's memory
``page``        docs/benchmarks.md
``command``     the options
=============== ================================================================

Needs torch, and matplotlib for pictures: ``pip install "tvm-flash[bench]"``.  Nothing of them is imported before a
command needs it.
"""

import importlib.util

from tvm_flash.errors import NotSupportedError


def require(what: str, *modules: str) -> None:
    """See that what a command needs is installed.

    Raises
    ------
    NotSupportedError: it isn't; the message names what is missing, and the command that installs it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise NotSupportedError(f'{what}: needs {", ".join(missing)}; pip install "tvm-flash[bench]"')
