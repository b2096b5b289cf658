"""Probabilities and their derivatives of a warpgroup's scores, of which the log-sum-exp is known.

A step has raw products ``s`` in registers, and needs of each the probability ``p = exp(score(s) - lse)`` and the factor
``f = p * dscore/ds``, with which ``ds = f * (dp - delta)``.  ``s`` is at hand only now, so that f takes its place.

A parameter that asks for its gradient has a factor of its own, ``p * dscore/dparameter``, and its gradient is the sum of
them times ``dp - delta``.

What a row is to be shifted by comes as ``-lse * log2(e)``, and −inf where it sees nothing or isn't there: then p is 0.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.tile.dtypes import element_type
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import constant, local
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY, ScoreTile


def shift_of(lse: Expr) -> Expr:
    """What is added to scores in powers of two before they are exponentiated."""
    return T.Select(lse == T.float32(NEGATIVE_INFINITY), lse, lse * T.float32(-LOG2_E))


def negative(x: Expr) -> Expr:
    """``-x``."""
    return T.float32(0) - x


@T.meta_class
class Weights(ScoreTile):
    """Scores of ``columns`` columns a step to factors, and if ``packed`` to packed probabilities too.

    The rows are queries and the columns keys, or if ``transposed`` the other way round.  ``learnt`` are the parameters
    whose gradients are summed beside; of a thread, their factors and sums are in ``parameter_factors`` and
    ``parameter_sums``.
    """

    def __init__(self, pattern: Pattern, at: Site, columns: int, transposed: bool, learnt: tuple[str, ...] = ()):
        ScoreTile.__init__(self, pattern, at, M16N8, 1, columns)
        self.transposed, self.learnt = transposed, learnt
        if learnt:
            self.parameter_factors = T.alloc_local([len(learnt) * self.stride], "float32")
            self.parameter_sums = T.alloc_local([len(learnt)], "float32")
        self.pack = element_type(pattern.dtype).pack
        self.scale = local(self.signed_scale())

    def position(self, row0, column0, t, g, r, e):
        """Query and key of a register; ``row0`` is this lane's first query, ``column0`` its first key."""
        if not self.transposed:
            return ScoreTile.position(self, row0, column0, t, g, r, e)
        f = self.fragment
        return row0 + (g * f.group + e), column0 + r * f.row_step

    def _bounds(self, row0, column0, r):
        """Of the fragment's row ``r``: the first column that is seen, and both ends, counted from this lane's first."""
        i, j = self.position(row0, column0, 0, 0, r, 0)
        if self.transposed:
            lo, hi = self.pattern.rows_of(self.at, j, j).visible
            return lo, lo - row0, hi - row0
        lo, hi = self.pattern.keys_of(self.at, i, i).visible
        return lo, lo - column0, hi - column0

    @T.inline
    def weigh(self, S, P, shift, row0, column0, masked):
        """Raw products ``S`` to factors; ``P``, if it isn't None, takes the packed probabilities.

        ``shift(g, r, e)`` is the shift of a register's query.
        """
        if self.pattern.has_choice:
            # asked once, not for every score
            if self.pattern.choice(self.at):
                self._weigh(S, P, shift, row0, column0, masked, True)
            else:
                self._weigh(S, P, shift, row0, column0, masked, False)
        else:
            self._weigh(S, P, shift, row0, column0, masked, None)

    @T.inline
    def _weigh(self, S, P, shift, row0, column0, masked, chosen):
        begin = T.alloc_local([2], "int32")
        end = T.alloc_local([2], "int32")
        p = T.alloc_local([2], "float32")
        by_interval = T.meta_var(masked and self.pattern.is_interval)
        from_zero = T.meta_var(by_interval and constant(self._bounds(row0, column0, 0)[0]) == 0)
        if by_interval:
            for r in T.unroll(2):
                bounds = T.meta_var(self._bounds(row0, column0, r))
                begin[r] = bounds[1]
                end[r] = bounds[2]
        for g in T.unroll(self.groups):
            for r in T.unroll(2):
                for e in T.unroll(2):
                    x = T.meta_var(g * 4 + r * 2 + e)
                    at = T.meta_var(self.position(row0, column0, 0, g, r, e))
                    column = T.meta_var(g * self.fragment.group + e)
                    seen = T.meta_var(
                        self._within(column, None if from_zero else begin[r], end[r])
                        if by_interval
                        else self.pattern.mask(self.at, *at)
                        if masked
                        else None
                    )
                    p[e] = T.exp2(self._exponent(S[x], at, chosen, seen) + shift(g, r, e))
                    self._weigh_parameters(p[e], S[x], x, at, chosen)
                    S[x] = self._factor(p[e], S[x], at, chosen, masked)
                if P is not None:
                    T.ptx[self.pack](P[g * 2 + r], p[1], p[0])

    def _within(self, column, begin, end):
        return column < end if begin is None else T.And(column < end, column >= begin)

    def _exponent(self, s, at, chosen, seen):
        value = s * self.scale if self.folded else self.modified(s, *at, chosen)
        return value if seen is None else T.Select(seen, value, T.float32(NEGATIVE_INFINITY))

    def _factor(self, p, s, at, chosen, masked):
        slope = self.slope(s, *at, chosen)
        if slope is None:
            return p
        # where a key has no weight, its derivative may be anything
        return T.Select(p == T.float32(0), T.float32(0), p * slope) if masked else p * slope

    def _weigh_parameters(self, p, s, x, at, chosen):
        """The factors of register ``x`` for the parameters whose derivative isn't 0."""
        for n, name in enumerate(self.learnt):
            slope = self.parameter_slope(name, s, *at, chosen)
            if slope is not None:
                factor = T.Select(p == T.float32(0), T.float32(0), p * slope)
                T.buffer_store(self.parameter_factors, factor, [n * self.stride + x])

    @T.inline
    def start_parameters(self):
        """Before the first step."""
        if len(self.learnt) > 0:
            for n in T.unroll(len(self.learnt)):
                self.parameter_sums[n] = T.float32(0)

    @T.inline
    def add_parameters(self, E):
        """A step's share of the gradients of parameters; ``E`` is ``dp - delta``, anything where there is no weight."""
        if len(self.learnt) > 0:  # noqa: SIM102, decided when the kernel is made
            if self.pattern.has_choice:
                if self.pattern.choice(self.at):
                    self._add_parameters(E, True)
                else:
                    self._add_parameters(E, False)
            else:
                self._add_parameters(E, None)

    def _add_parameters(self, E, chosen):
        zero = T.float32(0)
        for n, name in enumerate(self.learnt):
            if self.parameter_slope(name, zero, T.int32(0), T.int32(0), chosen) is None:
                continue
            # a step by itself first, so that many steps lose nothing of it
            total = local(zero)
            with T.unroll(self.stride) as x:
                factor = self.parameter_factors[n * self.stride + x]
                share = T.Select(factor == zero, zero, factor * E[x])
                T.buffer_store(total.source, total + share, [0])
            T.buffer_store(self.parameter_sums, self.parameter_sums[n] + total, [n])

    @T.inline
    def gradients(self, F, E, P, masked):
        """Gradients of scaled products, the factors ``F`` times ``E``, packed to ``P``.

        What hidden values have left in ``E`` may be anything.
        """
        for g in T.unroll(self.groups):
            for r in T.unroll(2):
                for e in T.unroll(2):
                    x = T.meta_var(g * 4 + r * 2 + e)
                    product = T.meta_var(F[x] * E[x])
                    E[x] = T.Select(F[x] == T.float32(0), T.float32(0), product) if masked else product
                T.ptx[self.pack](P[g * 2 + r], E[g * 4 + r * 2 + 1], E[g * 4 + r * 2])
