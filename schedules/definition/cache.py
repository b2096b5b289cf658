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

#: The largest number of each.
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


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


def narrowed(x: Expr, cache: str) -> Expr:
    """The byte of an element of a cache, uint32, that a float32 which was divided by the scale is rounded to.

    It is brought into the range of the dtype and rounded to the nearest, ties to even; NaN is 0 in int8.
    """
    most = LARGEST[cache]
    x = T.Select(x > T.float32(most), T.float32(most), T.Select(x < T.float32(-most), T.float32(-most), x))
    bits = T.reinterpret("uint32", x)
    sign = T.bitwise_and(bits, T.uint32(0x80000000))
    magnitude = T.bitwise_xor(bits, sign)
    is_nan = magnitude > T.uint32(0x7F800000)
    if cache == "int8":
        # From 2^23 to 2^24 float32 has whole numbers, and their bits end in those of what was added to 1.5 * 2^23.
        whole = T.reinterpret("uint32", x + T.float32(1.5 * 2.0**23))
        return T.Select(is_nan, T.uint32(0), T.bitwise_and(whole, T.uint32(0xFF)))
    # Below 2^-6 steps are those of 2^14 in float32; above, 3 bits of the mantissa are left.
    small = T.reinterpret("uint32", T.reinterpret("float32", magnitude) + T.float32(2.0**14)) - T.uint32(0x46800000)
    is_odd = T.bitwise_and(T.shift_right(magnitude, T.uint32(20)), T.uint32(1))
    usual = T.shift_right(magnitude - T.uint32(120 << 23) + T.uint32(0x7FFFF) + is_odd, T.uint32(20))
    found = T.Select(magnitude < T.uint32(121 << 23), small, usual)
    found = T.Select(is_nan, T.uint32(0x7F), found)
    return T.bitwise_or(T.bitwise_and(found, T.uint32(0x7F)), T.shift_right(sign, T.uint32(24)))
