"""Which tiles of keys rows have to visit, and which of them need a mask: once for every family.

Tiles of keys are *fully visible* to the rows of a tile if every row sees every key of them, *invisible* if no row sees
any, and *partly visible* else.  Only the last kind is masked, and invisible ones aren't visited.  A mask whose visible
keys are one interval for each row splits the tiles in three parts, and :func:`in_parts` goes over them from right to
left: partly visible, fully visible, partly visible.  A mask with gaps is asked of each tile (:func:`next_visible`,
:func:`is_full`).

What is fully visible, and to which rows, the pattern says; nothing here knows the mask.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.tile.geometry import constant, local
from schedules.tile.mask_lists import LEFTWARDS


@T.meta_class
class KeyTiles:
    """Tiles of ``block_n`` keys that rows ``row_first .. row_last`` (inclusive) have to visit.

    Tiles ``begin .. end`` (exclusive) are visible to some row; of these, ``full_begin .. full_end`` are fully visible
    to every row and need no mask, the others partly.  ``begin <= full_begin <= full_end <= end`` always holds.
    ``has_full`` and ``has_left`` say whether there can be fully visible tiles at all, and partly visible ones to the
    left of them: known when the kernel is made.  ``within`` are the tiles, first and end, of a part of the keys; there
    ``begin`` may be beyond its end.
    """

    def __init__(
        self,
        pattern: Pattern,
        at: Site,
        row_first: Expr,
        row_last: Expr,
        block_n: int,
        within: tuple[Expr, Expr] | None = None,
    ):
        if pattern.lists_tiles:
            self._follow_list(pattern, at, row_first)
            return
        keys = pattern.keys_of_tile(at, row_first, row_last)
        lo, hi = keys.visible
        full_lo, full_hi = keys.full
        self._registers = keys.registers
        self.has_full = constant(full_hi) != 0  # an end that is no constant may be any number
        self.has_left = self.has_full and constant(full_lo) != 0
        begin, end = T.truncdiv(lo, block_n), T.truncdiv(hi + (block_n - 1), block_n)
        if within is not None:
            begin, end = T.max(begin, within[0]), T.min(end, within[1])
        self.begin = local(begin)
        self.end = local(T.max(end, self.begin))
        if not self.has_full:
            self.full_begin, self.full_end = self.end, self.end
            return
        first = T.truncdiv(full_lo + (block_n - 1), block_n) if self.has_left else self.begin
        self.full_begin = local(T.min(T.max(first, self.begin), self.end))
        self.full_end = local(T.max(T.min(T.truncdiv(full_hi, block_n), self.end), self.full_begin))
        self._full_hi, self._block_n = full_hi, block_n

    def _follow_list(self, pattern: Pattern, at: Site, row_first: Expr):
        """From the first tile of a walk to the left, or to the right, that a list has."""
        self.has_full = self.has_left = False
        first = pattern.first_tile(at, row_first)
        if pattern.order == LEFTWARDS:
            self.begin, self.end = T.int32(0), local(first + 1)
        else:
            self.begin, self.end = local(first), pattern.count(at)
        self.full_begin, self.full_end = self.end, self.end

    def seen_end(self) -> Expr:
        """The tile with which a walk from right to left has shown every row a key, in ``full_begin .. full_end``.

        The last key that all rows see is in a partly visible tile, or else in the last fully visible one.  Where no
        tile is known to be fully visible, nothing is known of rows either.
        """
        if not self.has_full:
            return self.begin
        masked = T.And(self._full_hi > self.full_end * self._block_n, self.full_end < self.end)
        return T.max(self.full_end - T.Select(masked, 0, 1), self.full_begin)


def is_full(pattern: Pattern, at: Site, rows, tile, keys: int) -> Expr:
    """Whether rows (first, last) all see all of a tile of ``keys`` keys."""
    if pattern.lists_tiles:
        return pattern.is_whole(at, rows[0], tile)
    key_first = tile * keys
    return pattern.tile_full(at, *rows, key_first, key_first + (keys - 1))


def is_visible(pattern: Pattern, at: Site, rows, key_first, keys: int) -> Expr:
    """Whether some of the rows (first, last) may see one of ``keys`` keys from ``key_first`` on."""
    return pattern.tile_live(at, *rows, key_first, key_first + (keys - 1))


@T.inline
def go_left(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, tile):
    """The same by asking of each tile."""
    tile = tile - 1
    if pattern.has_gaps:
        while T.And(tile >= tiles.begin, T.Not(is_visible(pattern, at, rows, tile * block_n, block_n))):
            tile = tile - 1


@T.inline
def next_visible(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, tile):
    """``tile`` to the next tile on the left that has something to see, or below ``tiles.begin``."""
    if pattern.lists_tiles:
        tile = pattern.next_tile(at, rows[0], tile)
    else:
        go_left(pattern, at, tiles, rows, block_n, tile)


@T.inline
def in_parts(bounds, has_full, has_left, partly, fully):
    """Go over the three parts of a range, from right to left.

    ``bounds`` are the ends of the parts in the order of the walk, ``(first, full, after, end)``.  ``partly(a, b)`` and
    ``fully(a, b)`` visit the tiles from ``a`` up to ``b`` (exclusive) in that order, whichever way they count.
    """
    partly(bounds[0], bounds[1])
    if has_full:
        fully(bounds[1], bounds[2])
        if has_left:
            partly(bounds[2], bounds[3])
