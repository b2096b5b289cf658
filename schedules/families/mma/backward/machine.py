"""One block's work in either launch of a backward: rows of its own against tiles of rows that it visits.

====================== ======================== ========================
\\                      dk and dv                dq
====================== ======================== ========================
a block's own          keys and values          queries and dO
a step visits          queries and dO           keys and values
S, of the first ones   ``K Qᵀ``, keys × queries ``Q Kᵀ``
dP, of the second ones ``V dOᵀ``                ``dO Vᵀ``
sums                   dV += P dO, dK += dS Q   dQ += dS K
====================== ======================== ========================

A warp has 16 or 32 of the own rows.  Of a step it has S and dP, then P and dS in registers: accumulators' pairs are the
left operands of the sums, and nothing of them passes through shared memory, unless pairs of warps share rows: then each
has S and dP of half of the visited rows, and hands what it has made of them to its partner, to add up half of the
columns.  It takes fewer loads from shared memory, which is what limits large head_dims: at 128, of 32 keys and 64
queries, 56 KiB a warp in place of 72 (on an H200 84% of what shared memory gives before, 74% then).

A family's machine is :class:`GradientMachine` with its copies and its products mixed in.
"""

from __future__ import annotations

from typing import NamedTuple

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.config import LaunchConfig
from schedules.families.mma.backward.products import GradientProducts
from schedules.families.mma.machine import RowCopies, Rows, pieces
from schedules.families.mma.mma import stage_rows
from schedules.families.mma.paired import PART_COLUMNS
from schedules.families.mma.registers import fresh
from schedules.tile.dtypes import tensor_types
from schedules.tile.epilogue import add_rows, store_rows
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import local
from schedules.tile.place_gradients import PlaceGradients, Targets
from schedules.tile.smem import SharedTile
from schedules.tile.static import static
from schedules.tile.table_gradients import TableGradients
from schedules.tile.weights import Weights

#: Named barriers of the pairs begin here; barrier 0 is the whole block's.
_FIRST_BARRIER = 1


class Sides(NamedTuple):
    """What enters the two products of scores: rows of q and k, and rows of dO and v."""

    scores: object
    gradients: object


@T.meta_class
class GradientMachine(GradientProducts, RowCopies):
    """Shared tiles, registers and steps of one block.

    ``own`` are row sources of what the block keeps, from row ``own_first`` on, and keys if ``transposed``: then there
    is a sum of P too.  ``pool`` is its shared memory if somebody has taken of it already.

    A launch's machine brings ``place_shared(pool)``; ``shift(t, g, r, e)`` and ``start(t, g, r, e)``, lse and delta of
    a register's query as a step wants them, after ``prepare_starts()`` and ``prepare_shifts()``; ``load_numbers(at,
    live)`` and ``store_numbers(stage)``, which fetch them where queries are visited; ``arrive_at(masked)``; and
    ``parameter_sums``.
    """

    #: Where an accumulator register of a family's products sits.
    fragment = M16N8

    def __init__(self, pattern: Pattern, config: LaunchConfig, own: Sides, own_first, pool=None, *, transposed: bool):
        D, E = pattern.head_dim, pattern.head_dim_v
        R, M = config.own_rows, config.step_rows
        self.pattern, self.config = pattern, config
        self.transposed, self.stages, self.threads = transposed, config.num_stages, config.threads
        self.types = tensor_types(pattern)
        self.m_tiles, self.tile_step = config.m_tiles(self.fragment), self.fragment.tile_rows
        self.parts = config.parts
        # 1. Shared memory: own tiles, stages of visited ones, and numbers of the visited queries.
        shared = pool or SMEMPool()
        if pool is not None:  # beside what is there, before the tiles' alignment
            self.place_shared(shared)
        shapes = (
            ((1, R, D), self.types.q),
            ((1, R, E), self.types.o),
            ((self.stages, M, D), self.types.k),
            ((self.stages, M, E), self.types.v),
        )
        tiles = [SharedTile(shared, *shape, element) for shape, element in shapes]
        self.own_tiles, self.visited_tiles = Sides(*tiles[:2]), Sides(*tiles[2:])
        slots = config.exchange_slots
        self.exchanged = SharedTile(shared, slots, R, M, self.types.v) if slots else None
        if pool is None:
            self.place_shared(shared)
        shared.commit()
        # 2. Where this thread's rows are: computed anew where it is asked, as registers are few.
        self.lane = fresh("tid.x") % 32
        self.part = fresh("tid.x") // 32 % self.parts if self.parts > 1 else 0
        self.warp_row = fresh("tid.x") // 32 // self.parts * (self.m_tiles * self.tile_step)
        self.own = Sides(*(Rows(source, tile, self.threads) for source, tile in zip(own, self.own_tiles, strict=True)))
        self.own_first = own_first
        # 3. Registers: sums of 16 rows an m-tile, S and dP, P and dS packed, operands.
        self.columns = M // self.parts
        self.s_stride = self.fragment.registers(self.columns)
        self.d_stride, self.e_stride = (self.fragment.registers(x // self.parts) for x in (D, E))
        self.sum_ds = T.alloc_local([self.m_tiles * self.d_stride], "float32")
        self.sum_p = T.alloc_local([self.m_tiles * self.e_stride], "float32") if transposed else None
        self.S = T.alloc_local([self.m_tiles * self.s_stride], "float32")
        self.dP = T.alloc_local([self.m_tiles * self.s_stride], "float32")
        self.P = T.alloc_local([self.m_tiles * self.s_stride // 2], "uint32") if transposed else None
        self.dS = T.alloc_local([self.m_tiles * self.s_stride // 2], "uint32")
        self.A = T.alloc_local([self.m_tiles * 4], "uint32")
        self.B = T.alloc_local([8 if config.ahead else 4], "uint32")
        # 4. The tile that is copied next, the stage in use, and in a step the first column of this lane.
        self.fetched, self.use, self.column = (local(T.int32(0)) for _ in range(3))
        self.place_staging(sum(pieces(tile, self.threads) for tile in self.visited_tiles))

    def place_shared(self, pool):
        """Shared memory beside the tiles."""

    def exchange(self, row, chunk):
        """Shared address of a chunk of what warps leave to each other."""
        return self.exchanged.address(row, chunk)

    def term_of(self, at, row):
        """Where lse and delta of a query of the block's sequence are, int64."""
        return self.tensors.lse_offset(at.b, at.h, self.tensors.queries.of(at.b).at(row))

    def weights(self, at, places: PlaceGradients | None = None, tables: TableGradients | None = None) -> Weights:
        """Scores of one head to probabilities and gradients; ``places`` and ``tables`` as in :class:`Weights`."""
        return Weights(
            self.pattern,
            at,
            self.columns,
            self.transposed,
            fragment=self.fragment,
            m_tiles=self.m_tiles,
            tile_step=self.tile_step,
            pack=self.pack_pair,
            places=places,
            tables=tables,
        )

    def place_gradients(self, targets: Targets, at) -> PlaceGradients | None:
        """What takes the gradients of one head that have values for queries or keys, if there are any."""
        if not targets.params:
            return None
        return PlaceGradients(targets, at, self.fragment, self.m_tiles, self.tile_step, self.transposed)

    @T.inline
    def store_places(self, places):
        """Store those of the block's own rows; those of both warps that share them, one after the other."""
        if places is not None and len(places.sums) > 0:
            row0 = T.meta_var(self.first_row(fresh("tid.x")) + self.fragment.row(self.lane))
            if self.parts == 1:
                places.store_sums(row0, self.lane)
            else:
                if self.part == 0:
                    places.store_sums(row0, self.lane)
                self.sync_sharing_warps()
                if self.part != 0:
                    places.store_sums(row0, self.lane, adds=True)

    def output_column(self, group):
        """First column of a register group of a sum, counted from the first of this part's: every other 16 of two."""
        return self.fragment.output_column(group) if self.parts == 1 else group // 2 * 32 + group % 2 * 8

    @T.inline
    def sync_sharing_warps(self):
        """The warps that share rows wait for each other."""
        if self.parts > 1:
            T.ptx.bar.sync(T.Cast("uint32", _FIRST_BARRIER + fresh("tid.x") // (32 * self.parts)), 32 * self.parts)
        else:
            T.cuda.warp_sync()

    # ------------------------------------------------------------ copies

    def rows_of(self, sources) -> Sides:
        """Sources of visited rows with where they are copied to."""
        return Sides(
            *(Rows(source, tile, self.threads) for source, tile in zip(sources, self.visited_tiles, strict=True))
        )

    @T.inline
    def begin(self):
        """No sums yet; start copying the block's own rows."""
        self.copy(self.own.scores, 0, self.own_first, True, True)
        self.copy(self.own.gradients, 0, self.own_first, True, True)
        for i in T.unroll(self.m_tiles * self.d_stride):
            self.sum_ds[i] = T.float32(0)
        if self.transposed:
            for i in T.unroll(self.m_tiles * self.e_stride):
                self.sum_p[i] = T.float32(0)

    @T.inline
    def fetch(self, visited, stage, live):
        """Start copying the tile that is next."""
        first = T.meta_var(self.fetched * self.config.step_rows)
        self.send(visited.scores, stage, first, live, 0)
        self.send(visited.gradients, stage, first, live, pieces(self.visited_tiles.scores, self.threads))
        self.commit()

    @T.inline
    def land(self, visited, stage):
        """What was fetched is to be in its stage at the next barrier."""
        self.put(visited.scores, stage, 0)
        self.put(visited.gradients, stage, pieces(self.visited_tiles.scores, self.threads))
        self.store_numbers(stage)

    # ------------------------------------------------------------ steps

    @T.inline
    def compute(self, weights, tile, masked):
        """The products of a step."""
        thread: T.int32 = fresh("tid.x")
        place = T.meta_var(self.position(thread, tile))
        self.column = self.part * self.columns + self.fragment.column(thread % 32)
        for i in T.unroll(self.m_tiles * self.s_stride):
            self.S[i] = T.float32(0)
        self.score(self.S, self.own_tiles.scores, self.visited_tiles.scores)
        if self.config.early:
            self.prepare_shifts()
            weights.weigh(self.S, self.P, self.shift, place[0], place[1], masked)
            self.score_gradients()
            if self.transposed:
                self.add(self.sum_p, self.e_stride, self.P, self.visited_tiles.gradients)
            weights.gradients(self.S, self.dP, self.dS, masked)
        else:
            self.score_gradients()
            self.prepare_shifts()
            weights.turn(self.S, self.dP, self.P, self.dS, self.shift, place[0], place[1], masked, self.parameter_sums)
            if self.transposed:
                self.add(self.sum_p, self.e_stride, self.P, self.visited_tiles.gradients)
        if self.config.joint:
            self.clear_missing(weights.at, masked)
        self.add(self.sum_ds, self.d_stride, self.dS, self.visited_tiles.scores)

    @T.inline
    def score_gradients(self):
        """dP, less delta."""
        self.prepare_starts()
        for t in T.unroll(self.m_tiles):
            for g in T.unroll(self.s_stride // 4):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        self.dP[t * self.s_stride + g * 4 + r * 2 + e] = self.start(t, g, r, e)
        self.score(self.dP, self.own_tiles.gradients, self.visited_tiles.gradients)

    def first_row(self, thread):
        """The first own row of a thread's warp."""
        return self.own_first + thread // 32 // self.parts * (self.m_tiles * self.tile_step)

    def position(self, thread, tile):
        """Query and key of a thread's first score of a step."""
        lane = thread % 32
        own = self.first_row(thread) + self.fragment.row(lane)
        visited = tile * self.config.step_rows + self.part * self.columns + self.fragment.column(lane)
        return (visited, own) if self.transposed else (own, visited)

    def is_seen(self, at, tile):
        """Whether the mask shows a warp's rows any of a tile; it may say so where it shows none."""
        first, rows, M = self.first_row(fresh("tid.x")), self.m_tiles * self.tile_step, self.config.step_rows
        of = self.pattern.rows_of if self.transposed else self.pattern.keys_of
        begin, end = of(at, first, first + (rows - 1)).visible
        return T.And(begin < (tile + 1) * M, end > tile * M)

    @property
    def before(self):
        """The stage before the one in use, which is the next to be filled."""
        return T.Select(self.use == 0, self.stages, self.use) - 1

    @T.inline
    def step(self, visited, weights, tile, end, masked):
        """Visit a tile; the one that is ``stages - 1`` further on is fetched, if it is below ``end``."""
        if not self.pattern.has_gaps:
            # follow from the tile, so that they aren't kept from step to step
            self.use = tile % self.stages
            self.fetched = tile + (self.stages - 1)
        self.arrive_at(masked)
        live: T.bool = self.fetched < end
        self.load_numbers(weights.at, live)
        self.fetch(visited, self.before, live)
        if masked and not self.pattern.has_gaps:
            if self.is_seen(weights.at, tile):
                self.compute(weights, tile, masked)
        else:
            self.compute(weights, tile, masked)
        self.land(visited, self.before)
        if self.pattern.has_gaps:
            self.advance(weights.at, end, self.fetched)
            self.use = T.Select(self.use == self.stages - 1, 0, self.use + 1)

    @T.inline
    def advance(self, at, end, tile):
        """``tile`` to the next one that has something to see, or ``end``."""
        if self.pattern.lists_tiles:
            tile = self.pattern.next_tile(at, self.own_first, tile)
        else:
            tile = tile + 1
            if self.pattern.has_gaps:
                self.skip(at, end, tile)

    @T.inline
    def skip(self, at, end, tile):
        """``tile`` to the first that has something to see, from itself on, or ``end``."""
        while T.And(tile < end, T.Not(self.is_live(at, tile))):
            tile = tile + 1

    def is_live(self, at, tile):
        """Whether a mask with gaps shows the block's own rows any of a tile."""
        R, M = self.config.own_rows, self.config.step_rows
        own = (self.own_first, self.own_first + (R - 1))
        visited = (tile * M, tile * M + (M - 1))
        rows, keys = (visited, own) if self.transposed else (own, visited)
        return self.pattern.tile_live(at, *rows, *keys)

    @T.inline
    def visit(self, visited, weights, tiles):
        """All steps over the tiles of one head: ``tiles`` as :class:`Parts`."""
        # 1. The first tiles, once no warp reads the stages any more, and zeros that the head before has sent there last
        # have come: copies to one place may come in any order.
        self.arrive(0)
        self.use = 0
        self.fetched = tiles.begin
        if self.pattern.has_gaps and not self.pattern.lists_tiles:
            self.skip(weights.at, tiles.end, self.fetched)
        tile: T.int32 = self.fetched
        for n in T.unroll(self.stages - 1):
            stage = T.meta_var(n if self.pattern.has_gaps else self.fetched % self.stages)
            self.load_numbers(weights.at, self.fetched < tiles.end)
            self.fetch(visited, stage, self.fetched < tiles.end)
            self.land(visited, stage)
            self.advance(weights.at, tiles.end, self.fetched)
        # 2. Partly visible tiles, fully visible ones, partly visible ones.
        if self.pattern.has_gaps:
            while tile < tiles.end:
                if self.pattern.lists_tiles:
                    if self.pattern.is_whole(weights.at, self.own_first, tile):
                        self.step(visited, weights, tile, tiles.end, False)
                    else:
                        self.step(visited, weights, tile, tiles.end, True)
                else:
                    self.step(visited, weights, tile, tiles.end, True)
                self.advance(weights.at, tiles.end, tile)
        else:
            if tiles.has_left:
                for i in T.serial(tiles.begin, tiles.full_begin):
                    self.step(visited, weights, i, tiles.end, True)
            if tiles.has_full:
                for i in T.serial(tiles.full_begin, tiles.full_end):
                    self.step(visited, weights, i, tiles.end, False)
            if tiles.has_right:
                for i in T.serial(tiles.full_end, tiles.end):
                    self.step(visited, weights, i, tiles.end, True)

    # ------------------------------------------------------------ the way out

    @T.inline
    def finish(self):
        """Every warp is past its last step, and nothing is on its way to shared memory."""
        self.arrive(0)

    @T.inline
    def store(self, tensor, sequences, memory, block, acc, tile, factor):
        """Round a sum times ``factor``, and store it by way of the warp's own rows of ``tile``, which nobody reads.

        ``sequences`` are those of the own rows, ``block`` is the block's work tile.  Or add it to what is there.
        """
        stride = T.meta_var(self.fragment.registers(tile.columns // self.parts))
        rows = T.meta_var(self.fragment.tile_rows // self.parts)
        if static(self.tensors.adds):
            column: T.int32 = self.fragment.column(self.lane) + self.part * PART_COLUMNS
            first: T.int32 = block.m_block * self.config.own_rows + self.warp_row + self.fragment.row(self.lane)
            own = T.meta_var(sequences.of(block.batch))
            add_rows(
                memory, acc, stride, factor, self.m_tiles, tensor.sizes["dim"], column, self.output_column,
                lambda t, r: first + (t * self.tile_step + r * self.fragment.row_step), own.length,
                lambda row: tensor.offset(block.batch, block.head, own.at(row), column),
            )  # fmt: skip
        else:
            for i in T.unroll(self.m_tiles * stride):
                acc[i] = acc[i] * factor
            stage_rows(self, tile, acc, stride)
            store_rows(
                tensor, sequences.of(block.batch), block.batch, block.head, memory, tile,
                self.warp_row + self.part * rows, block.m_block * self.config.own_rows, self.lane, self.m_tiles,
                self.tile_step, rows,
            )  # fmt: skip
