"""What comes before and after the turns of a backward kernel: delta and empty sums, and results that are rounded."""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.cpu.backward.config import Config
from schedules.families.cpu.backward.geometry import MOST_SECTIONS, SUMMED, Geometry
from schedules.families.cpu.steps import f32
from schedules.families.cpu.vector_math import exp2
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY
from tvm_flash.packs.manifest import Param

#: Elements in a vector: what every head_dim is a multiple of.
_W = 8


def round_up(x, step):
    """How many steps ``x`` takes."""
    return (x + (step - 1)) // step


def summed(pattern: Pattern) -> list[Param]:
    """The parameters whose gradients are summed over everything of a head."""
    return [p for p in pattern.params if p.gradient and p.of_gradient in SUMMED and not p.rank]


def learnt_tables(pattern: Pattern) -> tuple[Param, ...]:
    """The tables that ask for a gradient."""
    return tuple(p for p in pattern.learnt if p.rank)


def make_ends(pattern: Pattern, config: Config, accumulates: bool) -> SimpleNamespace:
    """The macros by name; with ``accumulates`` results are added to what is there."""
    M, asked = config.block_m, summed(pattern)
    spread = [p for p in pattern.learnt if p not in asked and not p.rank]

    def announce(P, items, products):
        """Tell the thread pool what the next loop is; ``products`` multiply-adds for each query and key."""
        return T.call_extern("void", "tvm_flash_announce", items, P.batch * P.heads * P.seqlen_q * products)

    @T.inline
    def begin_rows(P: Geometry, w, tiles):
        """``delta`` of a tile of rows, and zeros in ``dq_sum``."""
        acc = T.sblock_alloc_buffer((_W,), "float32", scope="local")
        b: T.int64 = w // tiles // P.heads
        h: T.int64 = w // tiles % P.heads
        row0: T.int64 = w % tiles * M
        for i in T.serial(row0, T.min(row0 + M, P.seqlen_q)):
            o_row: T.int64 = P.o.row(b, h, i)
            do_row: T.int64 = P.do.row(b, h, i)
            at: T.int64 = (b * P.heads + h) * P.seqlen_q + i
            for lane in T.vectorized(_W):
                acc[lane] = T.float32(0)
            for e in T.serial(P.head_dim_v // _W):
                for lane in T.vectorized(_W):
                    acc[lane] += f32(P.o.flat[o_row + e * _W + lane]) * f32(P.do.flat[do_row + e * _W + lane])
            for lane in T.vectorized(4):
                acc[lane] += acc[lane + 4]
            total: T.float32 = (acc[0] + acc[2]) + (acc[1] + acc[3])
            if P.has_dlse():
                total -= P.dlse[at]
            P.delta[at] = total
            for d in T.serial(P.width // _W):
                for lane in T.vectorized(_W):
                    P.dq_sum[at * P.width + d * _W + lane] = T.float32(0)

    def result(before, value):
        """What an element of a result becomes."""
        return before + value if accumulates else T.cast(value, pattern.dtype)

    @T.inline
    def store_rows(P: Geometry, out, sum, width, dim, heads, seqlen, w, tiles, step, factor):
        """Round a tile of rows of sums to an output's dtype."""
        b: T.int64 = w // tiles // heads
        h: T.int64 = w // tiles % heads
        first: T.int64 = w % tiles * step
        for i in T.serial(first, T.min(first + step, seqlen)):
            row: T.int64 = out.row(b, h, i)
            at: T.int64 = ((b * heads + h) * seqlen + i) * width
            for d in T.serial(dim // _W):
                for lane in T.vectorized(_W):
                    out.flat[row + d * _W + lane] = result(
                        out.flat[row + d * _W + lane], sum[at + d * _W + lane] * factor
                    )

    def begin_parameters(P):
        """Zeros in the sums of parameters."""
        for p in asked:
            with T.serial(P.batch * P.heads * MOST_SECTIONS) as x:
                T.buffer_store(P.sums[p.name], T.float32(0), [x])

    def begin_places(P, b, h):
        """Zeros in a head's gradients of parameters over queries or keys."""
        for p in spread if not accumulates else ():
            extents = {
                "i": P.seqlen_q if "i" in p.axes else T.int64(1),
                "j": P.seqlen_kv if "j" in p.axes else T.int64(1),
            }
            with T.serial(T.Select(P.wants(p), extents["i"], T.int64(0))) as i, T.serial(extents["j"]) as j:
                at = {"b": b, "h": h, "i": i, "j": j}
                T.buffer_store(P.gradients[p.name], T.float32(0), [at[a] for a in p.of_gradient])

    def add_to_sinks(P, b, h, site, total):
        at = (b * P.heads + h) * MOST_SECTIONS
        for p in pattern.learnt_of_sink:
            T.buffer_store(P.sums[p.name], total * pattern.sink_gradient(p.name, site), [at])

    @T.inline
    def begin_sinks(P: Geometry, b, h):
        """The share of a head's rows in the gradients of parameters of the sink: ``-sum_i exp(sink - lse) * delta``."""
        site = T.meta_var(P.site(b, h))
        sink: T.float32 = pattern.sink(site)
        if sink > T.float32(NEGATIVE_INFINITY):
            total: T.float32 = T.float32(0)
            for i in T.serial(P.seqlen_q):
                total -= exp2((sink - P.lse[P.lse_row(b, h) + i]) * T.float32(LOG2_E)) * P.delta[P.lse_row(b, h) + i]
            add_to_sinks(P, b, h, site, total)

    def store_parameters(P):
        """Add the sums of key sections, and where a parameter is one number, those of all heads."""
        for p in asked:
            out = P.gradients[p.name]
            if not p.axes and not accumulates:
                T.buffer_store(out, T.float32(0), [T.int64(0)])
            with T.grid(P.batch, P.heads) as (b, h):
                place = [b, h] if p.axes else [T.int64(0)]
                if p.axes and not accumulates:
                    T.buffer_store(out, T.float32(0), place)
                with T.serial(T.int64(MOST_SECTIONS)) as c:
                    share = P.sums[p.name][(b * P.heads + h) * MOST_SECTIONS + c]
                    T.buffer_store(out, out[tuple(place)] + share, place)

    return SimpleNamespace(
        announce=announce,
        begin_rows=begin_rows,
        store_rows=store_rows,
        begin_sinks=begin_sinks,
        begin_places=begin_places,
        has_places=bool(spread),
        begin_parameters=begin_parameters,
        store_parameters=store_parameters,
    )
