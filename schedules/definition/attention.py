"""The definition: attention as plain mathematics in TensorIR.

No tiles, no layout, no threads: logical tensors ``q(b, h, i, d)``, ``k(b, g, j, d)``, ``v(b, g, j, e)``, and one named
block (:mod:`schedules.definition.blocks`) for each step.  The names are the contract between this file and the
templates:

====== ========================================================================
block  computes
====== ========================================================================
qk     ``S[b, h, i, j] = sum_d q * k``, float32; head h reads kv head ``h // (heads // kv_heads)``
score  ``Z[b, h, i, j]`` = the scaled and modified score, a function of ``S * softmax_scale``
mask   ``X[b, h, i, j]`` = ``Z`` where the mask allows it, else −inf
row_max  ``M[b, h, i] = max_j X``
prob   ``P[b, h, i, j] = exp(X - M)``
row_sum  ``L[b, h, i] = sum_j P``
pv     ``A[b, h, i, e] = sum_j P * v``
out    ``o = A / L``, zero in a row with nothing to attend to
lse    ``M + log(L)``, natural logarithm, −inf in such a row
====== ========================================================================

A score may come with a *sink*, a logit of a head without a key or a value, which is in the denominator only.  Then
``sink_max``, ``N = max(M, sink)``, follows ``row_max``, and ``sink_sum``, ``C = L + exp(sink - N)``, follows
``row_sum``, and the other blocks have N and C in place of M and L: the log-sum-exp includes the sink, and a row that
sees no key has the output 0 and the lse ``sink``.

Compiled as it stands (``tvm.compile``, no schedule) it is the oracle that every template is tested against.  The other
operators are derived from it: :mod:`schedules.definition.derive`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc

from schedules.definition import blocks
from schedules.definition.blocks import Formula, Sizes
from schedules.definition.catalogue import FULL, IDENTITY, Head, Mask, Position, ScoreModification
from schedules.definition.parameters import (
    Site,
    Table,
    append_arguments,
    check_names,
    parameter_symbols,
    value_of,
)
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, Param

BLOCKS = ("qk", "score", "mask", "row_max", "prob", "row_sum", "pv", "out", "lse")

#: Further ones where there is a sink.
SINK_BLOCKS = ("sink_max", "sink_sum")

#: Attributes of a definition: names of the parameters that ask for a gradient; and of those that are tensors or tables
#: ``"name:axes"`` or ``"name:rank"``, ``"bh"`` being left out.
GRADIENTS, AXES = "gradients", "axes"


@dataclass(frozen=True)
class Attention:
    """Attention with one score modification and one mask; call it to get the TensorIR.

    ``build_kernels --definition file.py:name`` takes one of these, or any function with the signature of
    :meth:`__call__` that returns such a PrimFunc.

    ``example(batch, heads, seqlen_q, seqlen_kv)``, if there is one, has values for parameters by name, which a check
    and a picture of the definition use in place of random ones: for what means something only together.
    """

    score: ScoreModification = IDENTITY
    mask: Mask = FULL
    name: str = BUILTIN_DEFINITION
    example: Callable[[int, int, int, int], Mapping[str, Any]] | None = None

    def __post_init__(self):
        check_names(self.name, self.params)

    @property
    def params(self) -> tuple[Param, ...]:
        """Run-time parameters, the mask's first, each name once."""
        return tuple(dict.fromkeys((*self.mask.params, *self.score.params)))

    def __call__(
        self, head_dim: int, dtype: str, *, head_dim_v: int | None = None, index_dtype: str = "int64"
    ) -> PrimFunc:
        """The definition for one head_dim and dtype.

        Parameters
        ----------
        head_dim, head_dim_v: elements of a query or key row, and of a value row (the same if not given).
        dtype: of q, k, v, o: ``"float32"``, ``"float16"`` or ``"bfloat16"``; everything between is float32.
        index_dtype: ``"int64"``, or ``"int32"`` where 64-bit index arithmetic is dear.

        Returns
        -------
        A PrimFunc ``(q, k, v, o, lse, softmax_scale, *params)`` with symbolic batch, heads, kv_heads, seqlen_q,
        seqlen_kv.
        """
        params = tuple(p.beside(dtype) for p in self.params)
        arguments, values = parameter_symbols(params, index_dtype)
        formula = _Formula(self, head_dim, head_dim_v or head_dim, dtype, index_dtype)
        func = append_arguments(attend(formula, values), arguments)
        return with_parameters(func, params)


def with_parameters(func: PrimFunc, params: tuple[Param, ...]) -> PrimFunc:
    """``func`` with attributes that say of its parameters what its arguments don't."""
    asked = [p.name for p in params if p.gradient]
    tensors = [f"{p.name}:{p.axes or p.rank}" for p in params if p.is_tensor and not p.per_head]
    for name, values in ((GRADIENTS, asked), (AXES, tensors)):
        func = func.with_attr(name, values) if values else func
    return func


@dataclass(frozen=True)
class _Formula:
    """The formula of a definition that is made of a score modification and a mask."""

    definition: Attention
    head_dim: int
    head_dim_v: int
    dtype: str
    index_dtype: str
    cache: str = ""

    def score(self, site: Site, s: Expr, i: Expr, j: Expr) -> Expr:
        return self.definition.score.expr(s * site.softmax_scale, self._position(site, i, j))

    def visible(self, site: Site, i: Expr, j: Expr) -> Expr | None:
        return self.definition.mask.expr(self._position(site, i, j))

    @property
    def has_sink(self) -> bool:
        return self.definition.score.sink is not None

    def sink(self, site: Site) -> Expr:
        return self.definition.score.sink(Head(site.b, site.h, self._values(site, None, None)))

    def _values(self, site: Site, i: Expr | None, j: Expr | None) -> dict[str, Expr]:
        return {p.name: value_of(p, site, i, j) for p in self.definition.params if not p.rank}

    def _position(self, site: Site, i: Expr, j: Expr) -> Position:
        tables = {p.name: Table(site.params[p.name]) for p in self.definition.params if p.rank}
        values = self._values(site, i, j)
        return Position(site.b, site.h, i, j, site.seqlen_q, site.seqlen_kv, values, tables)


def attend(formula: Formula, values, keys: tuple[tirx.Var, tirx.Var] | None = None) -> PrimFunc:
    """The operator ``forward``, or with ``keys``, the first and the end of a range, ``partial``.

    ``values`` are the run-time parameters by name; neither they nor ``keys`` are among the function's arguments yet.
    """
    index_dtype, dtype = formula.index_dtype, formula.dtype
    o_dtype = "float32" if keys else dtype
    narrow = None if keys is None else lambda Y, X, n: blocks.key_range(Y, X, n, *keys)
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
        T.func_attr({"tirx.noalias": True, "global_symbol": "attention"})
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        seqlen_q = T.Var("seqlen_q", index_dtype)
        seqlen_kv = T.Var("seqlen_kv", index_dtype)
        Q = T.match_buffer(q, (batch, heads, seqlen_q, D), dtype)
        K = T.match_buffer(k, (batch, kv_heads, seqlen_kv, D), dtype)
        V = T.match_buffer(v, (batch, kv_heads, seqlen_kv, E), dtype)
        O = T.match_buffer(o, (batch, heads, seqlen_q, E), o_dtype)
        LSE = T.match_buffer(lse, (batch, heads, seqlen_q), "float32")
        n = T.meta_var(Sizes(batch, heads, seqlen_q, E, kv_heads, seqlen_kv, D, None, softmax_scale, values))
        steps(Q, K, V, O, LSE, n, formula, o_dtype, narrow, keys is None and formula.has_sink)

    return attention


def steps(
    Q, K, V, O, LSE, n: Sizes, formula: Formula, o_dtype: str, narrow: Callable | None = None, has_sink: bool = False
) -> None:
    """The blocks from ``qk`` to ``lse``; ``narrow(Y, X, n)`` may hide further keys after the mask."""
    rows, scores = (n.batch, n.heads, n.seqlen_q), (n.batch, n.heads, n.seqlen_q, n.seqlen_kv)
    S, Z, X, P = (scratch(name, scores) for name in "SZXP")
    M, L, A = scratch("M", rows), scratch("L", rows), scratch("A", (*rows, n.head_dim_v))
    blocks.row_products("qk", S, Q, K, n, "d")
    blocks.score(Z, S, n, formula)
    if narrow is None:
        blocks.mask(X, Z, n, formula)
    else:
        Y = scratch("Y", scores)
        blocks.mask(Y, Z, n, formula)
        narrow(X, Y, n)
    blocks.row_max(M, X, n)
    if has_sink:
        M, without = scratch("N", rows), M
        blocks.sink_max(M, without, n, formula)
    blocks.prob(P, X, M, n)
    blocks.row_sum(L, P, n)
    if has_sink:
        L, of_keys = scratch("C", rows), L
        blocks.sink_sum(L, of_keys, M, n, formula)
    blocks.sum_over_keys("pv", A, P, V, n, "e")
    blocks.out(O, A, L, n, o_dtype)
    blocks.lse(LSE, M, L, n)


def scratch(name: str, shape, dtype: str = "float32"):
    """A buffer between blocks."""
    buffer = T.sblock_alloc_buffer(shape, dtype)
    IRBuilder.name(name, buffer)
    return buffer
