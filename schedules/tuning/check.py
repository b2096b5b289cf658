"""Numbers first: a candidate's results against float64, on an awkward small problem.

It is the case of ``python -m tvm_flash check``, which knows every kind of kernels, with longer sequences: grouped
heads, lengths that divide no tile, more keys than queries.  Runs in the measuring process.
"""

from __future__ import annotations

from pathlib import Path

from tvm_flash.machine import ffi
from tvm_flash.machine.device import Device
from tvm_flash.measure import small_case
from tvm_flash.packs.manifest import KernelEntry

SEQLEN_Q, SEQLEN_KV = 150, 333


class WrongNumbersError(Exception):
    """A result is wrong, unwritten, or not the same in two runs."""


def check_small(entry: KernelEntry, module: Path, device: str) -> float:
    """Run the small problem twice, memory full of NaN before; the largest error as a share of what is allowed.

    Raises
    ------
    WrongNumbersError: a result is wrong, unwritten, or differs from run to run.
    """
    kind, _, index = device.partition(":")
    loaded = ffi.load_module(module)
    functions = tuple(ffi.Kernel(loaded, launch.symbol) for launch in entry.launches)
    errors, same = small_case.compare(entry, functions, Device(kind, int(index or 0)), SEQLEN_Q, SEQLEN_KV, repeat=True)
    if not same:
        raise WrongNumbersError("two runs differ")
    shares = {role: small_case.share(figures) for role, figures in errors.items()}
    for role, share in shares.items():
        if not share <= 1:
            raise WrongNumbersError(f"the error of {role} is {share:.3g} × what is allowed")
    return max(shares.values())
