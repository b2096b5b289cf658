"""What verification asks of every operator's kernels: trials, and a usual problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.torch_cases import Compute
from tvm_flash import numerics, reference

#: All that a kernel wrote, float64 arrays; two runs must give the same.
Results = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Trial:
    """A problem that a kernel must get right.

    Attributes
    ----------
    label: names it in messages.
    run: ``run(compute, device)`` computes it, with everything that is written full of NaN beforehand.
    check: ``check(results, device)`` asserts that they are right; the largest error as a share of what is allowed.
    """

    label: str
    run: Callable[[Compute, str], Results]
    check: Callable[[Results, str], float]


@dataclass(frozen=True)
class Usual:
    """A problem to be timed: its ``name``, tensors and numbers by role, sizes by name, floating-point operations."""

    name: str
    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    flops: float


def gradients(*given: np.ndarray, dtype: str, learnt: Iterable[str], **what: Any) -> tuple[reference.Gradients, ...]:
    """Exact gradients, and the usual ones in a dtype.

    Those of parameters, each of which is differences of all scores, are computed once: nothing of them is rounded
    before the end, so that the usual ones are the exact ones as float32.

    Parameters
    ----------
    given: dout, q, k, v.
    learnt: names of the parameters whose gradients are wanted.
    what: the arguments of the reference that say which attention it is.
    """
    with np.errstate(invalid="ignore"):
        exact = reference.attention_backward(*given, gradients=[*learnt], **what)
        usual = numerics.usual_gradients(*given, dtype=dtype, **what)
    return exact, replace(usual, params={name: x.astype(np.float32) for name, x in exact.params.items()})
