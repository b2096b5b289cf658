"""Copies of Volta and Turing, which have no cp.async: to registers early, from there to shared memory late.

K and V have one buffer each.  V of a tile is on its way to registers during Q K, K of the next tile during softmax and
P V; a step has two barriers.  Pairs of warps hand P to each other in the memory of K, and K waits for a third.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.tile.dtypes import tensor_types

_PACK = """
__forceinline__ __device__ void pack_halves(unsigned int& to, float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  to = *(unsigned int*)&pair;
}
"""

_LOAD = """
__forceinline__ __device__ void load_or_zero(
    unsigned int& a, unsigned int& b, unsigned int& c, unsigned int& d, const void* from, int exists) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
      " @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(a), "=&r"(b), "=&r"(c), "=&r"(d) : "l"(from), "r"(exists) : "memory");
}
"""


_LOAD_HALF = """
__forceinline__ __device__ void load_half_or_zero(unsigned int& a, unsigned int& b, const void* from, int exists) {
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.v2.b32 {%0, %1}, [%2];}"
      : "=&r"(a), "=&r"(b) : "l"(from), "r"(exists) : "memory");
}
"""


def staging_registers(pattern: Pattern, config) -> int:
    """Registers that hold a thread's part of a tile of keys on its way to shared memory."""
    types = tensor_types(pattern)
    chunks = config.block_n * max(pattern.head_dim // types.k.chunk, pattern.head_dim_v // types.v.chunk)
    return 4 * -(-chunks // (32 * config.num_warps))


@T.inline
def load_or_zero(to, i, source, exists):
    """16 bytes from global memory to four registers, or zeros: a predicate, no branch between loads."""
    T.cuda.func_call(
        "load_or_zero", to[i], to[i + 1], to[i + 2], to[i + 3], source, T.Cast("int32", exists), source_code=_LOAD
    )


@T.inline
def load_half_or_zero(to, i, source, exists):
    """The same with 8 bytes and two registers."""
    T.cuda.func_call("load_half_or_zero", to[i], to[i + 1], source, T.Cast("int32", exists), source_code=_LOAD_HALF)


@T.inline
def pack_halves(to, i, low, high):
    """Two float32 as one register of halves; cvt.rn.f16x2.f32 needs sm_80."""
    T.cuda.func_call("pack_halves", to[i], low, high, source_code=_PACK)


class StagedCopies:
    """Mixed into a :class:`schedules.families.mma.machine.BlockMachine` with one stage."""

    q_in_registers = False

    def place_staging(self):
        """Registers for this thread's part of the largest tile of keys."""
        words = 4 * max(x.passes * x.tile.panels for x in (self.k, self.v))
        self.staging = T.alloc_local([words], "uint32")

    @T.inline
    def load(self, matrix, tile_first, live, ragged=False):
        """Start loading the tile at a cursor to registers; what doesn't exist is zero."""

        @T.inline
        def row(n, memory, shared, inside):
            load_or_zero(self.staging, n * 4, matrix.memory.ptr_to([memory]), inside)

        matrix.find(tile_first)
        self.each_row(matrix, 0, tile_first, live, ragged, row)

    @T.inline
    def store(self, matrix):
        """Registers to shared memory."""

        @T.inline
        def row(n, memory, shared, inside):
            T.ptx["st.shared.v4.b32"](shared, *[self.staging[n * 4 + x] for x in range(4)])

        self.each_row(matrix, 0, 0, True, False, row)

    @T.inline
    def copy(self, matrix, tile_first, live):
        """All rows of the tile at a cursor, at once; it may go beyond the last row."""

        @T.inline
        def row(n, memory, shared, inside):
            load_or_zero(self.staging, 0, matrix.memory.ptr_to([memory]), inside)
            T.ptx["st.shared.v4.b32"](shared, *[self.staging[x] for x in range(4)])

        matrix.find(tile_first)
        self.each_row(matrix, 0, tile_first, live, True, row)

    @T.inline
    def start(self):
        """Q and the first K."""
        self.clear()
        self.copy(self.q, self.rows[0], True)
        self.copy(self.k, self.fetched * self.config.block_n, self.fetched >= self.tiles.begin)
        self.fetch_done()
        if self.q_in_registers:
            T.cuda.cta_sync()
            self.keep_q()

    @T.inline
    def step(self, tile, masked, tracked):
        """One tile of keys."""
        T.cuda.cta_sync()
        self.load(self.v, tile * self.config.block_n, True, masked)
        self.move_to_next(self.v, tile, self.fetched)
        self.scores()
        self.score_tile(tile, masked, tracked)
        self.store(self.v)
        T.cuda.cta_sync()
        more: T.bool = self.fetched >= self.tiles.begin
        self.load(self.k, self.fetched * self.config.block_n, more)
        self.softmax_pv(tracked)
        if self.parts > 1:
            T.cuda.cta_sync()
        if more:
            self.store(self.k)
        self.fetch_done()
