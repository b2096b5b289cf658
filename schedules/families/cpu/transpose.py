"""Transposing blocks of 32-bit words in vector registers: as many words as a vector has lanes, in both directions.

Queries go in and results come out this way.  Element by element, which is a store or a load for each, that was a
fifth of a short sequence's time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

_NAME = "tvm_flash_transpose"


@lru_cache
def transpose_function(lanes: int) -> str:
    """LLVM's assembly of ``(to, to_stride, from, from_stride)``, strides in bytes, with rows of ``lanes`` words.

    In each round, of two rows that are ``step`` apart, one keeps what is at columns without that bit and takes the
    other's for columns with it, and the other way round.
    """
    vector = f"<{lanes} x i32>"
    body, rows = [], [f"%r{i}" for i in range(lanes)]
    for i, row in enumerate(rows):
        body += [f"%f{i} = mul i64 %from_stride, {i}", f"%fp{i} = getelementptr i8, ptr %from, i64 %f{i}"]
        body += [f"{row} = load {vector}, ptr %fp{i}, align 2"]
    step = 1
    while step < lanes:
        low = [k if not k & step else k - step + lanes for k in range(lanes)]
        high = [k + step if not k & step else k + lanes for k in range(lanes)]
        new = list(rows)
        for i in (i for i in range(lanes) if not i & step):
            for at, mask in ((i, low), (i + step, high)):
                indices = ", ".join(f"i32 {k}" for k in mask)
                new[at] = f"%s{step}_{at}"
                body.append(
                    f"{new[at]} = shufflevector {vector} {rows[i]}, {vector} {rows[i + step]}, "
                    f"<{lanes} x i32> <{indices}>"
                )
        rows, step = new, 2 * step
    for i, row in enumerate(rows):
        body += [f"%t{i} = mul i64 %to_stride, {i}", f"%tp{i} = getelementptr i8, ptr %to, i64 %t{i}"]
        body += [f"store {vector} {row}, ptr %tp{i}, align 2"]
    head = f"define linkonce_odr i32 @{_NAME}(ptr %to, i64 %to_stride, ptr %from, i64 %from_stride) nounwind {{"
    return "\n".join((head, *(f"  {line}" for line in body), "  ret i32 0", "}", ""))


def place(buffer: tirx.Buffer, access: str, *index) -> Expr:
    """Where an element of a buffer is, for a function outside TIR that reads ("r") or writes ("w") from there on.

    TVM shrinks a buffer to what it sees accessed: after ``T.address_of`` to that one element, after this not at all.
    """
    return buffer.access_ptr(access, offset=buffer.offset_of(index)[0])


def transpose(to: Expr, to_stride: int, source: Expr, source_stride: int | Expr) -> Expr:
    """A call of it."""
    source_stride = T.int64(source_stride) if isinstance(source_stride, int) else source_stride
    return T.call_extern("int32", _NAME, to, T.int64(to_stride), source, source_stride)


def make_transposed_load(row_vectors: int, lanes: int, words: Callable):
    """A macro that loads queries transposed; ``words(flat, row, d, count)`` are words of a row from ``d`` on."""
    G = row_vectors * lanes

    @T.inline
    def load(P, QT, block, b, h, row0, rows, count, width):
        """``QT[i // G, d, i % G]`` is word ``d`` of query ``row0 + i``; queries past ``rows`` repeat the last one."""
        if width >= lanes:
            for vector in T.serial(count // lanes):
                for part in T.serial(blocks(width, lanes)):
                    d0: T.int64 = block_begin(part, width, lanes)
                    for r in T.serial(lanes):
                        q_row: T.int64 = P.q.row(b, h, row0 + T.min(vector * lanes + r, rows - 1))
                        block[r, T.Ramp(0, 1, lanes)] = words(P.q.flat, q_row, d0, lanes)
                    to = T.meta_var(place(QT, "w", vector // row_vectors, d0, vector % row_vectors * lanes))
                    T.evaluate(transpose(to, 4 * G, place(block, "r", 0, 0), 4 * lanes))
        else:
            for i in T.serial(count):
                q_row: T.int64 = P.q.row(b, h, row0 + T.min(i, rows - 1))
                for d in T.serial(width):
                    QT[i // G, d, i % G] = words(P.q.flat, q_row, d, 1)

    return load


def make_transposed_store(row_vectors: int, lanes: int):
    """A macro that stores results which lie transposed."""
    G = row_vectors * lanes

    @T.inline
    def store(P, OT, factors, block, b, h, row0, rows):
        """Element ``e`` of the result of query ``row0 + i`` is ``OT[i // G, e, i % G] * factors[i]``."""
        if P.head_dim_v >= lanes:
            for vector in T.serial((rows + (lanes - 1)) // lanes):
                for part in T.serial(blocks(P.head_dim_v, lanes)):
                    e0: T.int64 = block_begin(part, P.head_dim_v, lanes)
                    source = T.meta_var(place(OT, "r", vector // row_vectors, e0, vector % row_vectors * lanes))
                    T.evaluate(transpose(place(block, "w", 0, 0), 4 * lanes, source, 4 * G))
                    for r in T.serial(T.min(T.int64(lanes), rows - vector * lanes)):
                        o_row: T.int64 = P.o.row(b, h, row0 + vector * lanes + r)
                        for lane in T.vectorized(lanes):
                            P.o.flat[o_row + e0 + lane] = T.cast(
                                block[r, lane] * factors[vector * lanes + r], P.o.flat.dtype
                            )
        else:
            for i in T.serial(rows):
                o_row: T.int64 = P.o.row(b, h, row0 + i)
                for e in T.serial(P.head_dim_v):
                    P.o.flat[o_row + e] = T.cast(OT[i // G, e, i % G] * factors[i], P.o.flat.dtype)

    return store


def blocks(words: Expr, lanes: int) -> Expr:
    """How many blocks cover ``words`` words; the last one overlaps the one before where it has to."""
    return (words + (lanes - 1)) // lanes


def block_begin(block: Expr, words: Expr, lanes: int) -> Expr:
    """Where a block begins; there must be at least ``lanes`` words."""
    return T.min(block * lanes, words - lanes)
