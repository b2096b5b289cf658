"""Elements of 8 bits on the mma.sync families: what they are as numbers, and how they and their scales are copied.

A stage of a pipeline has the bytes of a tile, and the scale of each of its rows beside them, which comes by an
asynchronous copy too, as the row's page is known when the row is copied.  What becomes of the bytes is a machine's own:
decoding widens them on their way from shared memory to operands (:mod:`schedules.families.mma.scaled_decode`), prompts
to tiles that several warps read (:mod:`schedules.families.mma.scaled`).  From there on all is as with 16 bits, so that
the result is that of attention to what the cache stands for (:mod:`schedules.definition.cache`), bit for bit.
"""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.cache import STORED
from schedules.families.mma.instructions import COPY, AsynchronousCopies
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.geometry import PagedGeometry, flat, local, wide
from schedules.tile.smem import CHUNK_BYTES

#: Bytes of a scale.
SCALE_BYTES = element_type("float32").bytes

#: The products are those of PTX: the compiler's would make 0 of what float32 has no leading bit for.
_SCALED = """
__forceinline__ __device__ float scaled(float x, float scale) {
  float y;
  asm volatile("mul.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(scale));
  return y;
}
"""

#: The value of byte ``i`` of a word as int8: it is put below the leading bit of 2^23.
_INT8 = """
__forceinline__ __device__ void widen_int8(float& a, float& b, float& c, float& d, unsigned int word) {
  unsigned int x = word ^ 0x80808080u;
  a = __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7540)) - 8388736.0f;
  b = __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7541)) - 8388736.0f;
  c = __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7542)) - 8388736.0f;
  d = __uint_as_float(__byte_perm(x, 0x4b000000u, 0x7543)) - 8388736.0f;
}
"""

#: The same by halves, below the leading bit of 2^10: half as many instructions choose bytes, which take two cycles each
#: on Hopper.
_INT8_BY_HALVES = """
__forceinline__ __device__ void widen_int8_by_halves(float& a, float& b, float& c, float& d, unsigned int word) {
  asm volatile("{.reg .b16 x, y; .reg .b32 h, g; prmt.b32 h, %4, 0, 0x4140; prmt.b32 g, %4, 0, 0x4342;"
               " xor.b32 h, h, 0x64806480; xor.b32 g, g, 0x64806480; sub.rn.f16x2 h, h, %5; sub.rn.f16x2 g, g, %5;"
               " mov.b32 {x, y}, h; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;"
               " mov.b32 {x, y}, g; cvt.f32.f16 %2, x; cvt.f32.f16 %3, y;}"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "r"(word), "r"(0x64806480u));
}
"""

#: As e4m3, where there is no instruction for it.  Exponent and mantissa, one bit further down than the upper byte of a
#: half has them, are 2^-8 of the number as a half, also where it has no leading bit; with the bit above them, which is
#: set of a NaN, they are one.
_E4M3 = """
__forceinline__ __device__ void widen_halves(float& a, float& b, unsigned int halves) {
  asm volatile("{.reg .b16 x, y; .reg .b32 h; mul.rn.f16x2 h, %2, %3; mov.b32 {x, y}, h;"
               " cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;}" : "=f"(a), "=f"(b) : "r"(halves), "r"(0x5c005c00u));
}
__forceinline__ __device__ void widen_e4m3(float& a, float& b, float& c, float& d, unsigned int word) {
  unsigned int magnitude = word & 0x7f7f7f7fu;
  unsigned int marked = magnitude | (magnitude + 0x01010101u & 0x80808080u);
  widen_halves(a, b, __byte_perm(marked, 0u, 0x1404) >> 1 | (__byte_perm(word, 0u, 0x1404) & 0x80008000u));
  widen_halves(c, d, __byte_perm(marked, 0u, 0x3424) >> 1 | (__byte_perm(word, 0u, 0x3424) & 0x80008000u));
}
"""

#: The same from sm_89 on.
_NATIVE_E4M3 = """
__forceinline__ __device__ void widen_native_e4m3(float& a, float& b, float& c, float& d, unsigned int word) {
  asm volatile("{.reg .b16 p, q, x, y; .reg .b32 h, g; mov.b32 {p, q}, %4; cvt.rn.f16x2.e4m3x2 h, p;"
               " cvt.rn.f16x2.e4m3x2 g, q; mov.b32 {x, y}, h; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;"
               " mov.b32 {x, y}, g; cvt.f32.f16 %2, x; cvt.f32.f16 %3, y;}"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "r"(word));
}
"""

_SOURCES = {
    "widen_int8": _INT8,
    "widen_int8_by_halves": _INT8_BY_HALVES,
    "widen_e4m3": _E4M3,
    "widen_native_e4m3": _NATIVE_E4M3,
}

#: The archs that have no instruction for e4m3.
_WITHOUT_E4M3 = ("sm_75", "sm_80", "sm_86")


def widening(cache: str, arch: str, by_halves: bool = False) -> str:
    """The function that makes four float32 of a word of a cache on an arch; ``by_halves``: int8 as Hopper likes it."""
    if cache == "int8":
        return "widen_int8_by_halves" if by_halves else "widen_int8"
    return "widen_e4m3" if arch in _WITHOUT_E4M3 else "widen_native_e4m3"


@T.meta_class
class ScaledGeometry(PagedGeometry):
    """The arguments of a kernel over pages of a cache of 8 bits: ``scales`` of keys and of values follow the table."""

    def __init__(self, pattern, handles, where, scales, softmax_scale, parameters: dict, alignment: int, cache: str):
        stored = element_type(STORED[cache])
        types = dataclasses.replace(tensor_types(pattern), k=stored, v=stored)
        PagedGeometry.__init__(self, pattern, handles, where, softmax_scale, parameters, alignment, types)
        self.scales, self.scale_strides = [], []
        for name, handle in zip("kv", scales, strict=True):
            pages = self.k.sizes["batch"]
            strides = [tirx.Var(f"{name}_scale_{axis}_stride", "int32") for axis in ("page", "head")]
            self.scales.append(
                T.match_buffer(handle, (pages, self.kv_heads), "float32", strides=strides, align=SCALE_BYTES)
            )
            self.scale_strides.append(strides)


class Widening:
    """Mixed into a machine over a cache of dtype ``cache``: ``widen`` makes four float32 of a word."""

    cache = ""
    widen = ""
    #: Whether int8 becomes halves first.
    by_halves = False

    def place_scales(self):
        """Where the scales of this head's keys and values are, and registers for elements on their way."""
        geometry = self.geometry
        self.floats = T.alloc_local([4], "float32")
        self.scale_sources = [flat(x) for x in geometry.scales]
        kv_head = self.k.source.head
        self.scale_heads = [local(wide(kv_head) * wide(strides[1])) for strides in geometry.scale_strides]

    def number_of(self, matrix) -> int:
        """0 of keys, 1 of values, −1 of queries."""
        return -1 if matrix is self.q else int(matrix is self.v)

    def scale_at(self, which: int, page):
        """Where the scale of a page is."""
        return wide(page) * wide(self.geometry.scale_strides[which][0]) + self.scale_heads[which]

    @T.inline
    def widen_word(self, word, scale):
        """Four elements to ``floats``, the x-th times ``scale(x)``."""
        source = T.meta_var(_SOURCES[self.widen])
        T.cuda.func_call(self.widen, *[self.floats[x] for x in range(4)], word, source_code=source)
        for x in T.unroll(4):
            self.floats[x] = T.cuda.func_call(
                "scaled", self.floats[x], scale(x), source_code=_SCALED, return_type="float32"
            )


class ScaledCopies(Widening):
    """The same with copies by cp.async."""

    def cache_types(self):
        """Element types of the tiles that keys and values are copied to."""
        stored = element_type(STORED[self.cache])
        return stored, stored

    def place_shared(self, pool):
        """The scales of the rows of each stage."""
        self.row_scales = [
            pool.alloc((self.stages, self.config.block_n), "float32", align=CHUNK_BYTES) for _ in range(2)
        ]

    @T.inline
    def copy(self, matrix, stage, tile_first, live, ragged=False):
        """Start copying a tile, and with keys and values the scales of its rows."""
        which = T.meta_var(self.number_of(matrix))
        if which < 0:
            AsynchronousCopies.copy(self, matrix, stage, tile_first, live, ragged)
        else:

            @T.inline
            def row(n, memory, shared, inside):
                # A row may end in the middle of 16 bytes.
                column = T.meta_var(matrix.column() + T.truncmod(n, matrix.tile.panels) * matrix.tile.panel)
                there = T.meta_var(T.Cast("uint32", T.min(matrix.dim - column, CHUNK_BYTES)))
                T.ptx[COPY](shared, matrix.memory.ptr_to([memory]), CHUNK_BYTES, T.Select(inside, there, T.uint32(0)))

            matrix.find(tile_first)
            self.each_row(matrix, stage, tile_first, live, ragged, row)
            self.copy_scales(matrix, which, stage, tile_first, live)

    @T.inline
    def copy_scales(self, matrix, which, stage, tile_first, live):
        """Start copying the scales of a tile's rows: the first thread of each of its rows that of a row."""
        first: T.int32 = matrix.row() + tile_first
        to: T.uint32 = T.cuda.cvta_generic_to_shared(self.row_scales[which].ptr_to([stage, matrix.row()]))
        for i in T.unroll(matrix.passes):
            if T.And(matrix.column() == 0, matrix.row() + i * matrix.step < matrix.tile.rows):
                inside = T.meta_var(T.And(live, first + i * matrix.step < matrix.rows))
                self.copy_scale(which, T.ptx.addr(to, i * matrix.step * SCALE_BYTES), matrix.pages[i], inside)

    @T.inline
    def copy_scale(self, which, to, page, inside):
        """Start copying the scale of a page; 0 if that isn't one that there is."""
        size = T.meta_var(T.Select(inside, T.uint32(SCALE_BYTES), T.uint32(0)))
        source = T.meta_var(self.scale_sources[which].ptr_to([self.scale_at(which, page)]))
        T.ptx["cp.async.ca.shared.global"](to, source, SCALE_BYTES, size)
