"""Which queries the rows of a row tile are: the query heads of one group may share a tile.

Usually a row is a position.  But a row tile is as high as up to four warpgroups, and a decoding step has one query:
where several query heads read the same head of keys, and their queries fit into one row tile, the rows are the queries
of one head after those of the other, each head padded to a power of two.  Keys and values are then read once for the
group and not once for each of its heads.  The host decides so at each call.

On an H200, 32 heads, float16: one query, 4 heads of keys, head_dim 128, 64 x 1024 keys 187 to 37 us, head_dim 64 245 to
36.  With queries of more than one tile (48, groups of 4, rows of 128) packing took 51 us in place of 31: fewer blocks.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.config import Config
from schedules.geometry import Geometry

#: Queries up to which heads may be packed: the rows of a warpgroup, so that what one stores is whole heads or one.
MOST_PACKED = 64
#: Shift and mask where heads aren't packed: no row number has a bit beyond.
_UNPACKED, _ALL_POSITIONS = 31, 0x7FFFFFFF


@T.meta_class
class Rows:
    """How rows stand for queries; made before ``T.device_entry()``, of host expressions.

    There are ``count`` rows for each of ``heads`` heads of the grid.  One of these stands for ``head_step`` query
    heads; ``group`` query heads read one head of keys.
    """

    def __init__(self, config: Config, geometry: Geometry):
        self.geometry = geometry
        seqlen_q = geometry.seqlen_q
        self.group = T.bind(T.truncdiv(geometry.heads, geometry.kv_heads))
        shift = T.int32(0)
        for bits in range(MOST_PACKED.bit_length() - 1):
            shift = shift + T.Cast("int32", seqlen_q > 1 << bits)
        shift = T.bind(shift)
        packed = T.bool(False)
        if config.pack_heads:
            fits = T.And(seqlen_q <= MOST_PACKED, T.shift_left(self.group, shift) <= config.block_m)
            packed = T.bind(T.And(self.group > 1, fits))
        self.shift = T.bind(T.Select(packed, shift, _UNPACKED))
        self.mask = T.bind(T.Select(packed, T.shift_left(T.int32(1), shift) - 1, _ALL_POSITIONS))
        self.head_step = T.bind(T.Select(packed, self.group, 1))
        self.count = T.bind(T.Select(packed, T.shift_left(self.group, shift), seqlen_q))
        self.heads = T.bind(T.truncdiv(geometry.heads, self.head_step))

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
