"""Exponential and tanh that vectorise: a few arithmetic operations in place of a call for each element."""

from __future__ import annotations

import math

import numpy as np
from tvm.ir import Expr
from tvm.script import tirx as T

LOG2E = math.log2(math.e)

#: Below this, 2**x is zero: denormal numbers as probabilities made a causal run ten times slower.
_SMALLEST_EXPONENT = -126.0


def _exp2_coefficients(degree: int) -> list[float]:
    """Polynomial for 2**f on [-1/2, 1/2], highest power first: least squares of the relative error at Chebyshev nodes."""
    nodes = np.cos(np.pi * (np.arange(400) + 0.5) / 400) / 2
    weight = 1 / np.exp2(nodes)
    return np.linalg.lstsq(np.vander(nodes, degree + 1) * weight[:, None], np.exp2(nodes) * weight, rcond=None)[
        0
    ].tolist()


_EXP2 = _exp2_coefficients(5)  # relative error 2e-7 in float32


def exp2(x: Expr) -> Expr:
    """``2**x`` for float32 ``x <= 1``: NaN stays NaN, results below 2**-126 are zero."""
    whole = T.nearbyint(x)
    fraction = x - whole
    power = T.float32(_EXP2[0])
    for c in _EXP2[1:]:
        power = power * fraction + T.float32(c)
    exponent = T.shift_left(T.cast(whole, "int32"), T.int32(23))
    scaled = T.reinterpret("float32", T.reinterpret("int32", power) + exponent)
    return T.Select(x < T.float32(_SMALLEST_EXPONENT), T.float32(0), scaled)
