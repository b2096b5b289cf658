"""bfloat16 with native dot products: the two products of a tile on pairs of elements, without a conversion to float32.

``vdpbf16ps`` adds the products of two pairs to a float32.  A pair of elements is one 32-bit word, the first in its low
half: of a query along head_dim, of a probability and of a value along the keys.  A pair of a key is broadcast from
where the caller has it.

=========== ============= ==================================
buffer      shape         holds
=========== ============= ==================================
QT          (M/G, D/2, G) pairs of queries of each group
KT          (N, D / 2)    pairs of keys, only where rows are apart
PT          (N / 2, G)    pairs of probabilities, of one group
VT          (N / 2, E)    pairs of values
=========== ============= ==================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.config import Config
from schedules.families.cpu.geometry import Geometry
from schedules.families.cpu.steps import accumulate_visible, f32
from schedules.families.cpu.transpose import make_transposed_load

#: acc[i] += a[i].low * pair.low + a[i].high * pair.high, all lanes with the one pair.
DOT_PAIRS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float>
@tvm_flash_dot_pairs(<16 x float> %acc, <16 x i32> %a, i32 %pair) alwaysinline nounwind {
  %one = insertelement <16 x i32> poison, i32 %pair, i64 0
  %all = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %all to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %sum
}
"""
LANES = 16
#: The bits of infinity.
_INF = 0x7F80


def dot(acc, a, pair):
    return T.call_extern(f"float32x{LANES}", "tvm_flash_dot_pairs", acc, a, pair)


def bits(x, dtype="uint16"):
    return T.reinterpret(dtype, x)


def magnitude(x):
    """A bfloat16 without its sign, as bits: ordered like the number, and from ``_INF`` on not finite."""
    return T.bitwise_and(bits(x), T.uint16(0x7FFF))


def pair(low, high):
    """Two 16-bit words as one of 32."""
    return T.bitwise_or(T.cast(low, "uint32"), T.shift_left(T.cast(high, "uint32"), T.uint32(16)))


def rounded_pair(low, high):
    """Two float32 as a pair of bfloat16, rounded to nearest."""
    low, high = (bits(x, "uint32") + T.uint32(0x8000) for x in (low, high))
    return T.bitwise_or(T.shift_right(low, T.uint32(16)), T.bitwise_and(high, T.uint32(0xFFFF0000)))


def make_pair_macros(config: Config) -> SimpleNamespace:
    """What the products on pairs and on tile registers share."""
    V = config.row_vectors

    def words(flat, row, d, count):
        """``count`` pairs of a row from pair ``d`` on."""
        return T.reinterpret(f"uint32x{count}" if count > 1 else "uint32", flat[T.Ramp(row + 2 * d, 1, 2 * count)])

    load_transposed = make_transposed_load(V, LANES, words)

    @T.inline
    def load_queries(P: Geometry, QT, state, block, b, h, row0, rows, count):
        load_transposed(P, QT, block, b, h, row0, rows, count, P.head_dim // 2)

    @T.inline
    def round_probabilities(ST, PT, keys, end):
        """Pairs of probabilities, with zeros from ``keys`` to ``end``, which is even."""
        for j in T.serial(keys, end):
            for n in T.unroll(V):
                for lane in T.vectorized(LANES):
                    ST[j, n * LANES + lane] = T.float32(0)
        for j in T.serial(end // 2):
            for n in T.unroll(V):
                for lane in T.vectorized(LANES):
                    PT[j, n * LANES + lane] = rounded_pair(ST[2 * j, n * LANES + lane], ST[2 * j + 1, n * LANES + lane])

    @T.inline
    def output_of_visible(P: Geometry, ST, OT, correction, v_at, group, keys):
        """Key by key, for a masked tile with an inf or NaN among its values: a masked key must not bring it in."""
        for e in T.serial(P.head_dim_v):
            for n in T.unroll(V):
                for lane in T.vectorized(LANES):
                    OT[group, e, n * LANES + lane] *= correction[n * LANES + lane]
                for j in T.serial(keys):
                    for lane in T.vectorized(LANES):
                        OT[group, e, n * LANES + lane] = accumulate_visible(
                            OT[group, e, n * LANES + lane],
                            ST[j, n * LANES + lane],
                            f32(P.v.flat[P.v.in_tile(v_at, j) + e]),
                        )

    def is_finite(largest):
        """Whether eight largest magnitudes are those of finite numbers."""
        bound = largest[0]
        for lane in range(1, 8):
            bound = T.max(bound, largest[lane])
        return bound < T.uint16(_INF)

    return SimpleNamespace(
        words=words,
        load_queries=load_queries,
        round_probabilities=round_probabilities,
        output_of_visible=output_of_visible,
        magnitude=magnitude,
        is_finite=is_finite,
    )


def pair_products(config: Config, lanes: int, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """The same as :func:`schedules.families.cpu.floats.float_products`, on pairs."""
    M, N, R, V = config.block_m, config.block_n, config.tile_rows, config.row_vectors
    G = V * LANES
    macros = make_pair_macros(config)

    def is_packed(P: Geometry, rows):
        """Whether keys are brought together, as of float32 (``floats.py``)."""
        return T.And(rows >= 2 * G, P.k.is_apart(P.head_dim))

    @T.inline
    def load_tile(P: Geometry, KT, VT, largest, block, k_at, v_at, keys, rows):
        """Values as pairs, the last one with 0 if ``keys`` is odd; ``largest`` of their magnitudes, as bits."""
        if is_packed(P, rows):
            for j in T.serial(keys):
                for d in T.serial(P.head_dim // 8):
                    KT[j, T.Ramp(d * 4, 1, 4)] = macros.words(P.k.flat, P.k.in_tile(k_at, j), d * 4, 4)
        for lane in T.vectorized(8):
            largest[lane] = T.uint16(0)
        for j in T.serial((keys + 1) // 2):
            low: T.int64 = P.v.in_tile(v_at, 2 * j)
            high: T.int64 = P.v.in_tile(v_at, T.min(2 * j + 1, keys - 1))
            whole: T.uint16 = T.Select(2 * j + 1 < keys, T.uint16(0xFFFF), T.uint16(0))
            for d in T.serial(P.head_dim_v // 8):
                for lane in T.vectorized(8):
                    VT[j, d * 8 + lane] = pair(
                        bits(P.v.flat[low + d * 8 + lane]),
                        T.bitwise_and(bits(P.v.flat[high + d * 8 + lane]), whole),
                    )
                    largest[lane] = T.max(
                        largest[lane],
                        T.max(magnitude(P.v.flat[low + d * 8 + lane]), magnitude(P.v.flat[high + d * 8 + lane])),
                    )

    @T.inline
    def zero(acc):
        for x in T.unroll(R * V):
            acc[T.Ramp(x * LANES, 1, LANES)] = T.Broadcast(T.float32(0), LANES)

    @T.inline
    def scores_with(P: Geometry, QT, KT, ST, acc, row, k_at, group, keys, in_tile):
        for tile in T.serial((keys + (R - 1)) // R):
            zero(acc)
            for r in T.unroll(R):
                row[r] = P.k.in_tile(k_at, T.min(tile * R + r, keys - 1))
            for d in T.serial(P.head_dim // 2):
                for r in T.unroll(R):
                    for n in T.unroll(V):
                        acc[T.Ramp((r * V + n) * LANES, 1, LANES)] = dot(
                            acc[T.Ramp((r * V + n) * LANES, 1, LANES)],
                            QT[group, d, T.Ramp(n * LANES, 1, LANES)],
                            KT[tile * R + r, d] if in_tile else macros.words(P.k.flat, row[r], d, 1),
                        )
            for r in T.unroll(R):
                for n in T.unroll(V):
                    ST[tile * R + r, T.Ramp(n * LANES, 1, LANES)] = acc[T.Ramp((r * V + n) * LANES, 1, LANES)]

    @T.inline
    def scores(P: Geometry, QT, KT, ST, acc, row, k_at, group, keys, rows):
        if is_packed(P, rows):
            scores_with(P, QT, KT, ST, acc, row, k_at, group, keys, True)
        else:
            scores_with(P, QT, KT, ST, acc, row, k_at, group, keys, False)

    @T.inline
    def output_of_all(P: Geometry, PT, VT, OT, acc, correction, group, keys):
        for tile in T.serial(P.head_dim_v // R):
            zero(acc)
            for j in T.serial((keys + 1) // 2):
                for r in T.unroll(R):
                    for n in T.unroll(V):
                        acc[T.Ramp((r * V + n) * LANES, 1, LANES)] = dot(
                            acc[T.Ramp((r * V + n) * LANES, 1, LANES)],
                            PT[j, T.Ramp(n * LANES, 1, LANES)],
                            VT[j, tile * R + r],
                        )
            for r in T.unroll(R):
                for n in T.unroll(V):
                    for lane in T.vectorized(LANES):
                        OT[group, tile * R + r, n * LANES + lane] = (
                            OT[group, tile * R + r, n * LANES + lane] * correction[n * LANES + lane]
                            + acc[(r * V + n) * LANES + lane]
                        )

    @T.inline
    def output(P: Geometry, ST, PT, VT, OT, acc, correction, largest, v_at, group, keys, full, rows):
        if full or macros.is_finite(largest):
            macros.round_probabilities(ST, PT, keys, (keys + 1) // 2 * 2)
            output_of_all(P, PT, VT, OT, acc, correction, group, keys)
        else:
            macros.output_of_visible(P, ST, OT, correction, v_at, group, keys)

    @T.inline
    def keep_awake():
        pass

    @T.inline
    def finish(state):
        pass

    return SimpleNamespace(
        queries=((M // G, head_dim // 2, G), "uint32"),
        keys=((N, head_dim // 2), "uint32"),
        values=((N // 2, head_dim_v), "uint32"),
        probabilities=((N // 2, G), "uint32"),
        accumulators=(R * G,),
        state=((1,), "uint8"),
        load_queries=macros.load_queries,
        load_tile=load_tile,
        scores=scores,
        output=output,
        finish=finish,
        keep_awake=keep_awake,
        rows_awake=N,
    )
