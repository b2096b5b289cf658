"""The backward kernel of ragged sequences on the CPU: the turns of each, in equal shares.

A sequence has sections of its own, as many as it has alone, and its turns begin with everybody's; where it has no more,
the others go on.  Before and after the turns, rows and keys are what they are whichever sequence they belong to.  Where
a table is learnt, each share of a turn adds to the sums of a lane of its own (``tables.py``): which items a share has
follows from the lengths alone.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.parameters import append_arguments, gradient_name, gradient_symbols
from schedules.definition.pattern import Pattern
from schedules.families.cpu.backward.config import Config, default_configs, feasible, space
from schedules.families.cpu.backward.ends import learnt_tables, make_ends, round_up, summed
from schedules.families.cpu.backward.geometry import MOST_SECTIONS, Geometry, SequenceGeometry, flat_by_role, sections
from schedules.families.cpu.backward.kernel import vector_argument
from schedules.families.cpu.backward.tables import MOST_LANES, Tables, lanes_of
from schedules.families.cpu.backward.tile import section_macro
from schedules.families.cpu.config import multiplication
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import LLVM_FUNCTIONS
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.cpu.ragged.sequences import (
    MALFORMED,
    MOST_SHARES,
    Shares,
    Starts,
    append,
    begin_share,
    find,
    make_sense,
)
from schedules.families.interface import Program, ScheduledLaunch, Target
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import Workspace

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

#: What a section costs beside its products, in pairs of a query and a key.
_COST_OF_A_SECTION = 4096


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel of one pattern (see :mod:`schedules.families.interface`)."""
    arguments, values = pattern.parameter_symbols()
    gradients, targets = gradient_symbols(pattern.params, pattern.index_dtype)
    asked = [p for p in pattern.params if p.gradient]
    of_heads = summed(pattern)
    isa = ISAS[target.isa]
    G = config.row_vectors * isa.lanes
    width, width_v = (("*", ("ceildiv", d, G), G) for d in ("head_dim", "head_dim_v"))
    of_parameter = (("*", ("+", "batch", 1), "heads", MOST_SECTIONS),)
    workspaces = (
        Workspace("delta", "float32", (("*", "heads", "total_q"),)),
        Workspace("dq_sum", "float32", (("*", "heads", "total_q", width),)),
        Workspace("dk_sum", "float32", (("*", "kv_heads", "total_k", width),)),
        Workspace("dv_sum", "float32", (("*", "kv_heads", "total_k", width_v),)),
        *(Workspace(f"{gradient_name(p)}_sums", "float32", of_parameter) for p in of_heads),
    )
    sums = {p.name: vector_argument(f"{gradient_name(p)}_sums") for p in of_heads}
    func = _kernel(pattern, config, isa, values, targets, sums, name)
    func = append_arguments(func, [*arguments, *gradients, *sums.values()])
    roles = ("q", "k", "v", "o", "do", "lse", "dlse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k", "softmax_scale")
    roles += ("delta", "dq_sum", "dk_sum", "dv_sum", *(p.name for p in pattern.params))
    roles += (*map(gradient_name, asked), *(f"{gradient_name(p)}_sums" for p in of_heads))
    launch = ScheduledLaunch(func, roles)
    alignment = element_type(pattern.dtype).bytes
    return Program("backward", (launch,), PIPELINE, alignment=alignment, index_bits=64, workspaces=workspaces)


def _kernel(pattern: Pattern, config: Config, isa: Isa, params, gradients, sums, name: str):
    dtype = pattern.dtype
    M, N, G = config.block_m, config.block_n, config.row_vectors * isa.lanes
    section = section_macro(pattern, config, isa)
    up, ends, learns_sinks = round_up, make_ends(pattern, config, accumulates=False), bool(pattern.learnt_of_sink)
    of_tables = learnt_tables(pattern)
    learns_tables = bool(of_tables)

    def tensor(handle, role, heads, positions, width):
        """One of the rank-3 arguments: a buffer, and its strides."""
        by_position, by_head = (tirx.Var(f"{role}_{axis}_stride", "int64") for axis in ("seq", "head"))
        buffer = T.match_buffer(handle, (positions, heads, width), dtype, strides=(by_position, by_head, T.int64(1)))
        return buffer, (T.int64(0), by_head, by_position)

    def vector(handle, name):
        """A flat float32 argument of any length."""
        return T.match_buffer(handle, (tirx.Var(f"{name}_length", "int64"),), "float32")

    def of_sequences(whole: Geometry, batch) -> SequenceGeometry:
        """The call, with the first row and key of all."""
        zero = T.int64(0)
        known = {**vars(whole), "batch": batch, "total_q": whole.seqlen_q, "total_k": whole.seqlen_kv}
        return SequenceGeometry(**known, first_row=zero, first_part_row=zero, first_key=zero)

    def of_sequence(call: SequenceGeometry, first_q, length_q, first_k, length_k):
        """The call of one sequence."""
        own = {role: getattr(call, role).from_row(first_q) for role in ("q", "o", "do", "dq")}
        own |= {role: getattr(call, role).from_row(first_k) for role in ("k", "v", "dk", "dv")}
        lengths = {"seqlen_q": length_q, "seqlen_kv": length_k}
        return replace(call, **own, **lengths, first_row=first_q, first_key=first_k)

    def sections_of(length_q, length_k):
        """How many sections a sequence has: one too if it has keys and no queries, so that these get zeros."""
        count = T.max(sections(length_q, length_k), T.int64(1))
        return T.Select(length_k > 0, count, T.int64(0))

    def sections_at_most(total_q, total_k):
        """How many sections no sequence has more of."""
        return T.max(sections(total_q, total_k), T.int64(1))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        do: T.handle,
        lse: T.handle,
        dlse: T.handle,
        dq: T.handle,
        dk: T.handle,
        dv: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        softmax_scale: T.float32,
        delta: T.handle,
        dq_sum: T.handle,
        dk_sum: T.handle,
        dv_sum: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        total_q, total_k, heads, kv_heads, starts = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v = T.int64(), T.int64()
        tensors = T.meta_var(
            {
                "q": tensor(q, "q", heads, total_q, head_dim),
                "k": tensor(k, "k", kv_heads, total_k, head_dim),
                "v": tensor(v, "v", kv_heads, total_k, head_dim_v),
                "o": tensor(o, "o", heads, total_q, head_dim_v),
                "do": tensor(do, "do", heads, total_q, head_dim_v),
                "dq": tensor(dq, "dq", heads, total_q, head_dim),
                "dk": tensor(dk, "dk", kv_heads, total_k, head_dim),
                "dv": tensor(dv, "dv", kv_heads, total_k, head_dim_v),
            }
        )
        LSE = T.meta_var(vector(lse, "lse"))
        dLSE = T.meta_var(vector(dlse, "dlse"))
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32", align=4)
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32", align=4)
        rest = T.meta_var(
            [vector(delta, "delta"), vector(dq_sum, "dq_sum"), vector(dk_sum, "dk_sum"), vector(dv_sum, "dv_sum")]
        )
        t = T.meta_var(flat_by_role(tensors))
        lanes = T.meta_var(lanes_of(starts * kv_heads * sections_at_most(total_q, total_k)))
        tables = T.meta_var(Tables.of(of_tables, params, gradients, lanes))
        # Before and after the turns, all rows and keys are those of one sequence.
        whole = T.meta_var(
            Geometry(
                *(pattern, t.q, t.k, t.v, t.o, LSE, LSE.shape[0], softmax_scale, params),
                *(T.int64(1), heads, kv_heads, total_q, total_k, head_dim, head_dim_v),
                *(t.do, dLSE, dLSE.shape[0], t.dq, t.dk, t.dv, *rest),
                *(sums, tables, gradients, up(head_dim, G) * G, up(head_dim_v, G) * G),
            )
        )
        call = T.meta_var(of_sequences(whole, starts - 1))
        queries = T.meta_var(Starts(q_starts, starts - 1, total_q))
        keys = T.meta_var(Starts(k_starts, starts - 1, total_k))
        if multiplication(isa, dtype) in LLVM_FUNCTIONS:
            T.attr(0, "pragma_import_llvm", LLVM_FUNCTIONS[multiplication(isa, dtype)])
        assert T.And(make_sense(queries), make_sense(keys)), MALFORMED
        row_tiles: T.int64 = up(total_q, M)
        key_tiles: T.int64 = up(total_k, N)

        # 1. What each row needs to know, and empty sums.
        ends.begin_parameters(call)
        tables.begin(lanes)
        T.evaluate(ends.announce(whole, heads * row_tiles, head_dim + head_dim_v))
        for w in T.parallel(heads * row_tiles):
            with T.sblock("begin"):
                T.reads()
                T.writes()
                ends.begin_rows(whole, w, row_tiles)

        # 2. The turns, each of the sequences that have so many.
        with T.sblock("turns"):
            T.reads()
            T.writes()
            items = T.sblock_alloc_buffer((starts + 1,), "int64")
            costs = T.sblock_alloc_buffer((starts + 1,), "int64")
            shares = T.meta_var(Shares(items, costs, starts, MOST_LANES if learns_tables else MOST_SHARES))
            turns: T.int64 = T.int64(0)
            for s in T.serial(starts):
                turns = T.max(turns, sections_of(queries.own_length(s), keys.length(s)))
            for turn in T.serial(turns):
                items[0] = T.int64(0)
                costs[0] = T.int64(0)
                for s in T.serial(starts):
                    length_q: T.int64 = queries.own_length(s)
                    length_k: T.int64 = keys.length(s)
                    count: T.int64 = sections_of(length_q, length_k)
                    pairs: T.int64 = up(length_q, T.max(count, T.int64(1))) * up(length_k, T.max(count, T.int64(1)))
                    append(
                        shares,
                        s,
                        T.Select(count > turn, kv_heads * count, T.int64(0)),
                        pairs * call.group + _COST_OF_A_SECTION,
                    )
                T.evaluate(
                    T.call_extern(
                        "void", "tvm_flash_announce", shares.count, shares.cost * (3 * head_dim + 2 * head_dim_v)
                    )
                )
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
                            length_q: T.int64 = queries.own_length(s)
                            first_k: T.int64 = keys.begin(s)
                            length_k: T.int64 = keys.length(s)
                            P = T.meta_var(of_sequence(call, first_q, length_q, first_k, length_k))
                            count: T.int64 = sections_of(length_q, length_k)
                            section_rows: T.int64 = up(up(length_q, M), count) * M
                            section_keys: T.int64 = up(up(length_k, N), count) * N
                            w: T.int64 = item - items[s]
                            slot: T.int64 = w % count
                            first_key: T.int64 = slot * section_keys
                            first_row: T.int64 = (slot + turn) % count * section_rows
                            end_key: T.int64 = T.min(first_key + section_keys, length_k)
                            end_row: T.int64 = T.min(first_row + section_rows, length_q)
                            g: T.int64 = w // count
                            with T.sblock("section"):
                                T.reads()
                                T.writes()
                                section(
                                    *(P.in_lane(share), s, g),
                                    *(first_key, end_key, first_row, end_row, slot, turn == 0),
                                )

        # 3. The results.
        if learns_sinks:
            for w in T.parallel((starts - 1) * heads):
                with T.sblock("sinks"):
                    T.reads()
                    T.writes()
                    s: T.int64 = w // heads
                    P = T.meta_var(
                        of_sequence(call, queries.begin(s), queries.own_length(s), keys.begin(s), keys.length(s))
                    )
                    ends.begin_sinks(P, s, w % heads)
        ends.store_parameters(call)
        tables.store(lanes, False)
        T.evaluate(ends.announce(whole, heads * row_tiles, head_dim))
        for w in T.parallel(heads * row_tiles):
            with T.sblock("store_rows"):
                T.reads()
                T.writes()
                ends.store_rows(
                    whole, t.dq, whole.dq_sum, whole.width, head_dim, heads, total_q, w, row_tiles, M, softmax_scale
                )
        T.evaluate(ends.announce(whole, kv_heads * key_tiles, head_dim + head_dim_v))
        for w in T.parallel(kv_heads * key_tiles):
            with T.sblock("store_keys"):
                T.reads()
                T.writes()
                ends.store_rows(
                    whole, t.dk, whole.dk_sum, whole.width, head_dim, kv_heads, total_k, w, key_tiles, N, softmax_scale
                )
                ends.store_rows(
                    *(whole, t.dv, whole.dv_sum, whole.width_v, head_dim_v, kv_heads, total_k, w, key_tiles, N),
                    T.float32(1),
                )

    return backward
