"""Decoding: few query rows for each head of keys, so that the keys are split among blocks.

A block has the forward kernel's main loop with one consumer warpgroup and a single producer's warp, and takes a run of
splits, one after the other (:mod:`schedules.families.sm90.runs`).  How many that are, and whether the blocks of a row's
runs put what they have together themselves or leave it to a second launch, follows from how many the machine has places
for (:func:`schedules.families.sm90.run_program.run_program`).

Splits are at fixed positions, multiples of a length that follows from the number of keys alone, so that a sequence has
the same bits in any batch.  What limits these kernels is memory: every step masks and takes the maximum, and one kernel
for a window with sides beyond the ends serves full and causal attention as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.config import BARRIER_BYTES, OTHER_REGISTERS, PANEL, WARPGROUP_ROWS, panels
from schedules.families.sm90.config import available_memory as _available_memory
from schedules.families.sm90.run_program import Several, run_program
from schedules.families.sm90.runs import FEW_ROWS, compute_runs
from schedules.families.sm90.split_scheduler import ALIGNMENT
from schedules.families.sm90.states import bytes_of_states
from schedules.tile.geometry import parameterised
from schedules.tile.tile_scheduler import Traversal

#: Keys of a split, by the fewest keys of the sequence: as few as fill the machine with one sequence, unless its blocks
#: would take longer to start and end than to read (the table in docs/hopper.md, "Decoding").
SPLIT_LENGTHS = ((0, 64), (384, 128), (1025, 192), (1537, 256), (8192, 512), (65536, 1024), (131072, 2048))
#: How many of them a split of a long sequence has, by the heads of keys: from four on, the machine is filled all the
#: same.  1 x 32k keys of 8 heads 38.8 us in place of 46.3 (H200, with an earlier second launch).
_LONG, _OF_HEADS = 32768, ((0, 1), (4, 2))
_SPLIT_LENGTH = (
    "*",
    ("steps", "seqlen_kv", *SPLIT_LENGTHS),
    ("max", 1, ("*", ("steps", "seqlen_kv", (0, 0), (_LONG, 1)), ("steps", "kv_heads", *_OF_HEADS))),
)

#: Multiprocessors of an H100 or H200: how many blocks there are to fill.
MULTIPROCESSORS = 132
_REGISTER_FILE = 65536
_MOST_REGISTERS = 255


@dataclass(frozen=True)
class Config:
    """How a decoding kernel is scheduled.

    Attributes
    ----------
    block_n: keys of a tile, a multiple of 16 that divides every split.
    num_stages: stages of each of the two pipelines, of K and of V.
    blocks_per_sm: blocks that share a multiprocessor.
    pack_heads: query heads of a group share a work tile (``packing.py``).
    """

    block_n: int = 64
    num_stages: int = 2
    blocks_per_sm: int = 2
    pack_heads: bool = True

    # What the main loop asks of a configuration.
    num_consumer_warpgroups = 1
    block_m = WARPGROUP_ROWS
    pingpong = overlap_tiles = several_tiles = persistent = False
    tiles_per_cta = 1

    @property
    def threads(self) -> int:
        """Threads of a block: the consumer warpgroup and the producer's warp."""
        return 32 * (WARPS + 1)

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return min(_REGISTER_FILE // (self.threads * self.blocks_per_sm) // 8 * 8, _MOST_REGISTERS)


@dataclass(frozen=True)
class Places:
    """Blocks that have several work tiles each.

    With places for three blocks on a multiprocessor 64 x 1k keys of 8 heads at head_dim 64 took the same, but there is
    no memory for the queries of two work tiles then.  With stages of keys in their place 64 x 4k took 126.3 us (four)
    and 127.5 (five) in place of 124.2, with fewer 130.6 (two; H200).

    Attributes
    ----------
    blocks_per_sm: as in ``Config``.
    query_stages: of how many work tiles a block has the queries.
    cost: as in :class:`schedules.families.sm90.run_program.Several`.
    """

    blocks_per_sm: int
    query_stages: int
    cost: int


#: By the columns of queries and values; with more there is no such kernel.
SEVERAL = ((64, Places(2, 2, 200)), (128, Places(2, 1, 100)))


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration of a pattern."""
    packs = not pattern.depends_on_head
    if pattern.head_dim <= 64:
        # Two blocks with four stages: 26.6 us in place of 21.4 for 8 x 1500 keys of 20 heads, 37.9 in place of 38.2 for
        # 32 x 2k of 32 on 8 (H200).
        return {0: Config(num_stages=3, blocks_per_sm=3, pack_heads=packs)}
    if pattern.head_dim <= 128:
        return {0: Config(pack_heads=packs)}
    return {0: Config(num_stages=2, blocks_per_sm=1, pack_heads=packs)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config`` that are worth trying."""
    return {"block_n": (32, 64), "num_stages": (2, 3, 4, 8), "blocks_per_sm": (1, 2, 3, 4)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    if config.block_n % 16:
        return Rejected(f"block_n {config.block_n} is not a multiple of 16")
    if refusal := split_keys.undivided(config.block_n, SPLIT_LENGTHS):
        return refusal
    if not 2 <= config.num_stages <= 8:
        return Rejected(f"num_stages {config.num_stages} is not from 2 to 8")
    if pattern.has_gaps:
        return Rejected("a mask with gaps isn't decoded with split keys: every tile of them is loaded")
    if pattern.depends_on_head and config.pack_heads:
        return Rejected("a score or a mask that differs from head to head can't have heads packed")
    available = _available_memory(config)
    if (needed := _shared_memory(pattern, config)) > available:
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {available}")
    needed = config.block_n // 2 + config.block_n // 4 + pattern.head_dim_v // 2 + OTHER_REGISTERS
    if needed > config.registers:
        return Rejected(f"needs about {needed} registers a thread, there are {config.registers}")
    return None


def _shared_memory(pattern: Pattern, config: Config) -> int:
    keys = config.num_stages * config.block_n * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    return (config.block_m * panels(pattern.head_dim) + keys) * 2 * PANEL + bytes_of_states(pattern) + BARRIER_BYTES


def _places(pattern: Pattern, config: Config, target: Target) -> Places | None:
    """How blocks have several work tiles each, if they can, and there is a use for it."""
    columns = max(pattern.head_dim, pattern.head_dim_v)
    places = next((p for most, p in SEVERAL if columns <= most), None)
    if places is None or not config.pack_heads:
        return None
    own = replace(config, blocks_per_sm=places.blocks_per_sm)
    needed = (
        _shared_memory(pattern, own) + (places.query_stages - 1) * config.block_m * panels(pattern.head_dim) * 2 * PANEL
    )
    return None if feasible(pattern, own, target) or needed > _available_memory(own) else places


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The launches; ``config`` must be feasible."""

    def runs(few: bool) -> PrimFunc:
        func = parameterised(pattern, lambda parameters: compute_runs(pattern, config, traversal, few, parameters))
        return func.with_attr("global_symbol", f"{name}_few" if few else name)

    def several(places: Places) -> PrimFunc:
        own = replace(config, blocks_per_sm=places.blocks_per_sm)

        def make(parameters):
            return compute_runs(pattern, own, traversal, True, parameters, False, places.query_stages)

        return parameterised(pattern, make).with_attr("global_symbol", f"{name}_several")

    places = _places(pattern, config, target)

    return run_program(
        pattern,
        runs(False),
        (runs(True), FEW_ROWS),
        None if places is None else Several(several(places), MULTIPROCESSORS * places.blocks_per_sm, places.cost),
        traversal,
        name,
        _SPLIT_LENGTH,
        resident=MULTIPROCESSORS * config.blocks_per_sm,
        packs=config.pack_heads,
        most_rows=WARPGROUP_ROWS,
        alignment=ALIGNMENT,
    )
