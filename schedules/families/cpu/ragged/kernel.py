"""The forward kernel of ragged sequences on the CPU: the row tiles of each, or the parts of its keys, in equal shares.

1. The starts are checked, and each sequence's work items counted: row tiles, or for few queries parts of its keys.
2. Shares of them go to the threads; a work item is what it is for sequences alone (``tiles.py``, ``few.py``).
3. Parts of keys are put together.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import Config, multiplication
from schedules.families.cpu.few import FEW, PART_KEYS, few_queries_macros, parts
from schedules.families.cpu.geometry import SequenceGeometry, Tensor
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import LLVM_FUNCTIONS, UNBOUNDED, item_macro
from schedules.families.cpu.ragged.sequences import MALFORMED, Shares, Starts, append, begin_share, find, make_sense
from schedules.families.cpu.tiles import row_tile_macro
from schedules.families.interface import Program, Target, ragged_program
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal

#: What a work item costs beside its products, in keys.
_KEYS_OF_AN_ITEM = 64
#: How much longer a query and a key take where there are few queries, whose products load an operand each.
_COST_OF_FEW = 4


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel of one pattern, in the order of a template (see :mod:`schedules.families.interface`)."""
    arguments, values = pattern.parameter_symbols()
    func = _kernel(pattern, config, ISAS[target.isa], traversal, values, name)
    func = append_arguments(func, arguments)
    itemsize = element_type(pattern.dtype).bytes
    return ragged_program(func, pattern.params, "s_tir", alignment=itemsize, index_bits=64)


def _kernel(pattern: Pattern, config: Config, isa: Isa, traversal: Traversal, params, name: str):
    dtype, M = pattern.dtype, config.block_m
    row_tile = row_tile_macro(config, isa, dtype, pattern.head_dim, pattern.head_dim_v)
    part, join = few_queries_macros(config.block_n, isa.lanes, dtype, pattern.head_dim, pattern.head_dim_v)
    work_item = item_macro(pattern, traversal)

    def tensor(handle, name, positions, heads, width):
        """One of the rank-3 arguments: a buffer, and its strides."""
        by_position, by_head = (tirx.Var(f"{name}_{axis}_stride", "int64") for axis in ("seq", "head"))
        buffer = T.match_buffer(handle, (positions, heads, width), dtype, strides=(by_position, by_head, T.int64(1)))
        return buffer, (T.int64(0), by_head, by_position)

    def flat(buffer, strides):
        """The same as the steps address it."""
        return Tensor(T.decl_buffer((T.int64(UNBOUNDED),), dtype, data=buffer.data), strides)

    def of_sequence(call: SequenceGeometry, first_q, length_q, first_k, length_k, first_part_row):
        """The call of one sequence."""
        tensors = {"q": call.q.from_row(first_q), "o": call.o.from_row(first_q)}
        tensors |= {"k": call.k.from_row(first_k), "v": call.v.from_row(first_k)}
        lengths = {"seqlen_q": length_q, "seqlen_kv": length_k}
        return replace(call, **tensors, **lengths, first_row=first_q, first_part_row=first_part_row)

    def seen(P, tiles):
        """Keys that a row tile in the middle visits."""
        first = tiles // 2 * M
        visible = pattern.keys_of(P.site(T.int64(0), T.int64(0)), first, T.min(first + M, P.seqlen_q) - 1).visible
        return T.max(visible[1] - visible[0], T.int64(0))

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
        Q = T.meta_var(tensor(q, "q", total_q, heads, head_dim))
        K = T.meta_var(tensor(k, "k", total_k, kv_heads, head_dim))
        V = T.meta_var(tensor(v, "v", total_k, kv_heads, head_dim_v))
        O = T.meta_var(tensor(o, "o", total_q, heads, head_dim_v))
        LSE = T.match_buffer(lse, (lse_length,), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32", align=4)
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32", align=4)
        queries = T.meta_var(Starts(q_starts, starts - 1, total_q))
        keys = T.meta_var(Starts(k_starts, starts - 1, total_k))

        call = T.meta_var(
            SequenceGeometry(
                *(pattern, flat(*Q), flat(*K), flat(*V), flat(*O), LSE, lse_length, softmax_scale, params),
                *(starts - 1, heads, kv_heads, total_q, total_k, head_dim, head_dim_v, T.int64(0), total_q, T.int64(0)),
            )
        )
        if multiplication(isa, dtype) in LLVM_FUNCTIONS:
            T.attr(0, "pragma_import_llvm", LLVM_FUNCTIONS[multiplication(isa, dtype)])
        assert T.And(make_sense(queries), make_sense(keys)), MALFORMED
        with T.sblock("sequences"):
            T.reads()
            T.writes()
            items = T.sblock_alloc_buffer((starts + 1,), "int64")
            costs = T.sblock_alloc_buffer((starts + 1,), "int64")
            part_rows = T.sblock_alloc_buffer((starts + 1,), "int64")
            most = T.meta_var(heads * (FEW * (total_k // PART_KEYS) + T.min(total_q, FEW * starts)))
            outputs = T.sblock_alloc_buffer((most * head_dim_v,), "float32")
            maxima = T.sblock_alloc_buffer((most,), "float32")
            sums = T.sblock_alloc_buffer((most,), "float32")
            shares = T.meta_var(Shares(items, costs, starts))

            # 1. Each sequence's work items.
            items[0] = T.int64(0)
            costs[0] = T.int64(0)
            part_rows[0] = T.int64(0)
            for s in T.serial(starts):
                length_q: T.int64 = queries.length(s)
                length_k: T.int64 = keys.own_length(s)
                P = T.meta_var(of_sequence(call, T.int64(0), length_q, T.int64(0), length_k, T.int64(0)))
                count: T.int64 = T.int64(0)
                if length_q <= FEW:
                    count = T.Select(length_q > 0, parts(P), T.int64(0))
                    append(
                        shares, s, heads * count, (length_q * length_k // parts(P) + _KEYS_OF_AN_ITEM) * _COST_OF_FEW
                    )
                else:
                    tiles: T.int64 = (length_q + (M - 1)) // M
                    rows: T.int64 = (length_q + (tiles - 1)) // tiles
                    append(shares, s, heads * tiles, rows * (seen(P, tiles) + _KEYS_OF_AN_ITEM))
                part_rows[s + 1] = part_rows[s] + heads * count * length_q

            # 2. All of them, in shares.
            T.evaluate(T.call_extern("void", "tvm_flash_announce", shares.count, shares.cost * (head_dim + head_dim_v)))
            for share in T.parallel(shares.count):
                with T.sblock("share"):
                    T.reads()
                    T.writes()
                    bounds = T.sblock_alloc_buffer((2,), "int64", scope="local")
                    begin_share(shares, share, bounds, 0)
                    begin_share(shares, share + 1, bounds, 1)
                    s: T.int64 = T.int64(0)
                    find(items, starts, bounds[0], s)
                    for item in T.serial(bounds[0], bounds[1]):
                        while items[s + 1] <= item:
                            s = s + 1
                        first_q: T.int64 = queries.begin(s)
                        length_q: T.int64 = queries.length(s)
                        first_k: T.int64 = keys.begin(s)
                        length_k: T.int64 = keys.own_length(s)
                        first_part_row: T.int64 = part_rows[s]
                        w: T.int64 = item - items[s]
                        P = T.meta_var(of_sequence(call, first_q, length_q, first_k, length_k, first_part_row))
                        if length_q <= FEW:
                            with T.sblock("part"):
                                T.reads()
                                T.writes()
                                count: T.int64 = parts(P)
                                part(P, (outputs, maxima, sums), s, w // count, w % count, count)
                        else:
                            with T.sblock("row_tile"):
                                T.reads()
                                T.writes()
                                tile = T.meta_var(work_item(w, T.int64(1), heads, (length_q + (M - 1)) // M))
                                h: T.int64 = tile.head
                                row0: T.int64 = tile.m_block * M
                                row_tile(P, s, h, row0)

            # 3. The parts of keys.
            if part_rows[starts] > 0:
                T.evaluate(T.call_extern("void", "tvm_flash_announce", starts * heads, part_rows[starts] * head_dim_v))
                for w in T.parallel(starts * heads):
                    with T.sblock("join"):
                        T.reads()
                        T.writes()
                        s: T.int64 = w // heads
                        first_q: T.int64 = queries.begin(s)
                        length_q: T.int64 = queries.length(s)
                        length_k: T.int64 = keys.own_length(s)
                        first_part_row: T.int64 = part_rows[s]
                        P = T.meta_var(of_sequence(call, first_q, length_q, T.int64(0), length_k, first_part_row))
                        if length_q <= FEW:
                            join(P, (outputs, maxima, sums), s, w % heads, parts(P))

    return attention
