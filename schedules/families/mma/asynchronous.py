"""cp.async, ldmatrix, mma.sync m16n8k16 with S, P and O in registers: blocks of Ampere and of all that came after it.

One block computes ``block_m`` rows of one head.  Its warps own 16 or 32 rows each and share the key tiles.  A step
takes one tile of keys, and overlaps inside a warp: the exponentials of the next 16 keys run between the instructions
that multiply P and V of these 16, so that tensor cores and exponentials are busy together::

    S = Q K                            tensor cores
    mask, row maximum, vote            arithmetic; O *= correction in the rare step in which a maximum grew
    P = exp2(S), O += P V              both, 16 keys at a time

With ``num_stages = 1`` K and V have one buffer each: V is copied during Q K, the next K after it (two barriers a step).
With more, a group of copies brings K and V of one tile, and ``num_stages - 1`` groups are in flight (one barrier).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families import limits
from schedules.families.interface import Rejected, Target
from schedules.families.mma import ldmatrix
from schedules.families.mma.decode import PackedSoftmax
from schedules.families.mma.instructions import AmpereProducts, AsynchronousCopies
from schedules.families.mma.ldmatrix import LdmatrixProducts
from schedules.families.mma.machine import BlockMachine
from schedules.families.mma.paired import PairedProducts
from schedules.tile.fragment import M16N8


@dataclass(frozen=True)
class Config:
    """``block_m`` rows and ``block_n`` keys a tile, ``num_warps`` warps, ``num_stages`` buffers of K and V each.

    ``min_blocks_per_sm`` bounds the registers so that this many blocks fit one multiprocessor.  ``q_in_registers``
    loads the fragments of Q once instead of once a tile.  ``cursors_in_shared`` saves four registers for 16 bytes of
    shared memory a thread.  ``warps_per_tile`` is 2 where pairs of warps share their rows
    (:mod:`schedules.families.mma.paired`).  ``section_mib``: in seq-outer order, heads go in sections whose keys and
    values have that size, so that they stay in the L2 cache while strip follows strip.  ``v_ahead``: as in
    :class:`LdmatrixProducts`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_blocks_per_sm: int
    q_in_registers: bool = False
    cursors_in_shared: bool = False
    warps_per_tile: int = 1
    section_mib: int = 16
    v_ahead: bool = False


@T.meta_class
class _AsynchronousMachine(AsynchronousCopies, AmpereProducts, BlockMachine):
    """Asynchronous copies, m16n8k16."""

    fragment_type = M16N8

    def __init__(self, pattern, config, *args):
        self.q_in_registers, self.v_ahead = config.q_in_registers, config.v_ahead
        BlockMachine.__init__(
            self, pattern, config, *args, fragment=self.fragment_type, num_stages=config.num_stages,
            parts=config.warps_per_tile, cursors_in_shared=config.cursors_in_shared,
        )  # fmt: skip

    @T.inline
    def fetch(self, stage, live, ragged=False):
        """Start the next group of copies if it is ``live``: K and V, or with one stage K alone."""
        key_first = T.meta_var(self.fetched * self.config.block_n)
        self.copy(self.k, stage, key_first, live, ragged)
        if self.stages > 1:
            self.copy(self.v, stage, key_first, live, ragged)
            before: T.int32 = self.fetched
            self.fetch_done()
            self.move_to_next(self.v, before, self.fetched)
        else:
            self.fetch_done()
        T.ptx.cp.async_.commit_group()

    def is_live(self, tile):
        """Whether the tile that is copied next, in the step of ``tile``, exists."""
        if self.pattern.has_gaps:
            return self.fetched >= self.tiles.begin
        return tile - max(self.stages - 1, 1) >= self.tiles.begin

    @T.inline
    def wait_for_copies(self):
        """Wait for this thread's copies that no step has waited for: all of them, where a block sees no key."""
        T.ptx.cp.async_.wait_group(0)

    @T.inline
    def start(self):
        """Fill the pipeline."""
        self.clear()
        self.copy(self.q, 0, self.rows[0], True, True)
        if self.q_in_registers:
            T.ptx.cp.async_.commit_group()
        # Only the rightmost tile may go beyond the last key.
        self.fetch(0, self.fetched >= self.tiles.begin, True)
        for stage in T.unroll(1, max(self.stages - 1, 1)):
            self.fetch(stage, self.fetched >= self.tiles.begin)
        if self.q_in_registers:
            self.arrive(max(self.stages - 1, 1))
            self.keep_q()

    @T.inline
    def step(self, tile, masked, tracked):
        """One tile of keys."""
        self.arrive(max(self.stages - 2, 0))
        if self.stages > 1:
            self.fetch(T.Select(self.use == 0, self.stages, self.use) - 1, self.is_live(tile))
        else:
            self.copy(self.v, 0, tile * self.config.block_n, True, masked)
            self.move_to_next(self.v, tile, self.fetched)
            T.ptx.cp.async_.commit_group()
        if self.stages > 1:

            @T.inline
            def compute(first):
                self.scores(first)
                self.score_tile(tile, masked, tracked, first)
                self.softmax_pv(tracked, first)

            self.from_first_visible(tile, masked, compute)
            self.use = T.Select(self.use == self.stages - 1, 0, self.use + 1)
        else:

            @T.inline
            def score(first):
                self.scores(first)
                self.score_tile(tile, masked, tracked, first)

            @T.inline
            def softmax_pv(first):
                self.softmax_pv(tracked, first)

            self.from_first_visible(tile, masked, score)
            self.arrive(0)
            self.fetch(0, self.is_live(tile))
            self.from_first_visible(tile, masked, softmax_pv)


@T.meta_class
class Machine(LdmatrixProducts, _AsynchronousMachine):
    """Each warp has rows of its own."""


@T.meta_class
class DecodeMachine(Machine):
    """The packed rows of a group of heads, against one split of the keys."""

    softmax_type = PackedSoftmax
    looks_ahead = True


@T.meta_class
class PairedMachine(PairedProducts, _AsynchronousMachine):
    """Two warps share the rows."""


def feasible(pattern: Pattern, config: Config, target: Target, found: int = 0) -> Rejected | None:
    """Whether the machine has the shared memory and registers, and whether the tile can be divided.

    ``found``: bytes of shared memory for what a block has looked up.
    """
    if config.num_stages < 1:
        return Rejected(f"num_stages {config.num_stages} must be at least 1")
    return limits.check(
        pattern, config, target, M16N8, num_stages=config.num_stages, m_tiles=(1, 2),
        more=ldmatrix.operand_registers(pattern, config), parts=config.warps_per_tile,
        cursors_in_shared=config.cursors_in_shared, found=found,
    )  # fmt: skip
