"""Volta: mma.sync m8n8k4 on 32-row tiles without ldmatrix, copies staged in registers, 96 KiB of shared memory.

A warp holds 32 rows: its four quad pairs make a 2 x 2 arrangement of m8n8 products, and share operands by broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
from schedules.families.mma import backward, mma
from schedules.families.mma.backward.key_machine import KeyMachine
from schedules.families.mma.backward.query_machine import QueryMachine
from schedules.families.mma.backward.volta import VoltaProducts
from schedules.families.mma.instructions import StagedStages
from schedules.families.mma.machine import BlockMachine
from schedules.families.mma.merged import MergedForward
from schedules.families.mma.ragged import PagedForward, RaggedForward
from schedules.families.mma.staged import StagedCopies, pack_halves, staging_registers
from schedules.tile.fragment import VOLTA
from schedules.tile.softmax import from_lane
from schedules.tile.tile_scheduler import Traversal

DTYPES = ("float16",)  # tensor cores know bfloat16 from sm_80 on
TEMPLATES = ("v1",)
INDEX_DTYPE = "int32"

#: 2 KiB of shared memory are to be had, and four registers are what head_dim 128 would spill.
CURSORS_IN_SHARED = True

_QK = "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32"
_PV = "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32"


@dataclass(frozen=True)
class Config:
    """``block_m`` rows and ``block_n`` keys a tile, ``num_warps`` warps; ``min_blocks_per_sm`` bounds the registers."""

    block_m: int
    block_n: int
    num_warps: int
    min_blocks_per_sm: int


@T.meta_class
class Machine(StagedCopies, BlockMachine):
    """Staged copies, m8n8k4; operands come by 16-byte loads that serve two products each."""

    def __init__(self, pattern, config, *args):
        BlockMachine.__init__(
            self, pattern, config, *args, fragment=VOLTA, num_stages=1, cursors_in_shared=CURSORS_IN_SHARED
        )
        self.place_staging()

    def place_operands(self):
        """The registers of operands: one load of A and B, and P of 16 keys."""
        self.A, self.B, self.P = (T.alloc_local([n], "uint32") for n in (4, 4, 8))
        self.pair = T.alloc_local([3], "uint32")

    @T.inline
    def multiply(self, instruction, C, c, A, a, e):
        """Products of k = 4 for the quad pairs: 8 accumulators, 2 registers of A, 2 of the loaded B."""
        T.ptx[instruction](
            *[C[c + x] for x in range(8)],
            A[a],
            A[a + 1],
            self.B[e * 2],
            self.B[e * 2 + 1],
            *[C[c + x] for x in range(8)],
        )

    @T.inline
    def load_operand(self, to, tile, row, chunk):
        T.ptx["ld.shared.v4.b32"](to[0], to[1], to[2], to[3], tile.pointer(0, row, chunk))

    @T.inline
    def scores(self, first=0):
        """S = Q K, 8 columns of the head at a time."""
        row_a = T.meta_var(self.warp_row + self.lane % 8 + self.lane % 16 // 8 * 16 + self.lane // 16 * 8)
        row_b = T.meta_var(self.lane % 4 + self.lane // 16 * 4)
        for i in T.unroll(self.s_stride):
            self.S[i] = T.float32(0)
        for k in T.unroll(self.head_dim // 8):
            self.load_operand(self.A, self.q.tile, row_a, k)
            for n in T.unroll(self.config.block_n // 8):
                self.load_operand(self.B, self.k.tile, row_b + n * 8, k)
                for e in T.unroll(2):
                    self.multiply(_QK, self.S, n * 8, self.A, e * 2, e)

    @T.inline
    def probabilities(self, k, scale, first=0):
        """P of the k-th 16 keys: lanes l and l ^ 2 exchange halves of their rows, from accumulator to A operand."""
        left = T.meta_var(self.column0 == 0)
        self.softmax.exponentials(self.S, k * 4, 4, scale)
        for g in T.unroll(4):
            s = T.meta_var((k * 4 + g) * 4)
            for r in T.unroll(2):
                self.pack_pair(self.pair, r, self.S[s + r * 2], self.S[s + r * 2 + 1])
            self.pair[2] = from_lane(T.Select(left, self.pair[1], self.pair[0]), 2)
            self.P[g * 2] = T.Select(left, self.pair[0], self.pair[2])
            self.P[g * 2 + 1] = T.Select(left, self.pair[2], self.pair[1])

    @T.inline
    def accumulate(self, k, first=0):
        """O += P V for the k-th 16 keys, 4 keys a product."""
        for g in T.unroll(4):
            row = T.meta_var(k * 16 + g * 4 + self.lane % 4)
            for n in T.unroll(self.head_dim_v // 16):
                self.load_operand(self.B, self.v.tile, row, n * 2 + self.lane // 16)
                for e in T.unroll(2):
                    self.multiply(_PV, self.O, n * 16 + e * 8, self.P, g * 2, e)

    @T.inline
    def pack_pair(self, to, i, low, high):
        """Two float32 as one register of halves."""
        pack_halves(to, i, low, high)


#: By head_dim, the first that is large enough; beyond 128 the output of 32 rows doesn't fit the registers of a warp.
_CONFIGS = {
    64: Config(128, 64, 4, 1),
    96: Config(128, 32, 4, 1),
    128: Config(128, 32, 4, 1),
}


def _is_crowded(pattern: Pattern) -> bool:
    """Whether parameters that differ from head to head, which are kept in registers, are more than a padded batch's."""
    return sum(p.per_head for p in pattern.params) > 2


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for each bucket of sequence length."""
    config = limits.by_head_dim(_CONFIGS, pattern)
    if pattern.params and pattern.head_dim > 96:
        config = replace(config, block_n=16)  # with 32, parameters of masks and scores made it spill
    elif _is_crowded(pattern):
        config = replace(config, block_n=min(config.block_n, 48))  # with 64, four parameters spilled 160 bytes at 64
    return {0: config}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling."""
    return {
        "block_m": (64, 128, 256),
        "block_n": (16, 32, 48, 64, 96, 128),
        "num_warps": (4, 8),
        "min_blocks_per_sm": (1, 2),
    }


def feasible(pattern: Pattern, config: Config, target: Target, found: int = 0) -> Rejected | None:
    """Whether the machine has the shared memory and registers, and whether the tile can be divided.

    ``found``: bytes of shared memory for what a block has looked up.
    """
    if _is_crowded(pattern) and max(pattern.head_dim, pattern.head_dim_v) > 96:
        # 12 bytes of 255 registers spilled with 16 keys, the fewest
        return Rejected(
            "parameters that differ from head to head leave no registers for outputs of more than 96 columns"
        )
    more = staging_registers(pattern, config)
    return limits.check(
        pattern, config, target, VOLTA, num_stages=1, m_tiles=(1,), more=more, cursors_in_shared=CURSORS_IN_SHARED,
        found=found,
    )  # fmt: skip


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel."""
    return mma.program(pattern, config, traversal, name, Machine)


@T.meta_class
class BackwardKeys(StagedStages, VoltaProducts, KeyMachine):
    """The backward's launch for dk and dv."""


@T.meta_class
class BackwardQueries(StagedStages, VoltaProducts, QueryMachine):
    """The backward's launch for dq."""


_BACKWARD_MACHINE = backward.Machine(VOLTA, staged=True)
#: Of the backward, by head_dim, the first that is large enough; beyond 64 both sums of 32 keys don't fit the registers
#: of one warp.
_BACKWARD = {
    64: backward.Config(128, 16, 4, 2, 1, 128, 16, 4, 2, 1),
    128: backward.Config(64, 16, 4, 2, 1, 128, 16, 4, 2, 1, warps_per_tile=2),
}


def _backward_config(template: str, pattern: Pattern, target: Target) -> backward.Config:
    return limits.by_head_dim(_BACKWARD, pattern)


KINDS = {
    RAGGED: RaggedForward(Config, default_configs, space, feasible, lambda config: Machine),
    PAGED: PagedForward(Config, default_configs, space, feasible, lambda config: Machine),
    BACKWARD: backward.Backward((BackwardKeys, BackwardQueries), _backward_config, _BACKWARD_MACHINE),
    BACKWARD_ACCUMULATE: backward.AccumulatingBackward(
        (BackwardKeys, BackwardQueries), _backward_config, _BACKWARD_MACHINE
    ),
    RAGGED_BACKWARD: backward.RaggedBackward((BackwardKeys, BackwardQueries), _backward_config, _BACKWARD_MACHINE),
    MERGED: MergedForward(Config, default_configs, space, feasible, lambda config: Machine),
    APPEND: Appending(lambda dtype: pack_halves),
}
TENSOR_KINDS, TABLE_KINDS = (FORWARD, BACKWARD), OF_SEQUENCES
#: Where results are merged, a sink is put in once, after the parts of all keys.
SINK_KINDS = (FORWARD, *(kind for kind in KINDS if kind != MERGED))
#: These would be the usual ones again, which serve them.
UNVERIFIED_VARIANTS = {BACKWARD: (CAUSAL_WITH_SINKS,)}
UNVERIFIED_KINDS = (MERGED, BACKWARD_ACCUMULATE)
