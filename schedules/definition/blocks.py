"""The named blocks of which every operator is made: plain mathematics over logical indices, a line or two each.

Axes are letters: ``b`` batch, ``h`` query head, ``g`` head of keys and values, ``r`` query heads that read one, ``i``
query, ``j`` key, ``d`` element of a query or key row, ``e`` of a value row, ``p`` part, ``t`` and ``u`` row of queries
and of keys where sequences lie one after the other, ``w``, ``x``, ``y``, ``z`` those of a table.  What lies between
inputs and outputs is float32.  Of the buffers that a block is given, the first is what it writes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.definition.cache import STORED, dequantised, narrowed
from schedules.definition.parameters import Site, gradient_name
from tvm_flash.packs.manifest import INTERLEAVED, UNTURNED, Param


class Formula(Protocol):
    """What a definition says: sizes, and the expressions that the blocks of its operators are written with.

    ``s`` is the product ``q · k``, neither scaled nor modified.  ``visible`` is None where every query sees every key.
    ``sink`` is a logit of a head that is in the denominator of the softmax beside those of keys, if ``has_sink``.
    ``score_gradient`` is the derivative of the score with respect to the scaled product; ``differentiate`` raises a
    DefinitionError where it, or that of a parameter, isn't known.  ``cache`` is the dtype of keys and values where an
    operator lets them have 8 bits.
    """

    head_dim: int
    head_dim_v: int
    dtype: str
    index_dtype: str
    cache: str
    params: tuple[Param, ...]
    has_sink: bool

    def score(self, site: Site, s: Expr, i: Expr, j: Expr) -> Expr: ...

    def visible(self, site: Site, i: Expr, j: Expr) -> Expr | None: ...

    def sink(self, site: Site) -> Expr: ...

    def differentiate(self) -> None: ...

    def score_gradient(self, site: Site, s: Expr, i: Expr, j: Expr) -> Expr: ...

    def parameter_gradient(self, name: str, site: Site, s: Expr, i: Expr, j: Expr) -> Expr: ...

    def table_gradients(self, name: str, site: Site, s: Expr, i: Expr, j: Expr) -> list[tuple[tuple, Expr]]: ...

    def sink_gradient(self, name: str, site: Site) -> Expr: ...

    def is_of_sink(self, param: Param) -> bool: ...


#: What the indices of a table are called.
_OF_TABLES = "wxyz"


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, where it has them, and its run-time parameters by name, as numbers or tensors.

    ``lengths`` are, if sequences have lengths of their own, those of queries and of keys, ``(batch,)`` buffers;
    ``seqlen_q`` and ``seqlen_kv`` are then those of all sequences together, which no sequence exceeds.
    """

    batch: Expr
    heads: Expr
    seqlen_q: Expr
    head_dim_v: Expr
    kv_heads: Expr | None = None
    seqlen_kv: Expr | None = None
    head_dim: Expr | None = None
    parts: Expr | None = None
    softmax_scale: Expr | None = None
    params: Mapping[str, Expr] | None = None
    lengths: tuple[tirx.Buffer, tirx.Buffer] | None = None

    def extents(self, axes: str) -> list[Expr]:
        """How many values an index of each axis has."""
        sizes = {"b": self.batch, "h": self.heads, "g": self.kv_heads, "i": self.seqlen_q, "j": self.seqlen_kv}
        sizes |= {"d": self.head_dim, "e": self.head_dim_v, "p": self.parts, "t": self.seqlen_q, "u": self.seqlen_kv}
        return [self.group if a == "r" else sizes[a] for a in axes]

    @property
    def group(self) -> Expr:
        """How many query heads read one head of keys and values."""
        return self.heads // self.kv_heads

    def kv_head(self, h: Expr) -> Expr:
        """The head of keys and values that query head ``h`` reads."""
        return h // self.group

    def query_head(self, g: Expr, r: Expr) -> Expr:
        """Query head number ``r`` of those that read head ``g``."""
        return g * self.group + r

    def site(self, b: Expr, h: Expr) -> Site:
        """The call at one batch entry and head."""
        seqlens = (self.seqlen_q, self.seqlen_kv) if self.lengths is None else (x[b] for x in self.lengths)
        seqlen_q, seqlen_kv = seqlens
        return Site(b, h, self.batch, self.heads, self.kv_heads, seqlen_q, seqlen_kv, self.softmax_scale, self.params)


# ---------------------------------------------------------------- how a block is written


@contextlib.contextmanager
def _block(name: str, n: Sizes, kept: str, summed: str = "", sizes: Sequence[Expr] | None = None):
    """A named block with its loops; gives its index variables, those it reduces over last.

    ``sizes`` are the extents of the axes ``kept`` if they are none of attention's.
    """
    axes = kept + summed
    extents = n.extents(axes) if sizes is None else [*sizes, *n.extents(summed)]
    with T.grid(*extents) as loops, T.sblock(name):
        loops = list(loops) if len(axes) > 1 else [loops]
        index = T.axis.remap("S" * len(kept) + "R" * len(summed), loops)
        index = list(index) if len(axes) > 1 else [index]
        for axis, loop, var in zip(axes, loops, index, strict=True):
            IRBuilder.name(f"{axis}0", loop)
            IRBuilder.name(axis, var)
        yield index


def _store(place: Expr, value: Expr) -> None:
    T.buffer_store(place.source, value, list(place.indices))


def _add(place: Expr, value: Expr) -> None:
    """Sum ``value`` over the block's reduced axes."""
    with T.init():
        _store(place, T.float32(0))
    _store(place, place + value)


def _largest(place: Expr, value: Expr) -> None:
    """The maximum of ``value`` over the block's reduced axes, −inf of none."""
    with T.init():
        _store(place, T.float32(-math.inf))
    _store(place, T.max(place, value))


def _wide(x: Expr) -> Expr:
    return T.cast(x, "float32")


def _zero_if(condition: Expr, value: Expr) -> Expr:
    return T.if_then_else(condition, T.float32(0), value)


# ---------------------------------------------------------------- products


def row_products(name: str, S, Q, K, n: Sizes, axis: str) -> None:
    """``S[b, h, i, j] = sum_d Q[b, h, i, d] * K[b, g, j, d]``; ``axis`` is ``d``, or ``e`` of rows like values."""
    with _block(name, n, "bhij", axis) as (b, h, i, j, d):
        _add(S[b, h, i, j], _wide(Q[b, h, i, d]) * _wide(K[b, n.kv_head(h), j, d]))


def sum_over_keys(name: str, A, P, V, n: Sizes, axis: str) -> None:
    """``A[b, h, i, e] = sum_j P[b, h, i, j] * V[b, g, j, e]``."""
    with _block(name, n, f"bhi{axis}", "j") as (b, h, i, e, j):
        _add(A[b, h, i, e], P[b, h, i, j] * _wide(V[b, n.kv_head(h), j, e]))


def sum_over_queries(name: str, A, P, Q, n: Sizes, axis: str) -> None:
    """``A[b, g, j, d] = sum_{r, i} P[b, h, i, j] * Q[b, h, i, d]`` over the query heads ``h`` that read head ``g``."""
    with _block(name, n, f"bgj{axis}", "ri") as (b, g, j, d, r, i):
        h = n.query_head(g, r)
        _add(A[b, g, j, d], P[b, h, i, j] * _wide(Q[b, h, i, d]))


def rounded(name: str, O, A, n: Sizes, axes: str, factor: Expr, dtype: str) -> None:
    """``O = A * factor``, in the dtype of an output."""
    with _block(name, n, axes) as index:
        _store(O[tuple(index)], T.cast(A[tuple(index)] * factor, dtype))


# ---------------------------------------------------------------- scores


def score(Z, S, n: Sizes, formula: Formula) -> None:
    """The scaled and modified score."""
    with _block("score", n, "bhij") as (b, h, i, j):
        _store(Z[b, h, i, j], formula.score(n.site(b, h), S[b, h, i, j], i, j))


def mask(X, Z, n: Sizes, formula: Formula) -> None:
    """The score where query ``i`` sees key ``j``, else −inf."""
    with _block("mask", n, "bhij") as (b, h, i, j):
        visible, value = formula.visible(n.site(b, h), i, j), Z[b, h, i, j]
        _store(X[b, h, i, j], value if visible is None else _hidden_unless(visible, value))


def key_range(Y, X, n: Sizes, first_key: Expr, last_key: Expr) -> None:
    """The masked scores of keys ``[first_key, last_key)``, −inf of all others."""
    with _block("key_range", n, "bhij") as (b, h, i, j):
        _store(Y[b, h, i, j], _hidden_unless(T.And(j >= first_key, j < last_key), X[b, h, i, j]))


def _hidden_unless(visible: Expr, value: Expr) -> Expr:
    return T.if_then_else(visible, value, T.float32(-math.inf))


def of_scores(name: str, X, S, n: Sizes, value: Callable) -> None:
    """``X[b, h, i, j] = value(site, i, j, S[b, h, i, j])``."""
    with _block(name, n, "bhij") as (b, h, i, j):
        _store(X[b, h, i, j], value(n.site(b, h), i, j, S[b, h, i, j]))


# ---------------------------------------------------------------- softmax


def row_max(M, X, n: Sizes) -> None:
    """``M[b, h, i] = max_j X[b, h, i, j]``."""
    with _block("row_max", n, "bhi", "j") as (b, h, i, j):
        _largest(M[b, h, i], X[b, h, i, j])


def prob(P, X, M, n: Sizes) -> None:
    """``P = exp(X - M)``, ``M`` being a row's maximum, or its log-sum-exp; 0 where the score is hidden."""
    with _block("prob", n, "bhij") as (b, h, i, j):
        x = X[b, h, i, j]
        _store(P[b, h, i, j], _zero_if(x == T.float32(-math.inf), T.exp(x - M[b, h, i])))


def row_sum(L, P, n: Sizes) -> None:
    """``L[b, h, i] = sum_j P[b, h, i, j]``."""
    with _block("row_sum", n, "bhi", "j") as (b, h, i, j):
        _add(L[b, h, i], P[b, h, i, j])


def out(O, A, L, n: Sizes, dtype: str) -> None:
    """``O = A / L``, zero in a row with nothing to attend to."""
    with _block("out", n, "bhie") as (b, h, i, e):
        _store(O[b, h, i, e], T.cast(_zero_if(L[b, h, i] == T.float32(0), A[b, h, i, e] / L[b, h, i]), dtype))


def lse(LSE, M, L, n: Sizes) -> None:
    """``M + log(L)``, −inf in a row with nothing to attend to."""
    with _block("lse", n, "bhi") as (b, h, i):
        _store(LSE[b, h, i], M[b, h, i] + T.log(L[b, h, i]))


# ---------------------------------------------------------------- a sink: a logit without a value


def sink_max(N, M, n: Sizes, formula: Formula) -> None:
    """``N = max(M, sink)``: a row's maximum, with the sink."""
    with _block("sink_max", n, "bhi") as (b, h, i):
        _store(N[b, h, i], T.max(M[b, h, i], formula.sink(n.site(b, h))))


def sink_sum(C, L, N, n: Sizes, formula: Formula) -> None:
    """``C = L + exp(sink - N)``: what a row's probabilities are divided by; a sink of −inf adds nothing."""
    with _block("sink_sum", n, "bhi") as (b, h, i):
        sink = formula.sink(n.site(b, h))
        weight = _zero_if(sink == T.float32(-math.inf), T.exp(sink - N[b, h, i]))
        _store(C[b, h, i], L[b, h, i] + weight)


def sink_prob(W, LSE, n: Sizes, formula: Formula) -> None:
    """``W = exp(sink - LSE)``: the share of a row's probability that the sink has."""
    with _block("sink_prob", n, "bhi") as (b, h, i):
        sink = formula.sink(n.site(b, h))
        _store(W[b, h, i], _zero_if(sink == T.float32(-math.inf), T.exp(sink - LSE[b, h, i])))


# ---------------------------------------------------------------- merging parts


def part_max(M, LSES, n: Sizes) -> None:
    """``M[b, h, i] = max_p LSES[p, b, h, i]``."""
    with _block("part_max", n, "bhi", "p") as (b, h, i, p):
        _largest(M[b, h, i], LSES[p, b, h, i])


def part_weight(W, LSES, M, n: Sizes) -> None:
    """``W = exp(LSES - M)``: a part's sum of exponentials beside the largest one's; 0 if the part saw nothing."""
    with _block("part_weight", n, "pbhi") as (p, b, h, i):
        x = LSES[p, b, h, i]
        _store(W[p, b, h, i], _zero_if(x == T.float32(-math.inf), T.exp(x - M[b, h, i])))


def part_sum(L, W, n: Sizes) -> None:
    """``L[b, h, i] = sum_p W[p, b, h, i]``."""
    with _block("part_sum", n, "bhi", "p") as (b, h, i, p):
        _add(L[b, h, i], W[p, b, h, i])


def merge(A, W, OS, n: Sizes) -> None:
    """``A[b, h, i, e] = sum_p W * OS``; the output of a part that saw nothing counts as zero, whatever it holds."""
    with _block("merge", n, "bhie", "p") as (b, h, i, e, p):
        w = W[p, b, h, i]
        _add(A[b, h, i, e], _zero_if(w == T.float32(0), w * OS[p, b, h, i, e]))


# ---------------------------------------------------------------- gradients


def out_products(R, O, dO, n: Sizes) -> None:
    """``R[b, h, i] = sum_e O * dO``."""
    with _block("out_products", n, "bhi", "e") as (b, h, i, e):
        _add(R[b, h, i], _wide(O[b, h, i, e]) * _wide(dO[b, h, i, e]))


def delta(D, R, dLSE, n: Sizes) -> None:
    """``D = R - dLSE``: what the ``dp`` of a row are compared with."""
    with _block("delta", n, "bhi") as (b, h, i):
        _store(D[b, h, i], R[b, h, i] - dLSE[b, h, i])


def dscore(dX, P, dP, D, n: Sizes) -> None:
    """The gradient of the modified score: ``dX = P * (dP - D)``; 0 of a key without weight, whatever ``dP`` is."""
    with _block("dscore", n, "bhij") as (b, h, i, j):
        p = P[b, h, i, j]
        _store(dX[b, h, i, j], _zero_if(p == T.float32(0), p * (dP[b, h, i, j] - D[b, h, i])))


def ds(dS, dX, P, S, n: Sizes, formula: Formula) -> None:
    """The gradient of the scaled product: ``dS = dX * ∂score/∂s``; 0 of a key without weight."""
    with _block("ds", n, "bhij") as (b, h, i, j):
        slope = formula.score_gradient(n.site(b, h), S[b, h, i, j], i, j)
        _store(dS[b, h, i, j], _zero_if(P[b, h, i, j] == T.float32(0), dX[b, h, i, j] * slope))


def parameter_gradient(dA, param: Param, dX, P, S, n: Sizes, formula: Formula) -> None:
    """``dA = sum dX * ∂score/∂param`` over the axes that the parameter doesn't have."""
    kept = param.of_gradient
    summed = "".join(a for a in "bhij" if a not in kept)
    with _block(gradient_name(param), n, kept, summed) as index:
        at = dict(zip(kept + summed, index, strict=True))
        b, h, i, j = (at[a] for a in "bhij")
        place = tuple(at[a] for a in kept) or (tirx.const(0, b.ty.dtype),)
        T.reads(dX[b, h, i, j], P[b, h, i, j], S[b, h, i, j])
        T.writes(dA[place])  # not found by itself: this buffer becomes an argument later
        slope = formula.parameter_gradient(param.name, n.site(b, h), S[b, h, i, j], i, j)
        _add(dA[place], _zero_if(P[b, h, i, j] == T.float32(0), dX[b, h, i, j] * slope))


def table_gradient(dA, param: Param, dX, P, S, n: Sizes, formula: Formula) -> None:
    """``dA[w, …] = sum dX * ∂score/∂table[w, …]``: each element's share of all scores that read it."""
    kept = _OF_TABLES[: param.rank]
    with _block(gradient_name(param), n, kept, "bhij", list(dA.shape)) as index:
        place, (b, h, i, j) = tuple(index[: param.rank]), index[param.rank :]
        T.reads(dX[b, h, i, j], P[b, h, i, j], S[b, h, i, j])
        T.writes(dA[place])  # as above
        slope = T.float32(0)
        for read, of_element in formula.table_gradients(param.name, n.site(b, h), S[b, h, i, j], i, j):
            is_here = tirx.all(*(x == y for x, y in zip(read, place, strict=True)))
            slope = slope + _zero_if(tirx.Not(is_here), of_element)
        _add(dA[place], _zero_if(P[b, h, i, j] == T.float32(0), dX[b, h, i, j] * slope))


def sink_gradient(dA, param: Param, W, D, n: Sizes, formula: Formula) -> None:
    """``dA = -sum W * D * ∂sink/∂param``: a sink takes from its row what it has no value for."""
    kept = param.of_gradient
    summed = "".join(a for a in "bhi" if a not in kept)
    with _block(gradient_name(param), n, kept, summed) as index:
        at = dict(zip(kept + summed, index, strict=True))
        b, h, i = (at[a] for a in "bhi")
        place = tuple(at[a] for a in kept) or (tirx.const(0, b.ty.dtype),)
        T.reads(W[b, h, i], D[b, h, i])
        T.writes(dA[place])  # as above
        slope = formula.sink_gradient(param.name, n.site(b, h))
        weight = W[b, h, i]
        _add(dA[place], _zero_if(weight == T.float32(0), T.float32(0) - weight * D[b, h, i] * slope))


# ---------------------------------------------------------------- sequences of different lengths


def lengths(name: str, L, starts, n: Sizes) -> None:
    """``L[b] = starts[b + 1] - starts[b]``."""
    with _block(name, n, "b") as (b,):
        _store(L[b], T.cast(starts[b + 1] - starts[b], L.dtype))


def given_lengths(name: str, L, given, n: Sizes) -> None:
    """``L[b] = given[b]``."""
    with _block(name, n, "b") as (b,):
        _store(L[b], T.cast(given[b], L.dtype))


def from_pages(name: str, X, pages, table, n: Sizes, axes: str, scales=None) -> None:
    """``X[b, g, j, d] = pages[table[b, j // size], j % size, g, d]``, 0 past a sequence's last key.

    With ``scales[page, g]`` elements have 8 bits, and ``X`` gets what they stand for.
    """
    size = pages.shape[1]
    with _block(name, n, axes) as (b, g, j, d):
        page = T.cast(table[b, T.floordiv(j, size)], j.ty.dtype)
        element = pages[page, T.floormod(j, size), g, d]
        if scales is not None:
            element = dequantised(element, scales[page, g], X.dtype)
        _store(X[b, g, j, d], T.if_then_else(j < n.lengths[1][b], element, tirx.const(0, X.dtype)))


def unpacked(name: str, X, rows, starts, L, n: Sizes, axes: str) -> None:
    """``X[b, h, i, d] = rows[starts[b] + i, h, d]``, 0 past a sequence's end."""
    with _block(name, n, axes) as (b, h, i, d):
        row = T.cast(starts[b], i.ty.dtype) + i
        _store(X[b, h, i, d], T.if_then_else(i < L[b], rows[row, h, d], tirx.const(0, X.dtype)))


def packed(name: str, rows, X, starts, n: Sizes, axes: str) -> None:
    """``rows[t, h, d] = X[b, h, t - starts[b], d]`` of the sequence ``b`` that row ``t`` is in, 0 if it is in none."""
    with _block(name, n, axes, "b") as (t, h, d, b):
        with T.init():
            _store(rows[t, h, d], tirx.const(0, rows.dtype))
        _store(rows[t, h, d], T.if_then_else(_inside(starts, b, t), X[b, h, _position(starts, b, t), d], rows[t, h, d]))


def packed_lse(rows, LSE, starts, n: Sizes) -> None:
    """``rows[h, t] = LSE[b, h, t - starts[b]]`` of the sequence ``b`` that row ``t`` is in, −inf if it is in none."""
    with _block("lse_rows", n, "ht", "b") as (h, t, b):
        with T.init():
            _store(rows[h, t], T.float32(-math.inf))
        _store(rows[h, t], T.if_then_else(_inside(starts, b, t), LSE[b, h, _position(starts, b, t)], rows[h, t]))


def unpacked_rows(name: str, X, rows, starts, L, n: Sizes) -> None:
    """``X[b, h, i] = rows[h, starts[b] + i]``, 0 past a sequence's end."""
    with _block(name, n, "bhi") as (b, h, i):
        row = T.cast(starts[b], i.ty.dtype) + i
        _store(X[b, h, i], T.if_then_else(i < L[b], rows[h, row], T.float32(0)))


def own_keys(Y, X, n: Sizes) -> None:
    """The masked scores of the queries and keys of a sequence, −inf beyond its ends."""
    with _block("own_keys", n, "bhij") as (b, h, i, j):
        inside = T.And(i < n.lengths[0][b], j < n.lengths[1][b])
        _store(Y[b, h, i, j], _hidden_unless(inside, X[b, h, i, j]))


def _position(starts, b: Expr, t: Expr) -> Expr:
    """Where a row is in its sequence."""
    return t - T.cast(starts[b], t.ty.dtype)


def _inside(starts, b: Expr, t: Expr) -> Expr:
    first, end = (T.cast(starts[x], t.ty.dtype) for x in (b, b + 1))
    return T.And(t >= first, t < end)


# ---------------------------------------------------------------- what is turned and put into a cache


@dataclass(frozen=True)
class Rotation:
    """Angles by position, ``(positions, half)`` buffers; whether and how rows are turned; their dtype."""

    cos: tirx.Buffer
    sin: tirx.Buffer
    turns: Expr
    dtype: str

    def turned(self, row: Callable[[Expr], Expr], d: Expr, position: Expr) -> Expr:
        """Element ``d`` of a row: of two that belong together ``(a cos - b sin, a sin + b cos)``, in float32."""
        positions, half = self.cos.shape
        at = T.max(T.min(position, positions - 1), tirx.const(0, position.ty.dtype))
        beside = self.turns == INTERLEAVED
        pair = T.if_then_else(beside, T.floordiv(d, 2), T.floormod(d, half))
        a = T.if_then_else(beside, d - T.floormod(d, 2), pair)
        b = T.if_then_else(beside, a + 1, a + half)
        a, b = (_wide(row(x)) for x in (a, b))
        cos, sin = (_wide(x[at, pair]) for x in (self.cos, self.sin))
        value = T.if_then_else(d == T.if_then_else(beside, 2 * pair, pair), a * cos - b * sin, a * sin + b * cos)
        is_turned = T.And(self.turns != UNTURNED, d < 2 * half)
        return T.if_then_else(is_turned, T.cast(value, self.dtype), row(d))


def sequence_of(name: str, B, starts, n: Sizes, axis: str) -> None:
    """``B[t]``: which sequence a row is in; as many as there are of one after the last."""
    with _block(name, n, axis, "b") as (t, b):
        with T.init():
            _store(B[t], tirx.const(0, B.dtype))
        _store(B[t], B[t] + T.cast(t >= T.cast(starts[b + 1], t.ty.dtype), B.dtype))


def turned(name: str, X, rows, B, starts, first, along, rotation: Rotation, n: Sizes, axes: str) -> None:
    """``X``: rows turned by their positions, from ``first[b]`` on in each sequence, or by that if ``along`` is 0.

    Rows after the last sequence stay as they are.
    """
    with _block(name, n, axes) as (t, h, d):
        b = T.min(B[t], n.batch - 1)
        inside = _position(starts, b, t)
        if along is not None:
            inside = T.if_then_else(along != 0, inside, tirx.const(0, inside.ty.dtype))
        position = T.cast(first[b], t.ty.dtype) + inside
        value = rotation.turned(lambda x: rows[t, h, x], d, position)
        _store(X[t, h, d], T.if_then_else(B[t] < n.batch, value, rows[t, h, d]))


def place(P, B, starts, before, table, pages: Expr, size: Expr, n: Sizes) -> None:
    """``P[u]``: where in the cache a new key comes, ``page * size + row of the page``; −1 if nowhere."""
    with _block("place", n, "u") as (u,):
        b, none = T.min(B[u], n.batch - 1), tirx.const(-1, P.dtype)
        position = T.cast(before[b], u.ty.dtype) + _position(starts, b, u)
        column = T.floordiv(T.max(position, tirx.const(0, position.ty.dtype)), size)
        page = T.cast(table[b, T.min(column, table.shape[1] - 1)], u.ty.dtype)
        exists = tirx.all(B[u] < n.batch, position >= 0, column < table.shape[1], page >= 0, page < pages)
        _store(P[u], T.if_then_else(exists, page * size + T.floormod(position, size), none))


def last_row(R, P, n: Sizes) -> None:
    """``R[p, x]``: the last row that comes to row ``x`` of page ``p``; −1 if there is none."""
    with _block("row", n, "px", "u", list(R.shape)) as (p, x, u):
        with T.init():
            _store(R[p, x], tirx.const(-1, R.dtype))
        _store(R[p, x], T.max(R[p, x], T.if_then_else(P[u] == p * R.shape[1] + x, u, tirx.const(-1, R.dtype))))


def put(name: str, X, rows, R, n: Sizes, axis: str, scales, cache: str) -> None:
    """``X[p, x, g, d] = rows[R[p, x], g, d]`` where a row comes; with ``scales[p, g]`` divided by that and rounded to
    the 8 bits of ``cache``."""
    extents = [*X.shape[:2], n.kv_heads, X.shape[3]]
    with _block(name, n, f"pxg{axis}", "", extents) as (p, x, g, d):
        value = rows[T.max(R[p, x], tirx.const(0, R.dtype)), g, d]
        if scales is not None:
            value = T.cast(narrowed(_wide(value) / scales[p, g], cache), STORED[cache])
        _store(X[p, x, g, d], T.if_then_else(R[p, x] >= 0, value, X[p, x, g, d]))
