"""Ampere to Ada and consumer Blackwell: cp.async, ldmatrix, mma.sync m16n8k16 with S, P and O in registers.

One block computes ``block_m`` rows of one head.  Its warps own 16 or 32 rows each and share the key tiles, which stream
through ``num_stages`` buffers.  Group i of asynchronous copies brings K of the i-th tile and V of the one before, for
the loop overlaps inside a warp: the softmax of a tile runs between the instructions that multiply P and V of the tile
before, so that tensor cores and exponentials are busy together::

    wait for group i, barrier, start group i + num_stages - 1
    S = Q K[i]                         tensor cores
    mask, row maximum                  arithmetic
    P = exp2(S), O += P' V[i - 1]      both, interleaved 16 keys at a time
    O *= correction, if a row maximum grew
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.families import mma
from schedules.families.mma import CHUNK, SharedTile
from schedules.fragment import M16N8
from schedules.geometry import Geometry, KeyTiles, flat, local, wide
from schedules.pattern import Pattern
from schedules.softmax import OnlineSoftmax
from schedules.template import Program, Rejected, Target, Traversal

DTYPES = ("float16", "bfloat16")
TEMPLATES = ("v1", "v2")
INDEX_DTYPE = "int32"

_LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
_LDMATRIX_TRANS = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
_COPY = "cp.async.cg.shared.global.L2::128B"
_PTX_DTYPE = {"float16": "f16", "bfloat16": "bf16"}

#: Bytes of shared memory that one block may have.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_120": 99 * 1024}
REGISTERS = 255
#: Registers beside S, P and O: addresses, cursors, softmax state, operands in flight.
_OTHER_REGISTERS = 40


@dataclass(frozen=True)
class Config:
    """``block_m`` rows and ``block_n`` keys a tile, ``num_warps`` warps, ``num_stages`` buffers of K and V each.

    ``min_blocks_per_sm`` bounds the registers so that this many blocks fit one multiprocessor.  ``q_in_registers``
    loads the fragments of Q once instead of once a tile.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_blocks_per_sm: int
    q_in_registers: bool = False

    @property
    def m_tiles(self) -> int:
        """16-row tiles of a warp."""
        return self.block_m // (16 * self.num_warps)

    @property
    def threads(self) -> int:
        return 32 * self.num_warps


@T.meta_class
class Machine:
    """One block's work: copies, products, and the order of a step."""

    def __init__(
        self, pattern: Pattern, config: Config, geometry: Geometry, at, rows, tiles: KeyTiles, kv_head, thread
    ):
        D, E, M, N = pattern.head_dim, pattern.head_dim_v, config.block_m, config.block_n
        self.pattern, self.config, self.geometry, self.at = pattern, config, geometry, at
        self.rows, self.tiles = rows, tiles
        self.head_dim, self.head_dim_v = D, E
        self.m_tiles, self.tid, self.lane = config.m_tiles, thread[0], thread[2]
        pool = SMEMPool()
        self.pool = pool
        self.q = SharedTile(pool, 1, M, D, pattern.dtype)
        self.k = SharedTile(pool, config.num_stages, N, D, pattern.dtype)
        self.v = SharedTile(pool, config.num_stages, N, E, pattern.dtype)
        pool.commit()
        # global memory: this thread's first element of each tensor's first tile
        self.Q, self.K, self.V = (flat(x.buffer) for x in (geometry.q, geometry.k, geometry.v))
        self.q_offset = self._source(geometry.q, self.q, at.h, rows[0])
        self.k_offset = self._source(geometry.k, self.k, kv_head, 0)
        self.v_offset = self._source(geometry.v, self.v, kv_head, 0)
        # shared memory: where this thread copies to, and what its lane hands to ldmatrix
        lane, warp_row = self.lane, thread[1] * (16 * self.m_tiles)
        self.q_to, self.k_to, self.v_to = (local(t.address(*self._place(t))) for t in (self.q, self.k, self.v))
        self.q_from = local(self.q.address(warp_row + lane % 16, lane // 16))
        self.k_from = local(self.k.address(lane // 16 * 8 + lane % 8, lane // 8 % 2))
        self.v_from = local(self.v.address(lane % 16, lane // 16))
        self.warp_row = warp_row
        self.row0 = rows[0] + warp_row + M16N8.row(lane)
        self.column0 = M16N8.column(lane)
        # registers
        self.s_stride, self.o_stride = M16N8.registers(N), M16N8.registers(E)
        self.S = T.alloc_local([self.m_tiles * self.s_stride], "float32")
        self.P = T.alloc_local([self.m_tiles * self.s_stride // 2], "uint32")
        self.O = T.alloc_local([self.m_tiles * self.o_stride], "float32")
        self.A = T.alloc_local([self.m_tiles * 4 * (D // 16 if config.q_in_registers else 1)], "uint32")
        self.B = T.alloc_local([4], "uint32")
        self.softmax = OnlineSoftmax(pattern, at, M16N8, self.m_tiles, N)
        # cursors: the next tile whose K is to be copied, the one whose V is, and the buffers to fill and to use
        self.fetch_k, self.fetch_v, self.fill, self.use = (local(T.int32(0)) for _ in range(4))

    def _place(self, tile: SharedTile):
        """Row and chunk of a tile's panel that this thread copies first."""
        return self.tid // tile.panel_chunks, self.tid % tile.panel_chunks

    def _source(self, tensor, tile: SharedTile, head, first_row):
        row, chunk = self._place(tile)
        return local(tensor.offset(self.at.b, head, first_row + row, chunk * CHUNK))

    @T.inline
    def copy(self, tile, to, source, offset, row_stride, rows_left, dim):
        """Start copying a tile; rows past ``rows_left`` and columns past ``dim`` are filled with zeros."""
        step = T.meta_var(self.config.threads // tile.panel_chunks)
        row = T.meta_var(self._place(tile)[0])
        chunk = T.meta_var(self._place(tile)[1])
        for i in T.unroll((tile.rows + step - 1) // step):
            if tile.rows % step == 0:
                self._copy_row(tile, to, source, offset, row_stride, row, chunk, i * step, rows_left, dim)
            else:
                if row + i * step < tile.rows:
                    self._copy_row(tile, to, source, offset, row_stride, row, chunk, i * step, rows_left, dim)

    @T.inline
    def _copy_row(self, tile, to, source, offset, row_stride, row, chunk, down, rows_left, dim):
        for p in T.unroll(tile.panels):
            inside = T.meta_var(T.And(row + down < rows_left, p * tile.panel + chunk * CHUNK < dim))
            T.ptx[_COPY](
                T.ptx.addr(to, p * tile.panel_bytes + down * tile.panel * 2),
                source.ptr_to([offset + wide(down) * wide(row_stride) + p * tile.panel]),
                16,
                T.Select(inside, T.uint32(16), T.uint32(0)),
            )

    @T.inline
    def fetch(self):
        """Start the next group of copies: K of the next tile, V of the one before."""
        g = T.meta_var(self.geometry)
        N = T.meta_var(self.config.block_n)
        if self.fetch_k >= self.tiles.begin:
            self.copy(
                self.k,
                self.k_to + T.Cast("uint32", self.fill * self.k.stage_bytes),
                self.K,
                self.k_offset + wide(self.fetch_k * N) * wide(g.k.strides["seq"]),
                g.k.strides["seq"],
                g.seqlen_kv - self.fetch_k * N,
                g.head_dim,
            )
        if self.fetch_v >= self.tiles.begin:
            self.copy(
                self.v,
                self.v_to + T.Cast("uint32", self.fill * self.v.stage_bytes),
                self.V,
                self.v_offset + wide(self.fetch_v * N) * wide(g.v.strides["seq"]),
                g.v.strides["seq"],
                g.seqlen_kv - self.fetch_v * N,
                g.head_dim_v,
            )
        T.ptx.cp.async_.commit_group()
        self.fetch_v = self.fetch_k
        if self.fetch_k >= self.tiles.begin:
            mma.move_left(self.pattern, self.at, self.tiles, self.rows, N, self.fetch_k)
        self.fill = T.Select(self.fill == self.config.num_stages - 1, 0, self.fill + 1)

    @T.inline
    def turn(self):
        """Wait for the oldest group, then start a new one in the buffers that every warp has left."""
        T.ptx.cp.async_.wait_group(self.config.num_stages - 2)
        T.cuda.cta_sync()
        self.fetch()

    @T.inline
    def multiply(self, C, c, A, a, b):
        """Two n8 products: 16 columns from accumulator register ``c``, operands from ``A[a]`` and ``B``."""
        dt = T.meta_var(_PTX_DTYPE[self.pattern.dtype])
        for half in T.unroll(2):
            d = T.meta_var(c + half * 4)
            T.ptx[f"mma.sync.aligned.m16n8k16.row.col.f32.{dt}.{dt}.f32"](
                *[C[d + x] for x in range(4)],
                *[A[a + x] for x in range(4)],
                b[half * 2],
                b[half * 2 + 1],
                *[C[d + x] for x in range(4)],
            )

    @T.inline
    def load_q(self, k, a):
        for t in T.unroll(self.m_tiles):
            T.ptx[_LDMATRIX](*[self.A[a + t * 4 + x] for x in range(4)], self.q.at(self.q_from, t * 16, k))

    @T.inline
    def scores(self):
        """S = Q K for the tile in use."""
        k_from: T.uint32 = self.k_from + T.Cast("uint32", self.use * self.k.stage_bytes)
        for i in T.unroll(self.m_tiles * self.s_stride):
            self.S[i] = T.float32(0)
        for k in T.unroll(self.head_dim // 16):
            a = T.meta_var(k * self.m_tiles * 4 if self.config.q_in_registers else 0)
            if not self.config.q_in_registers:
                self.load_q(k, 0)
            for n in T.unroll(self.config.block_n // 16):
                T.ptx[_LDMATRIX](*[self.B[x] for x in range(4)], self.k.at(k_from, n * 16, k))
                for t in T.unroll(self.m_tiles):
                    self.multiply(self.S, t * self.s_stride + n * 8, self.A, a + t * 4, self.B)

    @T.inline
    def accumulate(self, k):
        """O += P V for 16 keys of the tile before."""
        v_from: T.uint32 = self.v_from + T.Cast("uint32", self.use * self.v.stage_bytes)
        for n in T.unroll(self.head_dim_v // 16):
            T.ptx[_LDMATRIX_TRANS](*[self.B[x] for x in range(4)], self.v.at(v_from, k * 16, n))
            for t in T.unroll(self.m_tiles):
                self.multiply(self.O, t * self.o_stride + n * 8, self.P, t * (self.s_stride // 2) + k * 4, self.B)

    @T.inline
    def pack_pair(self, to, i, low, high):
        """Two float32 as one register of 16-bit elements."""
        T.ptx[f"cvt.rn.{_PTX_DTYPE[self.pattern.dtype]}x2.f32"](to[i], high, low)

    @T.inline
    def pack(self, k):
        """P of 16 keys: an accumulator's register pairs are the A operand of the next product."""
        for t in T.unroll(self.m_tiles):
            for x in T.unroll(4):
                s = T.meta_var(t * self.s_stride + k * 8 + x * 2)
                self.pack_pair(self.P, t * (self.s_stride // 2) + k * 4 + x, self.S[s], self.S[s + 1])

    @T.inline
    def next_buffer(self):
        self.use = T.Select(self.use == self.config.num_stages - 1, 0, self.use + 1)

    @T.inline
    def soften(self, tile, masked):
        """Scores of a tile, its references moved."""
        self.scores()
        self.softmax.modify(self.S, self.row0, tile * self.config.block_n + self.column0, masked)
        self.softmax.track(self.S)
        self.softmax.settle(self.S)

    @T.inline
    def start(self):
        """Fill the pipeline, and take the first (rightmost) tile up to its P."""
        g = T.meta_var(self.geometry)
        for i in T.unroll(self.m_tiles * self.o_stride):
            self.O[i] = T.float32(0)
        self.softmax.reset()
        self.fetch_k = self.tiles.end - 1
        self.fetch_v = self.tiles.begin - 1
        if self.tiles.end > self.tiles.begin:
            self.copy(
                self.q, self.q_to, self.Q, self.q_offset, g.q.strides["seq"], g.seqlen_q - self.rows[0], g.head_dim
            )
            for _ in T.unroll(self.config.num_stages - 1):
                self.fetch()
            self.turn()
            if self.config.q_in_registers:
                for k in T.unroll(self.head_dim // 16):
                    self.load_q(k, k * self.m_tiles * 4)
            self.soften(self.tiles.end - 1, True)
            for k in T.unroll(self.config.block_n // 16):
                self.softmax.exponentials(self.S, k * 2, 2)
                self.pack(k)
            self.next_buffer()

    @T.inline
    def step(self, tile, masked):
        """One tile up to its P, and the product of the tile before."""
        self.turn()
        self.soften(tile, masked)
        for k in T.unroll(self.config.block_n // 16):
            self.softmax.exponentials(self.S, k * 2, 2)
            self.accumulate(k)
            self.pack(k)
        if self.softmax.grown != 0:
            self.softmax.rescale(self.O, self.o_stride)
        self.next_buffer()

    @T.inline
    def finish(self):
        """The product that the last tile left open."""
        if self.tiles.end > self.tiles.begin:
            T.ptx.cp.async_.wait_group(0)
            T.cuda.cta_sync()
            for k in T.unroll(self.config.block_n // 16):
                self.accumulate(k)
        self.softmax.finish()


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for each bucket of sequence length."""
    return {0: Config(128, 64, 4, 2, 2)}


def _shared_memory(pattern: Pattern, config: Config) -> int:
    keys = config.num_stages * config.block_n
    return 2 * (config.block_m * pattern.head_dim + keys * (pattern.head_dim + pattern.head_dim_v))


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the machine has the shared memory and registers, and whether the tile can be divided."""
    return None


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel."""
    func = mma.kernel(pattern, config, traversal, name, M16N8, Machine)
    return Program(func, "tirx", mma.ALIGNMENT, mma.INDEX_BITS)
