"""The definition: attention as plain mathematics in TensorIR.

No tiles, no layout, no threads: logical tensors ``q(b, h, i, d)``, ``k(b, g, j, d)``, ``v(b, g, j, e)``, and one named
block for each step.  The names are the contract between this file and the templates:

====== ========================================================================
block  computes
====== ========================================================================
qk     ``S[b, h, i, j] = sum_d q * k``, float32; head h reads kv head ``h // (heads // kv_heads)``
score  ``X[b, h, i, j]`` = the modified, scaled score where the mask allows it, else −inf
row_max  ``M[b, h, i] = max_j X``
prob   ``P[b, h, i, j] = exp(X - M)``
row_sum  ``L[b, h, i] = sum_j P``
pv     ``A[b, h, i, e] = sum_j P * v``
out    ``o = A / L``, zero in a row with nothing to attend to
lse    ``M + log(L)``, natural logarithm, −inf in such a row
====== ========================================================================

Compiled as it stands (``tvm.compile``, no schedule) it is the oracle that every template is tested against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import PrimType
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.catalogue import FULL, IDENTITY, Mask, Position, ScoreModification
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, Param

BLOCKS = ("qk", "score", "row_max", "prob", "row_sum", "pv", "out", "lse")


@dataclass(frozen=True)
class Attention:
    """Attention with one score modification and one mask; call it to get the TensorIR.

    ``build_kernels --definition file.py:name`` takes one of these, or any function with the signature of
    :meth:`__call__` that returns such a PrimFunc.
    """

    score: ScoreModification = IDENTITY
    mask: Mask = FULL
    name: str = BUILTIN_DEFINITION

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
        arguments, values = parameter_symbols(self.params, index_dtype)

        def position(b, h, i, j, seqlen_q, seqlen_kv):
            return Position(b, h, i, j, seqlen_q, seqlen_kv, _Parameters(values, b, h))

        def masked(s, at):
            visible, value = self.mask.expr(at), self.score.expr(s, at)
            return value if visible is None else T.if_then_else(visible, value, T.float32(-math.inf))

        func = _plain(head_dim, head_dim_v or head_dim, dtype, index_dtype, position, masked)
        return append_arguments(func, arguments)


class _Parameters:
    """Parameters by name; a per-head one is read at this position's batch and head."""

    def __init__(self, values, b, h):
        self._values, self._b, self._h = values, b, h

    def __contains__(self, name):
        return name in self._values

    def __getitem__(self, name):
        value = self._values[name]
        return value if isinstance(value.ty, PrimType) else value[self._b, self._h]


def parameter_symbols(params: tuple[Param, ...], index_dtype: str):
    """Fresh TIR variables and buffers for run-time parameters: as a list of function arguments, and by name."""
    values = {}
    for p in params:
        if p.per_head:
            shape, strides = (
                [tirx.Var(f"{p.name}_{suffix}", index_dtype) for suffix in suffixes]
                for suffixes in (("batch", "heads"), ("batch_stride", "head_stride"))
            )
            values[p.name] = tirx.decl_buffer(shape, p.dtype, name=p.name, strides=strides)
        else:
            values[p.name] = tirx.Var(p.name, p.dtype)
    return list(values.values()), values


def append_arguments(func: PrimFunc, arguments: list) -> PrimFunc:
    """``func`` with further arguments, which its body already mentions."""
    return PrimFunc([*func.params, *arguments], func.body, func.ret_type, func.attrs)


def _plain(head_dim, head_dim_v, dtype, index_dtype, position, masked) -> PrimFunc:
    D, E = (tirx.IntImm(index_dtype, x) for x in (head_dim, head_dim_v))

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
        O = T.match_buffer(o, (batch, heads, seqlen_q, E), dtype)
        LSE = T.match_buffer(lse, (batch, heads, seqlen_q), "float32")
        S = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        X = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        M = T.sblock_alloc_buffer((batch, heads, seqlen_q), "float32")
        P = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        L = T.sblock_alloc_buffer((batch, heads, seqlen_q), "float32")
        A = T.sblock_alloc_buffer((batch, heads, seqlen_q, E), "float32")
        for b0, h0, i0, j0, d0 in T.grid(batch, heads, seqlen_q, seqlen_kv, D):
            with T.sblock("qk"):
                b, h, i, j, d = T.axis.remap("SSSSR", [b0, h0, i0, j0, d0])
                with T.init():
                    S[b, h, i, j] = T.float32(0)
                S[b, h, i, j] += T.cast(Q[b, h, i, d], "float32") * T.cast(
                    K[b, h // (heads // kv_heads), j, d], "float32"
                )
        for b0, h0, i0, j0 in T.grid(batch, heads, seqlen_q, seqlen_kv):
            with T.sblock("score"):
                b, h, i, j = T.axis.remap("SSSS", [b0, h0, i0, j0])
                X[b, h, i, j] = masked(S[b, h, i, j] * softmax_scale, position(b, h, i, j, seqlen_q, seqlen_kv))
        for b0, h0, i0, j0 in T.grid(batch, heads, seqlen_q, seqlen_kv):
            with T.sblock("row_max"):
                b, h, i, j = T.axis.remap("SSSR", [b0, h0, i0, j0])
                with T.init():
                    M[b, h, i] = T.float32(-math.inf)
                M[b, h, i] = T.max(M[b, h, i], X[b, h, i, j])
        for b0, h0, i0, j0 in T.grid(batch, heads, seqlen_q, seqlen_kv):
            with T.sblock("prob"):
                b, h, i, j = T.axis.remap("SSSS", [b0, h0, i0, j0])
                P[b, h, i, j] = T.if_then_else(
                    X[b, h, i, j] == T.float32(-math.inf), T.float32(0), T.exp(X[b, h, i, j] - M[b, h, i])
                )
        for b0, h0, i0, j0 in T.grid(batch, heads, seqlen_q, seqlen_kv):
            with T.sblock("row_sum"):
                b, h, i, j = T.axis.remap("SSSR", [b0, h0, i0, j0])
                with T.init():
                    L[b, h, i] = T.float32(0)
                L[b, h, i] += P[b, h, i, j]
        for b0, h0, i0, e0, j0 in T.grid(batch, heads, seqlen_q, E, seqlen_kv):
            with T.sblock("pv"):
                b, h, i, e, j = T.axis.remap("SSSSR", [b0, h0, i0, e0, j0])
                with T.init():
                    A[b, h, i, e] = T.float32(0)
                A[b, h, i, e] += P[b, h, i, j] * T.cast(V[b, h // (heads // kv_heads), j, e], "float32")
        for b0, h0, i0, e0 in T.grid(batch, heads, seqlen_q, E):
            with T.sblock("out"):
                b, h, i, e = T.axis.remap("SSSS", [b0, h0, i0, e0])
                O[b, h, i, e] = T.cast(
                    T.if_then_else(L[b, h, i] == T.float32(0), T.float32(0), A[b, h, i, e] / L[b, h, i]), dtype
                )
        for b0, h0, i0 in T.grid(batch, heads, seqlen_q):
            with T.sblock("lse"):
                b, h, i = T.axis.remap("SSS", [b0, h0, i0])
                LSE[b, h, i] = M[b, h, i] + T.log(L[b, h, i])

    return attention
