"""Keys and values in 8 bits on the mma.sync families: they are copied as they are, and widened to tiles of 16 bits.

A stage of a pipeline has the bytes of a tile, and the scale of each of its rows beside them, which comes by an
asynchronous copy too, as the row's page is known when the row is copied.  A step widens its tile before it multiplies:
each thread the 16 bytes that it copied of each row.  From there on all is as with 16 bits, so that the result is that
of attention to what the cache stands for (:mod:`schedules.definition.cache`), bit for bit.
"""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.cache import STORED
from schedules.families.mma.asynchronous import DecodeMachine
from schedules.families.mma.instructions import COPY, AsynchronousCopies
from schedules.families.mma.ldmatrix import LdmatrixProducts
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.geometry import PagedGeometry, flat, local, wide
from schedules.tile.smem import CHUNK_BYTES, SharedTile

#: Bytes of a scale.
_SCALE_BYTES = element_type("float32").bytes

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
  a = __uint_as_float(0x4b000000u | (x & 0xffu)) - 8388736.0f;
  b = __uint_as_float(0x4b000000u | (x >> 8 & 0xffu)) - 8388736.0f;
  c = __uint_as_float(0x4b000000u | (x >> 16 & 0xffu)) - 8388736.0f;
  d = __uint_as_float(0x4b000000u | x >> 24) - 8388736.0f;
}
"""

#: As e4m3, where there is no instruction for it: an exponent of 0 means 1 without the leading bit.
_E4M3 = """
__forceinline__ __device__ float widened_e4m3(unsigned int bits) {
  unsigned int magnitude = bits & 0x7fu;
  float x = __uint_as_float((magnitude << 20) + (magnitude < 8u ? 0x3c800000u : 0x3c000000u));
  x = magnitude < 8u ? x - 0.015625f : x;
  x = magnitude == 0x7fu ? __uint_as_float(0x7fffffffu) : x;
  return __uint_as_float(__float_as_uint(x) | (bits & 0x80u) << 24);
}
__forceinline__ __device__ void widen_e4m3(float& a, float& b, float& c, float& d, unsigned int word) {
  a = widened_e4m3(word & 0xffu);
  b = widened_e4m3(word >> 8 & 0xffu);
  c = widened_e4m3(word >> 16 & 0xffu);
  d = widened_e4m3(word >> 24);
}
"""

#: The same from sm_89 on.
_NATIVE_E4M3 = """
__forceinline__ __device__ void widen_pair(float& a, float& b, unsigned int pair) {
  asm volatile("{.reg .b16 p, x, y; .reg .b32 h; cvt.u16.u32 p, %2; cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {x, y}, h;"
               " cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;}" : "=f"(a), "=f"(b) : "r"(pair));
}
__forceinline__ __device__ void widen_native_e4m3(float& a, float& b, float& c, float& d, unsigned int word) {
  widen_pair(a, b, word & 0xffffu);
  widen_pair(c, d, word >> 16);
}
"""

_WIDEN = {"widen_int8": _INT8, "widen_e4m3": _E4M3, "widen_native_e4m3": _NATIVE_E4M3}


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
                T.match_buffer(handle, (pages, self.kv_heads), "float32", strides=strides, align=_SCALE_BYTES)
            )
            self.scale_strides.append(strides)


@T.meta_class
class ScaledDecodeMachine(DecodeMachine):
    """The machine of decoding, over a cache of one dtype."""

    cache = ""
    #: The function that makes four float32 of a word.
    widen = ""

    def cache_types(self):
        """Element types of the tiles that keys and values are copied to."""
        stored = element_type(STORED[self.cache])
        return stored, stored

    def place_shared(self, pool):
        """Tiles of 16 bits, and the scales of the rows of each stage."""
        keys = self.config.block_n
        self.wide_tiles = [
            SharedTile(pool, 1, keys, columns, element)
            for columns, element in ((self.head_dim, self.types.k), (self.head_dim_v, self.types.v))
        ]
        self.row_scales = [pool.alloc((self.stages, keys), "float32", align=CHUNK_BYTES) for _ in range(2)]

    def place_operands(self):
        """Products read the tiles of 16 bits, which all stages share."""
        self.k_tile, self.v_tile = self.wide_tiles
        self.k_tile.stage_bytes = self.v_tile.stage_bytes = 0
        self.words, self.floats = T.alloc_local([4], "uint32"), T.alloc_local([4], "float32")
        self.packed = T.alloc_local([8], "uint32")
        geometry = self.geometry
        self.scale_sources = [flat(x) for x in geometry.scales]
        kv_head = self.k.source.head
        self.scale_heads = [local(wide(kv_head) * wide(strides[1])) for strides in geometry.scale_strides]
        LdmatrixProducts.place_operands(self)

    def number_of(self, matrix) -> int:
        """0 of keys, 1 of values, −1 of queries."""
        return -1 if matrix is self.q else int(matrix is self.v)

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
            first: T.int32 = matrix.row() + tile_first
            to: T.uint32 = T.cuda.cvta_generic_to_shared(self.row_scales[which].ptr_to([stage, matrix.row()]))
            for i in T.unroll(matrix.passes):
                if T.And(matrix.column() == 0, matrix.row() + i * matrix.step < matrix.tile.rows):
                    inside = T.meta_var(T.And(live, first + i * matrix.step < matrix.rows))
                    size = T.meta_var(T.Select(inside, T.uint32(_SCALE_BYTES), T.uint32(0)))
                    at = T.meta_var(wide(matrix.pages[i]) * wide(self.geometry.scale_strides[which][0]))
                    T.ptx["cp.async.ca.shared.global"](
                        T.ptx.addr(to, i * matrix.step * _SCALE_BYTES),
                        self.scale_sources[which].ptr_to([at + self.scale_heads[which]]),
                        _SCALE_BYTES,
                        size,
                    )

    @T.inline
    def widen_tile(self, matrix, which):
        """The tile of the stage in use, to 16 bits; what no tensor has is 0, whatever the scale is."""
        tile = T.meta_var(self.wide_tiles[which])
        source = T.meta_var(_WIDEN[self.widen])

        @T.inline
        def row(n, memory, shared, inside):
            T.ptx["ld.shared.v4.b32"](*[self.words[x] for x in range(4)], shared)
            at = T.meta_var(matrix.row() + T.truncdiv(n, matrix.tile.panels) * matrix.step)
            chunk = T.meta_var(
                (matrix.column() // matrix.tile.chunk + T.truncmod(n, matrix.tile.panels) * matrix.tile.panel_chunks)
                * 2
            )
            scale: T.float32 = T.Select(inside, self.row_scales[which][self.use, at], T.float32(0))
            for word in T.unroll(4):
                T.cuda.func_call(self.widen, *[self.floats[x] for x in range(4)], self.words[word], source_code=source)
                for x in T.unroll(4):
                    self.floats[x] = T.cuda.func_call(
                        "scaled", self.floats[x], scale, source_code=_SCALED, return_type="float32"
                    )
                self.pack_pair(self.packed, word * 2, self.floats[0], self.floats[1])
                self.pack_pair(self.packed, word * 2 + 1, self.floats[2], self.floats[3])
            for half in T.unroll(2):
                T.ptx["st.shared.v4.b32"](
                    T.cuda.cvta_generic_to_shared(tile.pointer(0, at, chunk + half)),
                    *[self.packed[half * 4 + x] for x in range(4)],
                )

        self.each_row(matrix, self.use, 0, True, False, row)

    @T.inline
    def step(self, tile, masked, tracked):
        """One tile of keys."""
        self.arrive(self.stages - 2)
        self.fetch(T.Select(self.use == 0, self.stages, self.use) - 1, self.is_live(tile))
        self.widen_tile(self.k, 0)
        self.widen_tile(self.v, 1)
        T.cuda.cta_sync()
        self.scores(0)
        self.score_tile(tile, masked, tracked, 0)
        self.softmax_pv(tracked, 0)
        self.use = T.Select(self.use == self.stages - 1, 0, self.use + 1)


@T.meta_class
class ScaledInt8(ScaledDecodeMachine):
    """Over int8."""

    cache, widen = "int8", "widen_int8"


@T.meta_class
class ScaledE4M3(ScaledDecodeMachine):
    """Over e4m3."""

    cache, widen = "float8_e4m3fn", "widen_e4m3"


@T.meta_class
class ScaledNativeE4M3(ScaledE4M3):
    """The same, by the instruction that sm_89 and what came after it have."""

    widen = "widen_native_e4m3"


def machine_for(cache: str, arch: str) -> type:
    """The machine of a cache's dtype on an arch."""
    if cache == "int8":
        return ScaledInt8
    return ScaledE4M3 if arch in ("sm_80", "sm_86") else ScaledNativeE4M3
