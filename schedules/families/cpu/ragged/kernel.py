"""The forward kernel of ragged sequences on the CPU: their starts are checked, then all is computed (``work.py``)."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import Config
from schedules.families.cpu.flat import flat
from schedules.families.cpu.geometry import SequenceGeometry, Tensor
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import functions_of
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.cpu.ragged.sequences import MALFORMED, Starts, make_sense
from schedules.families.cpu.ragged.work import attend_macro
from schedules.families.interface import Program, Target, ragged_program
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel of one pattern, in the order of a template (see :mod:`schedules.families.interface`)."""
    arguments, values = pattern.parameter_symbols()
    func = _kernel(pattern, config, ISAS[target.isa], traversal, values, name)
    func = append_arguments(func, arguments)
    itemsize = element_type(pattern.dtype).bytes
    return ragged_program(func, pattern.params, PIPELINE, alignment=itemsize, index_bits=64)


def rows_argument(handle, name: str, positions, heads, width, dtype: str):
    """An argument of rank 3: a buffer, and its strides by batch, head and position."""
    by_position, by_head = (tirx.Var(f"{name}_{axis}_stride", "int64") for axis in ("seq", "head"))
    buffer = T.match_buffer(handle, (positions, heads, width), dtype, strides=(by_position, by_head, T.int64(1)))
    return buffer, (T.int64(0), by_head, by_position)


def _kernel(pattern: Pattern, config: Config, isa: Isa, traversal: Traversal, params, name: str):
    dtype = pattern.dtype
    attend = attend_macro(pattern, config, isa, traversal)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        total_q, total_k, heads, kv_heads, starts = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v, lse_length = T.int64(), T.int64(), T.int64()
        Q = T.meta_var(rows_argument(q, "q", total_q, heads, head_dim, dtype))
        K = T.meta_var(rows_argument(k, "k", total_k, kv_heads, head_dim, dtype))
        V = T.meta_var(rows_argument(v, "v", total_k, kv_heads, head_dim_v, dtype))
        O = T.meta_var(rows_argument(o, "o", total_q, heads, head_dim_v, dtype))
        LSE = T.match_buffer(lse, (lse_length,), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32", align=4)
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32", align=4)
        queries = T.meta_var(Starts(q_starts, starts - 1, total_q))
        keys = T.meta_var(Starts(k_starts, starts - 1, total_k))
        tensors = T.meta_var([Tensor(flat(buffer), strides) for buffer, strides in (Q, K, V, O)])
        call = T.meta_var(
            SequenceGeometry(
                *(pattern, *tensors, LSE, lse_length, softmax_scale, params),
                *(starts - 1, heads, kv_heads, total_q, total_k, head_dim, head_dim_v, T.int64(0), total_q, T.int64(0)),
            )
        )
        T.attr(0, "pragma_import_llvm", functions_of(isa, dtype))
        assert T.And(make_sense(queries), make_sense(keys)), MALFORMED
        attend(call, queries, keys)

    return attention
