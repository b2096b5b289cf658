"""Decoding where values are the first columns of keys, on pages: multi-head latent attention, its projections absorbed.

All query heads read one head of keys, so that rows are many for few queries: 64 of them, of whatever head and query,
are a row tile.  Tiles of keys are fetched once for scores and output (:mod:`schedules.families.sm90.latent_kernel`);
splits, shares of the blocks and the second launch are those of :mod:`schedules.families.sm90.paged_decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90.barriers import WARPGROUP_THREADS
from schedules.families.sm90.config import BARRIER_BYTES, PANEL, REGISTERS, WARPGROUP_ROWS, available_memory, panels
from schedules.families.sm90.kernel import ALIGNMENT
from schedules.families.sm90.latent_kernel import compute_latent_parts
from schedules.families.sm90.latent_tiles import STAGES, WARPGROUPS, LatentScheduler, columns_of_half
from schedules.tile.geometry import PagedGeometry, parameterised
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

#: Keys of a split where a call doesn't say, by the sequence's own number of keys; powers of two.  A middle: short ones
#: are for few sequences, and long ones for many (docs/hopper.md, "Values in keys").
SPLIT_LENGTHS = ((0, 128), (1024, 256), (4096, 512), (16384, 1024))

#: Query rows of a sequence for which these kernels are meant: partial results of more would take longer than keys.
MAX_ROWS = 1024


@dataclass(frozen=True)
class Config:
    """How the kernel is scheduled.

    Attributes
    ----------
    block_n: keys of a tile; 64, as probabilities are handed over in a panel of a tile.
    """

    block_n: int = 64

    # What work tiles ask of a configuration.
    blocks_per_sm = 1
    pack_heads = True
    block_m = WARPGROUP_ROWS
    several_tiles = True
    tiles_per_cta = 1

    @property
    def threads(self) -> int:
        """Threads of a block: the consumer warpgroups and that of those which fetch."""
        return (WARPGROUPS + 1) * WARPGROUP_THREADS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that fetches, and of a consumer's."""
        return REGISTERS[WARPGROUPS, self.blocks_per_sm]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration of a pattern."""
    return {0: Config()}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field that are worth trying: there is one."""
    return {"block_n": (64,)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if config.block_n != PANEL:
        return Rejected(f"block_n {config.block_n} is not {PANEL}: probabilities are handed over in a panel of a tile")
    if pattern.head_dim % 16:
        return Rejected(f"head_dim {pattern.head_dim} is not a multiple of 16")
    half = columns_of_half(pattern)
    if half % PANEL or not PANEL <= half <= 256:
        return Rejected(
            f"head_dim_v {pattern.head_dim_v} is not a multiple of 128 up to 512, of which each of two warpgroups has "
            f"whole panels"
        )
    if pattern.head_dim <= pattern.head_dim_v:
        return Rejected(
            f"head_dim {pattern.head_dim} has no columns beside the {pattern.head_dim_v} of values, in whose place "
            f"probabilities could be handed over"
        )
    if pattern.has_gaps:
        return Rejected("a mask with gaps isn't served: every tile of keys is scored")
    if pattern.depends_on_head:
        return Rejected("a score or a mask that differs from head to head can't have heads packed")
    tiles = (WARPGROUP_ROWS + STAGES * config.block_n) * panels(pattern.head_dim) * 2 * PANEL
    needed = tiles + WARPGROUPS * WARPGROUP_ROWS * 8 + BARRIER_BYTES
    if needed > (available := available_memory(config)):
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {available}")
    return None


def _partial(pattern: Pattern, config: Config, name: str) -> PrimFunc:
    """``(q, k, o_partial, lse_partial, o, lse, cu_seqlens_q, seqlens_k, page_table, softmax_scale, row_tiles,
    split_bits, *params)``."""

    def make(parameters):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            o_partial: T.handle,
            lse_partial: T.handle,
            o: T.handle,
            lse: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            softmax_scale: T.float32,
            row_tiles: T.int32,
            split_bits: T.int32,
        ):
            handles = T.meta_var(((q, k, None, o, lse), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, parameters, ALIGNMENT)
            results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
            bits = T.meta_var(lambda keys: split_keys.asked_split_bits(split_bits, keys, config.block_n, SPLIT_LENGTHS))
            scheduler = LatentScheduler(pattern, geometry, config, bits, results.splits, row_tiles)
            compute_latent_parts(pattern, geometry, scheduler, results)

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The two launches; ``config`` must be feasible."""
    func = _partial(pattern, config, name)
    options = {"lengths": SPLIT_LENGTHS, "block_n": config.block_n, "block_m": config.block_m}
    return split_keys.latent_program(pattern, func, name, alignment=ALIGNMENT, most_rows=MAX_ROWS, **options)
