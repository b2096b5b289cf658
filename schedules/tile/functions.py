"""What a definition computes of floats, on GPUs, to about as much as float32 has.

With ``--use_fast_math``, which everything else is compiled with, CUDA's functions are those of the machine: ``tanh`` is
good to 5e-4 only; ``sin`` and ``cos`` lose a digit for each further digit of an angle, as in ``cos(q_idx - kv_idx)``;
and ``pow`` is ``exp2(n * log2(x))``, which is NaN for a negative ``x``, and off by a thousandth for a decay near 1 to
the power of a long distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import tvm_ffi
from tvm.ir import Call, Expr
from tvm.script import tirx as T

_TURNS_OF = 1 / (2 * math.pi)
#: 2 pi as a number of 8 bits, whose product with any number of turns that matters is exact, and the rest.
_TURN, _REST = 6.28125, 2 * math.pi - 6.28125

_WITHIN_A_TURN = f"""
__forceinline__ __device__ float within_a_turn(float x) {{
  float turns = rintf(x * {_TURNS_OF!r}f);
  return fmaf(turns, {-_REST!r}f, fmaf(turns, {-_TURN!r}f, x));
}}
"""

#: That of the compiler's own library, which has no other name by which fast mathematics leave it alone.
_POWER = """
extern "C" __device__ float __nv_powf(float, float);
__forceinline__ __device__ float exact_power(float x, float n) {
  return __nv_powf(x, n);
}
"""


def _tanh(x: Expr) -> Expr:
    return T.float32(1) - T.float32(2) / (T.exp2(x * T.float32(2 * math.log2(math.e))) + T.float32(1))


def _within_a_turn(x: Expr) -> Expr:
    """The same angle between -pi and pi, where the machine's functions are good to 4e-7."""
    return T.cuda.func_call("within_a_turn", x, source_code=_WITHIN_A_TURN, return_type="float32")


def _tan(x: Expr) -> Expr:
    angle = _within_a_turn(x)
    return T.sin(angle) / T.cos(angle)


def _power(x: Expr, n: Expr) -> Expr:
    return T.cuda.func_call("exact_power", x, n, source_code=_POWER, return_type="float32")


_FUNCTIONS: Mapping[str, Callable[..., Expr]] = {
    "tanh": _tanh,
    "sin": lambda x: T.sin(_within_a_turn(x)),
    "cos": lambda x: T.cos(_within_a_turn(x)),
    "tan": _tan,
    "pow": _power,
}


def accurate(expr: Expr) -> Expr:
    """``expr`` with functions of float32 that are as accurate as that."""

    def replace(node):
        if not isinstance(node, Call):
            return node
        function = _FUNCTIONS.get(getattr(node.op, "name", "").rpartition(".")[2])
        return node if function is None else function(*node.args)

    return tvm_ffi.structural_map(expr, replace, order="post")
