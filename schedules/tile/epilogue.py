"""The end of a row tile: log-sum-exp, normalisation, 16-byte stores of the output, sums in float32."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.tile.geometry import Geometry, Tensor, wide
from schedules.tile.sequences import Sequence
from schedules.tile.softmax import OnlineSoftmax

#: Groups of a row that are read before the first of them is written.
_ON_THE_WAY = 8


def groups_at_once(groups: int) -> int:
    """How many of a row's groups are read together: as many as go, so that they can be had in equal parts."""
    return max(n for n in range(1, _ON_THE_WAY + 1) if groups % n == 0)


@T.inline
def store_lse(geometry: Geometry, queries: Sequence, softmax: OnlineSoftmax, LSE, row0, lane):
    """Write the log-sum-exp of this lane's rows of ``queries`` if anyone asked; ``LSE`` is a flat view of the tensor.

    ``row0`` is this lane's first row; after ``softmax.finish()``.  One lane of those that share a row writes.
    """
    if T.And(geometry.lse_wanted, softmax.fragment.column(lane) == 0):
        for t in T.unroll(softmax.m_tiles):
            for r in T.unroll(2):
                row = T.meta_var(softmax.position(row0, 0, t, 0, r, 0)[0])
                if row < queries.length:
                    LSE[geometry.lse_offset(softmax.at.b, softmax.at.h, queries.at(row))] = softmax.lse(t * 2 + r)


@T.inline
def normalise(softmax: OnlineSoftmax, O, stride):
    """Divide the output's registers, ``stride`` an m-tile, by the row sums; rows that saw nothing become 0."""
    for t in T.unroll(softmax.m_tiles):
        for r in T.unroll(2):
            inverse: T.float32 = softmax.inverse(t * 2 + r)
            for g in T.unroll(stride // 4):
                for e in T.unroll(2):
                    i = T.meta_var(t * stride + g * 4 + r * 2 + e)
                    if softmax.pattern.is_unmasked:
                        O[i] = O[i] * inverse
                    else:
                        # a row that saw nothing may still hold the NaN of a value that it doesn't see
                        O[i] = T.Select(inverse == T.float32(0), T.float32(0), O[i] * inverse)


@T.inline
def store_rows(
    tensor: Tensor, queries: Sequence, b, h, elements, tile, tile_row, row_first, lane, groups, group_step, rows
):
    """One warp copies rows from shared memory to a head of a tensor, 16 bytes a lane and 128 a row at a time.

    These are ``groups`` times ``rows`` rows (a multiple of 8), ``group_step`` apart, from row ``tile_row`` of ``tile``;
    row 0 of the tile is row ``row_first`` of ``queries`` (or of keys); ``elements`` is a flat view of the tensor.  What
    is past their last row or the last column isn't written.
    """
    chunks = T.meta_var(tile.panel_chunks)
    row: T.int32 = tile_row + lane // chunks
    column: T.int32 = lane % chunks * tile.chunk
    shared: T.uint32 = tile.address(row, lane % chunks)
    memory: T.int64 = tensor.offset(b, h, queries.at(row_first + row), column)
    words = T.alloc_local([4], "uint32")
    for g in T.unroll(groups):
        for i in T.unroll(rows * chunks // 32):
            down = T.meta_var(g * group_step + i * (32 // chunks))
            for p in T.unroll(tile.panels):
                if T.And(row_first + row + down < queries.length, column + p * tile.panel < tensor.sizes["dim"]):
                    T.ptx["ld.shared.v4.b32"](*[words[x] for x in range(4)], tile.at(shared, down, p * chunks))
                    T.ptx["st.global.v4.b32"](
                        elements.ptr_to([memory + wide(down) * wide(tensor.strides["seq"]) + p * tile.panel]),
                        *[words[x] for x in range(4)],
                    )


@T.inline
def add_rows(memory, acc, stride, factor, m_tiles, columns, column, output_column, row_of, rows, offset):
    """Add accumulators times ``factor``, ``stride`` registers an m-tile, to rows of a float32 tensor.

    ``memory`` is a flat view.  ``row_of(t, r)`` is the row of a register, of ``rows`` that there are, and
    ``offset(row)`` where it is from this lane's first ``column`` of ``columns`` on; ``output_column(g)`` is where group
    ``g`` is from there.
    """
    groups = T.meta_var(stride // 4)
    batch = T.meta_var(groups_at_once(groups))
    before = T.alloc_local([2 * batch], "float32")
    for t in T.unroll(m_tiles):
        for r in T.unroll(2):
            row = T.meta_var(row_of(t, r))
            if row < rows:
                to: T.int64 = offset(row)
                for first in T.unroll(groups // batch):
                    for x in T.unroll(batch):
                        further = T.meta_var(output_column(first * batch + x))
                        if column + further < columns:
                            T.ptx["ld.global.v2.f32"](before[x * 2], before[x * 2 + 1], memory.ptr_to([to + further]))
                    for x in T.unroll(batch):
                        further = T.meta_var(output_column(first * batch + x))
                        a = T.meta_var(t * stride + (first * batch + x) * 4 + r * 2)
                        if column + further < columns:
                            for e in T.unroll(2):
                                before[x * 2 + e] = before[x * 2 + e] + acc[a + e] * factor
                            T.ptx["st.global.v2.f32"](memory.ptr_to([to + further]), before[x * 2], before[x * 2 + 1])
