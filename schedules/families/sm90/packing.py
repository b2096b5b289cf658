"""Which queries the rows of a work tile are: the query heads of one group may share a tile.

Usually a row is a position.  But a work tile is as high as up to four warpgroups, and a decoding step has one query:
where several query heads read the same head of keys, and their queries fit into one work tile, the rows are the queries
of one head after those of the other, each head padded to a power of two.  Keys and values are then read once for the
group and not once for each of its heads.  The host decides so at each call.

On an H200, 32 heads, float16: one query, 4 heads of keys, head_dim 128, 64 x 1024 keys 187 to 37 us, head_dim 64 245 to
36.  With queries of more than one tile (48, groups of 4, rows of 128) packing took 51 us in place of 31: fewer blocks.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.config import Config
from schedules.tile.geometry import Geometry, constant

#: Queries up to which heads may be packed: the rows of a warpgroup, so that what one stores is whole heads or one.
MOST_PACKED = 64
#: Shift and mask where heads aren't packed: no row number has a bit beyond.
_UNPACKED, _ALL_POSITIONS = 31, 0x7FFFFFFF


def _opaque(x):
    """``x``, and nothing of what it was computed from.

    The simplifier would follow it into the bounds of every tile: a kernel with a mask took 9 s to lower, not 0.9.
    """
    return T.bind(T.call_extern("int32", "opaque", x))


@T.meta_class
class Rows:
    """How rows stand for queries; made before ``T.device_entry()``, of host expressions.

    There are ``count`` rows for each of ``heads`` heads of the grid.  One of these stands for ``head_step`` query
    heads; ``group`` query heads read one head of keys.
    """

    #: Whether many work tiles have warpgroups without rows.
    may_be_absent = False

    def __init__(self, config: Config, geometry: Geometry):
        self.geometry = geometry
        self.group = T.bind(T.truncdiv(geometry.heads, geometry.kv_heads))
        self.shift, self.mask = T.int32(_UNPACKED), T.int32(_ALL_POSITIONS)
        self.head_step, self.count = 1, geometry.seqlen_q
        if config.pack_heads:
            self._pack(config.block_m)
        self.heads = T.bind(T.truncdiv(geometry.heads, self.head_step))

    def _pack(self, block_m: int):
        """Let the heads of a group share a work tile, if all fit into one."""
        seqlen_q = self.geometry.seqlen_q
        doublings = (T.Cast("int32", seqlen_q > 1 << bits) for bits in range(MOST_PACKED.bit_length() - 1))
        shift = T.bind(sum(doublings, T.int32(0)))
        rows = T.bind(T.shift_left(self.group, shift))
        packed = T.bind(T.And(T.And(seqlen_q <= MOST_PACKED, rows <= block_m), self.group > 1))
        self.shift = _opaque(T.Select(packed, shift, self.shift))
        self.mask = _opaque(T.Select(packed, T.shift_left(T.int32(1), shift) - 1, self.mask))
        self.head_step = _opaque(T.Select(packed, self.group, self.head_step))
        self.count = _opaque(T.Select(packed, rows, self.count))

    @property
    def are_positions(self) -> bool:
        """Whether it is certain that no tile has rows of several heads."""
        return constant(self.mask) == _ALL_POSITIONS

    @property
    def packed(self):
        """Whether a tile has rows of several heads."""
        return self.mask != _ALL_POSITIONS

    def position(self, row):
        """The query of a row; seqlen_q or more for a row that pads."""
        return T.bitwise_and(row, self.mask)

    def head(self, row):
        """The query head of a row, counted from that of row 0."""
        return T.shift_right(row, self.shift)

    def box(self, rows: int):
        """``(positions, heads)`` of ``rows`` rows."""
        return T.Select(self.packed, self.mask + 1, rows), T.Select(
            self.packed, T.shift_right(T.int32(rows), self.shift), 1
        )

    def span(self, row_first, rows: int):
        """First and last position (inclusive) of ``rows`` rows."""
        end = T.Select(self.packed, self.geometry.seqlen_q, row_first + rows)
        return T.Select(self.packed, 0, row_first), T.min(end, self.geometry.seqlen_q) - 1
