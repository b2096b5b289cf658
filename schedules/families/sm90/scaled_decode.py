"""Decoding over pages of a cache of 8 bits on Hopper: keys and values on the left of products, in tiles that come in
boxes of TMA (:mod:`schedules.families.sm90.tile_ring`).

A block is a warp, and takes splits of a sequence and a head of keys, one or several.  A call with few rows a key has a
kernel of its own with half as many rows a tile, and so half the registers: 16 warps share a multiprocessor then.
Where such a call has few splits, all warps of a block share each (:mod:`schedules.families.sm90.wide_tiles`).  Which
kernel it is, and with how many blocks, follows from shapes (:mod:`schedules.families.sm90.block_program`); bits are the
same.

Beyond head_dim 128 kernels are those of :mod:`schedules.families.mma.scaled_decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import PAGED_DECODE_SCALED, Program, Rejected, Target
from schedules.families.mma import asynchronous, scaled_decode
from schedules.families.mma.mma import ALIGNMENT
from schedules.families.mma.scaled_decode import ScaledDecoding
from schedules.families.mma.scaled_machines import ScaledDecodeMachine, over
from schedules.families.mma.widen import SCALE_BYTES, ScaledGeometry
from schedules.families.sm90.block_program import block_program
from schedules.families.sm90.tile_ring import ByteBoxes, RingMachine, Walk, place_bytes
from schedules.families.sm90.wide_tiles import WideMachine
from schedules.tile.dtypes import tensor_types
from schedules.tile.geometry import parameterised, site
from schedules.tile.key_range import KeyTiles
from schedules.tile.packing import PackedRows
from schedules.tile.parameters import Parameters
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal, WorkTile, ceildiv


@dataclass(frozen=True)
class Config(asynchronous.Config):
    """``transposed`` has keys and values on the left of products, and ``num_stages`` places for tiles of K or V.

    ``few_blocks_per_sm``: as ``min_blocks_per_sm``, of the kernel for few rows.  ``wide_warps``: warps of a block that
    share a split, and ``wide_blocks_per_sm`` of these.
    """

    transposed: bool = False
    few_blocks_per_sm: int = 16
    wide_warps: int = 8
    wide_blocks_per_sm: int = 3


@T.inline
def attend(pattern, config, machine_type, geometry, results, packs, early, blocks):
    """The body of a kernel, of ``blocks`` blocks for each sequence and head of keys."""
    M, N, W = T.meta_var((config.block_m, config.block_n, machine_type.warps_of(config)))
    # 1. Descriptors of keys and values, made on the host.
    boxes = T.meta_var(ByteBoxes(geometry, N))
    k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode(k_map, geometry.k, pattern.head_dim))
    v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode(v_map, geometry.v, pattern.head_dim_v))
    # 2. Blocks, those of the first splits of all sequences first.
    group = T.bind(T.truncdiv(geometry.heads, geometry.kv_heads) if packs else T.int32(1))
    units = T.bind(T.truncdiv(geometry.heads, group))
    everything = T.bind(units * geometry.batch)
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.min_blocks_per_sm})
    x = T.cta_id([everything * blocks])
    lane, _warp = T.thread_id([32, W])
    if early:
        T.ptx.griddepcontrol.launch_dependents()
    # 3. Whose rows and keys these are.
    number: T.int32 = T.truncdiv(x, everything)
    place: T.int32 = x - number * everything
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
    if seqlen_q <= 0:
        splits = 0
    # 4. Its splits, and the row tiles of each.
    seen = KeyTiles(pattern, at, *positions, N)
    walk = Walk(seen, positions, split_tiles, splits, number, blocks, ceildiv(rows.sequence.length, M))
    sources = T.meta_var(
        (
            rows,
            geometry.key_rows(geometry.k, b, kv_head, keys),
            geometry.key_rows(geometry.v, b, kv_head, keys),
        )
    )
    span = T.meta_var((walk.row_tile * M, positions[1]))
    of_machine = T.meta_var((geometry, at, span, seen, sources, WorkTile(b, h, walk.row_tile), lane))
    machine = machine_type(pattern, config, *of_machine, boxes=boxes, walk=walk)
    machine.begin_block()
    machine.start()
    if splits > 0:
        machine.read_rows(rows)
    machine.compute(rows, results)


def partial(pattern: Pattern, config, name: str, machine_type, packs: bool, early: bool) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table, k_scale, v_scale, softmax_scale, wanted,
    blocks, *params)``; ``packs`` and ``early`` as without scales."""

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
            k_scale: T.handle,
            v_scale: T.handle,
            softmax_scale: T.float32,
            wanted: T.int32,
            blocks: T.int32,
        ):
            handles = T.meta_var(((q, k, v), (cu_seqlens_q, seqlens_k, page_table), (k_scale, v_scale)))
            geometry = ScaledGeometry(pattern, *handles, softmax_scale, values, ALIGNMENT, machine_type.cache)
            results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
            attend(pattern, config, machine_type, geometry, results, packs, early, blocks)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


@dataclass(frozen=True)
class RingDecoding(ScaledDecoding):
    """The kernels over a cache of one dtype."""

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Values of each field that are worth trying."""
        found = ScaledDecoding.space(self, template, pattern, target)
        return {
            **found,
            "transposed": (False, True),
            "num_stages": (2, 3, 4, 5, 6),
            "min_blocks_per_sm": (8, 12),
            "few_blocks_per_sm": (12, 16, 20),
            "wide_blocks_per_sm": (2, 3),
        }

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the machine has room for as many warps."""
        if config.transposed and not config.q_in_registers:
            return Rejected("keys on the left of products take queries that are kept in registers")
        if config.transposed and pattern.head_dim_v > config.wide_warps * 32:
            return Rejected(
                f"wide_warps {config.wide_warps}: each has up to 32 columns of head_dim_v {pattern.head_dim_v}"
            )
        return ScaledDecoding.feasible(self, pattern, config, target)

    @staticmethod
    def _beside(pattern: Pattern, config) -> int:
        if not config.transposed:
            return ScaledDecoding._beside(pattern, config)
        types, columns = tensor_types(pattern), (pattern.head_dim, pattern.head_dim_v)
        found = config.num_stages * (place_bytes(config.block_n, max(columns)) + config.block_n * SCALE_BYTES)
        return found - config.num_stages * config.block_n * sum(columns) * types.k.bytes

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The launches."""
        if not config.transposed:
            return ScaledDecoding.program(self, pattern, config, target, traversal, name)
        packs = not pattern.depends_on_head

        def make(machine, config, when):
            symbol = name if when == "more" else f"{name}_{when}"
            return partial(pattern, config, symbol, over(machine, self.cache, target.arch), packs, self.early)

        # Rows that don't exist have scores of 0, which raise no reference unless something is added to them: else a
        # tile of fewer rows would have other bits.
        few = {}
        if pattern.is_scale_only:
            of_few = replace(
                config, block_m=RingMachine.fragment_type.tile_rows, min_blocks_per_sm=config.few_blocks_per_sm
            )
            few["few"] = make(RingMachine, of_few, "few")
            if not pattern.has_gaps:
                wide = replace(of_few, num_stages=2, min_blocks_per_sm=config.wide_blocks_per_sm)
                few["wide"] = make(WideMachine, wide, "wide")
        return block_program(
            pattern, make(RingMachine, config, "more"), few, config, name, packs=packs, waits=self.early
        )


#: By head_dim, the first that is large enough.
CONFIGS: Mapping[int, Config] = {
    64: Config(16, 32, 1, 4, 12, q_in_registers=True, transposed=True, few_blocks_per_sm=20),
    128: Config(16, 32, 1, 3, 8, q_in_registers=True, transposed=True),
    256: Config(*scaled_decode.CONFIGS[256]),
}

#: The kinds, by name.
KINDS = {
    kind: RingDecoding(Config, ScaledDecodeMachine, CONFIGS, asynchronous.feasible, early=True, cache=cache)
    for cache, kind in PAGED_DECODE_SCALED.items()
}
