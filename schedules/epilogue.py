"""The end of a row tile: log-sum-exp, normalisation, and 16-byte stores of the output."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.geometry import Geometry, wide
from schedules.softmax import OnlineSoftmax


@T.inline
def store_lse(geometry: Geometry, softmax: OnlineSoftmax, LSE, row0, lane):
    """Write the log-sum-exp of this lane's rows if anyone asked; ``LSE`` is a flat view of the tensor.

    ``row0`` is this lane's first row; after ``softmax.finish()``.  One lane of those that share a row writes.
    """
    if T.And(geometry.lse_wanted, softmax.fragment.column(lane) == 0):
        for t in T.unroll(softmax.m_tiles):
            for r in T.unroll(2):
                row = T.meta_var(softmax.position(row0, 0, t, 0, r, 0)[0])
                if row < geometry.seqlen_q:
                    LSE[geometry.lse_offset(softmax.at.b, softmax.at.h, row)] = softmax.lse(t * 2 + r)


@T.inline
def normalise(softmax: OnlineSoftmax, O, stride):
    """Divide the output's registers, ``stride`` an m-tile, by the row sums; rows that saw nothing become 0."""
    for t in T.unroll(softmax.m_tiles):
        for r in T.unroll(2):
            inverse: T.float32 = softmax.inverse(t * 2 + r)
            for g in T.unroll(stride // 4):
                for e in T.unroll(2):
                    i = T.meta_var(t * stride + g * 4 + r * 2 + e)
                    # a row that saw nothing may still hold the NaN of a value that it doesn't see
                    O[i] = T.Select(inverse == T.float32(0), T.float32(0), O[i] * inverse)


@T.inline
def store_rows(geometry: Geometry, at, O, tile, tile_row, row, rows, columns, lane):
    """One warp copies ``rows`` x ``columns`` 16-bit elements from shared memory to the output, 16 bytes a lane.

    ``tile.pointer(0, r, chunk)`` is where 8 elements are; rows from ``tile_row`` of the tile go to rows from ``row`` of
    the output ``O`` (a flat view); what is past seqlen_q or head_dim_v isn't written.
    """
    chunks = T.meta_var(columns // 8)
    words = T.alloc_local([4], "uint32")
    for i in T.unroll(rows * chunks // 32):
        r = T.meta_var((i * 32 + lane) // chunks)
        chunk = T.meta_var((i * 32 + lane) % chunks)
        if T.And(row + r < geometry.seqlen_q, chunk * 8 < geometry.head_dim_v):
            T.ptx["ld.shared.v4.b32"](words[0], words[1], words[2], words[3], tile.pointer(0, tile_row + r, chunk))
            T.ptx["st.global.v4.b32"](
                O.ptr_to(
                    [
                        geometry.o.offset(at.b, at.h, row, 0)
                        + wide(r) * wide(geometry.o.strides["seq"])
                        + wide(chunk * 8)
                    ]
                ),
                words[0],
                words[1],
                words[2],
                words[3],
            )
