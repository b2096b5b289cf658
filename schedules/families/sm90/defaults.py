"""Default configurations of the Hopper family, from measurements on one H200.

Figures are TFLOP/s in steady state at the card's power cap: float16, 16k tokens a batch, hidden size 2048.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from schedules.definition.pattern import Pattern
from schedules.families.interface import Target
from schedules.families.sm90.config import ALL, Config


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Configurations by the fewest keys that they are meant for."""
    configs = _configs(pattern)
    if any(p.per_head for p in pattern.params):  # read once, for one place
        configs = {
            b: replace(c, waves=0, overlap_tiles=c.overlap_tiles and c.tiles_per_cta > 1) for b, c in configs.items()
        }
    if pattern.has_gaps:
        alone = {"tiles_per_cta": 1, "waves": 0, "overlap_tiles": False, "separate_output": False}
        configs = {bucket: replace(c, **alone) for bucket, c in configs.items()}
    if pattern.head_dim <= 128 and not pattern.depends_on_head:  # with more it would spill
        configs = {bucket: replace(c, pack_heads=True) for bucket, c in configs.items()}
    # A bucket that has become the same as the one below it needs no kernel of its own.
    buckets = sorted(configs)
    same = {b for a, b in pairwise(buckets) if configs[a] == configs[b]}
    return {bucket: configs[bucket] for bucket in buckets if bucket not in same}


def _configs(pattern: Pattern) -> dict[int, Config]:
    if pattern.head_dim <= 64:
        return _head_dim_64(pattern)
    if pattern.head_dim <= 128:
        return _head_dim_128(pattern)
    if pattern.head_dim <= 192:
        return _head_dim_192(pattern)
    return _head_dim_256(pattern)


def _head_dim_64(pattern: Pattern) -> dict[int, Config]:
    if not pattern.is_scale_only or pattern.has_gaps:
        return {0: Config(tiles_per_cta=2, overlap_tiles=True)}  # four consumer warpgroups have too few registers
    # Four consumer warpgroups hide each other's waits where two take turns; blocks that stay have the next tile's
    # queries and keys there in time.  Two with 128 keys, four, four that stay: full 512 348, 390, 434;
    # 1k 406, 437, 490; causal (places of two tiles are equally long) 512 220, 268, 310; 1k 289, 358, 395; 2k 358, 438,
    # 466.  Three with 128 keys: full 16k 567 to 570, causal 16k 545 to 554.
    blocks = Config(num_consumer_warpgroups=4, block_n=64, num_stages=4, pingpong=False, waves=1)
    # Strips of all heads gain 2% at 8k and 16k in short blocks of calls, and lose 5% at the power cap: memory's share.
    return {0: blocks if pattern.is_unmasked else replace(blocks, tiles_per_cta=2)}


def _head_dim_128(pattern: Pattern) -> dict[int, Config]:
    if not pattern.is_scale_only:
        # Parameters of a head (ALiBi's slope) take registers, with 128 keys they would spill.
        return {0: Config(block_n=96 if any(p.per_head for p in pattern.params) else 128)}
    # Blocks for one place of two tiles against blocks that stay: full 512 449 to 496, 1k 545 to 581, 8k 672 to 682.
    wide = Config(waves=1)
    narrow = replace(wide, num_stages=4, block_n=80)
    if pattern.is_unmasked:
        # 128 keys, 128 with overlap of row tiles, 64, 80: full 512 534, 508, 524, 499; 1k 584, 568, 578, 593; 2k 615,
        # 617, 604, 624; 8k 655, 660, 632, 666; 16k 675, 681, 644, 682.
        return {0: wide, 1024: narrow}
    # Warpgroups that see nothing of a tile of 64 keys leave it out, where one of 128 would be masked.  128 keys against
    # 64: causal 512 314 to 343, 1k 425 to 456, 2k 525 to 535.  Pairs with 64, 80, 128 keys, strips with 64, 80: causal
    # 4k 571, 568, 577, 576, 573; 8k 579, 600, 598, 598, 613; 16k 607, 631, 627, 634, 650.
    pairs = replace(narrow, tiles_per_cta=2)
    return {0: replace(pairs, block_n=64), 8192: _by_strips(narrow) if _is_triangle(pattern) else pairs}


def _head_dim_192(pattern: Pattern) -> dict[int, Config]:
    # All that fits beside 192 columns of output.
    block_n = 128 if pattern.head_dim_v <= 128 and pattern.is_scale_only else 96
    # A strip of all heads at a time: causal 2k 538 to 497, 4k 623 to 618, 8k 681 to 676, 16k 669 to 692.
    return _stays(pattern, Config(block_n=block_n), 16384)


def _head_dim_256(pattern: Pattern) -> dict[int, Config]:
    # Taking turns gains nothing here.  80 keys without room for outputs: 8k 692 to 703.
    # A strip of all heads at a time: causal 2k 552 to 522, 4k 602 to 623, 8k 657 to 665, 16k 677 to 697.
    return _stays(pattern, Config(block_n=64, pingpong=False), 4096)


def _stays(pattern: Pattern, config: Config, strips_from: int) -> dict[int, Config]:
    """Blocks that stay, where there is room for the queries of one row tile, but for outputs beside them.

    In place of a block for each row tile, with outputs in the place of the queries, each kind at its best: head_dim 256
    full 512 470 to 538, 2k 633 to 667, 8k 705 to 714; causal (single tiles a place are 0.69 of it) 512 329 to 364, 2k
    537 to 560, 8k 650 to 653; sections of 1, 4, 8 heads: causal 512 364, 357, 357; 8k 653, 650, 650.  192 full 512 436
    to 493, 2k 604 to 642, 8k 692 to 716; causal 512 302 to 329, 2k 488 to 551, 8k 627 to 664.  192 with values of 128
    full 512 455 to 505, 8k 701 to 710; causal 512 291 to 340, 2k 497 to 556, 8k 607 to 638.
    """
    # With modified scores the step without maximum would spill.
    single = replace(config, waves=1, separate_output=True, running_max=not pattern.is_scale_only)
    if pattern.is_unmasked and pattern.is_scale_only:
        return {0: single}
    pairs = {0: replace(single, tiles_per_cta=2)}
    return pairs | ({strips_from: _by_strips(single)} if _is_triangle(pattern) else {})


def _by_strips(config: Config) -> Config:
    """Single row tiles, strip after strip of all heads, the longest first: no block is without work at the end, where
    places of two tiles leave 3% of the machine so.  It reads keys and values more often."""
    return replace(config, tiles_per_cta=1, head_section=ALL)


def _is_triangle(pattern: Pattern) -> bool:
    """Whether each row sees more than the one before, as with a causal mask.  A mask with parameters may be a window,
    whose rows are equally long."""
    return pattern.is_scale_only and not pattern.is_unmasked and not pattern.params
