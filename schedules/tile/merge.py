"""The end of a row tile whose results are put into those of other keys: one log-sum-exp and one float32 output a row.

What there is of other keys weighs like a sink of its log-sum-exp, and brings its output along.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from schedules.tile.epilogue import groups_at_once
from schedules.tile.score import LOG2_E
from schedules.tile.softmax import OnlineSoftmax


@T.inline
def merge_rows(
    softmax: OnlineSoftmax,
    acc,
    stride,
    columns,
    O,
    LSE,
    column,
    output_column,
    row_of,
    rows,
    lse_offset,
    o_offset,
    sync,
):
    """Put the outputs ``acc`` of finished rows, ``stride`` registers an m-tile, into ``O``, their sums into ``LSE``.

    ``O`` and ``LSE`` are flat views.  ``row_of(t, r)`` is the row of a register, of ``rows`` that there are;
    ``lse_offset(row)`` and ``o_offset(row)`` say where it is, the latter from this lane's first ``column`` of
    ``columns`` on, and ``output_column(g)`` where group ``g`` is from there.  ``sync()`` waits for the lanes that share
    a row.  A row whose log-sum-exp is −inf has seen nothing, and its output isn't read.
    """
    groups = T.meta_var(stride // 4)
    batch = T.meta_var(groups_at_once(groups))
    before = T.alloc_local([2 * softmax.m_tiles], "float32")
    kept = T.alloc_local([2 * batch], "float32")
    for t in T.unroll(softmax.m_tiles):
        for r in T.unroll(2):
            i = T.meta_var(t * 2 + r)
            row = T.meta_var(row_of(t, r))
            before[i] = T.float32(-math.inf)
            if row < rows:
                before[i] = LSE[lse_offset(row)]
    sync()  # nobody writes one that another lane still has to read
    softmax.add_sink(lambda i: before[i])
    for t in T.unroll(softmax.m_tiles):
        for r in T.unroll(2):
            i = T.meta_var(t * 2 + r)
            row = T.meta_var(row_of(t, r))
            own: T.float32 = softmax.correction[i]
            exists: T.bool = before[i] > T.float32(-math.inf)
            share: T.float32 = T.Select(
                exists, T.exp2(before[i] * T.float32(LOG2_E) - softmax.row_max[i]) / softmax.row_sum[i], T.float32(0)
            )
            if row < rows:
                if column == 0:
                    LSE[lse_offset(row)] = softmax.lse(i)
                to: T.int64 = o_offset(row)
                for first in T.unroll(groups // batch):
                    for x in T.unroll(2 * batch):
                        kept[x] = T.float32(0)
                    if exists:
                        for x in T.unroll(batch):
                            further = T.meta_var(output_column(first * batch + x))
                            if column + further < columns:
                                T.ptx["ld.global.v2.f32"](kept[x * 2], kept[x * 2 + 1], O.ptr_to([to + further]))
                    for x in T.unroll(batch):
                        further = T.meta_var(output_column(first * batch + x))
                        a = T.meta_var(t * stride + (first * batch + x) * 4 + r * 2)
                        if column + further < columns:
                            for e in T.unroll(2):
                                # a row that saw nothing may still hold the NaN of a value that it doesn't see
                                seen = T.meta_var(T.Select(own == T.float32(0), T.float32(0), acc[a + e] * own))
                                kept[x * 2 + e] = kept[x * 2 + e] * share + seen
                            T.ptx["st.global.v2.f32"](O.ptr_to([to + further]), kept[x * 2], kept[x * 2 + 1])
