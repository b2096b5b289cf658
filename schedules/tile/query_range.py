"""Which tiles of queries keys are visible to, and which of them need a mask: ``key_range`` the other way round."""

from __future__ import annotations

import tvm_ffi
from tvm import sym
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.tile.geometry import constant, local
from schedules.tile.mask_lists import PARTS
from schedules.tile.tile_scheduler import ceildiv


@T.meta_class
class QueryTiles:
    """Tiles of ``block_m`` queries that see one of ``keys`` keys from ``key_first`` on: step ``i`` is tile
    ``begin + i``, ``steps`` in all.

    Steps ``left .. right`` (exclusive) are of tiles that see every key that exists, and need no mask; the others of
    partly visible ones.  Queries past the last one weigh nothing by themselves, and keys past the last one aren't
    stored, so that neither needs a mask.  ``has_full`` and ``has_masked`` say whether there can be such steps.

    Where a kernel has a list of its tiles (``visits``), steps follow that, those that need a mask first.
    """

    def __init__(self, pattern: Pattern, at: Site, key_first: Expr, keys: int, block_m: int):
        self.has_masked = not pattern.is_unmasked
        self.visits = None
        if pattern.lists_tiles:
            self._follow_list(pattern, at, key_first)
            return
        rows = pattern.rows_of_tile(at, key_first, T.min(key_first + (keys - 1), at.seqlen_kv - 1))
        (lo, hi), (full_lo, full_hi) = rows.visible, rows.full
        self._registers = rows.registers
        self.has_full = pattern.is_unmasked or constant(full_hi) != 0
        self.begin = local(T.truncdiv(lo, block_m))
        steps = T.max(ceildiv(hi, block_m) - self.begin, 0)
        # Keys that nobody sees visit no tile: their range is empty, but lies in one that blocks before have finished.
        self.steps = local(T.Select(lo < hi, steps, 0) if pattern.may_hide_keys else steps)
        self.left, self.right = (self.steps if self.has_masked else T.int32(0)), self.steps
        self.has_right = False
        if self.has_masked and self.has_full:
            self.has_right = not tvm_ffi.structural_equal(full_hi, _all(at.seqlen_q))
            whole = T.Select(full_hi >= at.seqlen_q, self.steps, T.truncdiv(full_hi, block_m) - self.begin)
            self.left = local(T.min(T.max(ceildiv(full_lo, block_m) - self.begin, 0), self.steps))
            self.right = local(T.max(T.min(whole, self.steps), self.left)) if self.has_right else self.steps

    def _follow_list(self, pattern: Pattern, at: Site, key_first: Expr):
        """Take the steps from a list; of a walk to the right they are all tiles from its first one on."""
        self.has_right, self.has_full = False, pattern.order == PARTS
        if self.has_full:
            self.visits = pattern.visits(at, key_first)
            self.steps, self.left = self.visits.steps, self.visits.masked
        else:
            self.begin = local(pattern.first_tile(at, key_first))
            self.steps = self.left = local(pattern.count(at) - self.begin)
        self.right = self.steps

    def tile(self, step: Expr) -> Expr:
        """The tile of a step; of a list it is read, where this is called."""
        return self.visits.tile(step) if self.visits is not None else self.begin + step


def _all(count: Expr) -> Expr:
    """How the end of a range of rows is written that always is the last row's."""
    return sym.Analyzer().simplify(T.max(count, 0))
