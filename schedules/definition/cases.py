"""The cases of a score: what is left of it once all that no query and no key changes is known.

A score may ask for a parameter, such as whether there is a soft cap.  Asked for every score, that costs a branch or
both answers; :class:`Cases` has the atomic conditions that are the same for all scores of a head, and the score under
each combination of their answers, so that a kernel may ask once and compute what is left without branches.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr


class Cases:
    """``conditions`` are those atomic ones of ``score`` that mention none of the variables ``varying``."""

    def __init__(self, score: Expr | None, varying: Sequence[tirx.Var]):
        self._score, self._varying = score, tuple(varying)
        self.conditions: list[Expr] = []
        if score is not None:
            tvm_ffi.structural_walk(score, [(tirx.Select, lambda e: self._collect(e.condition)), (Call, self._of_call)])

    def score(self, answers: Sequence[bool]) -> Expr:
        """The score if the conditions have these answers; a divisor that doesn't vary is inverted, once for all."""

        def replace(e):
            known = self._answer(e, answers)
            if known is not None:
                return _constant(known)
            if isinstance(e, tirx.Select) or _is_choice(e):
                condition, a, b = (e.condition, e.true_value, e.false_value) if isinstance(e, tirx.Select) else e.args
                return e if _truth(condition) is None else a if _truth(condition) else b
            if isinstance(e, tirx.And):
                return _joined(e, e.a, e.b, False)
            if isinstance(e, tirx.Or):
                return _joined(e, e.a, e.b, True)
            if isinstance(e, tirx.Not) and _truth(e.a) is not None:
                return _constant(not _truth(e.a))
            if isinstance(e, tirx.Div) and not self._varies(e.b):
                return e.a * (tirx.const(1.0, e.b.ty.dtype) / e.b)
            return e

        return tvm_ffi.structural_map(self._score, replace, order="post")

    def _collect(self, condition: Expr) -> None:
        if isinstance(condition, (tirx.And, tirx.Or)):
            self._collect(condition.a)
            self._collect(condition.b)
        elif isinstance(condition, tirx.Not):
            self._collect(condition.a)
        elif not self._varies(condition) and self._answer(condition, self.conditions) is None:
            self.conditions.append(condition)

    def _of_call(self, e: Call) -> None:
        if _is_choice(e):
            self._collect(e.args[0])

    def _answer(self, e: Expr, answers: Sequence):
        """What is known of a condition; None if nothing."""
        pairs = zip(self.conditions, answers, strict=False)
        return next((a for c, a in pairs if tvm_ffi.structural_equal(c, e)), None)

    def _varies(self, e: Expr) -> bool:
        found = []
        tvm_ffi.structural_walk(e, [(tirx.Var, found.append)])
        return any(x.same_as(v) for x in found for v in self._varying)


def _is_choice(e) -> bool:
    return isinstance(e, Call) and getattr(e.op, "name", "").endswith("if_then_else")


def _constant(answer: bool) -> Expr:
    return tirx.const(answer, "bool")


def _truth(e: Expr) -> bool | None:
    """The value of a constant condition."""
    return bool(e.value) if isinstance(e, tirx.IntImm) else None


def _joined(e: Expr, a: Expr, b: Expr, decides: bool) -> Expr:
    """``e``, a conjunction or a disjunction of ``a`` and ``b``, less what is known: ``decides`` is what settles it."""
    for one, other in ((a, b), (b, a)):
        if _truth(one) is not None:
            return _constant(decides) if _truth(one) == decides else other
    return e
