"""The same over keys and values in 8 bits: a tile of them becomes one in the dtype of queries; all else is the same.

So the result is, bit for bit, that of the kernel without scales on what the cache stands for
(:mod:`schedules.definition.cache`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.definition.attention import append_arguments
from schedules.definition.cache import STORED
from schedules.definition.pattern import Pattern
from schedules.families.cpu import widen
from schedules.families.cpu.config import Config, default_configs, feasible
from schedules.families.cpu.flat import flat
from schedules.families.cpu.geometry import Tensor
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import functions_of
from schedules.families.cpu.paged.kernel import Pages, pages_argument
from schedules.families.cpu.pages import MALFORMED, PagedGeometry, ScaledTensor
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.cpu.ragged import sequences
from schedules.families.cpu.ragged.kernel import rows_argument
from schedules.families.cpu.ragged.sequences import Starts, make_sense
from schedules.families.cpu.ragged.work import attend_macro
from schedules.families.cpu.space import space
from schedules.families.interface import Program, Target, paged_program
from schedules.tile.tile_scheduler import Traversal


@dataclass(frozen=True)
class ScaledPages:
    """Kernels over caches of one dtype, a kind of the family's."""

    cache: str
    Config = Config
    default_configs = staticmethod(default_configs)
    feasible = staticmethod(feasible)
    space = staticmethod(space)

    def program(self, pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel of one pattern, in the order of a template (see :mod:`schedules.families.interface`)."""
        arguments, values = pattern.parameter_symbols()
        func = _kernel(pattern, STORED[self.cache], config, ISAS[target.isa], traversal, values, name)
        func = append_arguments(func, arguments)
        return paged_program(func, pattern.params, PIPELINE, alignment=1, index_bits=64, scaled=True)


def _kernel(pattern: Pattern, stored: str, config: Config, isa: Isa, traversal: Traversal, params, name: str):
    dtype = pattern.dtype
    attend = attend_macro(pattern, config, isa, traversal)
    how = {"dtype": dtype, "looks_up": widen.looks_up(isa, dtype)}

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        page_table: T.handle,
        k_scale: T.handle,
        v_scale: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        total_q, heads, kv_heads, starts, batch = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        pages, page_size, pages_per_sequence, table_stride = T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v, lse_length = T.int64(), T.int64(), T.int64()
        k_scale_page, k_scale_head, v_scale_page, v_scale_head = T.int64(), T.int64(), T.int64(), T.int64()
        Q = T.meta_var(rows_argument(q, "q", total_q, heads, head_dim, dtype))
        K = T.meta_var(pages_argument(k, "k", pages, page_size, kv_heads, head_dim, stored))
        V = T.meta_var(pages_argument(v, "v", pages, page_size, kv_heads, head_dim_v, stored))
        O = T.meta_var(rows_argument(o, "o", total_q, heads, head_dim_v, dtype))
        LSE = T.match_buffer(lse, (lse_length,), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32", align=4)
        lengths = T.match_buffer(seqlens_k, (batch,), "int32", align=4)
        entries = T.match_buffer(
            page_table, (batch, pages_per_sequence), "int32", strides=(table_stride, T.int64(1)), align=4
        )
        k_scales = T.match_buffer(k_scale, (pages, kv_heads), "float32", strides=(k_scale_page, k_scale_head), align=4)
        v_scales = T.match_buffer(v_scale, (pages, kv_heads), "float32", strides=(v_scale_page, v_scale_head), align=4)
        rows = T.meta_var([Tensor(flat(buffer), strides) for buffer, strides in (Q, O)])
        cache = T.meta_var(
            [
                ScaledTensor(None, K[1], stored=flat(K[0]), scales=k_scales, width=pattern.head_dim, **how),
                ScaledTensor(None, V[1], stored=flat(V[0]), scales=v_scales, width=pattern.head_dim_v, **how),
            ]
        )
        table = T.meta_var(flat(entries))
        queries = T.meta_var(Starts(q_starts, batch, total_q))
        keys = T.meta_var(Pages(lengths, table, table_stride, batch, pages_per_sequence, pages, page_size))
        call = T.meta_var(
            PagedGeometry(
                *(pattern, rows[0], *cache, rows[1], LSE, lse_length, softmax_scale, params),
                *(batch, heads, kv_heads, total_q, T.int64(0), head_dim, head_dim_v, T.int64(0), total_q, T.int64(0)),
                *(table, T.int64(0), page_size),
            )
        )
        T.attr(0, "pragma_import_llvm", functions_of(isa, dtype) + widen.functions(isa, dtype))
        assert make_sense(queries), sequences.MALFORMED
        assert keys.make_sense(), MALFORMED
        attend(call, queries, keys)

    return attention
