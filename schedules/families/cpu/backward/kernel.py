"""The backward kernel of the CPU family: its arguments, and how work items are ordered and shared among threads.

Queries and keys are split into equally many sections (a number that follows from the lengths alone), and the sections
of a head are taken in turns.  In turn ``t`` the work item of key section ``c`` visits query section ``c + t``, counted
round: no two items of a turn have a section in common, so that each adds to ``dk`` and ``dv`` of its keys and to ``dq``
of its queries without asking anybody.  All are summed in an order that has nothing to do with threads, each pair of
tiles is visited once (five products; a kernel for dq beside one for dk and dv would need seven), and what is kept in
memory beside the results is one float32 for each of their elements.  Where a table is learnt, items of a turn share its
elements, and are dealt to lanes (``tables.py``).

1. ``delta`` of each row, and ``dq`` begins with zeros.
2. The turns.
3. Sums are scaled, rounded and stored.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.parameters import append_arguments, gradient_name, gradient_symbols
from schedules.definition.pattern import Pattern
from schedules.families.cpu.backward.config import Config
from schedules.families.cpu.backward.ends import learnt_tables, make_ends, round_up, summed
from schedules.families.cpu.backward.geometry import MOST_SECTIONS, Geometry, flat_by_role, sections
from schedules.families.cpu.backward.tables import Tables, lanes_of
from schedules.families.cpu.backward.tile import section_macro
from schedules.families.cpu.bounds import fill_bounds, with_bounds
from schedules.families.cpu.config import multiplication
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import LLVM_FUNCTIONS
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.interface import Program, ScheduledLaunch, Target
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import Workspace


def program(
    pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str, *, accumulates: bool = False
) -> Program:
    """The kernel of one pattern, in the layout of a template (see :mod:`schedules.families.interface`).

    One that ``accumulates`` adds to its results, which are float32, for a ring of machines.
    """
    arguments, values = pattern.parameter_symbols()
    gradients, targets = gradient_symbols(pattern.params, pattern.index_dtype)
    asked = [p for p in pattern.params if p.gradient]
    of_heads = summed(pattern)
    isa = ISAS[target.isa]
    G = config.row_vectors * isa.lanes
    width, width_v = (("*", ("ceildiv", d, G), G) for d in ("head_dim", "head_dim_v"))
    workspaces = (
        Workspace("delta", "float32", (("*", "batch", "heads", "seqlen_q"),)),
        Workspace("dq_sum", "float32", (("*", "batch", "heads", "seqlen_q", width),)),
        Workspace("dk_sum", "float32", (("*", "batch", "kv_heads", "seqlen_kv", width),)),
        Workspace("dv_sum", "float32", (("*", "batch", "kv_heads", "seqlen_kv", width_v),)),
        *(
            Workspace(f"{gradient_name(p)}_sums", "float32", (("*", "batch", "heads", MOST_SECTIONS),))
            for p in of_heads
        ),
    )
    sums = {p.name: vector_argument(f"{gradient_name(p)}_sums") for p in of_heads}
    func = _kernel(pattern, config, isa, traversal, values, targets, sums, name, accumulates)
    func = append_arguments(func, [*arguments, *gradients, *sums.values()])
    roles = ("q", "k", "v", "o", "do", "lse", "dlse", "dq", "dk", "dv", "softmax_scale")
    roles += ("delta", "dq_sum", "dk_sum", "dv_sum", *(p.name for p in pattern.params))
    roles += (*map(gradient_name, asked), *(f"{gradient_name(p)}_sums" for p in of_heads))
    launch = ScheduledLaunch(func, roles)
    alignment = element_type(pattern.dtype).bytes
    return Program("backward", (launch,), PIPELINE, alignment=alignment, index_bits=64, workspaces=workspaces)


def vector_argument(name: str) -> tirx.Buffer:
    """A flat float32 tensor of any length, as an argument."""
    return tirx.decl_buffer([tirx.Var(f"{name}_length", "int64")], "float32", name=name)


def _kernel(
    pattern: Pattern, config: Config, isa: Isa, traversal: Traversal, params, gradients, sums, name, accumulates
):
    dtype, result_dtype = pattern.dtype, "float32" if accumulates else pattern.dtype
    M, N, G = config.block_m, config.block_n, config.row_vectors * isa.lanes
    one = T.int64(1)
    section = section_macro(pattern, config, isa)

    def physical(b, h, s, d):
        return (b, s, h, d) if traversal.layout == "bshd" else (b, h, s, d)

    def tensor(handle, role, heads, seqlen, dim, batch):
        """One of the rank-4 arguments: a buffer, and its strides."""
        element = result_dtype if role in ("dq", "dk", "dv") else dtype
        strides = tuple(tirx.Var(f"{role}_{axis}_stride", "int64") for axis in ("batch", "head", "seq"))
        shape = physical(batch, heads, seqlen, dim)
        return T.match_buffer(handle, shape, element, strides=physical(*strides, one)), strides

    def vector(handle, name):
        """A flat float32 argument of any length."""
        return T.match_buffer(handle, (tirx.Var(f"{name}_length", "int64"),), "float32")

    up, ends, learns_sinks = round_up, make_ends(pattern, config, accumulates), bool(pattern.learnt_of_sink)
    of_tables = learnt_tables(pattern)
    learns_tables = bool(of_tables)

    @T.inline
    def visit(P: Geometry, turn, count, section_rows, section_keys, w):
        """Work item ``w`` of a turn."""
        slot: T.int64 = w % count
        first_key: T.int64 = slot * section_keys
        first_row: T.int64 = (slot + turn) % count * section_rows
        end_key: T.int64 = T.min(first_key + section_keys, P.seqlen_kv)
        end_row: T.int64 = T.min(first_row + section_rows, P.seqlen_q)
        b: T.int64 = w // count // P.kv_heads
        g: T.int64 = w // count % P.kv_heads
        section(P, b, g, first_key, end_key, first_row, end_row, slot, turn == 0)

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
        softmax_scale: T.float32,
        delta: T.handle,
        dq_sum: T.handle,
        dk_sum: T.handle,
        dv_sum: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        batch, heads, kv_heads, seqlen_q, seqlen_kv = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v = T.int64(), T.int64()
        tensors = T.meta_var(
            {
                "q": tensor(q, "q", heads, seqlen_q, head_dim, batch),
                "k": tensor(k, "k", kv_heads, seqlen_kv, head_dim, batch),
                "v": tensor(v, "v", kv_heads, seqlen_kv, head_dim_v, batch),
                "o": tensor(o, "o", heads, seqlen_q, head_dim_v, batch),
                "do": tensor(do, "do", heads, seqlen_q, head_dim_v, batch),
                "dq": tensor(dq, "dq", heads, seqlen_q, head_dim, batch),
                "dk": tensor(dk, "dk", kv_heads, seqlen_kv, head_dim, batch),
                "dv": tensor(dv, "dv", kv_heads, seqlen_kv, head_dim_v, batch),
            }
        )
        LSE = T.meta_var(vector(lse, "lse"))
        dLSE = T.meta_var(vector(dlse, "dlse"))
        rest = T.meta_var(
            [vector(delta, "delta"), vector(dq_sum, "dq_sum"), vector(dk_sum, "dk_sum"), vector(dv_sum, "dv_sum")]
        )
        t = T.meta_var(flat_by_role(tensors))
        items = T.meta_var(batch * kv_heads * sections(seqlen_q, seqlen_kv))
        tables = T.meta_var(Tables.of(of_tables, params, gradients, lanes_of(items)))
        P = T.meta_var(
            with_bounds(
                Geometry(
                    *(pattern, t.q, t.k, t.v, t.o, LSE, LSE.shape[0], softmax_scale, params),
                    *(batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim, head_dim_v),
                    *(t.do, dLSE, dLSE.shape[0], t.dq, t.dk, t.dv, *rest),
                    *(sums, tables, gradients, up(head_dim, G) * G, up(head_dim_v, G) * G),
                ),
                M,
                N,
                isa.lanes,
            )
        )
        if multiplication(isa, dtype) in LLVM_FUNCTIONS:
            T.attr(0, "pragma_import_llvm", LLVM_FUNCTIONS[multiplication(isa, dtype)])
        row_tiles: T.int64 = up(seqlen_q, M)
        key_tiles: T.int64 = up(seqlen_kv, N)
        count: T.int64 = sections(seqlen_q, seqlen_kv)
        section_rows: T.int64 = up(row_tiles, count) * M
        section_keys: T.int64 = up(key_tiles, count) * N

        fill_bounds(P)

        # 1. What each row needs to know, and empty sums.
        ends.begin_parameters(P)
        lanes = T.meta_var(lanes_of(items))
        tables.begin(lanes)
        if ends.has_places:
            for w in T.parallel(batch * heads):
                with T.sblock("places"):
                    T.reads()
                    T.writes()
                    ends.begin_places(P, w // heads, w % heads)
        T.evaluate(ends.announce(P, batch * heads * row_tiles, head_dim + head_dim_v))
        for w in T.parallel(batch * heads * row_tiles):
            with T.sblock("begin"):
                T.reads()
                T.writes()
                ends.begin_rows(P, w, row_tiles)

        # 2. The turns.
        for turn in T.serial(count):
            T.evaluate(ends.announce(P, items, up(seqlen_kv, count) * (3 * head_dim + 2 * head_dim_v)))
            if learns_tables:
                for lane in T.parallel(lanes):
                    with T.sblock("lane"):
                        T.reads()
                        T.writes()
                        for w in T.serial(lane * items // lanes, (lane + 1) * items // lanes):
                            with T.sblock("section"):
                                T.reads()
                                T.writes()
                                visit(P.in_lane(lane), turn, count, section_rows, section_keys, w)
            else:
                for w in T.parallel(items):
                    with T.sblock("section"):
                        T.reads()
                        T.writes()
                        visit(P, turn, count, section_rows, section_keys, w)

        # 3. The results.
        if learns_sinks:
            for w in T.parallel(batch * heads):
                with T.sblock("sinks"):
                    T.reads()
                    T.writes()
                    ends.begin_sinks(P, w // heads, w % heads)
        ends.store_parameters(P)
        tables.store(lanes, accumulates)
        T.evaluate(ends.announce(P, batch * heads * row_tiles, head_dim))
        for w in T.parallel(batch * heads * row_tiles):
            with T.sblock("store_rows"):
                T.reads()
                T.writes()
                ends.store_rows(P, P.dq, P.dq_sum, P.width, head_dim, heads, seqlen_q, w, row_tiles, M, softmax_scale)
        T.evaluate(ends.announce(P, batch * kv_heads * key_tiles, head_dim + head_dim_v))
        for w in T.parallel(batch * kv_heads * key_tiles):
            with T.sblock("store_keys"):
                T.reads()
                T.writes()
                ends.store_rows(
                    P, P.dk, P.dk_sum, P.width, head_dim, kv_heads, seqlen_kv, w, key_tiles, N, softmax_scale
                )
                ends.store_rows(
                    P, P.dv, P.dv_sum, P.width_v, head_dim_v, kv_heads, seqlen_kv, w, key_tiles, N, T.float32(1)
                )

    return backward
