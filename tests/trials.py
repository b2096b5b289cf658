"""What verification asks of every operator's kernels: trials, and a usual problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.torch_cases import Compute

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
