"""Where an accumulator register sits: the one thing about a matrix instruction that softmax and epilogue have to know.

A warp's accumulator of ``m_tiles`` times ``tile_rows`` rows and ``columns`` columns is ``m_tiles * registers(columns)``
floats a lane.  Register ``t * registers(columns) + g * 4 + r * 2 + e`` of a lane stands at

* row ``t * tile_rows + row(lane) + r * row_step``,
* column ``g * group + column(lane) + e * column_step`` of a score tile, ``output_column(g) + column(lane) + e`` of the
  output.

Every lane holds two rows of an m-tile, and the lanes that share them differ in the bits of ``row_lanes``.
Source: the layouts of mma and wgmma fragments in the PTX ISA; Volta's is that of m8n8k4 with the four quad pairs of a
warp arranged as 2 x 2 over 32 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr


@dataclass(frozen=True)
class Fragment:
    """An accumulator layout.

    ``group``: columns that four consecutive registers span.  ``tile_rows``: rows of an m-tile.  ``row_step``: rows
    between ``r = 0`` and ``r = 1``.  ``row_lanes``: masks of the shuffles that reduce a row.  ``column_step``: columns
    of a score tile between ``e = 0`` and ``e = 1``.
    """

    group: int
    tile_rows: int
    row_step: int
    row_lanes: tuple[int, ...]
    row: Callable[[Expr], Expr]
    column: Callable[[Expr], Expr]
    output_column: Callable[[int], int]
    column_step: int = 1

    def score_column(self, g: int, e: int) -> int:
        """Column of a register of a score tile, from this lane's first one."""
        return g * self.group + e * self.column_step

    def registers(self, columns: int) -> int:
        """Registers of a lane for one m-tile with that many columns."""
        return columns * 4 // self.group


#: mma.sync m16n8 of Turing and later; wgmma has the same map, 16 rows a warp.
M16N8 = Fragment(
    group=8,
    tile_rows=16,
    row_step=8,
    row_lanes=(1, 2),
    row=lambda lane: lane // 4,
    column=lambda lane: lane % 4 * 2,
    output_column=lambda g: g * 8,
)

#: The same instruction's D with rows and columns exchanged: keys are what it multiplies from the left.
M16N8_TRANSPOSED = Fragment(
    group=16,
    tile_rows=8,
    row_step=1,
    row_lanes=(4, 8, 16),
    row=lambda lane: lane % 4 * 2,
    column=lambda lane: lane // 4,
    output_column=lambda g: g * 16,
    column_step=8,
)

#: mma.sync m8n8k4 of Volta.  The output's columns are permuted: one 128-bit load of V serves two instructions.
VOLTA = Fragment(
    group=4,
    tile_rows=32,
    row_step=2,
    row_lanes=(2,),
    row=lambda lane: lane % 16 // 8 * 16 + lane // 16 * 8 + lane // 4 % 2 * 4 + lane % 2,
    column=lambda lane: lane // 2 % 2 * 2,
    output_column=lambda g: g // 4 * 16 + g % 2 * 8 + g % 4 // 2 * 4,
)
