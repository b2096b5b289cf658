"""What one block may use, and what a configuration needs: decided before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from schedules.definition.pattern import Pattern
from schedules.families.interface import Rejected, Target
from schedules.tile.dtypes import tensor_types
from schedules.tile.fragment import Fragment

Config = TypeVar("Config")

#: Bytes of shared memory that one block may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {
    "sm_70": 96 * 1024,
    "sm_75": 64 * 1024,
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_120": 99 * 1024,
}

_REGISTER_FILE = 65536  # of a multiprocessor, 32-bit
_MOST_REGISTERS = 255  # of a thread
#: Registers beside fragments and staging: addresses, cursors, softmax state, operands in flight.  The leanest kernel
#: that was found to compile without spills, sm_80 at head_dim 128 with 64 keys a tile, leaves this many.
_OTHER_REGISTERS = 40


def by_head_dim(table: Mapping[int, Config], pattern: Pattern) -> Config:
    """Of configurations by head_dim the first that is large enough for a pattern, or else the largest."""
    return table[min((d for d in table if d >= pattern.head_dim), default=max(table))]


def exchanged_bytes(pattern: Pattern, config) -> int:
    """Shared memory in which pairs of warps hand to each other P, and a float for each row and warp."""
    return config.block_m * (tensor_types(pattern).v.bytes * config.block_n + 2 * 4)


def shared_memory(
    pattern: Pattern,
    config,
    num_stages: int,
    parts: int = 1,
    cursors_in_shared: bool = False,
    exchange_in_k: bool = False,
) -> int:
    """Bytes of a block's tiles of Q, K and V, of what warps that share rows hand to each other, and of cursors."""
    types, D, E = tensor_types(pattern), pattern.head_dim, pattern.head_dim_v
    tiles = types.q.bytes * config.block_m * D
    tiles += num_stages * config.block_n * (types.k.bytes * D + types.v.bytes * E)
    exchanged = exchanged_bytes(pattern, config) if parts == 2 and not exchange_in_k else 0
    cursors = config.num_warps * 32 * 16 if cursors_in_shared else 0
    return tiles + exchanged + cursors


def registers_for(config) -> int:
    """Registers a thread may have, so that ``min_blocks_per_sm`` blocks fit."""
    share = _REGISTER_FILE // (32 * config.num_warps * config.min_blocks_per_sm)
    return min(share // 8 * 8, _MOST_REGISTERS)


def check(
    pattern: Pattern,
    config,
    target: Target,
    fragment: Fragment,
    *,
    num_stages: int,
    m_tiles: tuple[int, ...],
    more: int,
    parts: int = 1,
    cursors_in_shared: bool = False,
    exchange_in_k: bool = False,
    found: int = 0,
) -> Rejected | None:
    """Whether a block can be divided among its warps, and fits the machine.

    ``m_tiles``: how many row tiles a warp may have; ``more``: registers beside S, P and O that the family knows of;
    ``parts``: how many warps share the keys and columns of their rows; ``cursors_in_shared``: as in the machine;
    ``exchange_in_k``: what they hand to each other lies in the memory of K; ``found``: bytes for what a block looks up.
    """
    D, E = pattern.head_dim, pattern.head_dim_v
    if D % 32 or E % 32:
        return Rejected(f"head_dim {D} and head_dim_v {E} must be multiples of 32; build for the next larger one")
    if E > D:
        return Rejected(f"head_dim_v {E} exceeds head_dim {D}; the output is staged in the memory of Q")
    if parts not in (1, 2):
        return Rejected(f"warps_per_tile {parts} must be 1 or 2")
    if parts == 2 and (config.num_warps % 2 or config.block_n not in (32, 64)):
        return Rejected(f"pairs of warps need an even num_warps, and a block_n of 32 or 64, not {config.block_n}")
    tiles, rest = divmod(config.block_m * parts, fragment.tile_rows * config.num_warps)
    if rest or tiles not in m_tiles:
        rows = " or ".join(str(n * fragment.tile_rows) for n in m_tiles)
        return Rejected(f"block_m {config.block_m} doesn't give each of {config.num_warps} warps {rows} rows")
    if config.block_n % 16:
        return Rejected(f"block_n {config.block_n} must be a multiple of 16")
    if (
        parts == 2
        and exchange_in_k
        and exchanged_bytes(pattern, config) > tensor_types(pattern).k.bytes * config.block_n * D
    ):
        return Rejected(f"a tile of {config.block_n} keys is too small for what pairs of warps hand to each other")
    shared = shared_memory(pattern, config, num_stages, parts, cursors_in_shared, exchange_in_k) + found
    available = SHARED_MEMORY[target.arch]
    if shared > available:
        return Rejected(f"needs {-(-shared // 1024)} KiB of shared memory, {target.arch} has {available // 1024}")
    fragments = (
        fragment.registers(config.block_n // parts) + fragment.registers(E // parts) + fragment.registers(16) // 2
    )
    registers = tiles * fragments + more + _OTHER_REGISTERS
    if registers > registers_for(config):
        return Rejected(f"needs about {registers} registers a thread, {registers_for(config)} are to be had")
    return None
