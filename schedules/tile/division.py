"""Division by a number that is known when a kernel begins, without dividing where the quotient is waited for."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T


def reciprocal(size: Expr) -> Expr:
    """What :func:`quotient` multiplies by, of a divisor of 1 to 2**31 - 1."""
    return T.truncdiv(T.uint32(0xFFFFFFFF), T.Cast("uint32", size))


def quotient(x: Expr, size: Expr, of_one: Expr) -> Expr:
    """``x // size`` of an int32 from 0 on; ``of_one`` is ``reciprocal(size)``.

    The product is 1 too low at most: ``of_one`` lies 1 below ``2**32 / size`` at most, ``x`` below ``2**31``.
    """
    low = T.Cast("int32", T.shift_right(T.Cast("uint64", x) * T.Cast("uint64", of_one), T.uint64(32)))
    return low + T.Select(x - low * size >= size, 1, 0)
