"""What a predicate may be in a tile of scores: interval arithmetic over expressions of positions and parameters.

:class:`Tilewise` asks of a predicate that isn't affine whether it *may* hold for some score of a tile, and whether it
holds for *every* one, given the least and the greatest query and key.  Sums, products, quotients and remainders, minima
and maxima of integers are followed; of anything else nothing is known, which is an answer too.

What is read of tensors and tables at a query alone, or at a key alone (ids of documents, numbers of a tree), is an
*atom*: an integer that has a least and a greatest value in each block of queries or keys.  A kernel that has these, by
a pass over each sequence, learns from ids that lie sorted which tiles see nothing; without them nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr
from tvm.ir.expr import TensorLoad

#: What a predicate is written with: the least and greatest query and key of a tile.
Bounds = tuple[Expr, Expr]

#: Nodes of an expression; a longer one would cost more than it saves.
_LONGEST = 400


@dataclass(frozen=True)
class Atom:
    """An integer or a predicate that depends on the query alone (``axis`` is ``"i"``) or on the key alone (``"j"``), in
    the definition's variables; ``low`` and ``high`` stand for its bounds."""

    expr: Expr
    axis: str
    by_batch: bool
    by_head: bool
    low: tirx.Var
    high: tirx.Var


class Tilewise:
    """What is known of ``predicate`` in a tile.

    ``index`` are the definition's variables b, h, i, j, and ``axes`` has the axes of the variables that are tensors.
    ``may`` and ``must`` are expressions of these variables, of ``rows`` and ``columns`` (first and last, inclusive) and
    of the bounds of ``atoms``; None where nothing is known.  ``has_unknown`` says that some part of the predicate tells
    nothing: each score has to be looked at.
    """

    def __init__(self, predicate: Expr, index: Sequence[tirx.Var], axes: Sequence[tuple[tirx.Var, str]]):
        self._index, self._axes = tuple(index), tuple(axes)
        self.rows, self.columns = (
            tuple(tirx.Var(f"{name}_{end}", x.ty.dtype) for end in ("first", "last"))
            for name, x in (("row", index[2]), ("column", index[3]))
        )
        self.atoms: list[Atom] = []
        self.has_unknown = False
        self.may, self.must = self._predicate(predicate)
        if any(x is not None and _count(x) > _LONGEST for x in (self.may, self.must)):
            self.may = self.must = None
            self.has_unknown = True
        used = [x for e in (self.may, self.must) if e is not None for x in _variables(e)]
        self.atoms = [a for a in self.atoms if any(x.same_as(a.low) or x.same_as(a.high) for x in used)]

    # ---- predicates: (may hold, must hold)

    def _predicate(self, e: Expr) -> tuple[Expr | None, Expr | None]:
        if isinstance(e, tirx.And):
            (may, must), (other_may, other_must) = self._predicate(e.a), self._predicate(e.b)
            return _either_known(may, other_may, tirx.And), _both_known(must, other_must, tirx.And)
        if isinstance(e, tirx.Or):
            (may, must), (other_may, other_must) = self._predicate(e.a), self._predicate(e.b)
            return _both_known(may, other_may, tirx.Or), _either_known(must, other_must, tirx.Or)
        if isinstance(e, tirx.Not):
            may, must = self._predicate(e.a)
            return _not(must), _not(may)
        if not self._varies(e):
            return e, e
        if type(e) in _COMPARISONS:
            a, b = self._integer(e.a), self._integer(e.b)
            if a is not None and b is not None:
                return _COMPARISONS[type(e)](a, b)
        atom = self._atom(e)
        if atom is None:
            self.has_unknown = True
            return None, None
        return atom.high != 0, atom.low != 0

    # ---- integers: (least, greatest)

    def _integer(self, e: Expr) -> Bounds | None:
        if not str(e.ty.dtype).startswith(("int", "uint")):
            return None
        if not self._varies(e):
            return e, e
        if any(e.same_as(x) for x in self._index[2:]):
            return self.rows if e.same_as(self._index[2]) else self.columns
        atom = self._atom(e)
        if atom is not None:
            return atom.low, atom.high
        if isinstance(e, tirx.Cast):
            inner = self._integer(e.value)
            return None if inner is None else tuple(tirx.Cast(e.ty.dtype, x) for x in inner)
        if isinstance(e, tirx.Select):
            return self._selected(e)
        if type(e) not in _ARITHMETIC:
            return None
        a, b = self._integer(e.a), self._integer(e.b)
        if a is None or b is None or (isinstance(e, (tirx.FloorDiv, tirx.FloorMod)) and self._varies(e.b)):
            return None
        return _ARITHMETIC[type(e)](a, b)

    def _selected(self, e: tirx.Select) -> Bounds | None:
        """Either of both; of an absolute value, which TIR writes so, more is known."""
        a, b = self._integer(e.true_value), self._integer(e.false_value)
        if a is None or b is None:
            return None
        low, high = tirx.min(a[0], b[0]), tirx.max(a[1], b[1])
        negated = isinstance(e.false_value, tirx.Sub) and tvm_ffi.structural_equal(e.false_value.b, e.true_value)
        if negated and isinstance(e.false_value.a, tirx.IntImm) and e.false_value.a.value == 0:
            low = tirx.max(tirx.max(a[0], b[0]), tirx.const(0, e.ty.dtype))
        return low, high

    # ---- atoms

    def _atom(self, e: Expr) -> Atom | None:
        """The atom that ``e`` is, if it reads a tensor or a table and depends on the query or on the key alone."""
        if str(e.ty.dtype).startswith("float") or not self._reads(e):
            return None
        axes = "".join(a for a in "ij" if self._depends(e, a))
        if len(axes) != 1:
            return None
        for atom in self.atoms:
            if tvm_ffi.structural_equal(atom.expr, e):
                return atom
        dtype = "int32" if str(e.ty.dtype) == "bool" else str(e.ty.dtype)
        low, high = (tirx.Var(f"atom{len(self.atoms)}_{end}", dtype) for end in ("low", "high"))
        self.atoms.append(Atom(e, axes, self._depends(e, "b"), self._depends(e, "h"), low, high))
        return self.atoms[-1]

    def _reads(self, e: Expr) -> bool:
        loads = []
        tvm_ffi.structural_walk(e, [(TensorLoad, loads.append)])
        return bool(loads) or any(x.same_as(v) for x in _variables(e) for v, _ in self._axes)

    def _depends(self, e: Expr, axis: str) -> bool:
        index = self._index["bhij".index(axis)]
        own = [v for v, axes in self._axes if axis in axes]
        return any(x.same_as(y) for x in _variables(e) for y in (index, *own))

    def _varies(self, e: Expr) -> bool:
        return self._depends(e, "i") or self._depends(e, "j")


def _either_known(a, b, join: Callable):
    return b if a is None else a if b is None else join(a, b)


def _both_known(a, b, join: Callable):
    return None if a is None or b is None else join(a, b)


def _not(e: Expr | None) -> Expr | None:
    return None if e is None else tirx.Not(e)


def _less(a: Bounds, b: Bounds):
    return a[0] < b[1], a[1] < b[0]


def _at_most(a: Bounds, b: Bounds):
    return a[0] <= b[1], a[1] <= b[0]


def _equal(a: Bounds, b: Bounds):
    return tirx.And(a[0] <= b[1], b[0] <= a[1]), tirx.And(a[1] <= b[0], b[1] <= a[0])


def _unequal(a: Bounds, b: Bounds):
    may, must = _equal(a, b)
    return tirx.Not(must), tirx.Not(may)


_COMPARISONS = {
    tirx.LT: _less,
    tirx.LE: _at_most,
    tirx.GT: lambda a, b: _less(b, a),
    tirx.GE: lambda a, b: _at_most(b, a),
    tirx.EQ: _equal,
    tirx.NE: _unequal,
}


def _product(a: Bounds, b: Bounds) -> Bounds:
    if b[0].same_as(b[1]) or a[0].same_as(a[1]):  # a number: two products, of which one is the least
        (low, high), factor = (a, b[0]) if b[0].same_as(b[1]) else (b, a[0])
        return tirx.min(low * factor, high * factor), tirx.max(low * factor, high * factor)
    corners = [x * y for x in a for y in b]
    return tirx.min(*_halves(corners, tirx.min)), tirx.max(*_halves(corners, tirx.max))


def _halves(corners: list[Expr], op: Callable) -> tuple[Expr, Expr]:
    return op(corners[0], corners[1]), op(corners[2], corners[3])


def _quotient(a: Bounds, b: Bounds) -> Bounds:
    low, high = (tirx.floordiv(x, b[0]) for x in a)
    return tirx.min(low, high), tirx.max(low, high)


def _remainder(a: Bounds, b: Bounds) -> Bounds:
    divisor = b[0]
    zero, one = (tirx.const(x, divisor.ty.dtype) for x in (0, 1))
    together = tirx.EQ(tirx.floordiv(a[0], divisor), tirx.floordiv(a[1], divisor))
    low = tirx.Select(together, tirx.floormod(a[0], divisor), tirx.min(zero, divisor + one))
    return low, tirx.Select(together, tirx.floormod(a[1], divisor), tirx.max(zero, divisor - one))


_ARITHMETIC = {
    tirx.Add: lambda a, b: (a[0] + b[0], a[1] + b[1]),
    tirx.Sub: lambda a, b: (a[0] - b[1], a[1] - b[0]),
    tirx.Mul: _product,
    tirx.FloorDiv: _quotient,
    tirx.FloorMod: _remainder,
    tirx.Min: lambda a, b: (tirx.min(a[0], b[0]), tirx.min(a[1], b[1])),
    tirx.Max: lambda a, b: (tirx.max(a[0], b[0]), tirx.max(a[1], b[1])),
}


def _variables(e: Expr) -> list[tirx.Var]:
    found = []
    tvm_ffi.structural_walk(e, [(tirx.Var, found.append)])
    return found


def _count(e: Expr) -> int:
    found = []
    tvm_ffi.structural_walk(e, [(Expr, lambda x: found.append(1))])
    return len(found)
