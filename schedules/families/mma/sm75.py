"""Turing: ldmatrix and mma.sync m16n8k8 in fp16, copies staged in registers, 64 KiB of shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families import limits
from schedules.families.append import Appending
from schedules.families.interface import (
    APPEND,
    BACKWARD,
    BACKWARD_ACCUMULATE,
    CAUSAL_WITH_SINKS,
    FORWARD,
    MERGED,
    OF_SEQUENCES,
    PAGED,
    RAGGED,
    RAGGED_BACKWARD,
    Program,
    Rejected,
    Target,
)
from schedules.families.mma import backward, ldmatrix, mma, scaled
from schedules.families.mma.backward.key_machine import KeyMachine
from schedules.families.mma.backward.query_machine import QueryMachine
from schedules.families.mma.instructions import StagedStages, TuringProducts
from schedules.families.mma.ldmatrix import LdmatrixProducts
from schedules.families.mma.machine import BlockMachine
from schedules.families.mma.merged import MergedForward
from schedules.families.mma.paired import PairedProducts
from schedules.families.mma.ragged import PagedForward, RaggedForward
from schedules.families.mma.scaled_machines import StagedWidening
from schedules.families.mma.staged import StagedCopies, pack_halves, staging_registers
from schedules.tile.fragment import M16N8
from schedules.tile.tile_scheduler import Traversal

DTYPES = ("float16",)  # tensor cores know bfloat16 from sm_80 on
TEMPLATES = ("v1",)
INDEX_DTYPE = "int32"


@dataclass(frozen=True)
class Config:
    """``block_m`` rows and ``block_n`` keys a tile, ``num_warps`` warps; ``min_blocks_per_sm`` bounds the registers.

    ``q_in_registers``, ``cursors_in_shared``, ``warps_per_tile``: as for sm_80.  ``v_ahead``: as in
    :class:`LdmatrixProducts`.
    """

    block_m: int
    block_n: int
    num_warps: int
    min_blocks_per_sm: int
    q_in_registers: bool = False
    cursors_in_shared: bool = False
    v_ahead: bool = False
    warps_per_tile: int = 1


@T.meta_class
class Machine(LdmatrixProducts, StagedCopies, TuringProducts, BlockMachine):
    """Staged copies, m16n8k8."""

    def __init__(self, pattern, config, *args):
        self.q_in_registers, self.v_ahead = config.q_in_registers, config.v_ahead
        BlockMachine.__init__(
            self, pattern, config, *args, fragment=M16N8, num_stages=1,
            parts=config.warps_per_tile, cursors_in_shared=config.cursors_in_shared,
        )  # fmt: skip
        self.place_staging()


@T.meta_class
class PairedMachine(PairedProducts, Machine):
    """Two warps share the rows."""

    def place_shared(self, pool):
        """What they hand to each other is in the memory of K, between its last use in a step and the next tile."""
        end = pool.offset
        pool.move_base_to(self.first_byte + self.types.q.bytes * self.config.block_m * self.head_dim)
        PairedProducts.place_shared(self, pool)
        pool.move_base_to(end)


#: By head_dim, the first that is large enough; 64 KiB of shared memory hold no more than 64 rows and 32 keys at 256.
#: Figures: recompiled for an H200, TFLOP/s of 2k and 8k positions without a mask; PyTorch's memory-efficient kernel has
#: 125 to 131, 162 to 167 and 147.
_CONFIGS = {
    64: Config(128, 64, 4, 1, q_in_registers=True),  # 298, 310; Q loaded for every tile 286, 295
    96: Config(128, 32, 8, 1),
    128: Config(128, 32, 4, 1, cursors_in_shared=True, v_ahead=True),  # 293, 307; 8 warps and 64 keys 256, 266
    192: Config(64, 32, 4, 1),
    256: Config(64, 32, 4, 1, v_ahead=True, warps_per_tile=2),  # 230, 238; a warp to a row tile and 16 keys 197, 202
}
#: The same with parameters that differ from head to head, or a mask that reads ids, with which the configurations above
#: spill 12 to 172 bytes.
_WITH_PARAMETERS = {**_CONFIGS, 64: Config(128, 64, 4, 1), 256: Config(64, 16, 4, 1)}


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for each bucket of sequence length."""
    table = _WITH_PARAMETERS if pattern.atoms or any(p.per_head for p in pattern.params) else _CONFIGS
    return {0: limits.by_head_dim(table, pattern)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling."""
    return {
        "block_m": (64, 128, 256),
        "block_n": (16, 32, 48, 64, 96, 128),
        "num_warps": (4, 8),
        "min_blocks_per_sm": (1, 2),
        "q_in_registers": (False, True) if pattern.head_dim <= 64 else (False,),
        "cursors_in_shared": (False, True),
        "v_ahead": (False, True),
        "warps_per_tile": (1, 2) if pattern.head_dim > 128 else (1,),
    }


def feasible(pattern: Pattern, config: Config, target: Target, found: int = 0) -> Rejected | None:
    """Whether the machine has the shared memory and registers, and whether the tile can be divided.

    ``found``: bytes of shared memory for what a block has looked up.
    """
    more = staging_registers(pattern, config) + ldmatrix.operand_registers(pattern, config)
    return limits.check(
        pattern, config, target, M16N8, num_stages=1, m_tiles=(1, 2), more=more, parts=config.warps_per_tile,
        exchange_in_k=True, cursors_in_shared=config.cursors_in_shared, found=found,
    )  # fmt: skip


def _machine(config: Config) -> type:
    return PairedMachine if config.warps_per_tile == 2 else Machine


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel."""
    return mma.program(pattern, config, traversal, name, _machine(config))


def _ragged_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """What a block has looked up is beside the tiles: where pairs of warps leave no room for it, there are none."""
    table = _WITH_PARAMETERS if pattern.head_dim > 192 else {64: default_configs(template, pattern, target)[0]}
    return {0: limits.by_head_dim(table, pattern)}


def _paged_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """At 128 a warp of 32 rows has no registers for the pages of its keys and for parameters: 76 bytes spilled."""
    if any(p.per_head for p in pattern.params) and 96 < pattern.head_dim <= 128:
        return {0: Config(128, 32, 8, 1)}
    return _ragged_configs(template, pattern, target)


@T.meta_class
class ScaledMachine(StagedWidening, Machine):
    """Over a cache of 8 bits."""


def _scaled_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Those of 16 bits; no pairs of warps."""
    (config,) = _paged_configs(template, pattern, target).values()
    return {0: _WITH_PARAMETERS[256] if config.warps_per_tile > 1 else config}


@T.meta_class
class BackwardKeys(StagedStages, TuringProducts, KeyMachine):
    """The backward's launch for dk and dv."""


@T.meta_class
class BackwardQueries(StagedStages, TuringProducts, QueryMachine):
    """The backward's launch for dq."""


_BACKWARD_MACHINE = backward.Machine(staged=True)
#: Of the backward, by head_dim, the first that is large enough.
_BACKWARD = {
    64: backward.Config(128, 16, 4, 2, 1, 128, 32, 4, 2, 1, paced=False),  # 32 queries a step spilled 8 bytes
    128: backward.Config(64, 16, 4, 2, 1, 64, 16, 4, 2, 1, paced=False),
}


def _backward_config(template: str, pattern: Pattern, target: Target) -> backward.Config:
    return limits.by_head_dim(_BACKWARD, pattern)


KINDS = {
    RAGGED: RaggedForward(Config, _ragged_configs, space, feasible, _machine),
    PAGED: PagedForward(Config, _paged_configs, space, feasible, _machine),
    **scaled.kinds(
        Config, _scaled_configs, space, feasible, lambda config: ScaledMachine, beside=lambda pattern, config: 0
    ),
    BACKWARD: backward.Backward((BackwardKeys, BackwardQueries), _backward_config, _BACKWARD_MACHINE),
    BACKWARD_ACCUMULATE: backward.AccumulatingBackward(
        (BackwardKeys, BackwardQueries), _backward_config, _BACKWARD_MACHINE
    ),
    RAGGED_BACKWARD: backward.RaggedBackward((BackwardKeys, BackwardQueries), _backward_config, _BACKWARD_MACHINE),
    MERGED: MergedForward(Config, default_configs, space, feasible, _machine),
    APPEND: Appending(lambda dtype: pack_halves),
}
TENSOR_KINDS, TABLE_KINDS = (FORWARD, BACKWARD), OF_SEQUENCES
#: Where results are merged, a sink is put in once, after the parts of all keys.
SINK_KINDS = (FORWARD, *(kind for kind in KINDS if kind != MERGED))
#: These would be the usual ones again, which serve them.
UNVERIFIED_VARIANTS = {BACKWARD: (CAUSAL_WITH_SINKS,)}
#: Of these sizes no GPU has run what works on float32 results and gradients yet.
UNVERIFIED_HEAD_DIMS = dict.fromkeys((MERGED, BACKWARD_ACCUMULATE), ((256, 256),))
