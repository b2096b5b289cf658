"""Which keys a tile of rows may see, and which rows see a tile of keys: interval arithmetic on a mask.

``decompose`` splits a predicate at its conjunctions and disjunctions into comparisons that are affine in the query
index i and the key index j; whatever isn't affine stays as it is.  Every part answers the same questions:

* ``visible_range(span)``, ``full_range(span)``: of a span of rows, the keys ``[lo, hi)`` that some row may see, that
  every row sees; of a span of keys, the rows that may see some key, that see every key;
* ``live(tile)``, ``full(tile)``: whether some, whether every element of a tile is seen;
* ``is_opaque``: something in it isn't affine, and no range of keys or rows follows from it; what is known of a tile
  then follows from interval arithmetic (:mod:`schedules.definition.intervals`);
* ``has_unknown``: not even that says anything of some part of it;
* ``has_gaps``: the visible keys of a row need not be one interval; ``is_interval``: they are exactly its
  ``visible_range``.

An answer may be cautious (too wide a visible range, too narrow a full one), never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr
from tvm.ir.expr import TensorLoad

from schedules.definition.intervals import Atom, Tilewise

ROWS, KEYS = "rows", "keys"


@dataclass(frozen=True)
class Span:
    """Rows or keys (``of``) ``first .. last``, and how many there are of the others, which are asked for.

    ``substitute`` puts a kernel's values into an expression of the definition.
    """

    of: str
    first: Expr
    last: Expr
    others: Expr
    substitute: Callable[[Expr], Expr]


@dataclass(frozen=True)
class Tile:
    """A tile of scores, all bounds inclusive; ``bounds`` has those of atoms, where a kernel knows them."""

    row_first: Expr
    row_last: Expr
    col_first: Expr
    col_last: Expr
    substitute: Callable[[Expr], Expr]
    bounds: Callable[[Atom], tuple[Expr, Expr]] | None = None


def _always(value: bool) -> Expr:
    return tirx.const(value, "bool")


def _zero(span: Span) -> Expr:
    return tirx.const(0, span.others.ty.dtype)


@dataclass(frozen=True)
class _Affine:
    """``ci * i + cj * j + c >= 0`` with integer constants ci, cj and an expression c free of i and j."""

    predicate: Expr
    ci: int
    cj: int
    c: Expr
    has_gaps = False
    has_unknown = False
    is_opaque = False
    is_interval = True
    atoms = ()

    @property
    def narrows(self):
        return self.ci > 0 > self.cj

    def slopes(self, axis):
        """Signs of the coefficient of ``axis``, as a set."""
        coefficient = {"i": self.ci, "j": self.cj}[axis]
        return {(coefficient > 0) - (coefficient < 0)}

    def _range(self, span, largest):
        """What satisfies the comparison with the most (``largest``) or the least permissive one of the span."""
        own, other = (self.ci, self.cj) if span.of == ROWS else (self.cj, self.ci)
        bound = span.substitute(self.c) + own * (span.last if (own > 0) == largest else span.first)
        if other == 0:
            return _zero(span), tirx.Select(bound >= 0, span.others, _zero(span))
        step = abs(other)
        bound = bound if step == 1 else tirx.floordiv(bound, step)
        return (-bound, span.others) if other > 0 else (tirx.const(0, bound.ty.dtype), bound + 1)

    def visible_range(self, span):
        return self._range(span, True)

    def full_range(self, span):
        return self._range(span, False)

    def _corner(self, tile, largest: bool):
        row = tile.row_last if (self.ci > 0) == largest else tile.row_first
        col = tile.col_last if (self.cj > 0) == largest else tile.col_first
        return tile.substitute(self.c) + self.ci * row + self.cj * col >= 0

    def full(self, tile):
        return self._corner(tile, False)

    def live(self, tile):
        return self._corner(tile, True)


@dataclass(frozen=True)
class _All:
    predicate: Expr
    parts: tuple

    @property
    def atoms(self):
        return tuple(a for p in self.parts for a in p.atoms)

    @property
    def has_gaps(self):
        return any(p.has_gaps for p in self.parts)

    @property
    def is_interval(self):
        return all(p.is_interval for p in self.parts)

    def slopes(self, axis):
        return set().union(*(p.slopes(axis) for p in self.parts))

    @property
    def is_opaque(self):
        return any(p.is_opaque for p in self.parts)

    @property
    def has_unknown(self):
        return any(p.has_unknown for p in self.parts)

    def _range(self, span, which):
        los, his = zip(*(getattr(p, which)(span) for p in self.parts), strict=True)
        return _fold(tirx.max, los), _fold(tirx.min, his)

    def visible_range(self, span):
        return self._range(span, "visible_range")

    def full_range(self, span):
        return self._range(span, "full_range")

    def full(self, tile):
        return tirx.all(*(p.full(tile) for p in self.parts))

    def live(self, tile):
        return tirx.all(*(p.live(tile) for p in self.parts))


@dataclass(frozen=True)
class _Any:
    """One of several parts holds.

    Intervals that all begin with the first key, or all end with the last one, are one interval together: their union is
    ``is_joined`` if that is so of a row's keys and of a key's rows, as of a prefix and what is causal.
    """

    predicate: Expr
    parts: tuple

    @property
    def is_joined(self):
        return all(self.slopes(axis) in ({0}, {1}, {-1}, {0, 1}, {0, -1}) for axis in "ij")

    @property
    def has_gaps(self):
        return not self.is_joined

    @property
    def is_interval(self):
        return self.is_joined

    @property
    def narrows(self):
        """Each part begins with the first key and goes on to the last row, or sees everything or nothing."""
        return self.slopes("i") <= {0, 1} and self.slopes("j") <= {0, -1} and any(p.narrows for p in self.parts)

    def slopes(self, axis):
        return set().union(*(p.slopes(axis) for p in self.parts))

    @property
    def atoms(self):
        return tuple(a for p in self.parts for a in p.atoms)

    @property
    def is_opaque(self):
        return any(p.is_opaque for p in self.parts)

    @property
    def has_unknown(self):
        return any(p.has_unknown for p in self.parts)

    def visible_range(self, span):
        if self.is_joined:
            return self._joined_range(span, "visible_range")
        los, his = zip(*(p.visible_range(span) for p in self.parts), strict=True)
        return _fold(tirx.min, los), _fold(tirx.max, his)

    def full_range(self, span):
        if self.is_joined:
            return self._joined_range(span, "full_range")
        return _zero(span), _zero(span)  # a union of intervals is not an interval

    def _joined_range(self, span, which):
        los, his = zip(*(getattr(p, which)(span) for p in self.parts), strict=True)
        if 1 not in self.slopes("j" if span.of == ROWS else "i"):
            return _zero(span), _fold(tirx.max, his)
        # They end with the last one, but for those that are empty, whose beginning says nothing.
        begins = [tirx.Select(lo < hi, lo, span.others) for lo, hi in zip(los, his, strict=True)]
        return _fold(tirx.min, begins), span.others

    def full(self, tile):
        return tirx.any(*(p.full(tile) for p in self.parts))

    def live(self, tile):
        return tirx.any(*(p.live(tile) for p in self.parts))


@dataclass(frozen=True)
class _Opaque:
    """A predicate that isn't affine."""

    predicate: Expr
    tilewise: Tilewise
    is_interval = False
    is_opaque = True
    narrows = False

    def slopes(self, axis):
        return {-1, 1}

    @property
    def atoms(self):
        return tuple(self.tilewise.atoms)

    @property
    def has_unknown(self):
        return self.tilewise.has_unknown

    @property
    def has_gaps(self):
        return self.tilewise.may is not None and not self.atoms

    def visible_range(self, span):
        return _zero(span), span.others

    def full_range(self, span):
        return _zero(span), _zero(span)

    def full(self, tile):
        return self._known(tile, self.tilewise.must, False)

    def live(self, tile):
        return self._known(tile, self.tilewise.may, True)

    def _known(self, tile: Tile, expr: Expr | None, otherwise: bool) -> Expr:
        if expr is None or (self.atoms and tile.bounds is None):
            return _always(otherwise)
        pairs = [
            *zip(self.tilewise.rows, (tile.row_first, tile.row_last), strict=True),
            *zip(self.tilewise.columns, (tile.col_first, tile.col_last), strict=True),
        ]
        for atom in self.atoms:
            pairs += zip((atom.low, atom.high), tile.bounds(atom), strict=True)

        def replace(node):
            if isinstance(node, tirx.Var):
                return next((new for old, new in pairs if node.same_as(old)), node)
            return node

        return tvm_ffi.structural_map(tile.substitute(expr), replace, order="post")


def _fold(op, items):
    result = items[0]
    for item in items[1:]:
        result = op(result, item)
    return result


def decompose(predicate: Expr, index, tensors=()):
    """The mask as a tree of parts; ``index`` are the definition's variables b, h, i, j, and ``tensors`` the parameters
    that differ along some of these, with their axes."""
    varying = [v for v, axes in tensors if "i" in axes or "j" in axes]
    if isinstance(predicate, tirx.And):
        return _All(predicate, tuple(decompose(x, index, tensors) for x in (predicate.a, predicate.b)))
    if isinstance(predicate, tirx.Or):
        return _Any(predicate, tuple(decompose(x, index, tensors) for x in (predicate.a, predicate.b)))
    affine = None if _reads_position(predicate, index[2:], varying) else _comparison(predicate, index)
    return affine or _Opaque(predicate, Tilewise(predicate, index, tensors))


def _reads_position(predicate: Expr, positions, varying) -> bool:
    """Whether it has a parameter of a query or a key, or an element of a table that depends on one."""
    tensors, loads = [], []
    tvm_ffi.structural_walk(predicate, [(tirx.Var, tensors.append), (TensorLoad, loads.append)])
    read = []
    for load in loads:
        for x in load.indices:
            tvm_ffi.structural_walk(x, [(tirx.Var, read.append)])
    return any(x.same_as(v) for x in tensors for v in varying) or any(x.same_as(v) for x in read for v in positions)


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
