"""Keys and values in 8 bits: what an element of a cache is as a number, and what it is in the dtype of queries.

The one place that says so: the operator, and the kernels of every family, read elements with these expressions.  An
element ``x`` with the scale ``s`` of its head (or of its page and head) is ``round(float32(x) * s)``: the product is
rounded to float32, and then to the dtype of queries, to the nearest and ties to even; in float32 that does nothing.

=============== ======== ==================================================================
cache           buffers  an element is
=============== ======== ==================================================================
float8_e4m3fn   uint8    sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are NaN
int8            int8     itself
=============== ======== ==================================================================

Kernels take e4m3 as the bytes that it is.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

#: The dtype of the buffers that hold a cache of each dtype.
STORED = {"float8_e4m3fn": "uint8", "int8": "int8"}


def widened(x: Expr) -> Expr:
    """The value of an element of a cache, float32, exactly; a vector of them too."""
    dtype = str(x.ty.dtype)
    lanes = dtype.partition("x")[2]

    def wide(kind: str) -> str:
        return f"{kind}x{lanes}" if lanes else kind

    def const(value, kind: str = "uint32") -> Expr:
        one = tirx.const(value, kind)
        return T.Broadcast(one, int(lanes)) if lanes else one

    if dtype.startswith("int8"):
        return T.cast(x, wide("float32"))
    bits = T.cast(x, wide("uint32"))
    magnitude = T.bitwise_and(bits, const(0x7F))
    # An exponent of 0 means 1 without the leading bit: those few have it, and it is taken away as a number.
    small = magnitude < const(8)
    leading = T.Select(small, const(1), const(0))
    normal = T.shift_left(magnitude + T.shift_left(leading + const(120), const(3)), const(20))
    value = T.reinterpret(wide("float32"), normal)
    value = T.Select(small, value - const(2.0**-6, "float32"), value)
    value = T.Select(magnitude == const(0x7F), const(math.nan, "float32"), value)
    sign = T.shift_left(T.bitwise_and(bits, const(0x80)), const(24))
    return T.reinterpret(wide("float32"), T.bitwise_or(T.reinterpret(wide("uint32"), value), sign))


def dequantised(x: Expr, scale: Expr, dtype: str) -> Expr:
    """An element of a cache in the dtype of queries."""
    value = widened(x) * scale
    return value if dtype == "float32" else T.cast(value, dtype)
