"""The schedule parameters of the CPU family, their defaults, and what makes them feasible."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.definition.pattern import Pattern
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.interface import Rejected, Target

#: Scratch of one thread, in bytes, that still leaves room for K and V in a 1 MiB second-level cache.
_SCRATCH_LIMIT = 1 << 20


@dataclass(frozen=True)
class Config:
    """How a CPU kernel is tiled.

    Attributes
    ----------
    block_m: query rows of a work item, which share the conversion of K and V.
    block_n: keys of a kv tile.
    row_vectors: vectors of queries in a register tile; ``row_vectors * lanes`` queries are a row group.
    tile_rows: keys (of the first product) or value columns (of the second) in a register tile.
    """

    block_m: int
    block_n: int
    row_vectors: int
    tile_rows: int


def multiplication(isa: Isa, dtype: str) -> str:
    """How an instruction set multiplies a dtype: as ``floats``, in ``pairs``, or in ``tiles``."""
    return isa.bfloat16 if dtype == "bfloat16" else "floats"


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for any length.

    GFLOP/s of one Zen 4 core, where torch's matrix product reaches 95 in float32 and 210 in bfloat16:

    * AVX-512, float32, block_n 64, at head_dim 64, 128 and 32 (sequences of 2048, 4096, 384): row_vectors x tile_rows
      2 x 8 gave 101, 104, 86; 4 x 4 gave 95, 98, 84; 3 x 8 gave 94, 91, 79; block_n 32 and 128 up to 10 less.
    * A block_m of 256, 128, 64 and 32 gave 96, 99, 95, 91 at head_dim 64; causal float32 at 128 and 64 gave 90, 87.
    * bfloat16 in pairs, 2 x 8, sequences of 512: 158.
    * AVX2, sequences of 512: 2 x 4 gave 84, 3 x 4 82, 1 x 8 73; block_n 128 and 32 gave 85, 83.  Baseline, 2 x 4: 31.

    Both cores, 36 kernels with 13 to 15 configurations each:

    * Under a causal mask, a block_n of 32 is faster than 64 by 7 to 15% at lengths of 384 and 512, and by 0 to 4% at
      2048 and 4096, but for bfloat16 up to 3% slower there; in a window of 256 keys it is faster by 12%.
    * Six groups of rows are faster than four where they share a conversion of K and V, by 1 to 6% if causal.  V2, whose
      rows of K lie far apart, gains 7 to 15% in float32 and up to 4% in 16 bits.  Elsewhere it is less than 2%, and
      there would be fewer work items.
    * On one core of an Emerald Rapids, eight groups of float16 without a mask are faster than four by 3%, six by 2%.

    AMX, 16 threads of an Emerald Rapids: speed of 256 x 64, 256 x 128 and 512 x 128 (block_m x block_n) over the best:

    * head_dim 64 full (16 heads of 2048, 16 of 512, 48 of 384) 0.90, -, 1; 0.94, 0.97, 0.91; 0.98, 1, 0.87.
    * head_dim 64 causal (16 heads of 2048, 16 of 512) 1, -, 0.89; 0.91, 0.90, 0.94.
    * head_dim 128 (8 heads of 4096) full 0.86, -, 1; causal 0.96, -, 1; 128 heads of 1024 full 0.91, 0.94, 1.
    * head_dim 256 (4 heads of 2048) full 0.95, 0.66; causal 0.99, 0.77.

    AMX, one thread of another, since the tile registers are kept awake; GFLOP/s of 256 x 64, 512 x 64 and 512 x 128:

    * head_dim 64 full (16 heads of 1024) -, 405, 397; causal 335, 311, 291; causal (16 of 512) 283, 276, 234.
    * head_dim 128 full (8 heads of 1024) -, 474, 542; causal 253, 265, 256; causal (16 of 512) 301, 310, 305.

    One thread of another, processor time over PyTorch's in turns, of 8 heads of 1024, 4 of 512 and one of 4096:

    * head_dim 64 full 512 x 64 0.69, 0.66, 0.70; 384 x 64 0.62, 0.59, 0.63; 256 x 64 0.67, 0.68, 0.66.
    * head_dim 192 full 256 x 64 1.12, 1.08, 1.19; 256 x 128 0.93, 0.91, 1; causal 0.82, 0.69, 1.06; 0.74, 0.65, 0.88.
    * head_dim 256 full 256 x 64 1.08, 1.01, 1.15; 256 x 128 0.88, 0.83, 0.93; causal 0.79, 0.67, 1; 0.70, 0.61, 0.83;
      in windows of 128 keys 64 is 1 to 13% faster, in those of 512 128 is by 7 to 8%.
    """
    isa = ISAS[target.isa]
    if multiplication(isa, pattern.dtype) == "tiles":
        width = max(pattern.head_dim, pattern.head_dim_v)
        rows = 256 if width > 128 or (width <= 64 and not pattern.is_unmasked) else 512 if width > 64 else 384
        wide_tiles = width > 128 or (width > 64 and pattern.is_unmasked)
        return {0: Config(rows, 128 if wide_tiles else 64, row_vectors=2, tile_rows=32)}
    row_vectors, tile_rows = (2, 8) if isa.registers == 32 else (2, 4)
    masked, measured = not pattern.is_unmasked, max(pattern.head_dim, pattern.head_dim_v) <= 256
    groups = 6 if measured and (template == "v2" or (masked and pattern.dtype != "float32")) else 4
    if measured and not masked and pattern.dtype != "float32" and multiplication(isa, pattern.dtype) == "floats":
        groups = 8
    return {0: Config(groups * row_vectors * isa.lanes, 32 if masked else 64, row_vectors, tile_rows)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration fits the registers, the cache and the tiles; None if it does."""
    if target.isa not in ISAS:
        return Rejected(f"instruction set {target.isa!r} is unknown; expected one of {', '.join(ISAS)}")
    isa = ISAS[target.isa]
    group = config.row_vectors * isa.lanes
    if min(config.block_m, config.block_n, config.row_vectors, config.tile_rows) < 1:
        return Rejected(f"every field of {config} must be positive")
    if config.block_m % group:
        return Rejected(f"block_m {config.block_m} is not a multiple of the row group of {group} queries")
    if multiplication(isa, pattern.dtype) == "tiles":
        if (config.row_vectors, config.tile_rows) != (2, 32) or config.block_n % 32:
            return Rejected(f"{config}: products on tile registers are 32 rows of 2 vectors, and block_n in 32s")
    elif config.block_n % config.tile_rows or 8 % config.tile_rows:
        return Rejected(f"tile_rows {config.tile_rows} divides not both block_n {config.block_n} and 8")
    if config.block_n % isa.lanes:
        return Rejected(f"block_n {config.block_n} is not a multiple of the {isa.lanes} lanes of a vector")
    needed = config.tile_rows * config.row_vectors + config.row_vectors + 1
    if needed > isa.registers and multiplication(isa, pattern.dtype) != "tiles":
        return Rejected(f"needs {needed} vector registers, {target.isa} has {isa.registers}")
    scratch = scratch_floats(pattern, config, isa.lanes) * 4
    if scratch > _SCRATCH_LIMIT:
        return Rejected(f"needs {scratch} bytes of scratch for each thread, the limit is {_SCRATCH_LIMIT}")
    return None


def scratch_floats(pattern: Pattern, config: Config, lanes: int) -> int:
    """Float32 elements of scratch that a thread needs."""
    head_dims = pattern.head_dim + pattern.head_dim_v
    return config.block_m * (head_dims + 2) + config.block_n * head_dims + config.block_n * config.row_vectors * lanes
