"""Which keys a tile of rows may see, and which it certainly sees: interval arithmetic on a mask.

``decompose`` splits a predicate at its conjunctions and disjunctions into comparisons that are affine in the query
index i and the key index j; whatever isn't affine stays as it is.  Every part answers the same questions:

* ``visible_range(rows)``, ``full_range(rows)``: keys ``[lo, hi)`` that some row may see, that every row sees;
* ``live(tile)``, ``full(tile)``: whether some, whether every element of a tile is seen;
* ``has_gaps``: the visible keys of a row need not be one interval; ``is_interval``: they are exactly its
  ``visible_range``.

An answer may be cautious (too wide a visible range, too narrow a full one), never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import sym, tirx
from tvm.ir import Expr


@dataclass(frozen=True)
class Rows:
    """Rows ``first .. last``; ``substitute`` puts a kernel's values into an expression of the definition."""

    first: Expr
    last: Expr
    seqlen_kv: Expr
    substitute: Callable[[Expr], Expr]


@dataclass(frozen=True)
class Tile:
    """A tile of scores, all bounds inclusive."""

    row_first: Expr
    row_last: Expr
    col_first: Expr
    col_last: Expr
    substitute: Callable[[Expr], Expr]


def _always(value: bool) -> Expr:
    return tirx.const(value, "bool")


@dataclass(frozen=True)
class _Affine:
    """``ci * i + cj * j + c >= 0`` with integer constants ci, cj and an expression c free of i and j."""

    predicate: Expr
    ci: int
    cj: int
    c: Expr
    has_gaps = False
    is_interval = True

    def _row_term(self, rows, largest: bool):
        return rows.substitute(self.c) + self.ci * (rows.last if (self.ci > 0) == largest else rows.first)

    def _range(self, rows, largest):
        """Keys that satisfy the comparison for the most (``largest``) or the least permissive row."""
        if self.cj == 0:
            return _row_condition(self._row_term(rows, largest) >= 0, rows)
        bound = self._row_term(rows, largest)
        step = abs(self.cj)
        bound = bound if step == 1 else tirx.floordiv(bound, step)
        return (-bound, rows.seqlen_kv) if self.cj > 0 else (tirx.const(0, bound.ty.dtype), bound + 1)

    def visible_range(self, rows):
        return self._range(rows, True)

    def full_range(self, rows):
        return self._range(rows, False)

    def _corner(self, tile, largest: bool):
        row = tile.row_last if (self.ci > 0) == largest else tile.row_first
        col = tile.col_last if (self.cj > 0) == largest else tile.col_first
        return tile.substitute(self.c) + self.ci * row + self.cj * col >= 0

    def full(self, tile):
        return self._corner(tile, False)

    def live(self, tile):
        return self._corner(tile, True)


def _row_condition(holds, rows):
    """All keys if a condition on rows alone holds, else none."""
    zero = tirx.const(0, rows.seqlen_kv.ty.dtype)
    return zero, tirx.Select(holds, rows.seqlen_kv, zero)


@dataclass(frozen=True)
class _All:
    predicate: Expr
    parts: tuple

    @property
    def has_gaps(self):
        return any(p.has_gaps for p in self.parts)

    @property
    def is_interval(self):
        return all(p.is_interval for p in self.parts)

    def _range(self, rows, which):
        los, his = zip(*(getattr(p, which)(rows) for p in self.parts), strict=True)
        return _fold(tirx.max, los), _fold(tirx.min, his)

    def visible_range(self, rows):
        return self._range(rows, "visible_range")

    def full_range(self, rows):
        return self._range(rows, "full_range")

    def full(self, tile):
        return tirx.all(*(p.full(tile) for p in self.parts))

    def live(self, tile):
        return tirx.all(*(p.live(tile) for p in self.parts))


@dataclass(frozen=True)
class _Any:
    predicate: Expr
    parts: tuple
    has_gaps = True
    is_interval = False

    def visible_range(self, rows):
        los, his = zip(*(p.visible_range(rows) for p in self.parts), strict=True)
        return _fold(tirx.min, los), _fold(tirx.max, his)

    def full_range(self, rows):
        zero = tirx.const(0, rows.seqlen_kv.ty.dtype)
        return zero, zero  # a union of intervals is not an interval

    def full(self, tile):
        return tirx.any(*(p.full(tile) for p in self.parts))

    def live(self, tile):
        return tirx.any(*(p.live(tile) for p in self.parts))


@dataclass(frozen=True)
class _Opaque:
    """A predicate that isn't affine: nothing is known of a tile without looking at each element."""

    predicate: Expr
    has_gaps = False
    is_interval = False

    def visible_range(self, rows):
        return tirx.const(0, rows.seqlen_kv.ty.dtype), rows.seqlen_kv

    def full_range(self, rows):
        zero = tirx.const(0, rows.seqlen_kv.ty.dtype)
        return zero, zero

    def full(self, tile):
        return _always(False)

    def live(self, tile):
        return _always(True)


def _fold(op, items):
    result = items[0]
    for item in items[1:]:
        result = op(result, item)
    return result


def decompose(predicate: Expr, index):
    """The mask as a tree of parts; ``index`` are the definition's variables b, h, i, j."""
    if isinstance(predicate, tirx.And):
        return _All(predicate, (decompose(predicate.a, index), decompose(predicate.b, index)))
    if isinstance(predicate, tirx.Or):
        return _Any(predicate, (decompose(predicate.a, index), decompose(predicate.b, index)))
    return _comparison(predicate, index) or _Opaque(predicate)


def _comparison(predicate: Expr, index) -> _Affine | None:
    """The comparison as ``ci * i + cj * j + c >= 0``, or None if it isn't affine with constant coefficients."""
    nonnegative = {
        tirx.LT: lambda a, b: b - a - 1,
        tirx.LE: lambda a, b: b - a,
        tirx.GT: lambda a, b: a - b - 1,
        tirx.GE: lambda a, b: a - b,
    }.get(type(predicate))
    if nonnegative is None or not str(predicate.a.ty.dtype).startswith("int"):
        return None
    _, _, i, j = index
    terms = sym.detect_linear_equation(nonnegative(predicate.a, predicate.b), [i, j])
    if len(terms) != 3:
        return None
    ci, cj, c = (sym.Analyzer().simplify(t) for t in terms)
    if not (isinstance(ci, tirx.IntImm) and isinstance(cj, tirx.IntImm)):
        return None
    return _Affine(predicate, ci.value, cj.value, c)
