"""The two products of a few rows with a tile of keys: what a tile is in scratch, and how rows multiply it.

A tile is brought into scratch once for all rows that read it.  It holds words: a float32, or a pair of bfloat16 where
the processor multiplies pairs, of a key along head_dim, of a value along the keys.

=========== ================== ===========================================
buffer      shape              holds
=========== ================== ===========================================
QW          (rows, key_words)  words of queries, 0 beyond head_dim
KW          (N, key_words)     those of keys
VW          (N', value_words)  those of values; N' is N, or N / 2 of pairs
S           (ROWS, N)          scores of a block of rows, then probabilities
PW          (ROWS, N')         probabilities as they are multiplied
=========== ================== ===========================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.config import multiplication
from schedules.families.cpu.decode.vectors import dot_vectors, interleaved, sums
from schedules.families.cpu.geometry import Geometry, Tensor
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import bits, dot, pair, rounded_pair
from schedules.families.cpu.steps import f32

#: Rows that share what is loaded of a tile.
ROWS = 4
#: Keys of a score's register tile.
_KEYS = 4
#: Keys whose values are added in one loop, in registers: rows of the next tile are asked for between these.
_SECTION = 8
#: Elements that every head_dim is a multiple of.
_MULTIPLE = 8
#: Bytes of a tile in scratch, which leave room for the rest in a first-level cache of 48 KB.
_TILE_BYTES = 32768


def has_pairs(isa: Isa, dtype: str) -> bool:
    """Whether rows are multiplied as pairs of bfloat16."""
    return multiplication(isa, dtype) == "pairs"


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def products(isa: Isa, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """Macros and sizes for an instruction set, a dtype and the largest head_dims."""
    W, paired = isa.lanes, has_pairs(isa, dtype)
    together, word = (2, "uint32") if paired else (1, "float32")
    key_words, value_words = _up(head_dim // together, W), _up(head_dim_v, W)
    N = 64
    while N > 16 and N * (key_words + value_words // together) * 4 > _TILE_BYTES:
        N //= 2
    least = min(_MULTIPLE, W * together)
    vectors = 4 if isa.registers == 32 else 2

    def lanes(at, count=W):
        return T.Ramp(at, 1, count)

    def none():
        return T.Broadcast(T.float32(0), W)

    def multiplied(acc, a, b):
        return dot_vectors(acc, a, b) if paired else acc + a * b

    def weighted(acc, weight, values):
        return dot(acc, values, weight) if paired else acc + T.Broadcast(weight, W) * values

    def visible(weight, values):
        """Values of keys that have a probability; 0 in place of the others, whatever they are."""
        if not paired:
            return T.Select(T.Broadcast(weight, W) == none(), none(), values)
        low = T.Select(T.bitwise_and(weight, T.uint32(0xFFFF)) == 0, T.uint32(0), T.uint32(0xFFFF))
        high = T.Select(T.shift_right(weight, T.uint32(16)) == 0, T.uint32(0), T.uint32(0xFFFF0000))
        return T.bitwise_and(values, T.Broadcast(T.bitwise_or(low, high), W))

    @T.inline
    def load_words(words, at, tensor: Tensor, row, vectors, count):
        """``vectors`` times ``count`` elements of a row as words."""
        for d in T.serial(vectors):
            if paired:
                words[lanes(at + d * (count // 2), count // 2)] = T.reinterpret(
                    f"uint32x{count // 2}", tensor.flat[lanes(row + d * count, count)]
                )
            else:
                for lane in T.vectorized(count):
                    words[at + d * count + lane] = f32(tensor.flat[row + d * count + lane])

    @T.inline
    def load_row(words, at, tensor: Tensor, row, width, most):
        """A row of ``width`` elements; ``most`` of them, a constant, is the usual case."""
        if most % (W * together) == 0 and width == most:
            load_words(words, at, tensor, row, most // (W * together), W * together)
        else:
            load_words(words, at, tensor, row, width // least, least)

    @T.inline
    def clear(words, at, begin, end):
        for d in T.serial(begin, end):
            words[at + d] = T.cast(0, word)

    @T.inline
    def load_query(P: Geometry, QW, r, row):
        """Words of row ``r``, with zeros beyond head_dim: products are computed of all words that there may be."""
        load_row(QW, r * key_words, P.q, row, P.head_dim, head_dim)
        clear(QW, r * key_words, P.head_dim // together, key_words)

    @T.inline
    def clear_tile(P: Geometry, KW, VW):
        """Zeros beyond head_dim in a tile, for all that follow."""
        for j in T.serial(N):
            clear(KW, j * key_words, P.head_dim // together, key_words)
        for j in T.serial(N // together):
            clear(VW, j * value_words, P.head_dim_v, value_words)

    @T.inline
    def load_keys(P: Geometry, KW, k_base, key0, keys):
        for j in T.serial(keys):
            load_row(KW, j * key_words, P.k, P.k.near(k_base, key0, j), P.head_dim, head_dim)

    @T.inline
    def load_pairs(P: Geometry, VW, j, low, high):
        """Pair ``j`` of two rows of values."""
        if head_dim_v % (2 * W) == 0 and P.head_dim_v == head_dim_v:
            for e in T.unroll(head_dim_v // (2 * W)):
                first = T.meta_var(bits(P.v.flat[lanes(low + e * (2 * W), 2 * W)], f"uint16x{2 * W}"))
                second = T.meta_var(bits(P.v.flat[lanes(high + e * (2 * W), 2 * W)], f"uint16x{2 * W}"))
                VW[lanes(j * value_words + 2 * e * W)] = interleaved(first, second, 0)
                VW[lanes(j * value_words + (2 * e + 1) * W)] = interleaved(first, second, 1)
        else:
            for e in T.serial(P.head_dim_v // least):
                for lane in T.vectorized(least):
                    VW[j * value_words + e * least + lane] = pair(
                        bits(P.v.flat[low + e * least + lane]), bits(P.v.flat[high + e * least + lane])
                    )

    @T.inline
    def load_values(P: Geometry, VW, v_base, key0, keys):
        """Values of a tile; where there is one too few for a pair, 0 is the other."""
        if paired:
            for j in T.serial((keys + 1) // 2):
                low: T.int64 = P.v.near(v_base, key0, 2 * j)
                high: T.int64 = P.v.near(v_base, key0, T.min(2 * j + 1, keys - 1))
                load_pairs(P, VW, j, low, high)
            if keys % 2 == 1:
                last = T.meta_var(keys // 2 * value_words)
                for e in T.serial(value_words):
                    VW[last + e] = T.bitwise_and(VW[last + e], T.uint32(0xFFFF))
        else:
            for j in T.serial(keys):
                load_row(VW, j * value_words, P.v, P.v.near(v_base, key0, j), P.head_dim_v, head_dim_v)

    def clear_sums(acc, rows, count):
        for r in range(rows):
            for x in range(count):
                T.buffer_store(acc[r], none(), [lanes(x * W)])

    def add_scores(acc, rows, QW, KW, row0, key, d):
        """To the sums of ``rows`` and of ``_KEYS`` keys the products of vector ``d`` of their words."""
        for j in range(_KEYS):
            for r in range(rows):
                a, b = QW[lanes((row0 + r) * key_words + d * W)], KW[lanes((key + j) * key_words + d * W)]
                T.buffer_store(acc[r], multiplied(acc[r][lanes(j * W)], a, b), [lanes(j * W)])

    def store_scores(S, acc, rows, key):
        for r in range(rows):
            T.buffer_store(S, sums(*[acc[r][lanes(j * W)] for j in range(_KEYS)]), [lanes(r * N + key, _KEYS)])

    def add_values(acc, rows, columns, S, PW, VW, row0, j, e, some_masked):
        """To the sums of ``rows`` and of ``columns`` vectors from ``e`` on the values of key, or pair, ``j``."""
        for x in range(columns):
            values = VW[lanes(j * value_words + (e + x) * W)]
            for r in range(rows):
                weight = PW[(row0 + r) * (N // 2) + j] if paired else S[(row0 + r) * N + j]
                added = weighted(acc[r][lanes(x * W)], weight, visible(weight, values) if some_masked else values)
                T.buffer_store(acc[r], added, [lanes(x * W)])

    def store_sums(added, acc, rows, columns):
        for r in range(rows):
            for x in range(columns):
                T.buffer_store(added, acc[r][lanes(x * W)], [lanes((r * columns + x) * W)])

    def scores(rows):
        """The scores of a block of ``rows`` with the keys of a tile, rounded up to ``_KEYS``."""

        @T.inline
        def macro(QW, KW, S, acc, row0, ahead, keys, fetch):
            for block in T.serial((keys + (_KEYS - 1)) // _KEYS):
                fetch(ahead, block * _KEYS, _KEYS)
                clear_sums(acc, rows, _KEYS)
                for d in T.serial(key_words // W):
                    add_scores(acc, rows, QW, KW, row0, block * _KEYS, d)
                store_scores(S, acc, rows, block * _KEYS)

        return macro

    @T.inline
    def round_probabilities(S, PW, rows):
        """Probabilities as words; those of a row may be fewer than a vector has."""
        if paired:
            whole = T.meta_var(rows * N // 2 // W * W)
            for x in T.serial(whole // W):
                for lane in T.vectorized(W):
                    PW[x * W + lane] = rounded_pair(S[(x * W + lane) * 2], S[(x * W + lane) * 2 + 1])
            if rows * N // 2 > whole:
                for lane in T.vectorized(rows * N // 2 - whole):
                    PW[whole + lane] = rounded_pair(S[(whole + lane) * 2], S[(whole + lane) * 2 + 1])

    def output_columns(rows, columns, some_masked):
        """``columns`` vectors of the output of a block of ``rows``, beginning with vector ``e``.

        A tile is summed by itself first: a chain of N additions and one of tiles, not one of all keys of the part.
        """

        @T.inline
        def macro(P: Geometry, S, PW, VW, acc, added, outputs, at, factor, live, row0, ahead, keys, e, fetch):
            clear_sums(acc, rows, columns)
            for section in T.serial((keys + (_SECTION - 1)) // _SECTION):
                fetch(ahead, section * _SECTION, _SECTION)
                for j in T.serial(
                    section * (_SECTION // together),
                    T.min((keys + (together - 1)) // together, (section + 1) * (_SECTION // together)),
                ):
                    add_values(acc, rows, columns, S, PW, VW, row0, j, e, some_masked)
            store_sums(added, acc, rows, columns)
            for r in T.serial(rows):
                if live[row0 + r] != 0:
                    place: T.int64 = at[row0 + r] * P.head_dim_v + e * W
                    scale: T.float32 = factor[row0 + r]
                    if head_dim_v % W == 0 and P.head_dim_v == head_dim_v:
                        for x in T.unroll(columns):
                            outputs[lanes(place + x * W)] = (
                                outputs[lanes(place + x * W)] * T.Broadcast(scale, W)
                                + added[lanes((r * columns + x) * W)]
                            )
                    else:
                        for x in T.serial(T.min(T.int64(columns * W), P.head_dim_v - e * W)):
                            outputs[place + x] = outputs[place + x] * scale + added[r * (columns * W) + x]

        return macro

    def output(rows):
        """Add what a tile gives to the outputs of a block of ``rows``; ``fetch`` is called once for each key."""
        count = value_words // W
        several, one = output_columns(rows, vectors, False), output_columns(rows, 1, False)

        @T.inline
        def macro(P: Geometry, S, PW, VW, acc, added, outputs, at, factor, live, ahead, keys, fetch, fetch_nothing):
            if count >= vectors:
                several(P, S, PW, VW, acc, added, outputs, at, factor, live, 0, ahead, keys, 0, fetch)
            for e in T.serial(1, count // vectors):
                several(P, S, PW, VW, acc, added, outputs, at, factor, live, 0, ahead, keys, e * vectors, fetch_nothing)
            for e in T.serial(count // vectors * vectors, count):
                one(P, S, PW, VW, acc, added, outputs, at, factor, live, 0, ahead, keys, e, fetch_nothing)

        return macro

    one_masked = output_columns(1, 1, True)

    @T.inline
    def output_of_visible(P: Geometry, S, PW, VW, acc, added, outputs, at, factor, live, rows, keys, fetch_nothing):
        """The same where not every row sees every key: a masked one does nothing, whatever its value."""
        for r in T.serial(rows):
            for e in T.serial(value_words // W):
                one_masked(P, S, PW, VW, acc, added, outputs, at, factor, live, r, None, keys, e, fetch_nothing)

    return SimpleNamespace(
        lanes=W,
        tile=N,
        word=word,
        key_words=key_words,
        keys=(N * key_words, word),
        values=(N // together * value_words, word),
        probabilities=(ROWS * N // 2 if paired else 1, word),
        sums=max(_KEYS, vectors) * W,
        load_query=load_query,
        clear_tile=clear_tile,
        load_keys=load_keys,
        load_values=load_values,
        scores={rows: scores(rows) for rows in (1, ROWS)},
        round_probabilities=round_probabilities,
        output={rows: output(rows) for rows in (1, ROWS)},
        output_of_visible=output_of_visible,
    )
