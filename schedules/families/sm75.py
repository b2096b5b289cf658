"""Turing: ldmatrix and mma.sync m16n8k8 in fp16, copies staged in registers, 64 KiB of shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.families import limits, mma
from schedules.families.ldmatrix import LdmatrixProducts
from schedules.families.machine import BlockMachine
from schedules.families.staged import StagedCopies, pack_halves, staging_registers
from schedules.fragment import M16N8
from schedules.pattern import Pattern
from schedules.template import Program, Rejected, Target, Traversal

DTYPES = ("float16",)  # tensor cores know bfloat16 from sm_80 on
TEMPLATES = ("v1",)
INDEX_DTYPE = "int32"

_MMA = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"


@dataclass(frozen=True)
class Config:
    """``block_m`` rows and ``block_n`` keys a tile, ``num_warps`` warps; ``min_blocks_per_sm`` bounds the registers."""

    block_m: int
    block_n: int
    num_warps: int
    min_blocks_per_sm: int


@T.meta_class
class Machine(LdmatrixProducts, StagedCopies, BlockMachine):
    """Staged copies, two m16n8k8 for one k of 16: the registers are those of one m16n8k16."""

    q_in_registers = False

    def __init__(self, pattern, config, *args):
        BlockMachine.__init__(self, pattern, config, *args, fragment=M16N8, num_stages=1)
        self.place_staging()

    @T.inline
    def multiply(self, C, c, A, a, B, b):
        """A product of k = 16."""
        for k in T.unroll(2):
            T.ptx[_MMA](
                *[C[c + x] for x in range(4)], A[a + k * 2], A[a + k * 2 + 1], B[b + k], *[C[c + x] for x in range(4)]
            )

    @T.inline
    def pack_pair(self, to, i, low, high):
        """Two float32 as one register of halves."""
        pack_halves(to, i, low, high)


#: By head_dim, the first that is large enough.  At 128 the tiles take exactly the 64 KiB of a block.  Recompiled for an
#: H200, full attention over 16k keys: 258 TFLOP/s at 64, 242 at 128; PyTorch's memory-efficient kernel 125, 164.
_CONFIGS = {
    64: Config(128, 64, 4, 1),
    96: Config(128, 32, 8, 1),
    128: Config(128, 64, 8, 1),
    192: Config(64, 32, 4, 1),
    256: Config(64, 16, 4, 1),
}


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for each bucket of sequence length."""
    return {0: _CONFIGS[min((d for d in _CONFIGS if d >= pattern.head_dim), default=max(_CONFIGS))]}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling."""
    return {
        "block_m": (64, 128, 256),
        "block_n": (16, 32, 48, 64, 96, 128),
        "num_warps": (4, 8),
        "min_blocks_per_sm": (1, 2),
    }


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the machine has the shared memory and registers, and whether the tile can be divided."""
    more = staging_registers(pattern, config) + 8  # and one fragment of Q
    return limits.check(pattern, config, target, M16N8, num_stages=1, m_tiles=(1, 2), more=more)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel."""
    func = mma.kernel(pattern, config, traversal, name, Machine)
    return Program(func, "tirx", mma.ALIGNMENT, mma.INDEX_BITS)
