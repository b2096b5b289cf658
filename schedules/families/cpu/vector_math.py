"""Exponential and hyperbolic tangent of whole vectors: arithmetic in place of a library call for each element."""

from __future__ import annotations

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.ir import Expr
from tvm.ir.expr import Call, TensorLoad
from tvm.script import tirx as T
from tvm.sym import Analyzer

from schedules.tile.score import LOG2_E

#: What rounds to an integer below this has the power zero: with denormal ones a causal run took ten times as long.
_SMALLEST_EXPONENT = -125.0
#: Added to a small number it leaves the nearest integer, and 127 more, in the lowest bits: the exponent of a float32.
#: So exp2 is 10 instructions of AVX-512, its scale included, and was 14 with floor and a conversion to integers.
_ROUNDING = 1.5 * 2**23 + 127
#: Nodes of an argument from which on it is a variable: a function names it a dozen times, and what is made of the score
#: names that often in turn.  ``tanh(s + silu(s))``, whose backward had expressions of 30 MB, took minutes to compile,
#: and more than 6 GB; it takes 7 s.  Three such functions in one another still take TVM six times as long as two.
_LARGE = 64
#: From here on, tanh is 1 in float32.
_TANH_LIMIT = 9.02
#: Below this, tanh is computed from its series: 1 - 2 / (exp(2x) + 1) cancels there.
_TANH_SERIES_LIMIT = 0.55


def _fit(function, low: float, high: float, degree: int) -> list[float]:
    """Polynomial, highest power first, for a function that is 1 at 0, and so is the polynomial.

    Least squares of the relative error at Chebyshev nodes.
    """
    nodes = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    values = function(nodes)
    powers = np.vander(nodes, degree + 1)[:, :-1]
    return [*np.linalg.lstsq(powers / values[:, None], (values - 1) / values, rcond=None)[0].tolist(), 1.0]


# 2**f on [-1/2, 1/2]; relative error 1e-7 before rounding.  That 2**0 is exactly 1 matters: a maximum that stays leaves
# what was summed before as it is.
_EXP2 = _fit(np.exp2, -0.5, 0.5, 5)
# tanh(x) / x as a polynomial of x**2; relative error 1e-9 before rounding.
_TANH = _fit(lambda t: np.tanh(np.sqrt(t)) / np.sqrt(t), 0, _TANH_SERIES_LIMIT**2, 5)


def _horner(coefficients: list[float], x: Expr) -> Expr:
    result = T.float32(coefficients[0])
    for c in coefficients[1:]:
        result = result * x + T.float32(c)
    return result


def exp2(x: Expr, scale: Expr | None = None) -> Expr:
    """``2**x``, or ``2**(x * scale)``, of float32 exponents below 127: NaN stays NaN, results below 2**-125.5 are zero.

    The product with ``scale`` is rounded once, in what is left of it beside an integer.
    """
    scale = T.float32(1) if scale is None else scale
    shifted = T.reinterpret("int32", T.fma(x, scale, T.float32(_ROUNDING)))
    power = T.reinterpret("float32", T.shift_left(shifted, T.int32(23)))
    # Seen as a float32 again, since TVM takes x + y - y for x.
    again = T.reinterpret("float32", shifted)
    scaled = _horner(_EXP2, T.fma(x, scale, T.float32(_ROUNDING) - again)) * power
    return T.Select(again < T.float32(_ROUNDING + _SMALLEST_EXPONENT), T.float32(0), scaled)


def tanh(x: Expr) -> Expr:
    """``tanh(x)`` for float32; NaN stays NaN."""
    size = T.Select(x < T.float32(0), -x, x)
    series = _horner(_TANH, x * x) * x
    limited = T.Select(size > T.float32(_TANH_LIMIT), T.float32(_TANH_LIMIT), size)
    large = T.float32(1) - T.float32(2) / (exp2(limited * T.float32(2 * LOG2_E)) + T.float32(1))
    return T.Select(size < T.float32(_TANH_SERIES_LIMIT), series, T.Select(x < T.float32(0), -large, large))


def vectorizable(expr: Expr) -> Expr:
    """``expr`` with the functions of this module in place of the calls that LLVM makes one element at a time."""
    functions = {"tanh": (tanh, np.tanh)}  # of vectors, and of a number

    def replace(node):
        name = node.op.name.rsplit(".", 1)[-1] if isinstance(node, Call) else None
        if name not in functions:
            return node
        of_vectors, of_number = functions[name]
        (x,) = node.args
        parts = _parts(x)
        if (number := _number(x, parts)) is not None:
            return T.float32(of_number(number))
        if len(parts) <= _LARGE:
            return of_vectors(x)
        variable = tirx.Var(f"{name}_argument", x.ty.dtype)
        return tirx.Let(variable, x, of_vectors(variable))

    return tvm_ffi.structural_map(expr, replace, order="post")


def _parts(expr: Expr) -> list[Expr]:
    """The expressions that one is made of, itself included."""
    found = []
    tvm_ffi.structural_walk(expr, [(Expr, found.append)])
    return found


def _number(expr: Expr, parts: list[Expr]) -> float | None:
    """The value of an expression of numbers alone.

    In the argument of a function, whose variable stands for what TVM makes of it, it would be another one each time TVM
    simplifies it, which its analysis refuses.
    """
    if any(isinstance(x, (tirx.Var, TensorLoad)) for x in parts):
        return None
    value = Analyzer().simplify(expr)
    return value.value if isinstance(value, tirx.FloatImm) else None
