"""Scores and masks on accumulator fragments: once for every GPU, and whatever is made of the scores afterwards.

The pattern says what the score and the mask are; a :class:`ScoreTile` says where each register of a fragment stands,
and applies them to all of it.  Everything that is exponential later is in powers of two: where the definition only
scales the score, a fragment keeps raw products and ``signed_scale`` brings them to powers of two, in the multiplication
that is there anyway; otherwise it holds scores times log2(e), and the scale is 1.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.tile.diagonals import Diagonals
from schedules.tile.element_pairs import ElementPairs
from schedules.tile.fragment import Fragment
from schedules.tile.functions import accurate
from schedules.tile.geometry import constant, local
from schedules.tile.mask_terms import MaskTerms
from schedules.tile.parameters import Elements

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
NEGATIVE_INFINITY = -math.inf


@T.meta_class
class ScoreTile:
    """The scores of the rows that one lane shares in: ``2 * m_tiles`` rows of ``columns`` columns.

    Rows are queries and columns keys, unless it is ``transposed``.

    All can begin with m-tile ``first``, if those before it see nothing.  ``tile_step``: rows from one m-tile of a warp
    to the next.
    """

    transposed = False
    #: Whether the conditions of a mask are asked one after another, and no longer than they hold.
    branches = False
    #: Whether elements of tensors are read here, in pairs where they lie so.
    reads = True
    #: Whether a row that is some rows below another is as many queries after it.
    rows_follow = False
    #: Rows of this lane in an m-tile that are looked at: one where the others are known not to exist.
    lane_rows = 2

    def __init__(self, pattern: Pattern, at: Site, fragment: Fragment, m_tiles: int, columns: int, tile_step: int = 0):
        self.pattern, self.at, self.fragment = pattern, at, fragment
        self.m_tiles, self.groups = m_tiles, columns // fragment.group
        self.tile_step = tile_step or fragment.tile_rows
        self.stride = fragment.registers(columns)
        self.folded = pattern.is_scale_only
        reads = self.reads and any(isinstance(x, Elements) for x in at.params.values())
        self.pairs = ElementPairs(at, 2 * m_tiles, self.transposed) if reads else None
        self.in_pairs = None
        served = MaskTerms.serves(pattern)
        self.terms = MaskTerms(pattern, 2 * m_tiles, self.transposed, self.branches) if served else None
        along = self.rows_follow and Diagonals.serves(pattern, fragment)
        self.diagonals = Diagonals() if along else None

    def position(self, row0: Expr, column0: Expr, t, g, r, e) -> tuple[Expr, Expr]:
        """Row and column of a register, from those of this lane's first one."""
        f = self.fragment
        return row0 + (t * self.tile_step + r * f.row_step), column0 + f.score_column(g, e)

    def kept(self, row0: Expr, column0: Expr) -> tuple[Expr, Expr]:
        """Row and column of this lane's first register, in registers of their own where a table is looked up by them.

        Else the expressions that they are stand in that of each score, and TVM and nvcc simplify all of it each time.
        """
        if not any(p.rank for p in self.pattern.params):
            return row0, column0
        return local(row0), local(column0)

    # ------------------------------------------------------------ elements of tensors

    @property
    def here(self) -> Site:
        """The site of the register that is looked at: where tensors are read in pairs, with what was read."""
        return self.at if self.in_pairs is None else self.pairs.site(self.at, *self.in_pairs)

    def by_tiles(self, row0: Expr, column0: Expr, compute) -> None:
        """``compute()``, in whose loops :meth:`look_at_pair` and :meth:`look_at` are called: in a text of its own
        where the elements of tensors can be read in pairs."""
        if self.pairs is None:
            compute()
            return
        last = self.position(row0, column0, 0, self.groups - 1, 0, 1)[0 if self.transposed else 1]
        with T.If(self.pairs.covers(self.at, last)):
            with T.Then():
                for n in range(2 * self.m_tiles):
                    self.pairs.begin_row(n, *self.position(row0, column0, n // 2, 0, n % 2, 0))
                self.in_pairs = (0, 0, 0)
                compute()
                self.in_pairs = None
            with T.Else():
                compute()

    def look_at_pair(self, t, g, r) -> None:
        """The registers of two columns are next."""
        if self.in_pairs is not None:
            self.pairs.fetch(t * 2 + r, g * self.fragment.group)

    def look_at(self, t, g, r, e) -> None:
        """A register is next."""
        self.register = (g, r, e)
        if self.in_pairs is not None:
            self.in_pairs = (t * 2 + r, g * self.fragment.group, e)

    # ------------------------------------------------------------ the mask

    @T.inline
    def begin_mask(self, row0, column0, first=0):
        """Before the mask of a step is asked for."""
        if self.terms is not None:
            for t in T.unroll(first, self.m_tiles):
                for r in T.unroll(self.lane_rows):
                    self.terms.set_row(self.at, t * 2 + r, self.position(row0, column0, t, 0, r, 0))

    @T.inline
    def begin_columns(self, row0, column0, t, g):
        """The registers of two columns are next, of both rows."""
        if self.terms is not None:
            for e in T.unroll(2):
                self.terms.set_column(self.at, e, self.position(row0, column0, t, g, 0, e))

    def sees(self, at, t, r, e) -> Expr:
        """Whether the mask shows the score of query and key ``at``, in row ``r`` and column ``e`` of the group."""
        if self.terms is None:
            return self.pattern.mask(self.here, *at)
        return self.terms.sees(self.here, t * 2 + r, e, at)

    # ------------------------------------------------------------ what is added along diagonals

    def begin_diagonals(self, row0, column0, t, descending=False) -> None:
        """The registers of an m-tile are next, group by group."""
        if self.diagonals is not None:
            self.diagonals.begin(self.groups, self._added_at(row0, column0, t), descending)

    def follow_diagonals(self, row0, column0, t, g, descending=False) -> None:
        """Of these a group is next."""
        if self.diagonals is not None:
            self.diagonals.follow(g, self._added_at(row0, column0, t), descending)

    def _added_at(self, row0, column0, t):
        def added(g, r, e):
            return accurate(self.pattern.added(self.at, *self.position(row0, column0, t, g, r, e)))

        return added

    # ------------------------------------------------------------ one score

    def modified(self, s: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr:
        """The modified score in powers of two; ``chosen`` as in :meth:`Pattern.score`."""
        if self.diagonals is not None:
            return (s * self.at.softmax_scale + self.diagonals.of(*self.register)) * T.float32(LOG2_E)
        return accurate(self.pattern.score(self.here, s, i, j, chosen)) * T.float32(LOG2_E)

    def slope(self, s: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr | None:
        """The derivative of the score with respect to the scaled product, of the raw one ``s``; None for 1."""
        value = self.pattern.score_gradient(self.here, s, i, j, chosen)
        return None if isinstance(value, tirx.FloatImm) and value.value == 1 else accurate(value)

    def parameter_slope(self, name: str, s: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr | None:
        """The derivative of the score with respect to a parameter, of the raw product ``s``; None for 0."""
        value = self.pattern.parameter_gradient(name, self.here, s, i, j, chosen)
        return None if isinstance(value, tirx.FloatImm) and value.value == 0 else accurate(value)

    def table_slopes(
        self, name: str, s: Expr, i: Expr, j: Expr, chosen: bool | None = None
    ) -> list[tuple[tuple[Expr, ...], Expr]]:
        """The elements of a table that the score reads, by their indices, each with the derivative of the score with
        respect to it, of the raw product ``s``."""
        found = self.pattern.table_gradients(name, self.here, s, i, j, chosen)
        return [(index, accurate(slope)) for index, slope in found]

    def signed_scale(self) -> Expr:
        """From raw products (or modified scores, which are in powers of two already) to powers of two."""
        return self.at.softmax_scale * T.float32(LOG2_E) if self.folded else T.float32(1)

    @T.inline
    def scores(self, S, row0, column0, masked, first=0):
        """Raw products to scores that ``scale``, which is positive, brings to powers of two; −inf where hidden."""
        if self.folded:  # noqa: SIM102, decided when the kernel is made
            if self.at.softmax_scale < T.float32(0):
                for i in T.unroll(first * self.stride, self.m_tiles * self.stride):
                    S[i] = T.float32(0) - S[i]
        self.modify(S, row0, column0, masked, first)

    @T.inline
    def modify(self, S, row0, column0, masked, first=0):
        """Raw products to scores, −inf where the mask hides them; ``row0``, ``column0`` are this lane's first ones."""
        at = T.meta_var(self.kept(row0, column0))
        self.by_tiles(*at, lambda: self._modify(S, *at, masked, first))

    @T.inline
    def _modify(self, S, row0, column0, masked, first):
        if not self.folded:
            if self.pattern.has_choice:
                # asked once, not for every score
                if self.pattern.choice(self.at):
                    self._modify_elements(S, row0, column0, first, True)
                else:
                    self._modify_elements(S, row0, column0, first, False)
            else:
                self._modify_elements(S, row0, column0, first, None)
        if masked:
            if self.pattern.is_interval:
                self._mask_interval(S, row0, column0, first)
            else:
                self._mask_elements(S, row0, column0, first)

    @T.inline
    def _modify_elements(self, S, row0, column0, first, chosen):
        for t in T.unroll(first, self.m_tiles):
            self.begin_diagonals(row0, column0, t)
            for g in T.unroll(self.groups):
                self.follow_diagonals(row0, column0, t, g)
                for r in T.unroll(self.lane_rows):
                    self.look_at_pair(t, g, r)
                    for e in T.unroll(2):
                        self.look_at(t, g, r, e)
                        at = T.meta_var(self.position(row0, column0, t, g, r, e))
                        i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        S[i] = self.modified(S[i], at[0], at[1], chosen)

    @T.inline
    def _mask_interval(self, S, row0, column0, first):
        # the visible keys of a row are an interval: two comparisons of a constant with a register, or one
        for t in T.unroll(first, self.m_tiles):
            for r in T.unroll(self.lane_rows):
                row = T.meta_var(self.position(row0, column0, t, 0, r, 0)[0])
                keys = T.meta_var(self.pattern.keys_of(self.at, row, row).visible)
                end: T.int32 = keys[1] - column0
                begin: T.int32 = keys[0] - column0
                for g in T.unroll(self.groups):
                    for e in T.unroll(2):
                        i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        column = T.meta_var(self.fragment.score_column(g, e))
                        if constant(keys[0]) == 0:
                            S[i] = T.Select(column < end, S[i], T.float32(NEGATIVE_INFINITY))
                        else:
                            S[i] = T.Select(T.And(column < end, column >= begin), S[i], T.float32(NEGATIVE_INFINITY))

    @T.inline
    def _mask_elements(self, S, row0, column0, first):
        self.begin_mask(row0, column0, first)
        for t in T.unroll(first, self.m_tiles):
            for g in T.unroll(self.groups):
                self.begin_columns(row0, column0, t, g)
                for r in T.unroll(self.lane_rows):
                    self.look_at_pair(t, g, r)
                    for e in T.unroll(2):
                        self.look_at(t, g, r, e)
                        at = T.meta_var(self.position(row0, column0, t, g, r, e))
                        i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        S[i] = T.Select(self.sees(at, t, r, e), S[i], T.float32(NEGATIVE_INFINITY))
