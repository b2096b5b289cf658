"""Default configurations of the Hopper family, from measurements on one H200.

Figures are TFLOP/s in steady state at the card's power cap: float16, 16k tokens a batch, hidden size 2048.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from schedules.families.sm90.config import Config
from schedules.pattern import Pattern
from schedules.template import Target


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Configurations by the fewest keys that they are meant for."""
    configs = _configs(pattern)
    if template == "v1" or pattern.has_gaps:
        # V1 is the plain schedule: a head after the other, a row tile a block.  A mask with gaps can't chain row tiles.
        configs = {bucket: replace(c, tiles_per_cta=1, head_section=1) for bucket, c in configs.items()}
    # A bucket that has become the same as the one below it needs no kernel of its own.
    buckets = sorted(configs)
    same = {b for a, b in pairwise(buckets) if configs[a] == configs[b]}
    return {bucket: configs[bucket] for bucket in buckets if bucket not in same}


def _configs(pattern: Pattern) -> dict[int, Config]:
    if pattern.head_dim <= 64:
        return _head_dim_64(pattern)
    if pattern.head_dim <= 128:
        # Two row tiles a block, the second begun beside the end of the first: full 512 434 to 464, 8k 688 to 701;
        # causal 512 276 to 294, 1k 385 to 407.  Not taking the maximum: full 8k 635 to 701, causal 8k 593 to 618.
        return {0: Config(tiles_per_cta=2 if pattern.is_scale_only else 1)}
    if pattern.head_dim <= 192:
        # All that fits beside 192 columns of output; more registers are needed for masks and modified scores.
        wide = 112 if pattern.is_unmasked and pattern.is_scale_only else 96
        block_n = 128 if pattern.head_dim_v <= 128 and pattern.is_scale_only else wide
        return {0: Config(block_n=block_n, pingpong=False, running_max=not pattern.is_scale_only)}
    return _head_dim_256(pattern)


def _head_dim_64(pattern: Pattern) -> dict[int, Config]:
    short = Config(tiles_per_cta=2)
    if not pattern.is_scale_only:
        return {0: short}  # three consumer warpgroups have too few registers for more than a scale
    # Two against three consumer warpgroups: full 512 352 : 324, 1k 413 : 401, 2k 461 : 486, 8k 510 : 554;
    # causal 512 220 : 182, 2k 375 : 369, 4k 426 : 429, 8k 453 : 494.
    return {0: short, 2048 if pattern.is_unmasked else 4096: Config(num_consumer_warpgroups=3, num_stages=4)}


def _head_dim_256(pattern: Pattern) -> dict[int, Config]:
    # Scores and output leave no registers for taking turns.  With modified scores the step without maximum would spill.
    plain = Config(block_n=64, pingpong=False, running_max=not pattern.is_scale_only)
    if not pattern.is_scale_only:
        return {0: replace(plain, head_section=8)}  # the sections below were measured on plain scores only
    if pattern.is_unmasked:
        return {0: plain}  # sections of 4 heads: 2k 645 to 609, 8k 713 to 695
    # Where masks make row tiles of different length, strips over a few heads keep what is read in the cache:
    # sections of 1, 4, 8 heads: causal 1k 421, 425, 435; 2k 503, 523, 538; 4k 567, 627, 620; 8k 620, 672, 652.
    return {0: replace(plain, head_section=8), 4096: replace(plain, head_section=4)}
