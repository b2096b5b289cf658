"""Where sequences of different lengths begin: what is checked of it before a call, and on the processor in one."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence

from tvm_flash.call import checks
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks import TensorView


def count_sequences(starts: Mapping[str, TensorView]) -> int:
    """How many sequences there are, once the tensors that say where they begin (by name) are known to be such.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError
    """
    counts = {}
    for name, x in starts.items():
        if x.dtype != "int32":
            raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected int32; convert it")
        if len(x.shape) != 1 or not x.shape[0]:
            raise InvalidArgumentError(
                f"{name}: has shape {x.shape}, expected (batch + 1,): where each sequence begins, and the last one ends"
            )
        counts[name] = x.shape[0]
    (one, number), (other, others) = counts.items()
    if number != others:  # numbers that torch.jit.trace writes down aren't alike, but equal
        raise InvalidArgumentError(
            f"{other}: is of {others - 1} sequences, but {one} of {number - 1}; expected the same, a sequence without "
            f"keys or queries being the same number twice"
        )
    return number - 1


def check_starts(sizes: checks.RaggedSizes, at: Mapping[str, int]) -> None:
    """That starts in this process's memory make sense; ``at`` are their addresses by name, those of queries first.

    Raises
    ------
    InvalidArgumentError
    """
    totals = (("q", sizes.total_q), ("k", sizes.total_k))
    for (name, address), (of, total) in zip(at.items(), totals, strict=True):
        fault = fault_of(list((ctypes.c_int32 * sizes.starts).from_address(address)), of, total)
        if fault is not None:
            raise InvalidArgumentError(f"{name}: {fault}")


def fault_of(starts: Sequence[int], of: str, total: int) -> str | None:
    """What makes no sense in starts of sequences in ``total`` rows, and what is expected; None if all of it does."""
    if starts[0] != 0:
        return f"begins with {starts[0]}, expected 0, where the first sequence begins"
    for i, (a, b) in enumerate(itertools.pairwise(starts)):
        if b < a:
            return f"falls from {a} to {b} after sequence {i}, expected numbers that never fall; use cumsum of lengths"
    if starts[-1] > total:
        return f"ends with {starts[-1]}, expected at most the {total} rows of {of}"
    return None
