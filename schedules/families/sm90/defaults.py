"""Default configurations of the Hopper family, from measurements on one H200: the table in docs/hopper.md, "What was
tried", has the figures of each choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from schedules.definition.pattern import Pattern
from schedules.families.interface import Target
from schedules.families.sm90.config import ALL, Config


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Configurations by the fewest keys that they are meant for."""
    configs = _configs(pattern)
    if any(p.is_tensor for p in pattern.params):  # read once, for one place
        configs = {
            b: replace(c, waves=0, overlap_tiles=c.overlap_tiles and c.tiles_per_cta > 1) for b, c in configs.items()
        }
    if pattern.has_gaps:
        alone = {"tiles_per_cta": 1, "waves": 0, "overlap_tiles": False, "separate_output": False}
        configs = {bucket: replace(c, **alone) for bucket, c in configs.items()}
    if pattern.head_dim <= 128 and not (pattern.depends_on_head or pattern.has_sink):  # with more it would spill
        configs = {bucket: replace(c, pack_heads=True) for bucket, c in configs.items()}
    # A bucket that has become the same as the one below it needs no kernel of its own.
    buckets = sorted(configs)
    same = {b for a, b in pairwise(buckets) if configs[a] == configs[b]}
    return {bucket: configs[bucket] for bucket in buckets if bucket not in same}


def forward_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Those of dense forward kernels, which there are for sizes of their own (``FURTHER_SIZES``)."""
    if pattern.is_unmasked and pattern.is_scale_only and not pattern.params:
        if pattern.head_dim <= 32:
            # Short sequences of many heads: blocks of one warpgroup, four to a multiprocessor, hide each other's
            # start and end.  64 x 128 positions, 12 heads: 11.2 us, persistent blocks of two warpgroups 12.5, the
            # kernel of head_dim 64 19.9; 256 x 256, 8 heads: 80.6, four persistent warpgroups 66.0, head_dim 64 75.5.
            small = Config(1, 64, blocks_per_sm=4, pingpong=False, pack_heads=True)
            return {0: small, 256: Config(4, 64, 4, pingpong=False, waves=1, pack_heads=True)}
        if 64 < pattern.head_dim <= 80:
            # 257 positions are 3 tiles of 96 keys, and of 128 as well: 32 x 257, 16 heads 49.1 us in place of 60.9; the
            # kernel of head_dim 96 takes 63.4.  16 x 729 at head_dim 72: 128, 119 and 120.
            wide = Config(block_n=96, waves=1, pack_heads=True)
            return {0: wide, 1024: replace(wide, num_stages=4, block_n=80)}
    return default_configs(template, pattern, target)


def _configs(pattern: Pattern) -> dict[int, Config]:
    if any(p.is_spread for p in pattern.params):
        return {0: _with_tensors(pattern)}
    if pattern.head_dim <= 64:
        return _head_dim_64(pattern)
    if pattern.head_dim <= 128:
        return _head_dim_128(pattern)
    if pattern.head_dim <= 192:
        return _head_dim_192(pattern)
    return _head_dim_256(pattern)


def _with_tensors(pattern: Pattern) -> Config:
    """Fewer keys, as what tensors hold for a step's scores is in registers too; a bias may hide all that a row's first
    tile has, so that every step looks for the maximum."""
    if pattern.head_dim <= 64:
        return Config(block_n=96, tiles_per_cta=2, overlap_tiles=True, running_max=True)
    if pattern.head_dim <= 128:
        return Config(block_n=80, running_max=True)
    return Config(block_n=48, pingpong=pattern.head_dim <= 192, running_max=True)


def _head_dim_64(pattern: Pattern) -> dict[int, Config]:
    if not pattern.is_scale_only or pattern.has_gaps:
        return {0: Config(tiles_per_cta=2, overlap_tiles=True)}  # four consumer warpgroups have too few registers
    # Four consumer warpgroups hide each other's waits where two take turns (+12% at 512), and a persistent kernel has
    # the next work tile's queries and keys there in time (a further 11%).
    blocks = Config(num_consumer_warpgroups=4, block_n=64, num_stages=4, pingpong=False, waves=1)
    # Strips of all heads gain 2% at 8k and 16k in short blocks of calls, and lose 5% at the power cap: memory's share.
    return {0: blocks if pattern.is_unmasked else replace(blocks, tiles_per_cta=2)}


def _head_dim_128(pattern: Pattern) -> dict[int, Config]:
    if not pattern.is_scale_only:
        # Parameters of a head (ALiBi's slope) take registers, with 128 keys they would spill.
        return {0: Config(block_n=96 if any(p.is_tensor for p in pattern.params) else 128)}
    wide = Config(waves=1)
    narrow = replace(wide, num_stages=4, block_n=80)
    if pattern.is_unmasked:
        # 80 keys in 4 stages win from 1k on, by up to 3%.
        return {0: wide, 1024: narrow}
    # Warpgroups that see nothing of a tile of 64 keys leave it out, where one of 128 would be masked (+9% at 512).
    # From 8k on 80 keys and strips of all heads win, by 2 to 4%.
    pairs = replace(narrow, tiles_per_cta=2)
    return {0: replace(pairs, block_n=64), 8192: _by_strips(narrow) if _is_triangle(pattern) else pairs}


def _head_dim_192(pattern: Pattern) -> dict[int, Config]:
    # All that fits beside 192 columns of output.
    block_n = 128 if pattern.head_dim_v <= 128 and pattern.is_scale_only else 96
    return _persistent(pattern, Config(block_n=block_n), 16384)


def _head_dim_256(pattern: Pattern) -> dict[int, Config]:
    # Ping-pong gains nothing here.
    return _persistent(pattern, Config(block_n=64, pingpong=False), 4096)


def _persistent(pattern: Pattern, config: Config, strips_from: int) -> dict[int, Config]:
    """A persistent kernel, where there is room for the queries of one work tile, but for outputs beside them.

    It wins by up to 17% over a block for each work tile, with outputs in the place of the queries.
    """
    # With modified scores the step without maximum would spill.
    single = replace(config, waves=1, separate_output=True, running_max=not pattern.is_scale_only)
    if pattern.is_unmasked and pattern.is_scale_only:
        return {0: single}
    pairs = {0: replace(single, tiles_per_cta=2)}
    return pairs | ({strips_from: _by_strips(single)} if _is_triangle(pattern) else {})


def _by_strips(config: Config) -> Config:
    """Single work tiles, strip after strip of all heads, the longest first: no block is without work at the end, where
    places of two tiles leave 3% of the machine idle.  It reads keys and values more often."""
    return replace(config, tiles_per_cta=1, head_section=ALL)


def _is_triangle(pattern: Pattern) -> bool:
    """Whether each row sees more than the one before, as with a causal mask.  A mask with parameters may be a window,
    whose rows are equally long."""
    return pattern.is_scale_only and not pattern.is_unmasked and not pattern.params
