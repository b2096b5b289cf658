"""Decoding over keys on pages: few query rows for each head of keys, so that the keys are split among blocks.

As :mod:`schedules.families.mma.decode`, of ragged sequences.  How long the splits of a sequence are follows from its
own number of keys (:mod:`schedules.families.split_keys`), which the device reads, while the grid follows from sizes:
a block takes splits of a sequence at equal distances, as many as there are, and all row tiles of each.  The pages of
a tile are looked up while the one before it is on its way.

The second launch knows by itself which splits a row has: what the first one doesn't write of the partial results is
never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.mma.decode import Decoding, store_partial
from schedules.families.mma.mma import ALIGNMENT
from schedules.tile.geometry import PagedGeometry, flat, parameterised, site
from schedules.tile.key_range import KeyTiles, next_visible
from schedules.tile.packing import PackedRows
from schedules.tile.parameters import Parameters
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal, WorkTile, ceildiv

#: Blocks that a launch has unless there are fewer splits: enough to fill any machine several times, and few enough that
#: those without a split, where sequences are much shorter than their table has room for, cost little.
_BLOCKS = 8192


@T.inline
def attend_split(pattern, config, machine_type, of_machine, rows, results, split):
    """One row tile's part of a split: ``of_machine`` is what a machine takes beside pattern and configuration."""
    geometry, at, span, tiles = T.meta_var(of_machine[:4])
    # 1. The online softmax over the split's tiles, from right to left.
    machine = machine_type(pattern, config, *of_machine)
    machine.softmax.place(rows, machine.row0)
    machine.start()
    tile: T.int32 = tiles.end - 1
    while tile >= tiles.begin:
        machine.step(tile, True, True)
        next_visible(pattern, at, tiles, (T.int32(0), span[1]), config.block_n, tile)
    machine.wait_for_copies()
    # 2. The split's output and log-sum-exp.
    machine.finish()
    O = flat(results.o)
    LSE = flat(results.lse)
    store_partial(machine, rows, geometry, O, LSE, results.splits, split)


@T.inline
def attend_splits(pattern, config, machine_type, geometry, results, packs, early):
    """The body of a kernel: blocks for every group of heads and sequence, those of its first split first."""
    M = T.meta_var(config.block_m)
    N = T.meta_var(config.block_n)
    W = T.meta_var(config.num_warps)
    group = T.bind(T.truncdiv(geometry.heads, geometry.kv_heads) if packs else T.int32(1))
    units = T.bind(T.truncdiv(geometry.heads, group))
    of_a_split = T.bind(units * geometry.batch)
    distance = T.bind(T.min(results.splits, ceildiv(T.int32(_BLOCKS), of_a_split)))
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.min_blocks_per_sm})
    x = T.cta_id([of_a_split * distance])
    tid = T.thread_id([32 * W])
    if early:
        T.ptx.griddepcontrol.launch_dependents()
    # 2. Which rows of which group of heads this block computes.
    first: T.int32 = T.truncdiv(x, of_a_split)
    place: T.int32 = x - first * of_a_split
    b: T.int32 = T.truncdiv(place, units)
    h: T.int32 = (place - b * units) * group
    kv_head: T.int32 = geometry.kv_head(h)
    queries = T.meta_var(geometry.queries.of(b))
    query_first: T.int32 = queries.offset
    seqlen_q: T.int32 = queries.length
    seqlen_kv: T.int32 = geometry.keys.of(b).length
    keys = T.meta_var(geometry.keys.of(b).with_length(seqlen_kv))
    parameters = Parameters(geometry, b, h)
    own = T.meta_var(site(geometry, parameters, b, h))
    at = T.meta_var(replace(own, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv))
    rows = T.meta_var(PackedRows(geometry.q, b, h, group, seqlen_q, query_first))
    positions = T.meta_var((T.int32(0), seqlen_q - 1))
    split_tiles: T.int32 = T.truncdiv(split_keys.paged_split_length(seqlen_kv), N)
    splits: T.int32 = T.min(split_keys.paged_split_count(seqlen_kv), results.splits)
    sources = T.meta_var(
        (
            rows,
            geometry.key_rows(geometry.k, b, kv_head, keys),
            geometry.key_rows(geometry.v, b, kv_head, keys),
        )
    )
    # 3. Its splits, and the row tiles of each.
    split: T.int32 = first
    while split < splits:
        m_block: T.int32 = 0
        while m_block * M < rows.sequence.length:
            tiles = KeyTiles(pattern, at, *positions, N, (split * split_tiles, (split + 1) * split_tiles))
            # 4. What they see of the split.
            span = T.meta_var((m_block * M, positions[1]))
            block = T.meta_var(WorkTile(b, h, m_block))
            of_machine = T.meta_var((geometry, at, span, tiles, sources, block, tid))
            attend_split(pattern, config, machine_type, of_machine, rows, results, split)
            T.cuda.cta_sync()
            m_block = m_block + 1
        split = split + distance


def partial(pattern: Pattern, config, name: str, machine_type, packs: bool, early: bool) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table, softmax_scale, *params)``.

    ``packs`` says that the heads of a group share tiles, ``early`` that the next launch may begin before this one ends.
    """

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o_partial: T.handle,
            lse_partial: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            softmax_scale: T.float32,
        ):
            # 1. Arguments.
            handles = T.meta_var(((q, k, v), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, values, ALIGNMENT)
            results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
            attend_splits(pattern, config, machine_type, geometry, results, packs, early)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


@dataclass(frozen=True)
class PagedDecoding(Decoding):
    """A family's kernels of this kind.

    ``early``: whether the arch lets a launch begin before the one that it waits for has ended.
    """

    early: bool = False

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the machine has room for a block, and tiles fill the splits."""
        return self.refusal(config) or self.fits(pattern, config, target)

    @staticmethod
    def refusal(config) -> Rejected | None:
        """Why tiles can't be looked up ahead, or don't fill the splits."""
        if config.num_stages < 2:
            return Rejected(f"num_stages {config.num_stages}: pages are looked up a tile ahead, which takes two")
        if config.warps_per_tile > 1:
            return Rejected(f"warps_per_tile {config.warps_per_tile}: packed rows aren't shared by warps")
        lengths = split_keys.PAGED_SPLIT_LENGTHS
        return split_keys.undivided(config.block_n, lengths)

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The two launches."""
        func = partial(pattern, config, name, self.machine, not pattern.depends_on_head, self.early)
        return split_keys.paged_program(pattern, func, name, alignment=ALIGNMENT, waits=self.early)
