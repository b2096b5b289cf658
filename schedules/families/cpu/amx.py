"""bfloat16 on AMX: the two products of a tile as products of 16 x 16 tile registers.

A tile product adds ``A B`` to a tile of float32, with 16 rows of 32 elements in ``A``, and ``B`` as 16 rows of 16 pairs
(see ``pairs.py``).  Four tiles are computed at once, 32 keys or value columns by the 32 queries of a group.  ``A`` is K
as the caller has it, but for a last tile that isn't whole and for head dims that aren't a multiple of 32, and V
transposed.

A thread's tile configuration is put back as it was: oneDNN, which may have used the same thread, doesn't look whether
its own is still there.

=========== =================== =================================================
buffer      shape               holds
=========== =================== =================================================
QT          (M/G, D' / 2, G)    pairs of queries of each group; D' is D rounded up to 32
KT          (N, D')             keys with zeros around, where the caller's won't do
VT          (E', N)             values transposed, 0 past the last key
PT          (N / 2, G)          pairs of probabilities, of one group
acc         (32 * G,)           four tiles of the second product
state       (64,)               the thread's tile configuration, as it was
=========== =================== =================================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm import tirx
from tvm.script import tirx as T

from schedules.families.cpu.config import Config
from schedules.families.cpu.geometry import Geometry
from schedules.families.cpu.pairs import bits, make_pair_macros, pair
from schedules.families.cpu.transpose import block_begin, blocks, place, transpose

#: Rows and columns of four tiles, and elements that a tile product sums.
BLOCK = 32

#: Rows of exponentials, of two vectors each, that take about 450 cycles.
_AWAKE = 32

_TILE_CONFIG = 'c"\\01' + "\\00" * 15 + "\\40\\00" * 8 + "\\00" * 16 + "\\10" * 8 + "\\00" * 8 + '"'
#: A product of 32 rows and 32 columns: c = what `first` leaves in the registers, and the sum of `steps` products of a
#: (32 rows) and b (16 rows of 32 pairs); rows are `ld` bytes apart.
_PRODUCT = """
define linkonce_odr i32
@{name}(ptr %c, i64 %ldc, ptr %a, i64 %lda, ptr %b, i64 %ldb, i64 %steps) nounwind {{
entry:
  %c_half = shl i64 %ldc, 4
  %c1 = getelementptr i8, ptr %c, i64 64
  %c2 = getelementptr i8, ptr %c, i64 %c_half
  %c3 = getelementptr i8, ptr %c2, i64 64
{first}
  %a_half = shl i64 %lda, 4
  %b_step = shl i64 %ldb, 4
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %i_next, %loop ]
  %a0 = phi ptr [ %a, %entry ], [ %a_next, %loop ]
  %b0 = phi ptr [ %b, %entry ], [ %b_next, %loop ]
  %a1 = getelementptr i8, ptr %a0, i64 %a_half
  %b1 = getelementptr i8, ptr %b0, i64 64
  call void @llvm.x86.tileloadd64(i8 4, ptr %a0, i64 %lda)
  call void @llvm.x86.tileloadd64(i8 6, ptr %b0, i64 %ldb)
  call void @llvm.x86.tdpbf16ps(i8 0, i8 4, i8 6)
  call void @llvm.x86.tileloadd64(i8 7, ptr %b1, i64 %ldb)
  call void @llvm.x86.tdpbf16ps(i8 1, i8 4, i8 7)
  call void @llvm.x86.tileloadd64(i8 5, ptr %a1, i64 %lda)
  call void @llvm.x86.tdpbf16ps(i8 2, i8 5, i8 6)
  call void @llvm.x86.tdpbf16ps(i8 3, i8 5, i8 7)
  %a_next = getelementptr i8, ptr %a0, i64 64
  %b_next = getelementptr i8, ptr %b0, i64 %b_step
  %i_next = add i64 %i, 1
  %more = icmp slt i64 %i_next, %steps
  br i1 %more, label %loop, label %done
done:
  call void @llvm.x86.tilestored64(i8 0, ptr %c, i64 %ldc)
  call void @llvm.x86.tilestored64(i8 1, ptr %c1, i64 %ldc)
  call void @llvm.x86.tilestored64(i8 2, ptr %c2, i64 %ldc)
  call void @llvm.x86.tilestored64(i8 3, ptr %c3, i64 %ldc)
  ret i32 0
}}
"""
_ZERO = "\n".join(f"  call void @llvm.x86.tilezero(i8 {tile})" for tile in range(4))
_LOADED = "\n".join(
    f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr %{c}, i64 %ldc)"
    for tile, c in enumerate(("c", "c1", "c2", "c3"))
)
TILE_PRODUCT = f"""
@tvm_flash_tile_config = linkonce_odr hidden constant [64 x i8] {_TILE_CONFIG}, align 64
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.sttilecfg(ptr)
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
define linkonce_odr i32 @tvm_flash_tiles_begin(ptr %before) alwaysinline nounwind {{
  call void @llvm.x86.sttilecfg(ptr %before)
  call void @llvm.x86.ldtilecfg(ptr @tvm_flash_tile_config)
  ret i32 0
}}
define linkonce_odr i32 @tvm_flash_tiles_end(ptr %before) alwaysinline nounwind {{
  call void @llvm.x86.ldtilecfg(ptr %before)
  ret i32 0
}}
define linkonce_odr i32 @tvm_flash_tiles_keep_awake() alwaysinline nounwind {{
  call void @llvm.x86.tdpbf16ps(i8 0, i8 4, i8 6)
  ret i32 0
}}
{_PRODUCT.format(name="tvm_flash_tile_product", first=_ZERO)}
{_PRODUCT.format(name="tvm_flash_add_tile_product", first=_LOADED)}
"""


def tiles_begin(state: tirx.Buffer):
    """Keep the thread's tile configuration in 64 bytes, and load that of these products."""
    return T.call_extern("int32", "tvm_flash_tiles_begin", place(state, "w", 0))


def tiles_end(state: tirx.Buffer):
    """Put the configuration back."""
    return T.call_extern("int32", "tvm_flash_tiles_end", place(state, "r", 0))


@T.inline
def keep_awake():
    """A tile product whose result nobody reads.

    After 800 to 850 cycles without one an Emerald Rapids puts the unit to sleep, and the next ones take 800 cycles
    longer.
    """
    T.evaluate(T.call_extern("int32", "tvm_flash_tiles_keep_awake"))


def tile_product(c, ldc, a, lda, b, ldb, steps, *, adds: bool = False):
    """A product of 32 rows and 32 columns: ``c``, whose rows are ``ldc`` bytes apart, is the sum of ``steps`` products,
    and of what was there before if it ``adds``."""
    name = "tvm_flash_add_tile_product" if adds else "tvm_flash_tile_product"
    return T.call_extern("int32", name, c, ldc, a, lda, b, ldb, steps)


def whole(width):
    """Rounded up to what a tile product sums."""
    return (width + (BLOCK - 1)) // BLOCK * BLOCK


def tile_products(config: Config, lanes: int, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """The same as :func:`schedules.families.cpu.floats.float_products`, on tile registers."""
    M, N, V = config.block_m, config.block_n, config.row_vectors
    G = V * lanes
    macros = make_pair_macros(config)

    def is_copied(P: Geometry, keys, rows):
        """Whether the keys of a tile aren't where a product can read them, or would read them slowly several times:
        too few, too narrow, on pages, or apart."""
        if P.is_paged:
            return T.bool(True)
        unfit = T.Or(keys < N, tirx.NE(P.head_dim % BLOCK, T.int64(0)))
        return T.Or(unfit, T.And(rows >= 2 * G, P.k.is_apart(P.head_dim)))

    def value_row(P: Geometry, v_at, j, keys):
        """The row of a key's values, and what its elements are masked with: 0 past the last key."""
        whole = T.Select(j < keys, T.uint16(0xFFFF), T.uint16(0))
        return P.v.in_tile(v_at, T.min(j, keys - 1)), whole

    @T.inline
    def load_queries(P: Geometry, QT, state, block, b, h, row0, rows, count):
        T.evaluate(tiles_begin(state))
        macros.load_queries(P, QT, state, block, b, h, row0, rows, count)
        for d in T.serial(P.head_dim // 2, whole(P.head_dim) // 2):
            for i in T.serial(count):
                QT[i // G, d, i % G] = T.uint32(0)

    @T.inline
    def load_tile(P: Geometry, KT, VT, largest, block, k_at, v_at, keys, rows):
        for lane in T.vectorized(8):
            largest[lane] = T.uint16(0)
        if is_copied(P, keys, rows):
            for j in T.serial(whole(keys)):
                key: T.int64 = P.k.in_tile(k_at, T.min(j, keys - 1))
                for d in T.serial(P.head_dim // BLOCK):
                    for lane in T.vectorized(BLOCK):
                        KT[j, d * BLOCK + lane] = bits(P.k.flat[key + d * BLOCK + lane])
                for d in T.serial(P.head_dim // BLOCK * (BLOCK // 8), P.head_dim // 8):
                    for lane in T.vectorized(8):
                        KT[j, d * 8 + lane] = bits(P.k.flat[key + d * 8 + lane])
                for d in T.serial(P.head_dim // 8, whole(P.head_dim) // 8):
                    for lane in T.vectorized(8):
                        KT[j, d * 8 + lane] = T.uint16(0)
        for j in T.serial(keys):
            for e in T.serial(P.head_dim_v // 8):
                for lane in T.vectorized(8):
                    largest[lane] = T.max(
                        largest[lane], macros.magnitude(P.v.flat[P.v.in_tile(v_at, j) + e * 8 + lane])
                    )
        if P.head_dim_v >= lanes:
            for step in T.serial(whole(keys) // BLOCK):
                for part in T.serial(blocks(P.head_dim_v, lanes)):
                    e0: T.int64 = block_begin(part, P.head_dim_v, lanes)
                    for r in T.serial(lanes):
                        low = T.meta_var(value_row(P, v_at, step * BLOCK + 2 * r, keys))
                        high = T.meta_var(value_row(P, v_at, step * BLOCK + 2 * r + 1, keys))
                        for lane in T.vectorized(lanes):
                            block[r, lane] = pair(
                                T.bitwise_and(bits(P.v.flat[low[0] + e0 + lane]), low[1]),
                                T.bitwise_and(bits(P.v.flat[high[0] + e0 + lane]), high[1]),
                            )
                    T.evaluate(transpose(place(VT, "w", e0, step * BLOCK), 2 * N, place(block, "r", 0, 0), 4 * lanes))
        else:
            for j in T.serial(whole(keys)):
                row = T.meta_var(value_row(P, v_at, j, keys))
                for e in T.serial(P.head_dim_v):
                    VT[e, j] = T.bitwise_and(bits(P.v.flat[row[0] + e]), row[1])

    @T.inline
    def scores(P: Geometry, QT, KT, ST, acc, row, k_at, group, keys, rows):
        steps: T.int64 = whole(P.head_dim) // BLOCK
        for block in T.serial(whole(keys) // BLOCK):
            if is_copied(P, keys, rows):
                T.evaluate(
                    tile_product(
                        *(place(ST, "w", block * BLOCK, 0), T.int64(4 * G)),
                        *(place(KT, "r", block * BLOCK, 0), T.int64(2 * KT.shape[1])),
                        *(place(QT, "r", group, 0, 0), T.int64(4 * G), steps),
                    )
                )
            else:
                T.evaluate(
                    tile_product(
                        *(place(ST, "w", block * BLOCK, 0), T.int64(4 * G)),
                        *(T.address_of(P.k.flat[k_at + block * BLOCK * P.k.strides[2]]), 2 * P.k.strides[2]),
                        *(place(QT, "r", group, 0, 0), T.int64(4 * G), steps),
                    )
                )

    @T.inline
    def output_of_all(P: Geometry, PT, VT, OT, acc, correction, group, keys):
        for block in T.serial(whole(P.head_dim_v) // BLOCK):
            T.evaluate(
                tile_product(
                    *(place(acc, "w", 0), T.int64(4 * G)),
                    *(place(VT, "r", block * BLOCK, 0), T.int64(2 * N)),
                    *(place(PT, "r", 0, 0), T.int64(4 * G), whole(keys) // BLOCK),
                )
            )
            for r in T.serial(T.min(T.int64(BLOCK), P.head_dim_v - block * BLOCK)):
                for n in T.unroll(V):
                    for lane in T.vectorized(lanes):
                        OT[group, block * BLOCK + r, n * lanes + lane] = (
                            OT[group, block * BLOCK + r, n * lanes + lane] * correction[n * lanes + lane]
                            + acc[r * G + n * lanes + lane]
                        )

    @T.inline
    def output(P: Geometry, ST, PT, VT, OT, acc, correction, largest, v_at, group, keys, full, rows):
        if full or macros.is_finite(largest):
            keep_awake()
            macros.round_probabilities(ST, PT, keys, whole(keys))
            output_of_all(P, PT, VT, OT, acc, correction, group, keys)
        else:
            macros.output_of_visible(P, ST, OT, correction, v_at, group, keys)

    @T.inline
    def finish(state):
        T.evaluate(tiles_end(state))

    return SimpleNamespace(
        queries=((M // G, whole(head_dim) // 2, G), "uint32"),
        keys=((N, whole(head_dim)), "uint16"),
        values=((whole(head_dim_v), N), "uint16"),
        probabilities=((N // 2, G), "uint32"),
        accumulators=(BLOCK * G,),
        state=((64,), "uint8"),
        load_queries=load_queries,
        load_tile=load_tile,
        scores=scores,
        output=output,
        finish=finish,
        keep_awake=keep_awake,
        rows_awake=_AWAKE,
    )
