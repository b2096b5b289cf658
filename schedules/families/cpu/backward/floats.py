"""The five products of a tile in float32; 16-bit elements become float32 when a tile is loaded.

=========== ========== ==============================================================
buffer      shape      holds
=========== ========== ==============================================================
KT, VT      (D', N)    keys and values transposed, 0 past the last key; D' is D rounded up to register tiles
KR          (N, D')    values, then keys, 0 past head_dim and the last one
QR, OR      (M, D')    queries and gradients of outputs, 0 past head_dim and last row
acc         (R * G,)   the register tile
=========== ========== ==============================================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.geometry import Geometry
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.steps import f32
from schedules.families.cpu.transpose import place, transpose

#: So many products of a score are summed one after another, as in the forward (``floats.py`` beside this folder).
_CHAIN = 128
#: What every head_dim is a multiple of.
_EIGHT = 8


def float_products(config: Config, isa: Isa, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """Macros ``load_keys``, ``load_queries``, ``scores``, ``gradients``, and the shapes and dtypes of their buffers."""
    M, N, R, V, lanes = config.block_m, config.block_n, config.tile_rows, config.row_vectors, isa.lanes
    G = V * lanes
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)
    # Rows that are a power of two apart would share few sets of the first-level cache.
    NS, DS, ES = N + lanes, D + lanes, E + lanes
    KS = max(DS, ES)

    def up(x, step):
        return (x + (step - 1)) // step * step

    @T.inline
    def load_rows(tile, stride, tensor, at, count, step, width):
        """Rows of a tensor as float32, with zeros up to a whole register tile, in both directions."""
        for i in T.serial(count):
            for d in T.serial(width // lanes):
                for lane in T.vectorized(lanes):
                    tile[i * stride + d * lanes + lane] = f32(
                        tensor.flat[at + i * tensor.strides[2] + d * lanes + lane]
                    )
            for d in T.serial(width // lanes * lanes // _EIGHT, width // _EIGHT):
                for lane in T.vectorized(_EIGHT):
                    tile[i * stride + d * _EIGHT + lane] = f32(
                        tensor.flat[at + i * tensor.strides[2] + d * _EIGHT + lane]
                    )
            for d in T.serial(width // _EIGHT, up(width, G) // _EIGHT):
                for lane in T.vectorized(_EIGHT):
                    tile[i * stride + d * _EIGHT + lane] = T.float32(0)
        for i in T.serial(count, up(count, step)):
            for d in T.serial(up(width, G) // lanes):
                for lane in T.vectorized(lanes):
                    tile[i * stride + d * lanes + lane] = T.float32(0)

    @T.inline
    def transpose_rows(to, tile, stride, count, width):
        """``to[d, j]``: rows as columns."""
        for j in T.serial(up(count, G) // lanes):
            for d in T.serial(up(width, G) // lanes):
                T.evaluate(
                    transpose(
                        *(place(to, "w", d * lanes * NS + j * lanes), 4 * NS),
                        *(place(tile, "r", j * lanes * stride + d * lanes), 4 * stride),
                    )
                )

    @T.inline
    def load_keys(P: Geometry, t, k_at, v_at, keys, largest):
        load_rows(t.KR, KS, P.v, v_at, keys, G, P.head_dim_v)
        transpose_rows(t.VT, t.KR, KS, keys, P.head_dim_v)
        load_rows(t.KR, KS, P.k, k_at, keys, G, P.head_dim)
        transpose_rows(t.KT, t.KR, KS, keys, P.head_dim)
        look(t.KR, KS, keys, up(P.head_dim, G), largest, _magnitude)

    @T.inline
    def load_queries(P: Geometry, t, q_at, do_at, rows, largest):
        load_rows(t.QR, DS, P.q, q_at, rows, R, P.head_dim)
        load_rows(t.OR, ES, P.do, do_at, rows, R, P.head_dim_v)
        look(t.QR, DS, rows, up(P.head_dim, G), largest, _magnitude)
        look(t.OR, ES, rows, up(P.head_dim_v, G), largest, _magnitude)

    @T.inline
    def clear(acc):
        for x in T.unroll(R * V):
            for lane in T.vectorized(lanes):
                acc[x * lanes + lane] = T.float32(0)

    @T.inline
    def sum_products(acc, left, right, stride, row, column, first, end):
        """``acc[r, c] = sum_k left(row + r, k) * right[k, column + c]``."""
        clear(acc)
        for k in T.serial(first, end):
            for r in T.unroll(R):
                element: T.let[T.float32] = left(row + r, k)
                for n in T.unroll(V):
                    for lane in T.vectorized(lanes):
                        acc[(r * V + n) * lanes + lane] += element * right[k * stride + column + n * lanes + lane]

    @T.inline
    def rows_by_columns(out, acc, left, right, rows, columns, depth):
        """``out[i, j] = sum_d left(i, d) * right[d, j]``, in chains of ``_CHAIN``; rows and columns of ``N``."""
        for c in T.serial((columns + (G - 1)) // G):
            for i in T.serial((rows + (R - 1)) // R):
                for chain in T.serial((depth + (_CHAIN - 1)) // _CHAIN):
                    sum_products(acc, left, right, NS, i * R, c * G, chain * _CHAIN, T.min(depth, (chain + 1) * _CHAIN))
                    if chain == 0:
                        for r in T.unroll(R):
                            for n in T.unroll(V):
                                for lane in T.vectorized(lanes):
                                    out[(i * R + r) * N + c * G + n * lanes + lane] = acc[(r * V + n) * lanes + lane]
                    else:
                        for r in T.unroll(R):
                            for n in T.unroll(V):
                                for lane in T.vectorized(lanes):
                                    out[(i * R + r) * N + c * G + n * lanes + lane] += acc[(r * V + n) * lanes + lane]

    @T.inline
    def scores(P: Geometry, t, acc, rows, keys):
        """``S[i, j] = q_i · k_j`` and ``dP[i, j] = do_i · v_j``."""
        rows_by_columns(t.S, acc, by_row(t.QR, DS), t.KT, rows, keys, P.head_dim)
        rows_by_columns(t.dP, acc, by_row(t.OR, ES), t.VT, rows, keys, P.head_dim_v)

    @T.inline
    def add_products(out, base, out_stride, acc, left, right, stride, rows, width, depth, beyond):
        """``out[i, c] += sum_k left(i, k) * right[k, c]``; ``beyond`` says that ``out`` has rows past ``rows``."""
        for c in T.serial((width + (G - 1)) // G):
            for i in T.serial((rows + (R - 1)) // R):
                sum_products(acc, left, right, stride, i * R, c * G, 0, depth)
                for r in T.unroll(R):
                    if beyond or i * R + r < rows:
                        for n in T.unroll(V):
                            for lane in T.vectorized(lanes):
                                out[base + (i * R + r) * out_stride + c * G + n * lanes + lane] += acc[
                                    (r * V + n) * lanes + lane
                                ]

    @T.inline
    def gradients(P: Geometry, t, acc, dq_at, dq_stride, rows, keys):
        """Add the tile's share to dv, dk and dq; ``S`` holds probabilities now, ``dP`` gradients of scaled products."""
        add_products(t.dV, 0, E, acc, by_column(t.S, N), t.OR, ES, keys, P.head_dim_v, rows, True)
        add_products(t.dK, 0, D, acc, by_column(t.dP, N), t.QR, DS, keys, P.head_dim, rows, True)
        add_products(P.dq_sum, dq_at, dq_stride, acc, by_row(t.dP, N), t.KR, KS, rows, P.head_dim, keys, False)

    return SimpleNamespace(
        bits="uint32",
        columns=lanes,
        buffers={
            "KT": ((D * NS,), "float32"),
            "VT": ((E * NS,), "float32"),
            "KR": ((N * KS,), "float32"),
            "QR": ((M * DS,), "float32"),
            "OR": ((M * ES,), "float32"),
        },
        load_keys=load_keys,
        load_queries=load_queries,
        scores=scores,
        gradients=gradients,
        begin=nothing,
        finish=nothing,
        keep_awake=nothing,
    )


@T.inline
def look(tile, stride, count, width, largest, magnitude):
    """The largest magnitudes of rows, eight side by side; the width is a multiple of that."""
    for i in T.serial(count):
        for d in T.serial(width // _EIGHT):
            for lane in T.vectorized(_EIGHT):
                largest[lane] = T.max(largest[lane], magnitude(tile[i * stride + d * _EIGHT + lane]))


def nothing(*_):
    """What products without tile registers do before and after a work item."""


def by_row(matrix, stride):
    """``(row, k) -> matrix[row, k]``, of a flat buffer."""
    return lambda row, k: matrix[row * stride + k]


def by_column(matrix, stride):
    """``(row, k) -> matrix[k, row]``, of a flat buffer."""
    return lambda row, k: matrix[k * stride + row]


def _magnitude(x):
    """A float32 without its sign, as bits: ordered like the number, and from those of infinity on not finite."""
    return T.bitwise_and(T.reinterpret("uint32", x), T.uint32(0x7FFFFFFF))
