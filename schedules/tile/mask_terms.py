"""The mask of a fragment of scores, score by score, where it has divisions.

Those of the query alone, or of the key alone, are done once for a row or a column of the fragment, and all by a
multiplication where the divisor is the same for all scores.

A 2D neighbourhood asks of each score for the lines and the columns of its query and its key: four divisions of 32 bits
by a number of the call, some 25 instructions each.
"""

from __future__ import annotations

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.definition.terms import DIVISIONS, replaced
from schedules.tile.geometry import constant

#: The quotient's floor by a divisor whose reciprocal, rounded down, is computed once: for a number of 31 bits the
#: product with it is too small by less than 1/2, so that the quotient is right or too small by 1.  A negative quotient
#: is the complement of that of the complement.  ``x`` is above -2^31.
_FLOOR_DIVIDE = """
__forceinline__ __device__ int floor_divide(int x, int y) {
  unsigned size = y < 0 ? 0u - (unsigned)y : (unsigned)y;
  unsigned reciprocal = 0xFFFFFFFFu / size;
  int turned = y < 0 ? -x : x;
  int sign = turned >> 31;
  unsigned rest = (unsigned)(turned ^ sign);
  unsigned quotient = (unsigned)(((unsigned long long)rest * reciprocal) >> 32);
  quotient += rest - quotient * size >= size ? 1u : 0u;
  return (int)quotient ^ sign;
}
"""


def floor_divide(x: Expr, y: Expr) -> Expr:
    """The floor of ``x / y``, int32."""
    return T.cuda.func_call("floor_divide", x, y, source_code=_FLOOR_DIVIDE, return_type="int32")


_JOINED = """
__forceinline__ __device__ bool {name}(bool a, bool b) {{
  return a {operator} b;
}}
"""


def both(a: Expr, b: Expr) -> Expr:
    """Whether both conditions hold, which are both evaluated."""
    return _joined("both", "&", a, b)


def either(a: Expr, b: Expr) -> Expr:
    """Whether a condition holds, or the other one; both are evaluated."""
    return _joined("either", "|", a, b)


def _joined(name: str, operator: str, a: Expr, b: Expr) -> Expr:
    source = _JOINED.format(name=name, operator=operator)
    return T.cuda.func_call(name, a, b, source_code=source, return_type="bool")


@T.meta_class
class MaskTerms:
    """What a mask computes of the rows and the two columns of a fragment's group that a lane has.

    ``rows`` of the fragment are queries, or keys if it is ``transposed``.  If it ``branches``, conditions after one
    that doesn't hold are left out, as C does.
    """

    def __init__(self, pattern: Pattern, rows: int, transposed: bool, branches: bool):
        self.pattern, split = pattern, pattern.mask_split
        self.split = split
        of_rows = "j" if transposed else "i"
        self.of_rows = [t for t in split.terms if t.axis == of_rows]
        self.of_columns = [t for t in split.terms if t.axis != of_rows]
        rest = self._with_products(split.rest)
        self.asks_all = not branches and split.is_of_positions(split.rest)
        self.rest = rest if branches else self._without_branches(rest)
        self.in_rows = T.alloc_local([max(rows * len(self.of_rows), 1)], "int32")
        self.in_columns = T.alloc_local([max(2 * len(self.of_columns), 1)], "int32")

    @staticmethod
    def serves(pattern: Pattern) -> bool:
        """Whether the mask has divisions that are worth it."""
        split = pattern.mask_split
        return split is not None and (len(split.terms) > 0 or _has_division(split))

    def _with_products(self, expr: Expr) -> Expr:
        """``expr`` with divisions by what is the same for all scores as multiplications."""

        def replace(e):
            if not _by_parameter(self.split, e):
                return e
            quotient = floor_divide(e.a, e.b)
            return quotient if isinstance(e, tirx.FloorDiv) else e.a - quotient * e.b

        return tvm_ffi.structural_map(expr, replace, order="post")

    def _without_branches(self, expr: Expr) -> Expr:
        """``expr`` that evaluates both sides of what is joined, where neither reads memory: a warp's lanes would take
        a branch for each score (64 of them in a step of 64 scores a lane).

        On an H200, a 2D neighbourhood, 16 heads, 4 x 4k and 1 x 16k positions, head_dim 64, us: forward 575 to 372 and
        1022 to 659, dk and dv 467 to 439 and 818 to 778; dq, which lacks registers for it, 396 to 503 and 713 to 922.
        """

        def replace(e):
            if not isinstance(e, (tirx.And, tirx.Or)) or not self.split.is_of_positions(e):
                return e
            return both(e.a, e.b) if isinstance(e, tirx.And) else either(e.a, e.b)

        return tvm_ffi.structural_map(expr, replace, order="post")

    def set_row(self, at: Site, n, place) -> None:
        """Row ``n`` of the fragment is that of query and key ``place``."""
        self._set(self.in_rows, self.of_rows, at, n, place)

    def set_column(self, at: Site, e, place) -> None:
        """Column ``e`` of the group that is next is that of query and key ``place``."""
        self._set(self.in_columns, self.of_columns, at, e, place)

    def _set(self, buffer, terms, at, n, place):
        for k, value in enumerate(self.values(terms, at, place)):
            T.buffer_store(buffer, value, [n * len(terms) + k])

    def values(self, terms, at: Site, place) -> list[Expr]:
        """What terms are at query and key ``place``, int32."""
        found = [self.pattern.evaluated(self._with_products(term.expr), at, *place) for term in terms]
        return [x if str(x.ty.dtype) == "int32" else T.Cast("int32", x) for x in found]

    def sees(self, site: Site, n, e, place) -> Expr:
        """Whether the score of row ``n`` and column ``e`` is seen."""
        kept = (self.of_rows, self.in_rows, n), (self.of_columns, self.in_columns, e)
        values = [(t.value, x[at * len(terms) + k]) for terms, x, at in kept for k, t in enumerate(terms)]
        rest = replaced(self.pattern.evaluated(self.rest, site, *place), values)
        exists = place[1] < site.seqlen_kv
        return both(exists, rest) if self.asks_all else tirx.all(exists, rest)


def _by_parameter(split, e) -> bool:
    floors = isinstance(e, (tirx.FloorDiv, tirx.FloorMod)) and str(e.ty.dtype) == "int32"
    return floors and constant(e.b) is None and split.is_uniform(e.b)


def _has_division(split) -> bool:
    found = []
    for kind in DIVISIONS:
        tvm_ffi.structural_walk(split.rest, [(kind, found.append)])
    return any(_by_parameter(split, e) for e in found)
