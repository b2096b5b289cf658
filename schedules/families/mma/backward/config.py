"""The schedule parameters of a backward of the mma.sync families, and what a configuration needs."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.definition.errors import DefinitionError
from schedules.definition.pattern import Pattern
from schedules.families.interface import Rejected, Target
from schedules.families.limits import SHARED_MEMORY, registers_for
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.fragment import M16N8, Fragment
from schedules.tile.place_gradients import Targets
from schedules.tile.slots import WORDS
from schedules.tile.smem import TILE_ALIGNMENT, panel_columns
from schedules.tile.table_gradients import Slices, learnt_tables
from schedules.tile.weights import summed

#: Registers beside sums, S and dP, what is packed, and operands: addresses, counters, numbers of rows.
_OTHER_REGISTERS = 32


#: Rows of dq that a warp of the joint launch makes, if a tile of queries has so many.
DQ_ROWS = 32
#: Numbers that say where a block of the joint launch is: batch, head, and how many heads it is yet to visit; head of
#: keys, and which of the blocks that share its keys it is.
PLACES = 5


@dataclass(frozen=True)
class LaunchConfig:
    """One launch: ``own_rows`` rows of a block, ``step_rows`` rows of a step, ``num_warps`` warps, ``num_stages``
    buffers of the latter; ``min_blocks_per_sm`` bounds the registers so that this many blocks fit one multiprocessor.
    ``parts`` warps share the rows of their m-tiles: each has the scores of its part of a step's rows, and the sums of
    its part of the columns.  ``paced``: operands of S and dP are loaded 16 columns at a time, where the compiler would
    load more of them earlier, and spill.  ``ahead``: a right operand is loaded one before its products, and none
    earlier.  ``early``: probabilities are made before the products of dP, beside which their exponentials can run.
    ``joint``: the launch makes dq too, and a block tells the next one of every ``told_tiles`` tiles.
    """

    own_rows: int
    step_rows: int
    num_warps: int
    num_stages: int
    min_blocks_per_sm: int
    parts: int
    paced: bool
    ahead: bool
    early: bool
    joint: bool = False
    told_tiles: int = 1

    @property
    def exchange_slots(self) -> int:
        """How many tiles of what they make of scores warps leave in shared memory: the joint launch reads one while the
        next is written."""
        return 2 if self.joint else 1 if self.parts > 1 else 0

    @property
    def number_slots(self) -> int:
        """Tiles of queries whose numbers are in shared memory, where a step visits queries.

        The joint launch reads those of the tile before beside what is fetched.
        """
        return self.num_stages + 2 if self.joint else self.num_stages

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.num_warps

    def m_tiles(self, fragment: Fragment) -> int:
        """Tiles of a warp."""
        return self.own_rows * self.parts // (fragment.tile_rows * self.num_warps)


@dataclass(frozen=True)
class Config:
    """How the launch for dk and dv, and that for dq, are scheduled.

    Attributes
    ----------
    block_n, block_m: keys of a block, and queries of a step, of the launch for dk and dv.
    num_warps, num_stages, min_blocks_per_sm: of that launch, as in ``LaunchConfig``.
    block_m_dq, block_n_dq: queries of a block, and keys of a step, of the launch for dq.
    num_warps_dq, num_stages_dq, min_blocks_per_sm_dq: of that launch.
    section_mib: in seq-outer order, heads go in sections whose visited rows have that size.
    warps_per_tile: 2 where pairs of warps share their keys in the launch for dk and dv.
    paced: as in ``LaunchConfig``, of both; ``paced_dq`` of the launch for dq alone, if it isn't None.
    ahead, early, ahead_dq, early_dq: as in ``LaunchConfig``.
    joint: the launch for dk and dv makes dq too (:mod:`schedules.families.mma.backward.joint`), with five products in
        place of seven; fields of the launch for dq say nothing.
    told_tiles: how often a block of the joint launch tells the next one what it has added, where it is to visit many
        tiles.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    min_blocks_per_sm: int
    block_m_dq: int
    block_n_dq: int
    num_warps_dq: int
    num_stages_dq: int
    min_blocks_per_sm_dq: int
    section_mib: int = 16
    warps_per_tile: int = 1
    paced: bool = True
    ahead: bool = False
    early: bool = False
    paced_dq: bool | None = None
    ahead_dq: bool = False
    early_dq: bool = False
    joint: bool = False
    told_tiles: int = 1

    @property
    def keys(self) -> LaunchConfig:
        """The launch for dk and dv."""
        return LaunchConfig(
            *(self.block_n, self.block_m, self.num_warps, self.num_stages, self.min_blocks_per_sm),
            *(self.warps_per_tile, self.paced, self.ahead, self.early, self.joint, self.told_tiles),
        )

    @property
    def queries(self) -> LaunchConfig:
        """The launch for dq."""
        paced = self.paced if self.paced_dq is None else self.paced_dq
        return LaunchConfig(
            *(self.block_m_dq, self.block_n_dq, self.num_warps_dq, self.num_stages_dq, self.min_blocks_per_sm_dq),
            *(1, paced, self.ahead_dq, self.early_dq),
        )


@dataclass(frozen=True)
class Machine:
    """What configurations must fit beside an arch: where accumulators sit, whether tiles are on their way in registers
    (``staged``), and whether blocks have shared memory for a work tile that they look up (``looks_up``)."""

    fragment: Fragment = M16N8
    staged: bool = False
    looks_up: bool = False


#: One with asynchronous copies and m16n8 products, where blocks know their work tile.
MACHINE = Machine()


def feasible(pattern: Pattern, config: Config, target: Target, machine: Machine) -> Rejected | None:
    """Whether the machine has room for a block of either launch, and the score has a derivative; None if so."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 32:
            return Rejected(f"{name} {head_dim} is not a multiple of 32; build for the next larger one")
    try:
        pattern.differentiate()
    except DefinitionError as e:
        return Rejected(f"the score has no backward: {e}")
    if config.joint:
        return _refuse_joint(pattern, config, machine) or _fits("joint", pattern, config.keys, target, True, machine)
    return _fits("dkdv", pattern, config.keys, target, True, machine) or _fits(
        "dq", pattern, config.queries, target, False, machine
    )


def _refuse_joint(pattern: Pattern, config: Config, machine: Machine) -> Rejected | None:
    """Why the joint launch can't be made."""
    if not pattern.is_scale_only or not pattern.narrows or pattern.params:
        return Rejected("joint: it serves plain scores whose keys are seen by all queries from some one on")
    if machine.fragment is not M16N8 or machine.looks_up:
        return Rejected("joint: it is for dense tensors, and operands that come by ldmatrix")
    columns, left = divmod(pattern.head_dim * config.block_m, min(DQ_ROWS, config.block_m) * config.num_warps)
    panel = panel_columns(pattern.head_dim, element_type(pattern.dtype))
    if config.told_tiles < 1:
        return Rejected(f"joint: told_tiles {config.told_tiles} must be at least 1")
    if left or columns % 16 or pattern.head_dim % columns or (columns % panel and panel % columns):
        return Rejected(f"joint: {config.num_warps} warps can't share tiles of {config.block_m} rows of dq evenly")
    return None


def _fits(
    launch: str, pattern: Pattern, config: LaunchConfig, target: Target, transposed: bool, machine: Machine
) -> Rejected | None:
    R, M, fragment = config.own_rows, config.step_rows, machine.fragment
    if config.parts not in (1, 2) or config.num_warps % config.parts:
        return Rejected(f"{launch}: warps_per_tile {config.parts} must be 1, or 2 and num_warps even")
    most, tiles = 32 // fragment.tile_rows, config.m_tiles(fragment)
    if not 1 <= tiles <= most or fragment.tile_rows * tiles * config.num_warps != R * config.parts:
        rows = " or ".join(str(fragment.tile_rows * n) for n in range(1, most + 1))
        return Rejected(f"{launch}: {R} rows don't give each of {config.num_warps} warps {rows}")
    unit = 2 * fragment.group * config.parts
    if M % unit or config.threads < 2 * M:
        return Rejected(
            f"{launch}: {M} rows a step are not a multiple of {unit} up to half of {config.threads} threads"
        )
    if config.ahead and fragment is not M16N8:
        return Rejected(f"{launch}: ahead is for operands that come by ldmatrix")
    if config.early and (summed(pattern) or Targets(pattern, transposed).params):
        return Rejected(f"{launch}: early is for scores without gradients of parameters")
    if config.num_stages < 2:
        return Rejected(f"{launch}: num_stages {config.num_stages} must be at least 2")
    shared = _shared_memory(pattern, config, transposed, machine)
    available = SHARED_MEMORY[target.arch]
    if shared > available:
        return Rejected(f"{launch}: needs {shared} bytes of shared memory, a block of {target} has {available}")
    registers = _registers(pattern, config, transposed, fragment)
    registers += _staging(pattern, config) if machine.staged else 0
    if registers > registers_for(config):
        return Rejected(f"{launch}: needs about {registers} registers a thread, {registers_for(config)} are to be had")
    return None


def _shared_memory(pattern: Pattern, config: LaunchConfig, transposed: bool, machine: Machine) -> int:
    types = tensor_types(pattern)
    rows = config.own_rows + config.num_stages * config.step_rows
    asked = len(summed(pattern))
    numbers = (
        config.number_slots * config.step_rows * 2 if transposed else config.own_rows * 2 + asked * config.num_warps
    )
    numbers += config.num_warps + PLACES if config.joint else 0
    exchanged = config.own_rows * config.step_rows * config.exchange_slots
    others = 4 * numbers
    if not transposed and learnt_tables(pattern):
        others += Slices(machine.fragment, config.step_rows).bytes(config.num_warps)
    if machine.looks_up:  # it is before the tiles, with the numbers
        others = -(-(4 * (numbers + WORDS)) // TILE_ALIGNMENT) * TILE_ALIGNMENT
    return types.k.bytes * (rows * (pattern.head_dim + pattern.head_dim_v) + exchanged) + others


def _registers(pattern: Pattern, config: LaunchConfig, transposed: bool, fragment: Fragment) -> int:
    sums = pattern.head_dim + (pattern.head_dim_v if transposed else 0)
    # S and dP, of which P and dS take the place
    fragments = fragment.registers(sums // config.parts) + 2 * fragment.registers(config.step_rows // config.parts)
    return config.m_tiles(fragment) * (fragments + 4) + (8 if config.ahead else 4) + _OTHER_REGISTERS


def _staging(pattern: Pattern, config: LaunchConfig) -> int:
    elements = config.step_rows * (pattern.head_dim + pattern.head_dim_v)
    return -(-elements * tensor_types(pattern).k.bytes // (4 * config.threads))
