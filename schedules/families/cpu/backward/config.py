"""The schedule parameters of the CPU's backward kernels, their defaults, and what makes them feasible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from schedules.definition.errors import DefinitionError
from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import multiplication
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.interface import Rejected, Target

#: Scratch of one thread, in bytes: of a second-level cache of 1 MiB, what rows of dq and the next tiles leave; of 2 MiB
#: on processors with tile registers.
_SCRATCH_LIMIT, _SCRATCH_LIMIT_OF_TILES = 1 << 20, 3 << 19


@dataclass(frozen=True)
class Config:
    """How a backward kernel is tiled.

    Attributes
    ----------
    block_m: query rows of a tile.
    block_n: keys of a tile, which are prepared once for all rows that a work item visits.
    row_vectors: vectors in a row of a register tile.
    tile_rows: rows of a register tile.
    """

    block_m: int
    block_n: int
    row_vectors: int
    tile_rows: int


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for any length.

    Time of one thread of a Zen 5 at head_dim 64, others over 64 x 64 (block_m x block_n), of 1024 and 512 keys each:

    * float32, full 64 x 128 0.97, 0.97; 128 x 128 0.96, 0.96; 32 x 64 1.02, 1.02; 64 x 32 1.08, 1.09.  Causal 64 x 128
      1.01, 1.06; 128 x 128 1.01, 1.05; 128 x 64 1.04, 1.09; 32 x 64 1.01, 1.02; 64 x 32 1.07, 1.09.
    * bfloat16, full 64 x 128 0.96, 0.97; 128 x 128 0.95, 0.96; causal 64 x 128 1.01, 1.05; 64 x 32 1.11, 1.12.
    * A register tile of 4 rows of 4 vectors 0.99 to 1.00 everywhere.

    Since keys behind the last one that a row of a tile may see are left out, and rows of tiles of float32 lie a vector
    further apart, on one thread of an Emerald Rapids, AVX-512, over 64 x 64, causal or not:

    * float32 at head_dim 64 64 x 128 0.86 to 0.97, 64 x 256 0.84 to 0.96, 128 x 128 0.89 to 1.04; at 128 0.96 to 0.98,
      0.95 to 0.98, 0.94 to 1.04; at 256 64 x 128 0.87 to 1.02.
    * bfloat16 in pairs at 64 64 x 128 0.97 to 1.00, 64 x 256 0.96 to 0.99.

    AMX, one thread of an Emerald Rapids, time of 64 x 64 and of 64 x 128 over that of 64 x 256, in turns; 4 heads of
    1024, one of 4096, 16 of 512:

    * head_dim 64 full 1.32, 1.10; 1.34, 1.11; 1.32, 1.10; causal 1.30, 1.08; 1.32, 1.10; 1.25, 1.05.
    * head_dim 128 full 1.22, 1.11; 1.25, 1.13; 1.22, 1.12; causal 1.18, 1.10; 1.22, 1.11; 1.13, 1.05.
    * head_dim 256 full 1.19, 1.07; 1.22, 1.08; 1.18, 1.08; causal 1.13, 1.03; 1.22, 1.06; 1.08, 1.03.
    * 128 x 256 at head_dim 64 1.05 to 1.13; 32 x 256 1.09 to 1.10.

    Under a mask with gaps, wide tiles have more that nobody sees.
    """
    isa = ISAS[target.isa]
    scattered = pattern.is_opaque or pattern.has_gaps
    if multiplication(isa, pattern.dtype) == "tiles":
        most = 128 if scattered else 256
        configs = (Config(64, keys, row_vectors=2, tile_rows=32) for keys in (256, 128, 64, 32) if keys <= most)
        return {0: next(c for c in configs if scratch(pattern, c, isa) <= _SCRATCH_LIMIT_OF_TILES or c.block_n == 32)}
    row_vectors, tile_rows = (2, 8) if isa.registers == 32 else (2, 4)
    wide = Config(64, 128, row_vectors, tile_rows)
    # Half of what a thread may have, since other processors' caches are half of that one's.
    is_wide = isa.registers == 32 and not scattered and scratch(pattern, wide, isa) <= _SCRATCH_LIMIT // 2
    return {0: wide if is_wide else replace(wide, block_n=64)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config`` that are worth trying."""
    if multiplication(ISAS[target.isa], pattern.dtype) == "tiles":
        return {"block_m": (32, 64, 128), "block_n": (32, 64, 128, 256), "row_vectors": (2,), "tile_rows": (32,)}
    return {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "row_vectors": (1, 2, 3, 4), "tile_rows": (2, 4, 8)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration fits the registers and the cache, and the score has a derivative; None if so."""
    if target.isa not in ISAS:
        return Rejected(f"instruction set {target.isa!r} is unknown; expected one of {', '.join(ISAS)}")
    try:
        pattern.differentiate()
    except DefinitionError as e:
        return Rejected(f"the score has no backward: {e}")
    isa = ISAS[target.isa]
    if min(config.block_m, config.block_n, config.row_vectors, config.tile_rows) < 1:
        return Rejected(f"every field of {config} must be positive")
    width = config.row_vectors * isa.lanes
    if config.block_n % width:
        return Rejected(f"block_n {config.block_n} is not a multiple of the {width} columns of a register tile")
    if config.block_m % config.tile_rows or config.block_n % config.tile_rows:
        return Rejected(f"tile_rows {config.tile_rows} divides not both block_m and block_n of {config}")
    multiplied = multiplication(isa, pattern.dtype)
    if multiplied == "pairs" and (config.block_m % (2 * isa.lanes) or config.row_vectors % 2):
        return Rejected(f"{config}: pairs need a block_m of pairs of vectors, and an even row_vectors")
    on_tiles = multiplied == "tiles"
    if on_tiles and (config.row_vectors, config.tile_rows) != (2, 32):
        return Rejected(f"{config}: products on tile registers are 32 rows of 2 vectors")
    needed = config.tile_rows * config.row_vectors + config.row_vectors + 1
    if needed > isa.registers and not on_tiles:
        return Rejected(f"needs {needed} vector registers, {target.isa} has {isa.registers}")
    limit = _SCRATCH_LIMIT_OF_TILES if on_tiles else _SCRATCH_LIMIT
    if scratch(pattern, config, isa) > limit:
        return Rejected(f"needs {scratch(pattern, config, isa)} bytes of scratch for each thread, the limit is {limit}")
    return None


def scratch(pattern: Pattern, config: Config, isa: Isa) -> int:
    """Bytes of scratch that a thread needs, at most."""
    M, N = config.block_m, config.block_n
    D, E = (padded(d, config, isa) for d in (pattern.head_dim, pattern.head_dim_v))
    if multiplication(isa, pattern.dtype) == "floats":  # the tables of ``floats.py`` and ``tile.py``
        return (N * (2 * D + 2 * E + max(D, E)) + M * (D + E) + 2 * M * N) * 4
    return N * (8 * D + 6 * E + 2 * max(D, E)) + M * (4 * D + 4 * E) + M * N * 14  # of ``operands.py`` and others


def padded(width, config: Config, isa: Isa):
    """A head_dim rounded up to whole rows of register tiles."""
    columns = config.row_vectors * isa.lanes
    return (width + (columns - 1)) // columns * columns
