"""Hopper (sm_90a): TMA, wgmma, and warps with roles.

Source of the arrangement: FlashAttention-3 (Shah et al., 2024): a producer warpgroup, consumer warpgroups that take
turns, softmax overlapped with products.
"""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families.append import Appending, by_instruction
from schedules.families.interface import (
    APPEND,
    BACKWARD,
    BACKWARD_ACCUMULATE,
    DECODE,
    FORWARD,
    MERGED,
    OF_SEQUENCES,
    PAGED,
    PAGED_DECODE,
    PAGED_DECODE_ANY,
    PAGED_LATENT,
    RAGGED,
    RAGGED_BACKWARD,
    Program,
    Target,
    forward_program,
)
from schedules.families.ranged import own_name, with_ranges, with_tiles
from schedules.families.sm90 import (
    backward,
    decode,
    latent,
    merged,
    paged,
    paged_decode,
    paged_scaled,
    ragged,
    scaled_decode,
)
from schedules.families.sm90.backward import accumulate
from schedules.families.sm90.backward import ragged as ragged_backward
from schedules.families.sm90.config import Config, feasible, narrow_axes
from schedules.families.sm90.defaults import forward_configs as default_configs
from schedules.families.sm90.defaults import further_tiles
from schedules.families.sm90.kernel import ALIGNMENT, build
from schedules.families.sm90.space import space
from schedules.tile.tile_scheduler import Traversal

__all__ = [
    "DTYPES",
    "INDEX_DTYPE",
    "KINDS",
    "SINK_KINDS",
    "TABLE_KINDS",
    "TEMPLATES",
    "TENSOR_KINDS",
    "Config",
    "default_configs",
    "feasible",
    "further_tiles",
    "program",
    "space",
]

DTYPES = ("float16", "bfloat16")
TEMPLATES = ("v1", "v2")
INDEX_DTYPE = "int32"
KINDS = {
    DECODE: decode,
    MERGED: merged,
    BACKWARD: backward,
    BACKWARD_ACCUMULATE: accumulate,
    RAGGED: ragged,
    RAGGED_BACKWARD: ragged_backward,
    PAGED: paged,
    PAGED_DECODE: paged_decode,
    PAGED_DECODE_ANY: paged_decode.ANY_PAGES,
    PAGED_LATENT: latent,
    **paged_scaled.KINDS,
    **scaled_decode.KINDS,
    APPEND: Appending(by_instruction),
}
#: head_dim 32 multiplies half of what 64 does, and 80 five sixths of what 96 does.
FURTHER_SIZES = {FORWARD: {("full", "identity"): ((32, 32), (80, 80))}}
TENSOR_KINDS, TABLE_KINDS = (FORWARD, BACKWARD), OF_SEQUENCES
#: Where results are merged, a sink is put in once, after the parts of all keys.
SINK_KINDS = (FORWARD, *(kind for kind in KINDS if kind != MERGED))


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The scheduled kernel; ``config`` must be feasible."""
    known = with_tiles(pattern, "i", config.block_m, config.block_n, config.num_consumer_warpgroups)
    func = build(known, config, traversal, own_name(known, name))
    axes = narrow_axes(config)
    attention = forward_program(func, known.params, "tirx", alignment=ALIGNMENT, index_bits=32, narrow_axes=axes)
    return with_ranges(attention, traversal, name, known)
