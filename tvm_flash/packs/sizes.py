"""Whole numbers that follow from a problem's sizes, as plain data: how large a workspace is, how long a split.

An expression is a number, the name of a size, or a tuple of an operation and its operands:

================================= =====================================================================
``("*", a, b, …)``, ``("+", …)``  product and sum
``("min", a, …)``, ``("max", …)`` the smallest and the largest
``("ceildiv", a, b)``             ``a / b`` rounded up
``("//", a, b)``                  ``a / b`` rounded down
``("steps", a, (x, y), …)``       the ``y`` of the last pair whose ``x`` is at most ``a``; the first x is 0
================================= =====================================================================

The builder writes them into a manifest, the run time evaluates them once for a call's shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

#: An expression as the module describes it.
Expression = int | str | tuple

#: Sizes that every problem has.  ``rows`` are the query rows that share a key: ``seqlen_q * heads / kv_heads``.
PROBLEM_SIZES = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_kv", "head_dim", "head_dim_v", "rows")

_OPERATIONS = {
    "*": math.prod,
    "+": sum,
    "min": min,
    "max": max,
    "ceildiv": lambda x: -(-x[0] // x[1]),
    "//": lambda x: x[0] // x[1],
}


def of(
    batch: int, heads: int, seqlen_q: int, kv_heads: int, seqlen_kv: int, head_dim: int, head_dim_v: int
) -> dict[str, int]:
    """The sizes of a problem by name, ``PROBLEM_SIZES``."""
    rows = seqlen_q * (heads // max(1, kv_heads))
    return dict(
        zip(PROBLEM_SIZES, (batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim, head_dim_v, rows), strict=True)
    )


def of_sequences(
    batch: int, heads: int, total_q: int, kv_heads: int, total_k: int, head_dim: int, head_dim_v: int
) -> dict[str, int]:
    """The sizes by name of a problem of ``batch`` sequences of different lengths: of queries and keys all together."""
    names = ("batch", "heads", "kv_heads", "total_q", "total_k", "head_dim", "head_dim_v")
    return dict(zip(names, (batch, heads, kv_heads, total_q, total_k, head_dim, head_dim_v), strict=True))


def of_pages(
    batch: int,
    heads: int,
    total_q: int,
    kv_heads: int,
    pages: int,
    page_size: int,
    pages_per_sequence: int,
    head_dim: int,
    head_dim_v: int,
    seqlen_q: int | None = None,
    split_length: int = 0,
) -> dict[str, int]:
    """The sizes by name of a problem of ``batch`` sequences whose keys lie on pages of a cache.

    ``seqlen_q`` is a number of queries that no sequence exceeds (``total_q`` if not given), ``seqlen_kv`` in the answer
    one of keys, ``pages_per_sequence * page_size``; ``rows`` are the most query rows of a sequence that share a key.
    Where it is given, nothing of this but ``total_q`` itself says how many queries others have.
    ``split_length`` are the keys of a split where a call says so, else 0.
    """
    longest = total_q if seqlen_q is None else seqlen_q
    whole = of(batch, heads, longest, kv_heads, pages_per_sequence * page_size, head_dim, head_dim_v)
    return whole | {
        "total_q": total_q, "pages": pages, "page_size": page_size, "pages_per_sequence": pages_per_sequence,
        "split_length": split_length,
    }  # fmt: skip


def elements_of(role: str) -> str:
    """What the number of elements of a tensor is called, where it doesn't follow from the other sizes: of the gradient
    of a table, 1 if nobody asks for it."""
    return f"{role}_elements"


def evaluate(expression: Expression, sizes: Mapping[str, int]) -> int:
    """The value of an expression.

    Raises
    ------
    KeyError: it names a size that isn't among ``sizes``.
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return sizes[expression]
    operation, *operands = expression
    if operation == "steps":
        at = evaluate(operands[0], sizes)
        return [value for begin, value in operands[1:] if begin <= at][-1]
    return _OPERATIONS[operation]([evaluate(x, sizes) for x in operands])


def from_json(raw: Any) -> Expression:
    """An expression that was JSON, its lists tuples again.

    Raises
    ------
    ValueError: it isn't of the form that the module describes.
    """
    expression = _tuples(raw)
    if not _is_well_formed(expression):
        raise ValueError(f"{raw!r} is no expression of sizes")
    return expression


def names(expression: Expression) -> Iterator[str]:
    """The sizes that a well-formed expression names."""
    if isinstance(expression, str):
        yield expression
    elif isinstance(expression, tuple):
        operands = expression[1:2] if expression[0] == "steps" else expression[1:]
        for operand in operands:
            yield from names(operand)


def _tuples(raw: Any) -> Any:
    return tuple(_tuples(x) for x in raw) if isinstance(raw, (list, tuple)) else raw


def _is_well_formed(x: Any) -> bool:
    if isinstance(x, tuple):
        if len(x) < 3 or not isinstance(x[0], str):
            return False
        if x[0] == "steps":
            pairs = x[2:]
            plain = all(isinstance(p, tuple) and len(p) == 2 and all(map(_is_number, p)) for p in pairs)
            return _is_well_formed(x[1]) and plain and pairs[0][0] == 0 and list(pairs) == sorted(pairs)
        operands_fit = len(x) == 3 if x[0] in ("ceildiv", "//") else True
        return x[0] in _OPERATIONS and operands_fit and all(map(_is_well_formed, x[1:]))
    return isinstance(x, str) or _is_number(x)


def _is_number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0
