"""Default configurations of the Hopper family, from measurements on one H200: the table in docs/hopper.md, "What was
tried", has the figures of each choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from schedules.definition.pattern import Pattern
from schedules.families.interface import Target
from schedules.families.sm90.config import BY_LENGTH, Config, comes_in_boxes, is_mask_in_boxes, keeps_bits

#: Up to head_dim 64.  Four consumer warpgroups hide each other's waits where two take turns (+12% at 512), and a
#: persistent kernel has the next work tile's queries and keys there in time (a further 11%).
_FOUR = Config(num_consumer_warpgroups=4, block_n=64, num_stages=4, pingpong=False, waves=1)


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Configurations by the fewest keys that they are meant for."""
    configs = _configs(pattern)
    if any(p.is_tensor for p in pattern.params) and not is_mask_in_boxes(pattern):  # read once, for one place
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
    if _is_plain(pattern):
        if pattern.head_dim <= 32:
            return {0: replace(_FOUR, pack_heads=True)}
        if 64 < pattern.head_dim <= 80:
            # In turns, 80 keys, 4 stages, beside 96 keys in 2, us: 32 x 257 positions, 16 heads, 49.2 and 49.4;
            # 16 x 1024 180 and 219; 1 x 4096 164 and 187; at head_dim 72 16 x 729 112 and 134, the kernel of 96 120.
            return {0: Config(block_n=80, num_stages=4, waves=1, pack_heads=True)}
    return default_configs(template, pattern, target)


def further_tiles(pattern: Pattern, config: Config) -> dict[int, Config]:
    """Configurations that differ from the usual one of a dense forward kernel in the height of work tiles and what it
    asks for, by that height; the bits are the same, as the keys of a step are, and each warp has its 16 rows alone.

    The run time takes the one whose waves take the least time: full ones at four warpgroups, short ones at one.
    """
    if not _is_plain(pattern) or config.block_n != _FOUR.block_n or config.num_consumer_warpgroups != 4:
        return {}
    if pattern.head_dim <= 32:
        # 64 x 128 positions, 12 heads, us: 18.0 with four warpgroups, 11.3 with one; 256 x 256, 8 heads: 66.4, 80.8.
        return {64: replace(config, num_consumer_warpgroups=1, num_stages=2, blocks_per_sm=4, waves=0)}
    # 2 x 1024 positions, 20 heads, us: 33.5 with four warpgroups, then 26.3, 31.1, 24.1; 64 x 197, 12 heads: 32.8,
    # 46.1, 39.1, 42.7; 32 x 257, 16 heads: 48.7, 37.8, 46.2, 42.9; 64 x 128, 12 heads: 20.6, 16.6, 15.3, 18.2.
    return {
        192: replace(config, num_consumer_warpgroups=3, pingpong=True),
        128: replace(config, num_consumer_warpgroups=2, pingpong=True),
        64: replace(config, num_consumer_warpgroups=1, num_stages=2, blocks_per_sm=3, waves=0),
    }


def _is_plain(pattern: Pattern) -> bool:
    """Whether every score counts as it is."""
    return pattern.is_unmasked and pattern.is_scale_only and not pattern.params


def _configs(pattern: Pattern) -> dict[int, Config]:
    if _reads_ids_only(pattern):
        return {0: _by_ids(pattern)}
    if any(p.is_spread for p in pattern.params):
        return {0: _with_tensors(pattern)}
    return _of_positions(pattern)


def _reads_ids_only(pattern: Pattern) -> bool:
    """Whether what is read is ids of queries and of keys, which a mask compares: fully visible steps read none."""
    over_both = any({"i", "j"} <= set(p.axes) for p in pattern.params)
    return bool(pattern.atoms) and pattern.is_scale_only and not (pattern.has_unknown or over_both)


def _by_ids(pattern: Pattern) -> Config:
    """The tiles of short causal sequences: few keys, as documents end anywhere.

    Causal documents of 512 in 16k positions of 16 heads, head_dim 128: 152 us, 240 with the tiles for tensors, 247 with
    80 keys.  At 64, by 4096 positions: 100 us with a block of one consumer warpgroup, three of them at a time; 122 with
    two of 48 keys; 124 with four of 48 keys (with 64 keys 101, but that spills 16 bytes); 182 with three.
    """
    config = _of_positions(pattern)[0]
    if pattern.head_dim <= 64:
        return replace(config, num_consumer_warpgroups=1, num_stages=2, blocks_per_sm=3, tiles_per_cta=1)
    return config


def _of_positions(pattern: Pattern) -> dict[int, Config]:
    """Those of kernels that read nothing beside q, k and v, or little."""
    if pattern.head_dim <= 64:
        return _head_dim_64(pattern)
    if pattern.head_dim <= 128:
        return _head_dim_128(pattern)
    if pattern.head_dim <= 192:
        return _head_dim_192(pattern)
    return _head_dim_256(pattern)


def _with_tensors(pattern: Pattern) -> Config:
    """Fewer keys, as what tensors hold for a step's scores is in registers too; a bias may hide all that a row's first
    tile has, so that every step looks for the maximum, unless its products are kept."""
    if comes_in_boxes(pattern):
        return _in_boxes(pattern)
    # What the next step needs is fetched as soon as a step has its scores: 457 TFLOP/s in place of 348 at head_dim 128
    # with a bias of queries and keys, 288 in place of 208 at 64.
    usual = Config(running_max=True, tensors_ahead=not pattern.has_gaps)
    # With modified scores steps are longer, and find their tiles there in 2 stages: at head_dim 128 a bias of batch and
    # keys has 451 TFLOP/s, 443 with 4.
    stages = 4 if pattern.is_scale_only else 2
    if pattern.head_dim <= 64:
        return replace(usual, block_n=96, num_stages=stages, tiles_per_cta=2, overlap_tiles=True)
    if pattern.head_dim <= 128:
        return replace(usual, block_n=80, num_stages=stages)
    return replace(usual, block_n=48, pingpong=pattern.head_dim <= 192)


def _in_boxes(pattern: Pattern) -> Config:
    """Those of a tensor that comes to shared memory in boxes; with more keys a kernel would spill whose mask asks for
    positions too.

    With a bias of queries and keys, for each head, and of batch and keys, bfloat16, 4 x 4096 positions, TFLOP/s: at
    head_dim 128 545, 547 and 572 (688 without), 522, 513 and 514 if persistent with 80 keys; at 64 363, 366 and 384
    (535 without), 318 to 344 if persistent with 112 or 96.  With a boolean mask: at 128, persistent, 599, 599 and 622
    (758 without), 566 to 576 with 80 keys; at 64 416, 410 and 425 (591 without), 363 to 381 if persistent; as bits
    444, 443 and 444, where these had 424, 423 and 423 (600 without).
    """
    usual = Config(tensor_stages=2, batches_beside=True)
    if keeps_bits(pattern):
        return replace(usual, num_consumer_warpgroups=4, block_n=64, num_stages=4, pingpong=False)
    alike = pattern.is_unmasked or is_mask_in_boxes(pattern)
    if pattern.head_dim <= 64:
        return replace(usual, num_consumer_warpgroups=3, block_n=80 if alike else 64, num_stages=4)
    goes_on = is_mask_in_boxes(pattern)
    return replace(usual, block_n=96 if alike else 80, waves=int(goes_on), overlap_tiles=goes_on)


def _head_dim_64(pattern: Pattern) -> dict[int, Config]:
    if not pattern.is_scale_only or pattern.has_gaps:
        return {0: Config(tiles_per_cta=2, overlap_tiles=True)}  # four consumer warpgroups have too few registers
    if pattern.is_unmasked:
        return {0: _FOUR}
    return _with_sections(pattern, {0: replace(_FOUR, tiles_per_cta=2)}, 8192)


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
    # From 8k on 80 keys win.
    pairs = replace(narrow, tiles_per_cta=2)
    configs = _with_sections(pattern, {0: replace(pairs, block_n=64), 8192: pairs}, 8192)
    # A block for each work tile starts late where messages of other GPUs hold a multiprocessor, and others do its work.
    return configs | ({32768: replace(narrow, waves=0)} if _is_triangle(pattern) else {})


def _head_dim_192(pattern: Pattern) -> dict[int, Config]:
    # All that fits beside 192 columns of output.
    block_n = 128 if pattern.head_dim_v <= 128 and pattern.is_scale_only else 96
    return _persistent(pattern, Config(block_n=block_n), 8192)


def _head_dim_256(pattern: Pattern) -> dict[int, Config]:
    # Ping-pong gains nothing here.
    return _persistent(pattern, Config(block_n=64, pingpong=False), 4096)


def _persistent(pattern: Pattern, config: Config, sections_from: int) -> dict[int, Config]:
    """A persistent kernel, where there is room for the queries of one work tile, but for outputs beside them.

    It wins by up to 17% over a block for each work tile, with outputs in the place of the queries.
    """
    # With modified scores the step without maximum would spill.
    single = replace(config, waves=1, separate_output=True, running_max=not pattern.is_scale_only)
    if pattern.is_unmasked and pattern.is_scale_only:
        return {0: single}
    return _with_sections(pattern, {0: replace(single, tiles_per_cta=2)}, sections_from)


def _with_sections(pattern: Pattern, configs: dict[int, Config], begin: int) -> dict[int, Config]:
    """From so many keys on, where each row sees more than the one before, single work tiles in strips of sections of
    heads, in place of pairs.

    No block is without work at the end, where places of two tiles leave 3% of the machine idle, and few heads of keys
    are walked over at a time.  H200, bfloat16, causal, us by pairs and in sections (docs/hopper.md): head_dim 64,
    32 heads of 16k positions, 1937 and 1862, but 4 x 4k 513 and 528; 128, 32 heads on 8 of 16k 3298 and 3198; 256,
    8 heads of 4 x 4k 435 and 416, of 16k 1598 and 1509.
    """
    if not _is_triangle(pattern):
        return configs
    usual = configs[max(bucket for bucket in configs if bucket <= begin)]
    return configs | {begin: replace(usual, tiles_per_cta=1, head_section=BY_LENGTH)}


def _is_triangle(pattern: Pattern) -> bool:
    """Whether each row sees more than the one before, as with a causal mask.  A mask with parameters may be a window,
    whose rows are equally long."""
    return pattern.is_scale_only and not pattern.is_unmasked and not pattern.params
