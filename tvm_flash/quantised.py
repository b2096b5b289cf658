"""Keys and values in 8 bits: what they stand for, and how they are made.

An element ``x`` of a cache with the scale ``s`` of its head, or of its page and head, stands for ``float32(x) * s``,
rounded to float32 and then to the dtype of the queries, to the nearest and ties to even.  Attention over the cache
gives the bits that it gives over that.
"""

from __future__ import annotations

from typing import Any

from tvm_flash.call.paged import CACHE_DTYPES
from tvm_flash.call.problem import DTYPES
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks import dtype_name
from tvm_flash.frameworks.arrays import arrays_of

#: The largest number that an element is, by the dtype of the cache.
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}

#: The largest number of float32, and the least that has all its digits.
_FLOAT32_MAX, _FLOAT32_NORMAL = (2 - 2.0**-23) * 2.0**127, 2.0**-126


def quantise_cache(x: Any, dtype: Any = "float8_e4m3fn", scale: Any = None) -> tuple[Any, Any]:
    """Keys or values in 8 bits.

    ``x / scale`` in float32 is brought into the range of the dtype, ±448 of ``"float8_e4m3fn"`` and ±127 of ``"int8"``,
    and rounded to the nearest, ties to even; NaN, and 0 / 0, are NaN in the former and 0 in the latter.  It is how
    :func:`tvm_flash.flash_attention_with_kvcache` appends.

    Parameters
    ----------
    x: ``(…, kv_heads, dim)``, a tensor of torch, NumPy or JAX, of float32, float16 or bfloat16.
    dtype: ``"float8_e4m3fn"`` or ``"int8"``, or that dtype of torch, NumPy or JAX.
    scale: float32 ``(kv_heads,)``, or ``(pages, kv_heads)`` where x is ``(pages, page_size, kv_heads, dim)``.  If it
        isn't given, each head gets what makes its largest finite element the largest of the dtype; 1 if all are 0.

    Returns
    -------
    The elements in ``dtype``, shaped as x (of NumPy's arrays, float8_e4m3fn is that of ml_dtypes), and the scale.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError: an argument is wrong.
    """
    dtype = dtype_name(dtype, CACHE_DTYPES)
    xp = arrays_of(x, "x")
    _check_rows(xp, x, DTYPES)
    wide = xp.float32(x)
    if scale is None:
        axes = tuple(i for i in range(wide.ndim) if i != wide.ndim - 2)
        size = xp.where(abs(wide) <= _FLOAT32_MAX, abs(wide), 0.0)  # of what is neither infinite nor NaN
        largest = xp.largest(size, axes) if 0 not in x.shape else size.sum(axes)
        # A scale that isn't a normal number has lost digits, and on some machines it is 0.
        scale = xp.where(largest > 0, xp.float32(largest / LARGEST[dtype]), 1.0)
        scale = xp.float32(xp.where(scale < _FLOAT32_NORMAL, _FLOAT32_NORMAL, scale))
    return rounded(xp, xp.quotient(wide, _beside(xp, x, scale)), dtype), scale


def dequantise_cache(x: Any, scale: Any, dtype: Any) -> Any:
    """What keys or values in 8 bits stand for, in the dtype of the queries that read them.

    Parameters
    ----------
    x: ``(…, kv_heads, dim)`` of float8_e4m3fn or int8, a tensor of torch, NumPy or JAX.
    scale: float32 ``(kv_heads,)``, or ``(pages, kv_heads)`` where x is ``(pages, page_size, kv_heads, dim)``.
    dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, or that dtype of torch, NumPy or JAX.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError: an argument is wrong.
    """
    dtype = dtype_name(dtype, DTYPES)
    xp = arrays_of(x, "x")
    _check_rows(xp, x, CACHE_DTYPES)
    return xp.cast(xp.float32(x) * _beside(xp, x, scale), dtype)


def rounded(xp: Any, x: Any, dtype: str) -> Any:
    """Float32 elements, already divided by their scales, in a dtype of 8 bits; ``xp`` is that of their framework."""
    most = LARGEST[dtype]
    x = xp.clip(x, -most, most)
    if dtype == "int8":
        x = xp.where(x == x, xp.round(x), 0.0)
    return xp.cast(x, dtype)


def _check_rows(xp: Any, x: Any, dtypes: tuple[str, ...]) -> None:
    xp.check(x, "x")
    if len(x.shape) < 2:
        raise InvalidArgumentError(f"x: has shape {tuple(x.shape)}, expected (…, kv_heads, dim)")
    if xp.name_of(x) not in dtypes:
        raise ArgumentTypeError(f"x: has dtype {xp.name_of(x)}, expected one of {', '.join(dtypes)}; convert it")


def _beside(xp: Any, x: Any, scale: Any) -> Any:
    """A scale so that it broadcasts against ``x``."""
    if arrays_of(scale, "scale") is not xp:
        raise ArgumentTypeError("scale: is a tensor of another framework than x; convert one to the other's")
    xp.check(scale, "scale")
    if xp.device(scale) != xp.device(x):
        raise ArgumentTypeError(f"scale: is on {xp.device(scale)}, expected {xp.device(x)}, where x is; move it")
    if xp.name_of(scale) != "float32":
        raise ArgumentTypeError(f"scale: has dtype {xp.name_of(scale)}, expected float32; convert it")
    shape, own = tuple(x.shape), tuple(scale.shape)
    if own == shape[-2:-1]:
        return scale[:, None]
    if len(shape) == 4 and own in ((shape[0], shape[2]), (1, shape[2])):
        return scale[:, None, :, None]
    paged = f", or ({shape[0]}, {shape[2]})" if len(shape) == 4 else ""
    raise InvalidArgumentError(f"scale: has shape {own}, expected ({shape[-2]},){paged}: one for each head")
