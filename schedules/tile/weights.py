"""Probabilities and their derivatives of scores whose log-sum-exp is known: what every GPU's backward makes of them.

A step has raw products ``s`` in registers, and needs of each the probability ``p = exp(score(s) - lse)`` and the factor
``f = p * dscore/ds``, with which ``ds = f * (dp - delta)``.  ``s`` is at hand only now, so that f takes its place.

What a row is to be shifted by comes as ``-lse * log2(e)``, and −inf where it sees nothing or isn't there: then p is 0.
"""

from __future__ import annotations

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.tile.dtypes import element_type
from schedules.tile.fragment import M16N8, Fragment
from schedules.tile.geometry import Geometry, constant, local
from schedules.tile.place_gradients import PlaceGradients
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY, ScoreTile
from schedules.tile.table_gradients import TableGradients
from tvm_flash.packs.manifest import Param


def shift_of(lse: Expr) -> Expr:
    """What is added to scores in powers of two before they are exponentiated."""
    return T.Select(lse == T.float32(NEGATIVE_INFINITY), lse, lse * T.float32(-LOG2_E))


def shift_of_row(pattern: Pattern, at: Site, lse: Expr, row: Expr) -> Expr:
    """The same of a query, whose log-sum-exp may be that of a sink alone: then it sees nothing either."""
    if not pattern.has_sink or pattern.is_unmasked or not pattern.is_interval:
        return shift_of(lse)
    begin, end = pattern.keys_of(at, row, row).visible
    return T.Select(begin < end, shift_of(lse), T.float32(NEGATIVE_INFINITY))


def sink_share(pattern: Pattern, geometry: Geometry, at: Site, lse: Expr, delta: Expr) -> Expr:
    """A row's share in the gradient of its sink: that of a score whose value is 0."""
    sink = geometry.sink(pattern, at)
    has_weight = T.And(sink > T.float32(NEGATIVE_INFINITY), lse > T.float32(NEGATIVE_INFINITY))
    return T.Select(has_weight, T.exp2((sink - lse) * T.float32(LOG2_E)) * negative(delta), T.float32(0))


def summed(pattern: Pattern) -> tuple[Param, ...]:
    """The parameters whose gradients are summed over everything of a head: those whose sums a launch leaves."""
    return tuple(p for p in pattern.params if p.gradient and p.is_summed)


def asks_for_whole(pattern: Pattern) -> bool:
    """Whether any of these is a number, whose gradient is one for all heads and batch entries."""
    return any(not p.axes for p in summed(pattern))


def negative(x: Expr) -> Expr:
    """``-x``."""
    return T.float32(0) - x


def packing(dtype: str):
    """``pack(to, i, low, high)``: two float32, rounded, as one register; it needs sm_80."""
    instruction = element_type(dtype).pack

    @T.inline
    def pack(to, i, low, high):
        T.ptx[instruction](to[i], high, low)

    return pack


def _with_steps_apart(expr: Expr, place) -> Expr:
    """``expr``, where it makes a float of a whole number that grows evenly along the loops whose counts ``place`` has,
    with that number where they begin plus the growth, which is known when the loops are unrolled.

    Of all registers of a step one conversion is left.  The number is exact up to 2^24.
    """
    counts: list[tirx.Var] = []
    for x in place:
        tvm_ffi.structural_walk(x, [(tirx.Var, counts.append)])

    def replace(e):
        if not isinstance(e, tirx.Cast) or not str(e.value.ty.dtype).startswith("int"):
            return e
        terms = sym.detect_linear_equation(e.value, counts)
        if not terms:
            return e
        *factors, first = terms
        growth = sum((x * f for x, f in zip(counts, factors, strict=True)), tirx.IntImm("int32", 0))
        return tirx.Cast(e.ty.dtype, first) + tirx.Cast(e.ty.dtype, growth)

    return tvm_ffi.structural_map(expr, replace, order="post")


@T.meta_class
class Weights(ScoreTile):
    """Scores of ``columns`` columns a step to factors, and if they are wanted to packed probabilities too.

    The rows are queries and the columns keys, or if ``transposed`` the other way round.  ``pack`` is as
    :func:`packing` makes it, the other arguments are those of :class:`ScoreTile`.  If ``descending``, scores are
    weighed from the last column to the first, for which ptxas may need fewer registers.  If ``asks_once``, each case of
    the score has a branch of its own, in which nothing is asked; else only the two of a choice.  There no element has
    a branch either: ptxas makes one of a selection that would save an exponential.  ``places`` takes the gradients of
    parameters that have values for queries or keys, ``tables`` those of tables.
    """

    rows_follow = True

    def __init__(
        self,
        pattern: Pattern,
        at: Site,
        columns: int,
        transposed: bool,
        *,
        fragment: Fragment = M16N8,
        m_tiles: int = 1,
        tile_step: int = 0,
        pack=None,
        descending: bool = False,
        asks_once: bool = False,
        places: PlaceGradients | None = None,
        tables: TableGradients | None = None,
    ):
        self.transposed, self.descending = transposed, descending
        self.branches = not transposed  # the other way round there are too few registers for all conditions
        ScoreTile.__init__(self, pattern, at, fragment, m_tiles, columns, tile_step)
        self.asks_once = asks_once and not self.folded
        self.places, self.tables = places, tables
        self.groups_of_slice = tables.slices.width // fragment.group if tables is not None else 0
        self.pack = pack or packing(pattern.dtype)
        self.scale = local(self.signed_scale())

    def position(self, row0, column0, t, g, r, e):
        """Query and key of a register; ``row0`` is this lane's first query, ``column0`` its first key."""
        if not self.transposed:
            return ScoreTile.position(self, row0, column0, t, g, r, e)
        f = self.fragment
        return row0 + (g * f.group + e), column0 + (t * self.tile_step + r * f.row_step)

    def _bounds(self, row0, column0, t, r):
        """Of a row of the fragment: the first column that is seen, and both ends, counted from this lane's first."""
        i, j = self.position(row0, column0, t, 0, r, 0)
        if self.transposed:
            lo, hi = self.pattern.rows_of(self.at, j, j).visible
            return lo, lo - row0, hi - row0
        lo, hi = self.pattern.keys_of(self.at, i, i).visible
        return lo, lo - column0, hi - column0

    @T.inline
    def weigh(self, S, P, shift, row0, column0, masked):
        """Raw products ``S`` to factors; ``P``, if it isn't None, takes the packed probabilities.

        ``shift(t, g, r, e)`` is the shift of a register's query.
        """
        at = T.meta_var(self.kept(row0, column0))
        self.by_tiles(*at, lambda: self._weigh_by_case(S, P, shift, *at, masked))

    @T.inline
    def _weigh_by_case(self, S, P, shift, row0, column0, masked):
        if self.asks_once:
            self._in_each_case(lambda known: self._weigh(S, P, shift, row0, column0, masked, known))
        elif self.pattern.has_choice:
            # asked once, not for every score
            if self.pattern.choice(self.at):
                self._weigh(S, P, shift, row0, column0, masked, True)
            else:
                self._weigh(S, P, shift, row0, column0, masked, False)
        else:
            self._weigh(S, P, shift, row0, column0, masked, None)

    @T.inline
    def turn(self, S, E, P, G, shift, row0, column0, masked, sums=None):
        """A step at once: raw products ``S`` and the gradients of probabilities less delta, ``E``, are both there.

        ``P``, if it isn't None, takes the packed probabilities, ``G`` the packed gradients of scaled products, and
        ``sums`` has those of the parameters that ask for one, to be added to.
        """
        at = T.meta_var(self.kept(row0, column0))
        self.by_tiles(*at, lambda: self._turn_by_case(S, E, P, G, shift, *at, masked, sums))

    @T.inline
    def _turn_by_case(self, S, E, P, G, shift, row0, column0, masked, sums):
        if self.asks_once:
            self._in_each_case(lambda known: self._turn(S, E, P, G, shift, row0, column0, masked, known, sums))
        elif self.pattern.has_choice:
            if self.pattern.choice(self.at):
                self._turn(S, E, P, G, shift, row0, column0, masked, True, sums)
            else:
                self._turn(S, E, P, G, shift, row0, column0, masked, False, sums)
        else:
            self._turn(S, E, P, G, shift, row0, column0, masked, None, sums)

    def _in_each_case(self, compute, known: tuple[bool, ...] = ()):
        """``compute(answers)`` in a branch of each case."""
        if len(known) == self.pattern.conditions:
            compute(known)
            return
        with T.If(self.pattern.condition(self.at, len(known))):
            with T.Then():
                self._in_each_case(compute, (*known, True))
            with T.Else():
                self._in_each_case(compute, (*known, False))

    @T.inline
    def _weigh(self, S, P, shift, row0, column0, masked, chosen):
        begin = T.alloc_local([2 * self.m_tiles], "int32")
        end = T.alloc_local([2 * self.m_tiles], "int32")
        p = T.alloc_local([2], "float32")
        by_interval = T.meta_var(masked and self.pattern.is_interval)
        from_zero = T.meta_var(by_interval and self._begins_at_zero(row0, column0))
        if by_interval:
            self._set_bounds(begin, end, row0, column0)
        if masked and not by_interval:
            self.begin_mask(row0, column0)
        for t in T.unroll(self.m_tiles):
            self.begin_diagonals(row0, column0, t, self.descending)
            for n in T.unroll(self.groups):
                g = T.meta_var(self.groups - 1 - n if self.descending else n)
                self.follow_diagonals(row0, column0, t, g, self.descending)
                if masked and not by_interval:
                    self.begin_columns(row0, column0, t, g)
                for r in T.unroll(2):
                    self.look_at_pair(t, g, r)
                    for e in T.unroll(2):
                        self.look_at(t, g, r, e)
                        x = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        at = T.meta_var(self.position(row0, column0, t, g, r, e))
                        interval = T.meta_var((None if from_zero else begin[t * 2 + r], end[t * 2 + r]))
                        seen = T.meta_var(self._seen(at, (t, g, r, e), interval, masked))
                        p[e] = self._weight(S[x], at, (t, g, r, e), chosen, seen, shift)
                        S[x] = self._factor(p[e], S[x], at, (t, g, r, e), chosen, masked)
                    if P is not None:
                        self.pack(P, t * (self.stride // 2) + g * 2 + r, p[0], p[1])

    @T.inline
    def _turn(self, S, E, P, G, shift, row0, column0, masked, chosen, sums):
        begin = T.alloc_local([2 * self.m_tiles], "int32")
        end = T.alloc_local([2 * self.m_tiles], "int32")
        p = T.alloc_local([2], "float32")
        by_interval = T.meta_var(masked and self.pattern.is_interval)
        from_zero = T.meta_var(by_interval and self._begins_at_zero(row0, column0))
        if by_interval:
            self._set_bounds(begin, end, row0, column0)
        if masked and not by_interval:
            self.begin_mask(row0, column0)
        for t in T.unroll(self.m_tiles):
            self.begin_diagonals(row0, column0, t)
            for g in T.unroll(self.groups):
                self.follow_diagonals(row0, column0, t, g)
                if masked and not by_interval:
                    self.begin_columns(row0, column0, t, g)
                for r in T.unroll(2):
                    self.look_at_pair(t, g, r)
                    for e in T.unroll(2):
                        self.look_at(t, g, r, e)
                        x = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        at = T.meta_var(self.position(row0, column0, t, g, r, e))
                        interval = T.meta_var((None if from_zero else begin[t * 2 + r], end[t * 2 + r]))
                        seen = T.meta_var(self._seen(at, (t, g, r, e), interval, masked))
                        p[e] = self._weight(S[x], at, (t, g, r, e), chosen, seen, shift)
                        E[x] = self._if_weight(p[e], p[e] * E[x], masked)
                        self._add_to_parameters(sums, p[e], E[x], S[x], at, (t, g, r, e), chosen, masked)
                        if self.tables is None:
                            E[x] = self._if_weight(
                                p[e], self._times_slope(E[x], S[x], at, (t, g, r, e), chosen), masked
                            )
                    i = T.meta_var(t * self.stride + g * 4 + r * 2)
                    word = T.meta_var(t * (self.stride // 2) + g * 2 + r)
                    if P is not None:
                        self.pack(P, word, p[0], p[1])
                    if self.tables is None:
                        self.pack(G, word, E[i], E[i + 1])
        if self.tables is not None:
            self._turn_with_tables(S, E, G, row0, column0, masked, chosen)

    @T.inline
    def _turn_with_tables(self, S, E, G, row0, column0, masked, chosen):
        """Add the gradients of scores, ``E``, to those of tables, then finish the step."""
        if self.tables.wanted:
            for t in T.unroll(self.m_tiles):
                for c in T.unroll(self.groups // self.groups_of_slice):
                    T.evaluate(self._add_to_tables(S, E, row0, column0, t, c, masked, chosen))
        for t in T.unroll(self.m_tiles):
            for g in T.unroll(self.groups):
                for r in T.unroll(2):
                    self.look_at_pair(t, g, r)
                    for e in T.unroll(2):
                        self.look_at(t, g, r, e)
                        x = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        at = T.meta_var(self.position(row0, column0, t, g, r, e))
                        E[x] = self._if_weight(E[x], self._times_slope(E[x], S[x], at, (t, g, r, e), chosen), masked)
                    i = T.meta_var(t * self.stride + g * 4 + r * 2)
                    self.pack(G, t * (self.stride // 2) + g * 2 + r, E[i], E[i + 1])

    def _add_to_tables(self, S, E, row0, column0, t, c, masked, chosen) -> int:
        """The same of m-tile ``t`` and slice ``c``, what a text may call."""
        tables = self.tables
        first = self.position(row0, column0, t, c * self.groups_of_slice, 0, 0)
        first = first[0] - self.fragment.row(tables.lane), first[1] - self.fragment.column(tables.lane)
        for param in tables.params:
            for number in range(self.pattern.elements_read(param.name, chosen)):
                T.evaluate(T.cuda.warp_sync())
                with T.unroll(self.groups_of_slice) as n, T.unroll(2) as r:
                    g = c * self.groups_of_slice + n
                    self.look_at_pair(t, g, r)
                    pair = T.alloc_local([2], "float32")
                    for e in range(2):
                        self.look_at(t, g, r, e)
                        x, at = t * self.stride + g * 4 + r * 2 + e, self.position(row0, column0, t, g, r, e)
                        _, slope = self.table_slopes(param.name, S[x], *at, chosen)[number]
                        slope = _with_steps_apart(slope, (t, g, r, e)) if self.asks_once else slope
                        T.buffer_store(pair, self._if_weight(E[x], E[x] * slope, masked), [e])
                    tables.put(n, r, pair)
                T.evaluate(T.cuda.warp_sync())
                tables.add(param, number, *first, chosen)
        return 0

    def _if_weight(self, p, value, masked):
        """``value``, or 0 where a key has no weight, whatever stands beside it."""
        return T.Select(p == T.float32(0), T.float32(0), value) if masked else value

    def _slope(self, s, at, place, chosen):
        slope = self.slope(s, *at, chosen)
        return slope if slope is None or not self.asks_once else _with_steps_apart(slope, place)

    def _times_slope(self, value, s, at, place, chosen):
        slope = self._slope(s, at, place, chosen)
        return value if slope is None else value * slope

    def _add_to_parameters(self, sums, p, value, s, at, place, chosen, masked):
        """Add ``value``, the gradient of a score, times its derivatives to the sums of parameters."""
        for n, param in enumerate(summed(self.pattern) if sums is not None else ()):
            slope = None if self.pattern.is_of_sink(param) else self.parameter_slope(param.name, s, *at, chosen)
            if slope is not None:
                slope = _with_steps_apart(slope, place) if self.asks_once else slope
                T.buffer_store(sums, sums[n] + self._if_weight(p, value * slope, masked), [n])
        for param in self.places.params if self.places is not None else ():
            slope = self.parameter_slope(param.name, s, *at, chosen)
            self.places.add(
                param,
                T.float32(0) if slope is None else self._if_weight(p, value * slope, masked),
                at,
                place,
            )

    @T.inline
    def _set_bounds(self, begin, end, row0, column0):
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                bounds = T.meta_var(self._bounds(row0, column0, t, r))
                begin[t * 2 + r] = bounds[1]
                end[t * 2 + r] = bounds[2]

    def _begins_at_zero(self, row0, column0) -> bool:
        return constant(self._bounds(row0, column0, 0, 0)[0]) == 0

    def _seen(self, at, place, interval, masked):
        """Whether the mask shows a register; None if nothing hides it."""
        if not masked:
            return None
        t, g, r, e = place
        if not self.pattern.is_interval:
            return self.sees(at, t, r, e)
        (begin, end), column = interval, g * self.fragment.group + e
        return column < end if begin is None else T.And(column < end, column >= begin)

    def _weight(self, s, at, place, chosen, seen, shift):
        """The probability of the register at ``place``, the counts of its loops."""
        value = s * self.scale if self.folded else self.modified(s, *at, chosen)
        if not self.asks_once:
            value = value if seen is None else T.Select(seen, value, T.float32(NEGATIVE_INFINITY))
            return T.exp2(value + shift(*place))
        p = T.exp2(_with_steps_apart(value, place) + shift(*place))
        if seen is None:
            return p
        bits = T.Select(seen, T.uint32(0xFFFFFFFF), T.uint32(0))
        return T.reinterpret("float32", T.bitwise_and(T.reinterpret("uint32", p), bits))

    def _factor(self, p, s, at, place, chosen, masked):
        slope = self._slope(s, at, place, chosen)
        if slope is None:
            return p
        # where a key has no weight, its derivative may be anything
        return T.Select(p == T.float32(0), T.float32(0), p * slope) if masked else p * slope

    @T.inline
    def gradients(self, F, E, P, masked):
        """Gradients of scaled products, the factors ``F`` times ``E``, packed to ``P``.

        What hidden values have left in ``E`` may be anything.
        """
        for t in T.unroll(self.m_tiles):
            for g in T.unroll(self.groups):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        x = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        product = T.meta_var(F[x] * E[x])
                        E[x] = T.Select(F[x] == T.float32(0), T.float32(0), product) if masked else product
                    i = T.meta_var(t * self.stride + g * 4 + r * 2)
                    self.pack(P, t * (self.stride // 2) + g * 2 + r, E[i], E[i + 1])
