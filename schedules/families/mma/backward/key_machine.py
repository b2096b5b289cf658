"""The machine of the launch for dk and dv: a block owns keys, and visits queries of all heads of their group."""

from __future__ import annotations

from dataclasses import replace

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.config import LaunchConfig
from schedules.families.mma.backward.machine import GradientMachine, Sides
from schedules.families.mma.registers import anew, fresh
from schedules.tile.dtypes import CHUNK_BYTES
from schedules.tile.geometry import local
from schedules.tile.gradients import Tensors
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.weights import negative, shift_of_row


@T.meta_class
class KeyMachine(GradientMachine):
    """The block's own rows are keys and values; of visited queries it wants to know lse and delta."""

    def __init__(self, pattern: Pattern, config: LaunchConfig, own: Sides, own_first, tensors: Tensors, pool=None):
        self.tensors, self.parameter_sums = tensors, None
        self.lse, self.delta = tensors.row_terms()
        GradientMachine.__init__(self, pattern, config, own, own_first, pool, transposed=True)
        self.next_number = local(T.float32(0))

    def place_shared(self, pool):
        # what lse adds to scores, and −delta
        self.numbers = pool.alloc((self.stages, 2, self.config.step_rows), "float32", align=16)

    def numbers_in_use(self):
        """Which of the queries' numbers are those of the tile in use."""
        return self.use

    def shift(self, t, g, r, e):
        """What is added to the score of a register in powers of two."""
        return self.numbers[self.numbers_in_use(), 0, g * self.fragment.group + self.column + e]

    def start(self, t, g, r, e):
        """−delta of a register's query."""
        return self.numbers[self.numbers_in_use(), 1, g * self.fragment.group + self.column + e]

    @T.inline
    def prepare_starts(self):
        """They are read where they are used."""

    @T.inline
    def prepare_shifts(self):
        """They too."""

    @T.inline
    def load_numbers(self, at, live):
        """Start reading what belongs to the queries of the tile that is next: a number a thread."""
        rows = T.meta_var(self.config.step_rows)
        thread: T.int32 = fresh("tid.x")
        row: T.int32 = self.fetched * rows + thread % rows
        index: T.int64 = self.term_of(replace(at, b=anew(at.b), h=anew(at.h)), row)
        exists: T.bool = T.And(live, row < at.seqlen_q)
        if thread < rows:
            self.next_number = T.float32(NEGATIVE_INFINITY)
            if exists:
                self.next_number = shift_of_row(self.pattern, at, self.lse[index], row)
        else:
            self.next_number = T.float32(0)
            if T.And(exists, thread < 2 * rows):
                self.next_number = negative(self.delta[index])

    @T.inline
    def store_numbers(self, stage):
        """What was read, to where its tile is."""
        rows = T.meta_var(self.config.step_rows)
        thread: T.int32 = fresh("tid.x")
        if thread < 2 * rows:
            self.numbers[stage, thread // rows, thread % rows] = self.next_number

    @T.inline
    def arrive_at(self, masked):
        """Wait for the tile in use.

        A query that sees nothing weighs nothing, whatever its row and that of dO hold: these become 0, as 0 times NaN
        were NaN.  There is none in a tile that needs no mask.
        """
        self.wait(self.stages - 2)
        if masked:
            self.clear_blind()
        else:
            T.cuda.cta_sync()

    @T.inline
    def clear_blind(self):
        """All warps meet, then such rows of the tile in use are 0."""
        thread: T.int32 = fresh("tid.x")
        blind: T.int32 = 0
        if thread < self.config.step_rows:
            # this thread has written it
            blind = T.Select(self.numbers[self.numbers_in_use(), 0, thread] == T.float32(NEGATIVE_INFINITY), 1, 0)
        some: T.int32 = T.cuda.syncthreads_or(blind)
        if some != 0:
            if blind != 0:
                self.clear_row(self.visited_tiles.scores, thread)
                self.clear_row(self.visited_tiles.gradients, thread)
            T.cuda.cta_sync()

    @T.inline
    def clear_row(self, tile, row):
        """Zeros in a row of the stage in use."""
        zero = T.alloc_local([1], "uint32")
        zero[0] = T.uint32(0)
        stage = T.meta_var(T.Cast("uint32", self.use * tile.stage_bytes))
        to: T.uint32 = tile.address(0, 0) + T.Cast("uint32", row * tile.row_bytes) + stage
        for p in T.unroll(tile.panels):
            for c in T.unroll(tile.panel_chunks):
                place = T.meta_var(T.ptx.addr(to, p * tile.panel_bytes + c * CHUNK_BYTES))
                T.ptx["st.shared.v4.b32"](place, *[zero[0]] * 4)
