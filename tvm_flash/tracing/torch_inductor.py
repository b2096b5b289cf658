"""Operators that exporters may take apart, and that inductor calls as they are.

Exporters to formats without such an operator, as that of ONNX, look into torch's table of decompositions.  Inductor
does too: under continuous integration (where the variable ``CI`` is set) it raises for an operator that is in the table
and that it has no lowering of.  So it gets one, a call.  Inductor takes seconds to import, and nobody imports it for
our sake: it is told when it has a program traced, which runs operators on fake tensors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

_decomposed: list[torch._ops.OpOverload] = []


def decompose(operator: torch._ops.OpOverload, into: Callable) -> None:
    """Let exporters take an operator apart; its fake implementation must be :func:`traced`."""
    torch._decomp.register_decomposition(operator)(into)
    _decomposed.append(operator)


def traced(fake: Callable) -> Callable:
    """The fake implementation of an operator, which inductor calls before it compiles a program with the operator."""

    @functools.wraps(fake)
    def run(*arguments, **options):
        _tell_inductor()
        return fake(*arguments, **options)

    return run


def _tell_inductor() -> None:
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or not hasattr(lowering, "make_fallback"):  # another thread is about to import it
        return
    for operator in _decomposed:
        if operator not in lowering.lowerings:
            lowering.make_fallback(operator, lowering.constrain_to_fx_strides, warn=False)
