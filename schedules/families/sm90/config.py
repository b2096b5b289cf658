"""Schedule parameters of the Hopper family, their defaults, and what fits into the machine."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.pattern import Pattern
from schedules.template import Rejected, Target

#: Elements of a shared-memory panel: 64 16-bit elements are the 128 bytes of the swizzle atom.
PANEL = 64
#: Rows of a warpgroup's wgmma.
WARPGROUP_ROWS = 64
#: Shared memory that a block can have, bytes.
SHARED_MEMORY = 227 * 1024
#: Room for the barriers.
BARRIER_BYTES = 256
#: Registers of a producer's and of a consumer's thread, for each number of consumer warpgroups: all that the 64 Ki of a
#: multiprocessor allow.
REGISTERS = {2: (24, 240), 3: (32, 160)}


@dataclass(frozen=True)
class Config:
    """How a Hopper kernel is scheduled.

    Attributes
    ----------
    num_consumer_warpgroups: each computes 64 rows of a row tile.
    block_n: keys of a tile, a multiple of 16 up to 256.
    num_stages: depth of each of the two rings, of K and of V, in shared memory; a power of two.
    pingpong: consumer warpgroups take turns at the tensor cores, so that one's softmax meets the other's products.
    tiles_per_cta: row tiles that a block computes one after the other, 1 or 2: the first product of the second tile is
        issued beside the last one of the first.
    running_max: take the row maximum in every step; else unmasked steps rely on the exact maximum of a row's first tile
        and take another only when the row sum of a step shows that it has been far exceeded.
    head_section: heads whose row tiles are visited together, strip by strip; 1 visits all row tiles of a head first.
    """

    num_consumer_warpgroups: int = 2
    block_n: int = 128
    num_stages: int = 2
    pingpong: bool = True
    tiles_per_cta: int = 1
    running_max: bool = False
    head_section: int = 1

    @property
    def block_m(self) -> int:
        """Rows of a row tile."""
        return WARPGROUP_ROWS * self.num_consumer_warpgroups

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's and the consumers' warpgroups."""
        return 128 * (self.num_consumer_warpgroups + 1)


def panels(head_dim: int) -> int:
    """Panels of a tile with rows of ``head_dim`` elements."""
    return -(-head_dim // PANEL)


def shared_memory(pattern: Pattern, config: Config) -> int:
    """Bytes of shared memory that a block needs."""
    row = 2 * PANEL
    q = config.tiles_per_cta * config.block_m * panels(pattern.head_dim)
    k_and_v = config.num_stages * config.block_n * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    return (q + k_and_v) * row + BARRIER_BYTES


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    if panels(pattern.head_dim_v) > panels(pattern.head_dim):
        return Rejected(
            f"head_dim_v {pattern.head_dim_v} exceeds head_dim {pattern.head_dim}; "
            "outputs are staged in the place of the queries"
        )
    if config.num_consumer_warpgroups not in REGISTERS:
        return Rejected(f"num_consumer_warpgroups {config.num_consumer_warpgroups} is not one of {sorted(REGISTERS)}")
    if config.block_n % 16 or not 16 <= config.block_n <= 256:
        return Rejected(f"block_n {config.block_n} is not a multiple of 16 from 16 to 256")
    if config.num_stages not in (2, 4, 8):
        return Rejected(f"num_stages {config.num_stages} is not 2, 4 or 8")
    if config.tiles_per_cta not in (1, 2):
        return Rejected(f"tiles_per_cta {config.tiles_per_cta} is not 1 or 2")
    if pattern.has_gaps and config.tiles_per_cta != 1:
        return Rejected("a mask with gaps needs tiles_per_cta 1: its tiles are counted as they come")
    needed = shared_memory(pattern, config)
    if needed > SHARED_MEMORY:
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {SHARED_MEMORY}")
    # Scores and output are float32 accumulators (a warpgroup's thread holds 1/2 element per row of a column), the
    # probabilities are packed in pairs; about 30 registers are addresses, row state and temporaries.
    registers = config.block_n // 2 + config.block_n // 4 + pattern.head_dim_v // 2 + 30
    available = REGISTERS[config.num_consumer_warpgroups][1]
    if registers > available:
        return Rejected(f"needs about {registers} registers a thread, a consumer warpgroup has {available}")
    return None
