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

from tvm.ir import Expr
from tvm.script import tirx as T

#: The dtype of the buffers that hold a cache of each dtype.
STORED = {"float8_e4m3fn": "uint8", "int8": "int8"}


def widened(x: Expr) -> Expr:
    """The value of an element of a cache, float32, exactly."""
    if str(x.ty.dtype) == "int8":
        return T.cast(x, "float32")
    bits = T.cast(x, "int32")
    magnitude = T.bitwise_and(bits, 0x7F)
    # An exponent of 0 means 1 without the leading bit: those few have it, and it is taken away as a number.
    small = magnitude < 8
    leading = T.Select(small, T.int32(1), T.int32(0))
    value = T.reinterpret("float32", T.shift_left(magnitude + T.shift_left(leading + 120, 3), 20))
    value = T.Select(small, value - T.float32(2.0**-6), value)
    value = T.Select(magnitude == 0x7F, T.float32(math.nan), value)
    sign = T.shift_left(T.bitwise_and(bits, 0x80), 24)
    return T.reinterpret("float32", T.bitwise_or(T.reinterpret("int32", value), sign))


def dequantised(x: Expr, scale: Expr, dtype: str) -> Expr:
    """An element of a cache in the dtype of queries."""
    value = widened(x) * scale
    return value if dtype == "float32" else T.cast(value, dtype)
