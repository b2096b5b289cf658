"""What of a mask is the same for a whole row or a whole column of scores: quotients and remainders of the query alone,
or of the key alone, such as the line and the column of a picture, and what is computed of these.

A kernel evaluates these once for a row or a column, and the rest of the mask for each score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr
from tvm.ir.expr import TensorLoad

#: Operations that take many times longer than an addition.
DIVISIONS = (tirx.FloorDiv, tirx.FloorMod, tirx.Div, tirx.Mod)
#: What is made of them belongs to a term: TVM would take comparisons with it apart, for each score.
_FURTHER = (tirx.Min, tirx.Max)


@dataclass(frozen=True)
class Term:
    """An int32, or what can be one, that depends on the query alone (``axis`` is ``"i"``) or on the key alone
    (``"j"``), in the definition's variables, and the variable that stands for it in the rest of the mask."""

    expr: Expr
    axis: str
    value: tirx.Var


class Split:
    """A predicate as its ``terms`` and the ``rest``, in which variables stand for these.

    ``positions`` are the definition's variables i and j, ``varying`` its parameters that have values for queries or
    keys.  ``ids`` are further terms, by their expressions and axes, that read such or a table; predicates among them
    become 0 or 1.
    """

    def __init__(
        self,
        predicate: Expr,
        positions: Sequence[tirx.Var],
        varying: Sequence[Expr],
        ids: Sequence[tuple[Expr, str]] = (),
    ):
        self._positions, self._varying = tuple(positions), tuple(varying)
        of_ids = [Term(e, axis, tirx.Var(f"id{n}", "int32")) for n, (e, axis) in enumerate(ids)]
        found: list[Term] = list(of_ids)

        def replace(e):
            whole = replaced(e, [(t.value, t.expr) for t in found])
            for term in of_ids:
                if tvm_ffi.structural_equal(term.expr, whole):
                    return _as(str(whole.ty.dtype), term.value)
            is_term = isinstance(e, DIVISIONS) or (isinstance(e, _FURTHER) and _reads(e, found[len(of_ids) :]))
            axes = self._axes(whole) if is_term and str(e.ty.dtype) == "int32" else None
            if axes is None or len(axes) != 1:
                return e
            for term in found:
                if tvm_ffi.structural_equal(term.expr, whole):
                    return term.value
            found.append(Term(whole, axes, tirx.Var(f"term{len(found)}", "int32")))
            return found[-1].value

        self.rest = tvm_ffi.structural_map(predicate, replace, order="post")
        used = _variables(self.rest)
        self.terms = tuple(t for t in found if any(x.same_as(t.value) for x in used))

    def is_uniform(self, expr: Expr) -> bool:
        """Whether an expression is the same for all scores of a head."""
        return self._axes(expr) == ""

    def is_of_positions(self, expr: Expr) -> bool:
        """Whether an expression reads no tensor of queries or keys, and no table."""
        return self._axes(expr) is not None

    def _axes(self, expr: Expr) -> str | None:
        """Those that an expression depends on; None if it reads tensors of queries or keys, or a table."""
        loads, read = [], _variables(expr)
        tvm_ffi.structural_walk(expr, [(TensorLoad, loads.append)])
        if loads or any(x.same_as(y) for x in read for y in self._varying):
            return None
        return "".join(a for a, v in zip("ij", self._positions, strict=True) if any(x.same_as(v) for x in read))


def replaced(expr: Expr, values: Sequence[tuple[tirx.Var, Expr]]) -> Expr:
    """``expr`` with values in place of variables."""

    def replace(node):
        if not isinstance(node, tirx.Var):
            return node
        return next((new for old, new in values if node.same_as(old)), node)

    return tvm_ffi.structural_map(expr, replace, order="post") if values else expr


def _as(dtype: str, value: tirx.Var) -> Expr:
    """An int32 as what it stands for."""
    if dtype == "int32":
        return value
    return value != 0 if dtype == "bool" else tirx.Cast(dtype, value)


def _reads(expr: Expr, terms: Sequence[Term]) -> bool:
    """Whether an expression has something that stands for one of the terms."""
    return any(x.same_as(t.value) for x in _variables(expr) for t in terms)


def _variables(expr: Expr) -> list[tirx.Var]:
    found: list[tirx.Var] = []
    tvm_ffi.structural_walk(expr, [(tirx.Var, found.append)])
    return found
