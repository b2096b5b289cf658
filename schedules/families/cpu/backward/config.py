"""The schedule parameters of the CPU's backward kernels, their defaults, and what makes them feasible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from schedules.definition.errors import DefinitionError
from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import multiplication as forward_multiplication
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.interface import Rejected, Target

#: Scratch of one thread, in bytes: of a second-level cache of 1 MiB, what rows of dq and the next tiles leave.
_SCRATCH_LIMIT = 1 << 20


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


def multiplication(isa: Isa, dtype: str) -> str:
    """How an instruction set multiplies a dtype here: as ``floats`` or in ``pairs``.

    A machine with tile registers has the instruction for pairs too.
    """
    return "floats" if forward_multiplication(isa, dtype) == "floats" else "pairs"


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for any length.

    Time of one thread of a Zen 5 at head_dim 64, others over 64 x 64 (block_m x block_n), of 1024 and 512 keys each:

    * float32, full 64 x 128 0.97, 0.97; 128 x 128 0.96, 0.96; 32 x 64 1.02, 1.02; 64 x 32 1.08, 1.09.  Causal 64 x 128
      1.01, 1.06; 128 x 128 1.01, 1.05; 128 x 64 1.04, 1.09; 32 x 64 1.01, 1.02; 64 x 32 1.07, 1.09.
    * bfloat16, full 64 x 128 0.96, 0.97; 128 x 128 0.95, 0.96; causal 64 x 128 1.01, 1.05; 64 x 32 1.11, 1.12.
    * A register tile of 4 rows of 4 vectors 0.99 to 1.00 everywhere.
    """
    isa = ISAS[target.isa]
    row_vectors, tile_rows = (2, 8) if isa.registers == 32 else (2, 4)
    return {0: Config(64, 64, row_vectors, tile_rows)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config`` that are worth trying."""
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
    if multiplication(isa, pattern.dtype) == "pairs" and (config.block_m % 2 or config.block_n % (2 * isa.lanes)):
        return Rejected(f"{config}: pairs need an even block_m and a block_n of pairs of vectors")
    needed = config.tile_rows * config.row_vectors + config.row_vectors + 1
    if needed > isa.registers:
        return Rejected(f"needs {needed} vector registers, {target.isa} has {isa.registers}")
    scratch = scratch_floats(pattern, config, isa) * 4
    if scratch > _SCRATCH_LIMIT:
        return Rejected(f"needs {scratch} bytes of scratch for each thread, the limit is {_SCRATCH_LIMIT}")
    return None


def scratch_floats(pattern: Pattern, config: Config, isa: Isa) -> int:
    """Float32 elements of scratch that a thread needs, at most."""
    head_dims = sum(padded(d, config, isa) for d in (pattern.head_dim, pattern.head_dim_v))
    return (3 * config.block_n + config.block_m) * head_dims + 2 * config.block_m * config.block_n


def padded(width, config: Config, isa: Isa):
    """A head_dim rounded up to whole rows of register tiles."""
    columns = config.row_vectors * isa.lanes
    return (width + (columns - 1)) // columns * columns
