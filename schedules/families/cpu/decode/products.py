"""The two products of a few rows with a tile of keys: what a tile is in scratch, and how rows multiply it.

Words are a float32, or a pair of bfloat16 where the processor multiplies pairs: of queries and keys along head_dim, of
values along the keys.  A vector of scores has four rows, or as many as it has quads: a quad of words of each row,
multiplied with the same quad of a key, which is read where it is if it needs no conversion.  So four lanes are all
that is left to be summed, of four keys at once.

=========== ==================== ===========================================
buffer      shape                holds
=========== ==================== ===========================================
QW          (blocks, quads, 16)  words of queries: a quad of each row of a block
KW          (N, key_words)       those of keys, where elements are converted
VW          (N', value_words)    those of values; N' is N, or N / 2 of pairs
S           (B * ROWS, N)        scores of some blocks of rows, then probabilities
PW          (ROWS, N')           probabilities as they are multiplied
=========== ==================== ===========================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.config import multiplication
from schedules.families.cpu.decode.vectors import dot_vectors, interleaved, quad, repeated, rounded, sums
from schedules.families.cpu.geometry import Geometry, Tensor
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import bits, dot, pair
from schedules.families.cpu.steps import f32

#: Rows of a block, which share what is loaded of a tile.
ROWS = 4
#: Words of a quad, and of a quad of each row of a block.
_QUAD = 4
_BLOCK = ROWS * _QUAD
#: Keys of a score's register tile.
_KEYS = 4
#: Keys whose values are added in one loop, in registers: rows of the next tile are asked for between these.
_SECTION = 8
#: Elements that every head_dim is a multiple of.
_MULTIPLE = 8
#: Blocks of rows that share what is loaded of keys.  On one core of a Zen 4, a query of 16 heads with 8192 latents of
#: bfloat16 takes 3.1 ms a block at a time, 2.6 ms two or four at a time.
_BLOCKS = 2
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
    quads, elements = key_words // _QUAD, _QUAD * together  # of a query; of a quad
    as_they_are = paired or dtype == "float32"
    N = 64
    while N > 16 and N * (key_words + value_words // together) * 4 > _TILE_BYTES:
        N //= 2
    least = min(_MULTIPLE, W * together)
    vectors = 4 if isa.registers == 32 else 2
    blocks = _BLOCKS if isa.registers == 32 else 1

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

    def place_of_query(r):
        return (r // ROWS * quads) * _BLOCK + r % ROWS * _QUAD

    @T.inline
    def load_query(P: Geometry, QW, r, row):
        """Words of row ``r``, which is one of a block."""
        place: T.int64 = place_of_query(r)
        for c in T.serial(P.head_dim // elements):
            load_words(QW, place + c * _BLOCK, P.q, row + c * elements, 1, elements)

    @T.inline
    def clear_query(P: Geometry, QW, r):
        """Nothing, in the place of row ``r``: where rows are no whole block, products are computed all the same."""
        place: T.int64 = place_of_query(r)
        for c in T.serial(P.head_dim // elements):
            clear(QW, place + c * _BLOCK, 0, _QUAD)

    @T.inline
    def clear_tile(P: Geometry, VW):
        """Zeros beyond head_dim in a tile, for all that follow."""
        for j in T.serial(N // together):
            clear(VW, j * value_words, P.head_dim_v, value_words)

    @T.inline
    def load_keys(P: Geometry, KW, k_base, key0, keys):
        if not as_they_are:
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

    def row_of_key(P: Geometry, k_base, key0, j):
        return P.k.near(k_base, key0, j) if as_they_are else j * key_words

    def quad_of_key(P: Geometry, KW, at, c):
        """Quad ``c`` of the words of the key at ``at``, in all places of a vector."""
        if paired:
            words = T.reinterpret("uint32x4", P.k.flat[lanes(at + c * elements, elements)])
        else:
            words = (P.k.flat if as_they_are else KW)[lanes(at + c * _QUAD, _QUAD)]
        return repeated(words, W, word)

    def add_scores(P: Geometry, acc, QW, KW, block, count, at, c):
        """To the sums of ``count`` blocks of rows and of ``_KEYS`` keys the products of quad ``c`` of their words."""
        for x in range(count * _BLOCK // W):
            a = QW[lanes(((block + x * W // _BLOCK) * quads + c) * _BLOCK + x * W % _BLOCK)]
            for j in range(_KEYS):
                b = quad_of_key(P, KW, at[j], c)
                T.buffer_store(acc[x], multiplied(acc[x][lanes(j * W)], a, b), [lanes(j * W)])

    def store_scores(S, acc, row0, count, key):
        for x in range(count * _BLOCK // W):
            T.buffer_store(acc[x], sums(*[acc[x][lanes(j * W)] for j in range(_KEYS)]), [lanes(0)])
            for place in range(W // _QUAD):
                row = row0 + x * (W // _QUAD) + place
                T.buffer_store(S, quad(acc[x][lanes(0)], place), [lanes(row * N + key, _KEYS)])

    def values_of_tile(VW):
        """Vectors of words of key, or pair, ``j`` in scratch."""
        return lambda j, e, x: VW[lanes(j * value_words + (e + x) * W)]

    def values_in_memory(P: Geometry, v_base, key0):
        """The same where they come from; of pairs if there is a second key."""

        def vector(j, e, x):
            if not paired:
                return f32_vector(P.v.flat, P.v.near(v_base, key0, j) + (e + x) * W)
            low, high = (
                bits(
                    P.v.flat[lanes(P.v.near(v_base, key0, 2 * j + key) + (e + x - x % 2) * W, 2 * W)], f"uint16x{2 * W}"
                )
                for key in range(2)
            )
            return interleaved(low, high, x % 2)

        return vector

    def f32_vector(flat, at):
        x = flat[lanes(at)]
        return x if dtype == "float32" else T.cast(x, f"float32x{W}")

    def add_values(acc, rows, columns, S, s0, PW, values, row0, j, e, some_masked):
        """To the sums of ``rows`` and of ``columns`` vectors from ``e`` on the values of key, or pair, ``j``."""
        for x in range(columns):
            vector = values(j, e, x)
            for r in range(rows):
                weight = PW[(row0 + r) * (N // 2) + j] if paired else S[s0 + (row0 + r) * N + j]
                added = weighted(acc[r][lanes(x * W)], weight, visible(weight, vector) if some_masked else vector)
                T.buffer_store(acc[r], added, [lanes(x * W)])

    def store_sums(added, acc, rows, columns):
        for r in range(rows):
            for x in range(columns):
                T.buffer_store(added, acc[r][lanes(x * W)], [lanes((r * columns + x) * W)])

    def scores_of(count):
        """The scores of ``count`` blocks of rows with the keys of a tile, rounded up to ``_KEYS``."""

        @T.inline
        def macro(P: Geometry, QW, KW, S, row0, acc, key_at, block, k_base, key0, keys, fetch):
            for several in T.serial((keys + (_KEYS - 1)) // _KEYS):
                if fetch.wanted:
                    fetch.macro(several * _KEYS, _KEYS)
                for j in T.unroll(_KEYS):
                    key_at[j] = row_of_key(P, k_base, key0, T.min(several * _KEYS + j, keys - 1))
                clear_sums(acc, count * _BLOCK // W, _KEYS)
                for c in T.serial(P.head_dim // elements):
                    add_scores(P, acc, QW, KW, block, count, key_at, c)
                store_scores(S, acc, row0, count, several * _KEYS)

        return macro

    one_block, several_blocks = scores_of(1), scores_of(blocks)

    @T.inline
    def scores(P: Geometry, QW, KW, S, acc, key_at, block, number, count, k_base, key0, keys, fetch):
        """The scores of block ``number`` of the ``count`` of a head, ``block`` among those of all heads.

        Some blocks are computed with the first of them, into S one after the other; the last, if they are too few for
        that, one by one into the same places.
        """
        place = T.meta_var(number % blocks)
        if blocks > 1:
            if number - place + blocks <= count:
                if place == 0:
                    several_blocks(P, QW, KW, S, 0, acc, key_at, block, k_base, key0, keys, fetch)
            else:
                one_block(P, QW, KW, S, place * ROWS, acc, key_at, block, k_base, key0, keys, fetch)
        else:
            one_block(P, QW, KW, S, 0, acc, key_at, block, k_base, key0, keys, fetch)

    @T.inline
    def round_probabilities(S, s0, PW, rows):
        """Those of a block as words, which are from ``s0`` on."""
        if paired:
            for x in T.serial(rows * N // W):
                PW[lanes(x * (W // 2), W // 2)] = rounded(S[lanes(s0 + x * W)])

    def output_columns(rows, columns, some_masked):
        """``columns`` vectors of the output of a block of ``rows``, beginning with vector ``e``; the first of the
        first row ask ``fetch`` for the shares of some keys at a time, if it is wanted.  Sums leave registers between
        these.

        A tile is summed by itself first: a chain of N additions and one of tiles, not one of all keys of the part.
        """

        @T.inline
        def macro(P: Geometry, scratch, outputs, values, row0, keys, e, fetch):
            S, s0, PW, acc, added, at, factor, live = scratch
            clear_sums(acc, rows, columns)
            asks: T.bool = T.And(fetch.wanted, T.And(row0 == 0, e == 0)) if columns > 1 else T.bool(False)
            size: T.int64 = T.Select(asks, T.int64(_SECTION), T.int64(N))
            for section in T.serial(T.Select(asks, (keys + (_SECTION - 1)) // _SECTION, T.int64(1))):
                if asks:
                    fetch.macro(section * size, size)
                for j in T.serial(
                    section * size // together,
                    T.min((keys + (together - 1)) // together, (section + 1) * size // together),
                ):
                    add_values(acc, rows, columns, S, s0, PW, values, row0, j, e, some_masked)
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

    count = value_words // W

    def output_of_rows(rows):
        """Add what a tile gives to the outputs of ``rows`` rows."""
        several, one = output_columns(rows, vectors, False), output_columns(rows, 1, False)

        @T.inline
        def macro(P: Geometry, scratch, outputs, values, row0, keys, fetch):
            for e in T.serial(count // vectors):
                several(P, scratch, outputs, values, row0, keys, e * vectors, fetch)
            if count % vectors != 0:
                for e in T.serial(count // vectors * vectors, count):
                    one(P, scratch, outputs, values, row0, keys, e, fetch)

        return macro

    one_row, all_rows, one_masked = output_of_rows(1), output_of_rows(ROWS), output_columns(1, 1, True)
    fits = head_dim_v % (W * together) == 0 and (not paired or count % vectors == 0)

    @T.inline
    def output_of_tile(P: Geometry, scratch, outputs, VW, rows, all_full, keys, fetch):
        values = T.meta_var(values_of_tile(VW))
        if all_full and rows == ROWS:
            all_rows(P, scratch, outputs, values, 0, keys, fetch)
        elif all_full:
            for r in T.serial(rows):
                one_row(P, scratch, outputs, values, r, keys, fetch)
        else:  # a masked row does nothing, whatever its value
            for r in T.serial(rows):
                for e in T.serial(count):
                    one_masked(P, scratch, outputs, values, r, keys, e, fetch)

    def is_read_once(P: Geometry, rows_of_head, keys):
        """Whether values are converted in registers: no other block reads them, and none lacks the other of a pair."""
        whole = keys % together == 0 if together > 1 else T.bool(True)
        return T.And(T.And(T.Or(rows_of_head == 1, rows_of_head == ROWS), whole), P.head_dim_v == head_dim_v)

    @T.inline
    def output(P: Geometry, scratch, outputs, VW, rows, rows_of_head, all_full, first, v_base, key0, keys, fetch):
        """Add what a tile gives to the outputs of a block of ``rows`` rows, the ``first`` of a head or another."""
        if fits and all_full and is_read_once(P, rows_of_head, keys):
            values = T.meta_var(values_in_memory(P, v_base, key0))
            if rows == ROWS:
                all_rows(P, scratch, outputs, values, 0, keys, fetch)
            else:
                one_row(P, scratch, outputs, values, 0, keys, fetch)
        else:
            if first:
                load_values(P, VW, v_base, key0, keys)
            output_of_tile(P, scratch, outputs, VW, rows, all_full, keys, fetch)

    return SimpleNamespace(
        lanes=W,
        tile=N,
        word=word,
        keys=(1 if as_they_are else N * key_words, word),
        queries=quads * _BLOCK,
        values=(N // together * value_words, word),
        probabilities=(ROWS * N // 2 if paired else 1, word),
        sums=max(_KEYS, vectors) * W,
        load_query=load_query,
        clear_query=clear_query,
        clear_tile=clear_tile,
        load_keys=load_keys,
        scores=scores,
        scores_size=blocks * ROWS * N,
        blocks=blocks,
        round_probabilities=round_probabilities,
        output=output,
    )
