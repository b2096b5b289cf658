"""A kernel of the CPU family: its arguments, and how its work items are ordered and shared among threads."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.cpu.amx import TILE_PRODUCT
from schedules.families.cpu.bounds import fill_bounds, with_bounds
from schedules.families.cpu.config import Config, multiplication
from schedules.families.cpu.decode.group import group_macro
from schedules.families.cpu.decode.products import has_pairs
from schedules.families.cpu.decode.vectors import functions
from schedules.families.cpu.few import FEW, EqualParts, few_queries_macros
from schedules.families.cpu.flat import UNBOUNDED
from schedules.families.cpu.geometry import Geometry, Tensor
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.pairs import DOT_PAIRS
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.cpu.tiles import row_tile_macro
from schedules.families.interface import Program, Target, forward_program
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal, Work, from_both_ends, place_of_item

#: What the multiplications need beyond TIR, as LLVM's assembly: instructions that LLVM doesn't find by itself.
LLVM_FUNCTIONS = {"pairs": DOT_PAIRS, "tiles": TILE_PRODUCT}


def program(
    pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str, *, result_dtype: str = ""
) -> Program:
    """The kernel of one pattern, in the order and layout of a template (see :mod:`schedules.families.interface`).

    ``result_dtype`` is that of ``o``, empty for that of ``q``.
    """
    arguments, values = pattern.parameter_symbols()
    func = _kernel(pattern, config, ISAS[target.isa], traversal, values, name, result_dtype or pattern.dtype)
    itemsize = element_type(pattern.dtype).bytes
    func = append_arguments(func, arguments)
    return forward_program(func, pattern.params, PIPELINE, alignment=itemsize, index_bits=64)


def functions_of(isa: Isa, dtype: str) -> str:
    """LLVM's assembly that forward kernels call."""
    multiplied = LLVM_FUNCTIONS.get(multiplication(isa, dtype), "")
    return multiplied + functions(isa.lanes, has_pairs(isa, dtype))


def item_macro(pattern: Pattern, traversal: Traversal):
    """``(work item, batch, heads, row tiles of a head) -> work tile``, in the template's order."""

    def work_item(w, batch, heads, tiles):
        # A section is all heads of a batch.
        order = traversal.order(Work(tiles, heads, batch), lambda: heads)
        tile = order.work_tile(place_of_item(order.grid(), w))
        # A mask leaves some m-blocks more to do than others, and a thread gets a contiguous part of the work items.
        return tile if pattern.is_unmasked else tile._replace(m_block=from_both_ends(tile.m_block, tiles))

    return work_item


def few_queries_macro(pattern: Pattern, config: Config, isa: Isa, announce):
    """A macro ``(geometry)``: few queries, whose keys are split among work items.

    A work item is of all query heads that read the same keys, which are read once for all of them.  It is of one query
    head where parameters differ from key to key, and where no other row reads its keys: on one core of a Zen 4, a query
    of 32 heads with 4096 keys each takes 0.9 of the time then in float32 and bfloat16, and 0.63 in float16.
    """
    split = EqualParts()
    sizes = (pattern.dtype, pattern.head_dim, pattern.head_dim_v, split)
    one_head, join = few_queries_macros(config.block_n, isa.lanes, *sizes)
    reads_keys = any("j" in p.axes for p in pattern.params)
    several_heads = None if reads_keys else group_macro(isa, *sizes)

    @T.inline
    def of_parts(P: Geometry, workspace, heads, count, part):
        """``part(geometry, workspace, batch, head, part, parts)`` of all heads of queries, or of keys."""
        T.evaluate(announce(P, P.batch * heads * count))
        for w in T.parallel(P.batch * heads * count):
            with T.sblock("part"):
                T.reads()
                T.writes()
                head: T.int64 = w // count
                part(P, workspace, head // heads, head % heads, w % count, count)

    @T.inline
    def of_readers(P: Geometry, workspace, b, kv_head, p, count):
        several_heads(P, workspace, b, kv_head, T.int64(1), p, count)

    @T.inline
    def few_queries(P: Geometry):
        with T.sblock("few_queries"):
            T.reads()
            T.writes()
            count: T.int64 = split.count(P)
            rows = T.meta_var(P.batch * P.heads * split.count(P) * P.seqlen_q)
            outputs = T.sblock_alloc_buffer((rows * P.head_dim_v,), "float32")
            maxima = T.sblock_alloc_buffer((rows,), "float32")
            sums = T.sblock_alloc_buffer((rows,), "float32")
            workspace = T.meta_var((outputs, maxima, sums))
            if several_heads is None:
                of_parts(P, workspace, P.heads, count, one_head)
            else:
                if P.seqlen_q == 1 and P.heads == P.kv_heads:
                    of_parts(P, workspace, P.heads, count, one_head)
                else:
                    of_parts(P, workspace, P.kv_heads, count, of_readers)
            for w in T.serial(P.batch * P.heads):
                join(P, workspace, w // P.heads, w % P.heads, count)

    return few_queries


def _kernel(pattern: Pattern, config: Config, isa: Isa, traversal: Traversal, params, name: str, result_dtype: str):
    dtype = pattern.dtype
    M = config.block_m
    one = T.int64(1)
    row_tile = row_tile_macro(config, isa, dtype, pattern.head_dim, pattern.head_dim_v)

    def physical(b, h, s, d):
        return (b, s, h, d) if traversal.layout == "bshd" else (b, h, s, d)

    work_item = item_macro(pattern, traversal)

    def announce(geometry, items):
        """Tell the thread pool what the next loop is; a small one is not worth sharing."""
        work = geometry.batch * geometry.heads * geometry.seqlen_q * geometry.seqlen_kv
        return T.call_extern("void", "tvm_flash_announce", items, work * (geometry.head_dim + geometry.head_dim_v))

    few_queries = few_queries_macro(pattern, config, isa, announce)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        batch, heads, kv_heads, seqlen_q, seqlen_kv = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v, lse_length = T.int64(), T.int64(), T.int64()
        q_b, q_h, q_s, k_b, k_h, k_s = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        v_b, v_h, v_s, o_b, o_h, o_s = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        Q = T.match_buffer(q, physical(batch, heads, seqlen_q, head_dim), dtype, strides=physical(q_b, q_h, q_s, one))
        K = T.match_buffer(
            k, physical(batch, kv_heads, seqlen_kv, head_dim), dtype, strides=physical(k_b, k_h, k_s, one)
        )
        V = T.match_buffer(
            v, physical(batch, kv_heads, seqlen_kv, head_dim_v), dtype, strides=physical(v_b, v_h, v_s, one)
        )
        O = T.match_buffer(
            o, physical(batch, heads, seqlen_q, head_dim_v), result_dtype, strides=physical(o_b, o_h, o_s, one)
        )
        LSE = T.match_buffer(lse, (lse_length,), "float32")
        q_flat = T.decl_buffer((T.int64(UNBOUNDED),), dtype, data=Q.data)
        k_flat = T.decl_buffer((T.int64(UNBOUNDED),), dtype, data=K.data)
        v_flat = T.decl_buffer((T.int64(UNBOUNDED),), dtype, data=V.data)
        o_flat = T.decl_buffer((T.int64(UNBOUNDED),), result_dtype, data=O.data)
        geometry = T.meta_var(
            Geometry(
                pattern,
                Tensor(q_flat, (q_b, q_h, q_s)),
                Tensor(k_flat, (k_b, k_h, k_s)),
                Tensor(v_flat, (v_b, v_h, v_s)),
                Tensor(o_flat, (o_b, o_h, o_s)),
                LSE,
                lse_length,
                softmax_scale,
                params,
                batch,
                heads,
                kv_heads,
                seqlen_q,
                seqlen_kv,
                head_dim,
                head_dim_v,
            )
        )
        T.attr(0, "pragma_import_llvm", functions_of(isa, dtype))
        if seqlen_q <= FEW:
            few_queries(geometry)
        else:
            P = T.meta_var(with_bounds(geometry, config.row_vectors * isa.lanes, config.block_n, isa.lanes))
            fill_bounds(P)
            T.evaluate(announce(geometry, batch * heads * ((seqlen_q + (M - 1)) // M)))
            for w in T.parallel(batch * heads * ((seqlen_q + (M - 1)) // M)):
                with T.sblock("row_tile"):
                    T.reads()
                    T.writes()
                    item = T.meta_var(work_item(w, batch, heads, (seqlen_q + (M - 1)) // M))
                    b: T.int64 = item.batch
                    h: T.int64 = item.head
                    row0: T.int64 = item.m_block * M
                    row_tile(P, b, h, row0)

    return attention
