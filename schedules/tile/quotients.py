"""Floors of quotients where they are asked for once a thread: as a function, not as an expression in each place.

TVM makes four comparisons of each floor whose operands' signs aren't known, and simplifies them with all that is
around.  Of a tile of a 2D neighbourhood forty are asked for, which took 0.8 s of 2.3 s in which the launch was lowered.
"""

from __future__ import annotations

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.geometry import constant

_FLOOR_QUOTIENT = """
__forceinline__ __device__ int floor_quotient(int x, int y) {
  int quotient = x / y, rest = x % y;
  return rest != 0 && (rest ^ y) < 0 ? quotient - 1 : quotient;
}
"""


def _floor_quotient(x: Expr, y: Expr) -> Expr:
    return T.cuda.func_call("floor_quotient", x, y, source_code=_FLOOR_QUOTIENT, return_type="int32")


def with_quotients_called(expr: Expr) -> Expr:
    """``expr`` with a function's call for each floor of an int32 by a divisor that isn't a constant."""

    def replace(e):
        if not isinstance(e, (tirx.FloorDiv, tirx.FloorMod)) or str(e.ty.dtype) != "int32" or constant(e.b) is not None:
            return e
        quotient = _floor_quotient(e.a, e.b)
        return quotient if isinstance(e, tirx.FloorDiv) else e.a - quotient * e.b

    return tvm_ffi.structural_map(expr, replace, order="post")
