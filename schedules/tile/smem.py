"""Tiles in shared memory: panels of 128 bytes a row (or 64, or 32), swizzled so that eight rows touch different banks.

Every family stores its tiles so.  TMA writes the 128-byte form by itself, and wgmma reads it; cp.async and plain stores
go through :meth:`SharedTile.address`, ldmatrix reads through :meth:`SharedTile.at`.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.dtypes import CHUNK_BYTES, ElementType

#: Bytes of a panel's row: those of the swizzle atom of TMA and wgmma.
PANEL_BYTES = 128
#: Rows that a swizzle tells apart: what an ldmatrix, or a quarter of a warp with 16 bytes a lane, touches at a time.
_ROWS = 8
#: What the swizzle atom asks of a tile's address.
TILE_ALIGNMENT = 1024


def panel_columns(columns: int, element: ElementType) -> int:
    """Columns of a panel of an unpadded tile: 128 bytes where that divides a row of it, else 64 or 32."""
    whole = PANEL_BYTES // element.bytes
    return next(panel for panel in (whole, whole // 2, whole // 4) if columns % panel == 0)


def padded_columns(columns: int, element: ElementType) -> int:
    """Columns of a tile that TMA fills, whose panels all have 128 bytes."""
    whole = PANEL_BYTES // element.bytes
    return -(-columns // whole) * whole


def swizzled(row, chunk, panel_chunks: int):
    """Where the 16-byte chunk ``chunk`` of a row stands in a panel of ``panel_chunks`` chunks; integers or expressions.

    ``chunk ^ row`` (mod 8); in a panel of 64 bytes, two rows of which fill all banks, ``chunk ^ row / 2`` (mod 4).
    """
    rows = _ROWS // panel_chunks
    return chunk ^ ((row // rows if rows > 1 else row) % panel_chunks)


@T.meta_class
class SharedTile:
    """``stages`` tiles of ``rows`` x ``columns`` elements in shared memory: ``[columns / panel][rows][panel]`` each.

    ``panel`` is in columns, ``panel_chunks`` in chunks of 16 bytes, ``chunk`` the columns of one of these.
    """

    def __init__(self, pool, stages: int, rows: int, columns: int, element: ElementType):
        self.rows, self.columns, self.panel = rows, columns, panel_columns(columns, element)
        self.element, self.chunk = element, element.chunk
        self.panel_chunks = self.panel // self.chunk
        self.panels = columns // self.panel
        self.row_bytes = self.panel * element.bytes
        self.panel_bytes = rows * self.row_bytes
        self.stage_bytes = self.panels * self.panel_bytes
        self.buffer = pool.alloc((stages, self.panels, rows, self.panel), element.name, align=TILE_ALIGNMENT)

    def swizzled(self, row: Expr, chunk: Expr) -> Expr:
        """Where chunk ``chunk`` of a panel's row stands."""
        return swizzled(row, chunk, self.panel_chunks)

    def pointer(self, stage, row: Expr, chunk: Expr, element: Expr = 0):
        """Pointer to element ``element`` of chunk ``chunk`` of a row."""
        within = self.swizzled(row, chunk % self.panel_chunks)
        return self.buffer.ptr_to([stage, chunk // self.panel_chunks, row, within * self.chunk + element])

    def address(self, row: Expr, chunk: Expr) -> Expr:
        """Shared address (uint32) of a chunk of the first panel, stage 0: ``at`` leads from it to any other step."""
        return T.cuda.cvta_generic_to_shared(self.buffer.ptr_to([0, 0, 0, 0])) + T.Cast(
            "uint32", row * self.row_bytes + self.swizzled(row, chunk) * CHUNK_BYTES
        )

    def below(self, address: Expr, i, step: int, panel):
        """The operand ``i * step`` rows and ``panel`` panels on from ``address``, in whose row only bits below ``step``
        count, a power of two."""
        if step % _ROWS == 0:  # the swizzle is the same there
            return T.ptx.addr(address, panel * self.panel_bytes + i * step * self.row_bytes)
        return self.at(address, i * step, panel * self.panel_chunks)

    def at(self, address: Expr, row: int, chunk: int, byte: int = 0):
        """The operand ``row`` rows, ``chunk`` chunks and ``byte`` bytes on from ``address``.

        The swizzle makes the way within a panel an exclusive or: of the bits of row and chunk that it mixes, those that
        are set here must not be set at ``address``.
        """
        mixed = (chunk % self.panel_chunks) ^ (row % _ROWS // (_ROWS // self.panel_chunks))
        return T.ptx.addr(
            T.bitwise_xor(address, T.Cast("uint32", mixed * CHUNK_BYTES)),
            chunk // self.panel_chunks * self.panel_bytes + row * self.row_bytes + byte,
        )
