"""Decoding on the mma.sync families: few query rows for each head of keys, so that the keys are split among blocks.

Two launches.  The first (:func:`partial`) has a block for each split of the keys, head of keys and batch: the machine
of the forward kernel with the one m-tile that the packed rows of a group of heads fill, restricted to the split's
keys.  It leaves a normalised output in float32 and its log-sum-exp.  The second combines the splits
(:mod:`schedules.tile.combine`).

What limits these kernels is how fast keys come: a block is a single warp, which waits for nobody, and as many of them
share a multiprocessor as have room for their pipelines.  Every step masks and takes the maximum, so that no step is
ever repeated.  Splits are at fixed positions, multiples of a length that follows from the number of keys alone, so that
a sequence has the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import limits, split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.mma.mma import ALIGNMENT, this_place
from schedules.tile.epilogue import normalise
from schedules.tile.geometry import Geometry, flat, parameterised, site, wide
from schedules.tile.key_range import KeyTiles, next_visible
from schedules.tile.key_source import ContiguousRows
from schedules.tile.packing import PackedRows
from schedules.tile.parameters import Parameters
from schedules.tile.partial import PartialResults
from schedules.tile.softmax import OnlineSoftmax
from schedules.tile.tile_scheduler import Order, Traversal, Work, WorkTile, ceildiv

#: Keys of a split, by the fewest keys of the sequence.
SPLIT_LENGTHS = ((0, 64), (2048, 128), (4096, 256), (131072, 512))


@T.meta_class
class PackedSoftmax(OnlineSoftmax):
    """The shared softmax on packed rows: the query of each row is computed once and kept."""

    is_whole = False
    rows_follow = False

    def __init__(self, *args):
        OnlineSoftmax.__init__(self, *args)
        self.queries = T.alloc_local([2 * self.m_tiles], "int32")

    def position(self, row0, column0, t, g, r, e):
        """Query and key of a register, from this lane's first key."""
        return self.queries[t * 2 + r], OnlineSoftmax.position(self, row0, column0, t, g, r, e)[1]

    def row(self, row0, t, r):
        """The packed row of a register, from that of this lane's first one."""
        return OnlineSoftmax.position(self, row0, 0, t, 0, r, 0)[0]

    @T.inline
    def place(self, rows, row0):
        """Set the queries of this lane's rows."""
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                self.queries[t * 2 + r] = rows.position(self.row(row0, t, r))


@T.inline
def store_partial(machine, rows, geometry, O, LSE, splits, split):
    """Write this lane's elements of a finished split: float32, normalised, and the log-sum-exp of its rows."""
    softmax = T.meta_var(machine.softmax)
    fragment = T.meta_var(machine.fragment)
    stride = T.meta_var(machine.o_stride)
    columns = T.meta_var(machine.head_dim_v)
    normalise(softmax, machine.O, stride)
    for t in T.unroll(machine.m_tiles):
        for r in T.unroll(2):
            row = T.meta_var(softmax.row(machine.row0, t, r))
            if row < rows.sequence.length:
                index: T.int64 = rows.number(geometry, row) * wide(splits) + wide(split)
                if fragment.column(machine.lane) == 0:
                    LSE[index] = softmax.lse(t * 2 + r)
                for g in T.unroll(stride // 4):
                    i = T.meta_var(t * stride + g * 4 + r * 2)
                    column = T.meta_var(machine.output_column(g) + fragment.column(machine.lane))
                    T.ptx["st.global.v2.f32"](
                        O.ptr_to([index * columns + wide(column)]), machine.O[i], machine.O[i + 1]
                    )


def _order(traversal: Traversal, splits, units, batch) -> Order:
    """The splits of ``units`` m-blocks of each batch in a template's order.

    The first axis of a grid is the only one that has room for more than 65535: seq-outer has the units of all batches
    there, heads-outer the splits of all.
    """
    if traversal.layout == "bshd":
        return traversal.order(Work(splits, units, batch), lambda: units * batch)
    return traversal.order(Work(splits * batch, units, 1), lambda: units)


def _batch_and_split(traversal: Traversal, item: WorkTile, splits):
    """Batch and split of a work tile of ``_order``."""
    if traversal.layout == "bshd":
        return item.batch, item.m_block
    return T.truncdiv(item.m_block, splits), T.truncmod(item.m_block, splits)


def partial(pattern: Pattern, config, traversal: Traversal, name: str, machine_type, packs: bool) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, softmax_scale, split_length, *params)``.

    ``split_length`` keys are a split, a multiple of ``block_n``; ``packs`` says that the heads of a group share tiles.
    """
    M, N, W = config.block_m, config.block_n, config.num_warps

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o_partial: T.handle,
            lse_partial: T.handle,
            softmax_scale: T.float32,
            split_length: T.int32,
        ):
            # 1. Arguments, and a block for each split, m-block of a group's rows, group and batch.
            geometry = Geometry(pattern, traversal, (q, k, v), softmax_scale, values, ALIGNMENT)
            results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
            group = T.meta_var(T.truncdiv(geometry.heads, geometry.kv_heads) if packs else T.int32(1))
            m_blocks = T.meta_var(ceildiv(group * geometry.seqlen_q, M))
            units = T.meta_var(T.truncdiv(geometry.heads, group) * m_blocks)
            order = T.meta_var(_order(traversal, results.splits, units, geometry.batch))
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.min_blocks_per_sm})
            x, y, z = T.cta_id([*order.grid()])
            tid = T.thread_id([32 * W])
            # 2. Which rows of which group of heads this block computes, and which keys.
            item = T.meta_var(order.work_tile(this_place(x, y, z)))
            batch_split = T.meta_var(_batch_and_split(traversal, item, results.splits))
            b: T.int32 = batch_split[0]
            split: T.int32 = batch_split[1]
            unit: T.int32 = item.head
            first_unit: T.int32 = T.truncdiv(unit, m_blocks)
            h: T.int32 = first_unit * group
            m_block: T.int32 = unit - first_unit * m_blocks
            kv_head: T.int32 = geometry.kv_head(h)
            keys = T.meta_var(geometry.keys.of(b))
            parameters = Parameters(geometry, b, h)
            at = T.meta_var(site(geometry, parameters, b, h))
            rows = T.meta_var(PackedRows(geometry.q, b, h, group, geometry.queries.of(b).length))
            positions = T.meta_var((T.int32(0), geometry.queries.of(b).length - 1))
            first_tile: T.int32 = split * T.truncdiv(split_length, N)
            end_tile: T.int32 = first_tile + T.truncdiv(split_length, N)
            tiles = KeyTiles(pattern, at, *positions, N, (first_tile, end_tile))
            # 3. The online softmax over the split's tiles, from right to left.
            sources = T.meta_var(
                (
                    rows,
                    ContiguousRows(geometry.k, b, kv_head, keys),
                    ContiguousRows(geometry.v, b, kv_head, keys),
                )
            )
            span = T.meta_var((m_block * M, positions[1]))
            machine = machine_type(pattern, config, geometry, at, span, tiles, sources, WorkTile(b, h, m_block), tid)
            machine.softmax.place(rows, machine.row0)
            machine.start()
            tile: T.int32 = tiles.end - 1
            while tile >= tiles.begin:
                machine.step(tile, True, True)
                next_visible(pattern, at, tiles, positions, N, tile)
            machine.wait_for_copies()
            # 4. The split's output and log-sum-exp.
            machine.finish()
            O = flat(results.o)
            LSE = flat(results.lse)
            store_partial(machine, rows, geometry, O, LSE, results.splits, split)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


@dataclass(frozen=True)
class Decoding:
    """A family's kernels of this kind, with what :mod:`schedules.families.interface` asks of one.

    Attributes
    ----------
    Config: the family's own.
    machine: the type of its machine for packed rows.
    configs: by head_dim, the first that is large enough.
    fits: the family's ``feasible``.
    """

    Config: type
    machine: type
    configs: Mapping[int, object]
    fits: Callable[[Pattern, object, Target], Rejected | None]

    def default_configs(self, template: str, pattern: Pattern, target: Target) -> dict[int, object]:
        """The configuration of a pattern."""
        return {0: limits.by_head_dim(self.configs, pattern)}

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Values of each field that are worth trying."""
        return {"block_n": (16, 32, 64), "num_stages": (2, 3, 4), "min_blocks_per_sm": (2, 3, 4, 6, 8)}

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the machine has room for a block, and tiles fill the splits."""
        if config.warps_per_tile > 1:
            return Rejected(f"warps_per_tile {config.warps_per_tile}: packed rows aren't shared by warps")
        return split_keys.undivided(config.block_n, SPLIT_LENGTHS) or self.fits(pattern, config, target)

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The two launches."""
        func = partial(pattern, config, traversal, name, self.machine, not pattern.depends_on_head)
        return split_keys.program(pattern, func, traversal, name, SPLIT_LENGTHS, alignment=ALIGNMENT, waits=False)
