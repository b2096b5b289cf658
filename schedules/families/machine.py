"""One block's work on any mma.sync machine: where its threads copy from and to, its registers, the order of a step.

What differs is mixed in: ``LdmatrixProducts`` (Turing and later) or Volta's products, asynchronous or staged copies.
A machine brings ``place_operands()``, ``scores()``, ``probabilities(k)``, ``accumulate(k)`` and ``pack_pair(to, i, low,
high)``; the kernel calls its ``start()``, ``step(tile, masked)`` and ``finish()``.
"""

from __future__ import annotations

import dataclasses

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.families.mma import CHUNK, SharedTile, fresh
from schedules.fragment import Fragment
from schedules.geometry import Geometry, KeyTiles, Tensor, flat, local, wide
from schedules.pattern import Pattern
from schedules.softmax import OnlineSoftmax


@T.meta_class
class Matrix:
    """One head's rows of q, k or v in global memory, and the shared tile that they are copied to.

    ``base``, the offset of the head's first element, is one register pair, or the only element of a buffer.
    """

    def __init__(self, tensor: Tensor, b, head, tile: SharedTile, buffer=None):
        self.memory, self.tile = flat(tensor.buffer), tile
        self.rows, self.dim, self.row_stride = tensor.sizes["seq"], tensor.sizes["dim"], tensor.strides["seq"]
        offset = tensor.offset(b, head, 0, 0)
        if buffer is None:
            self.base = local(offset)
        else:
            T.buffer_store(buffer, offset, [0])
            self.base = buffer[0]


@T.meta_class
class BlockMachine:
    """Shared tiles, copy cursors, registers and softmax state of one block.

    ``rows`` are its first and last row, ``block`` its batch, head and strip of rows, ``thread`` an index in it.
    ``bases_in_shared`` keeps the offsets of the heads in shared memory, where they cost no registers; all threads write
    the same.
    """

    def __init__(
        self,
        pattern: Pattern,
        config,
        geometry: Geometry,
        at,
        rows,
        tiles: KeyTiles,
        kv_head,
        block,
        thread,
        *,
        fragment: Fragment,
        num_stages: int,
        bases_in_shared: bool,
    ):
        D, E, M, N = pattern.head_dim, pattern.head_dim_v, config.block_m, config.block_n
        self.pattern, self.config, self.geometry, self.at = pattern, config, geometry, at
        self.rows, self.tiles, self.fragment = rows, tiles, fragment
        self.head_dim, self.head_dim_v, self.stages = D, E, num_stages
        self.threads = 32 * config.num_warps
        self.m_tiles = M // (fragment.tile_rows * config.num_warps)
        pool = SMEMPool()
        self.pool = pool
        tiles_of = [
            SharedTile(pool, *shape, pattern.dtype) for shape in ((1, M, D), (num_stages, N, D), (num_stages, N, E))
        ]
        self.bases = [pool.alloc((1,), "int64") if bases_in_shared else None for _ in tiles_of]
        pool.commit()
        heads = ((geometry.q, at.h), (geometry.k, kv_head), (geometry.v, kv_head))
        self.q, self.k, self.v = (
            Matrix(tensor, at.b, head, tile, base)
            for (tensor, head), tile, base in zip(heads, tiles_of, self.bases, strict=True)
        )
        self.s_stride, self.o_stride = fragment.registers(N), fragment.registers(E)
        self.S = T.alloc_local([self.m_tiles * self.s_stride], "float32")
        self.O = T.alloc_local([self.m_tiles * self.o_stride], "float32")
        self.softmax = OnlineSoftmax(pattern, at, fragment, self.m_tiles, N)
        self.place_block(*block, thread)
        # cursors: the tile to copy next, and the buffers to fill and to use
        self.fetched, self.fill, self.use = (local(T.int32(0)) for _ in range(3))
        self.place_operands()

    def place_block(self, b, h, strip, thread):
        """Set head, rows and lane from the indices of block and thread."""
        self.at = self.softmax.at = dataclasses.replace(self.at, b=b, h=h)
        self.row_first = strip * self.config.block_m
        self.lane, self.warp_row = thread % 32, thread // 32 * (self.fragment.tile_rows * self.m_tiles)
        self.row0 = self.row_first + self.warp_row + self.fragment.row(self.lane)
        self.column0 = self.fragment.column(self.lane)

    def rows_at_once(self, tile: SharedTile) -> int:
        """Rows of a panel that all threads together copy, 16 bytes each."""
        return self.threads // tile.panel_chunks

    def passes(self, tile: SharedTile) -> int:
        """How many rows of a panel one thread copies at most."""
        return -(-tile.rows // self.rows_at_once(tile))

    @T.inline
    def each_row(self, matrix, first, stage, body):
        """``body(n, memory, shared, inside)`` for all that this thread copies of a tile whose first row is ``first``.

        ``n`` counts; ``memory`` is the global element, ``shared`` the operand for shared memory; ``inside`` tells
        whether the element exists: where it doesn't, zeros are to be filled in.
        """
        thread: T.int32 = fresh("tid.x")
        tile = T.meta_var(matrix.tile)
        step = T.meta_var(self.rows_at_once(tile))
        row = T.meta_var(thread // tile.panel_chunks)
        chunk = T.meta_var(thread % tile.panel_chunks)
        start: T.int64 = matrix.base + wide(first + row) * wide(matrix.row_stride) + wide(chunk * CHUNK)
        to: T.uint32 = tile.address(row, chunk) + T.Cast("uint32", stage * tile.stage_bytes)
        for i in T.unroll(self.passes(tile)):
            for p in T.unroll(tile.panels):
                memory = T.meta_var(start + wide(i * step) * wide(matrix.row_stride) + p * tile.panel)
                shared = T.meta_var(T.ptx.addr(to, p * tile.panel_bytes + i * step * tile.panel * 2))
                exists = T.meta_var(first + row + i * step < matrix.rows)
                inside = T.meta_var(T.And(exists, p * tile.panel + chunk * CHUNK < matrix.dim))
                if tile.rows % step == 0:
                    body(i * tile.panels + p, memory, shared, inside)
                else:
                    if row + i * step < tile.rows:
                        body(i * tile.panels + p, memory, shared, inside)

    @T.inline
    def absorb(self):
        """S to P, and O += P V, 16 keys at a time: the next exponentials run between these products."""
        self.softmax.track(self.S)
        if self.softmax.grown != 0:
            self.softmax.rescale(self.O, self.o_stride)
        self.softmax.settle(self.S)
        for k in T.unroll(self.config.block_n // 16):
            self.probabilities(k)
            self.accumulate(k)

    @T.inline
    def clear(self):
        """No output, no softmax state; the rightmost tile is the next to be copied."""
        for i in T.unroll(self.m_tiles * self.o_stride):
            self.O[i] = T.float32(0)
        self.softmax.reset()
        self.fetched = self.tiles.end - 1
