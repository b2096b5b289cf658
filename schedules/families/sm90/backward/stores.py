"""The way out: a warp's 16 rows of accumulators pass through shared memory and are stored by TMA, or are added, as they
are, to what is there.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.config import panels
from schedules.families.sm90.tma import store_panel
from schedules.families.sm90.wgmma import swizzled
from schedules.tile.dtypes import element_type
from schedules.tile.fragment import M16N8
from schedules.tile.ordered_sums import add_pair

#: Rows of a warp, and of the boxes of the descriptors with which they are stored.
WARP_ROWS = 16


@T.inline
def stage_rows(dtype, acc, columns, factor, pointer, row, lane):
    """A warp: 16 rows of accumulators times ``factor``, rounded, to rows from ``row`` on of a tile in shared memory.

    ``pointer`` maps ``[panel, row, column]`` of the tile, which no warp reads any more.
    """
    packed = T.alloc_local([4], "uint32")
    pack = T.meta_var(element_type(dtype).pack)
    for c in T.unroll(columns // 16):
        for i in T.unroll(4):
            T.ptx[pack](packed[i], acc[c * 8 + i * 2 + 1] * factor, acc[c * 8 + i * 2] * factor)
        T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
            pointer(c // 4, row + lane % 16, swizzled(c % 4 * 2 + lane // 16, lane % 8)), *[packed[x] for x in range(4)]
        )


@T.inline
def store_rows(descriptor, columns, pointer, at, row, lane):
    """A warp: start to store the 16 rows from ``row`` on of a tile, which it has staged.

    ``at`` are the coordinates of the rows behind the panel's.  The warp's lane 0 has to wait until they are read.
    """
    T.ptx.fence.proxy.async_.shared__cta()
    T.cuda.warp_sync()
    if lane == 0:
        for p in T.unroll(panels(columns)):
            store_panel(descriptor, p, at, pointer(p, row, 0))
        T.ptx.cp.async_.bulk.commit_group()


@T.inline
def add_rows(memory, acc, stride, factor, columns, column, first, rows, offset):
    """A warp: add ``stride`` accumulators times ``factor`` to its rows of a float32 tensor, flat in ``memory``.

    ``first`` is this lane's first row, of ``rows`` that there are, ``column`` its first of ``columns``, and
    ``offset(row)`` says where that is.  Nobody else adds to them, so that the sums have the same bits on every run; and
    nothing is read, which would take registers.
    """
    for r in T.unroll(2):
        row = T.meta_var(first + r * M16N8.row_step)
        if row < rows:
            to: T.int64 = offset(row)
            for g in T.unroll(stride // 4):
                if column + M16N8.output_column(g) < columns:
                    a = T.meta_var(g * 4 + r * 2)
                    place = T.meta_var(memory.ptr_to([to + M16N8.output_column(g)]))
                    T.evaluate(add_pair(place, acc[a] * factor, acc[a + 1] * factor))
