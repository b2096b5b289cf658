"""The steps of a consumer warpgroup, one for each tile of keys: products, softmax.

A step of a warpgroup, for tile n of keys, overlaps its own softmax with its own products:

1. issue ``S = Q K(n)ᵀ``, then ``O += P V(n−1)`` (with ping-pong: when the other warpgroup has issued its own);
2. wait for S, score and mask it, make probabilities of it while the second product runs;
3. wait for O, release V(n−1), pack P, rescale O if the reference was raised.

Two consumer warpgroups with ping-pong and two stages, from left to right; ``▸`` is a wait that ends::

               step n−1                      step n                        step n+1
    producer K ▸empty  load K(n)             ▸empty  load K(n+1)           ▸empty  load K(n+2)
    producer V ▸empty  load V(n−1)           ▸empty  load V(n)             ▸empty  load V(n+1)
    WG0 issues  QK(n−1) PV(n−2)               QK(n) PV(n−1)                 QK(n+1) PV(n)
    WG0                         ▸S softmax ▸K(n) ▸O      ▸S softmax ▸K(n+1) ▸O       ▸S softmax …
    WG0 releases                K(n−1)      V(n−2)       K(n)        V(n−1)          K(n+1)
    tensor     [WG0 n−1        ][WG1 n−1    ][WG0 n      ][WG1 n     ][WG0 n+1     ][WG1 n+1 …
    WG1 issues                   QK(n−1) PV(n−2)          QK(n) PV(n−1)
    WG1 softmax … of n−2                     … of n−1                  … of n

K(n) is released as soon as S is there (in a step without maximum only at its end: the step may need it again), V(n−1)
when O is.  The producer is ahead by as many tiles as there are stages: K(n + stages) is loaded when the last of the
consumers' warps has released K(n).

There are four kinds of steps: with the maximum of the scores, found before their exponentials or, where these are
guessed, beside them; without maximum and mask; and without maximum where what is added to scores comes in boxes.
"""

from __future__ import annotations

import functools

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import NamedBarriers
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, keeps_bits
from schedules.families.sm90.mask_bits import MaskBits
from schedules.families.sm90.pipeline import Pipeline, PipelineState, TileCounter
from schedules.families.sm90.softmax import Finished, Softmax
from schedules.families.sm90.tensor_boxes import BoxedTile
from schedules.families.sm90.tensor_tile import FollowingTile, TensorTile
from schedules.families.sm90.wgmma import Products, k_major, mn_major, rows_offset
from schedules.families.sm90.work_tile import Block
from schedules.tile.softmax import LAZY
from schedules.tile.static import static

#: Largest head_dim at which descriptors of Q may be kept from step to step: beyond it they take registers that scores
#: and output need (110 moves to uniform registers against 73, and spills).
MANY_COLUMNS = 128

#: What a step that guesses needs beside scores, probabilities, output and tensors.
GUESS_REGISTERS = 28


class Steps:
    """What a warpgroup keeps from tile to tile of keys, and what it does with one.

    It is number ``index`` of the block's consumers, seen by its warp ``warp`` and that warp's lane ``lane``.
    :class:`Consumer`, made of it, is the meta class: if both were, buffers would lose their names.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        block: Block,
        pipelines: tuple[Pipeline, Pipeline, Pipeline],
        epilogue,
        index,
        warp,
        lane,
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v = pipelines
        self.epilogue = epilogue
        self.index, self.warp, self.lane = index, warp, lane
        self.barriers = NamedBarriers(config.num_consumer_warpgroups)
        self.products = Products(pattern.dtype, config.block_m, config.block_n, pattern.head_dim, pattern.head_dim_v)
        # A product of the work tile before may still need its V tile.
        several = config.num_consumer_warpgroups > 1
        all_alike = pattern.is_unmasked and not block.rows.may_be_absent
        self.may_skip = several and not (all_alike or pattern.has_gaps or pattern.lists_tiles or config.overlap_tiles)
        self.outputs = pattern.head_dim_v // 2
        # Of a warpgroup's 64 rows, 128 threads: (64, block_n), (64, head_dim_v) float32; (64, block_n) 16-bit in pairs.
        self.acc_s = T.alloc_local([config.block_n // 2], "float32")
        self.acc_o = T.alloc_local([self.outputs], "float32")
        self.p = T.alloc_local([config.block_n // 4], "uint32")
        self.softmax = Softmax(pattern, block.site, block.rows, config.block_n)
        self.fetches_ahead = any("j" in p.axes for p in pattern.params) and config.tensors_ahead
        # Tensors of a mask alone are fetched beside exponentials, tile by tile from right to left.
        # A tensor in boxes: what it adds is computed while products run, in place of probabilities.
        self.boxes = block.boxes.tensors
        follows = self.fetches_ahead and pattern.is_scale_only and not pattern.lists_tiles
        # A mask in boxes is but a bit a score, which a step without maximum asks for where it subtracts references.
        self.marks = self.boxes is not None and keeps_bits(pattern)
        boxed_type = MaskBits if self.marks else BoxedTile
        boxed = None if self.boxes is None else functools.partial(boxed_type, self.boxes, index, warp)
        self.softmax.add_tensors(lane, boxed or (FollowingTile if follows else TensorTile))
        self.guesses = follows and self._has_room_to_guess()
        # Probabilities are apart where scores may be needed once more: (64, block_n) float32.
        apart = self.guesses or (self.boxes is not None and not self.marks)
        self.weights = T.alloc_local([config.block_n // 2], "float32") if apart else self.acc_s
        # What is in boxes is added, or hides; or else changes the score in another way.
        self.hides = self.boxes is not None and pattern.is_scale_only and not self.marks
        if self.hides or (self.boxes is not None and pattern.is_added_to):
            self.softmax.add_to_products(self.weights)
        self.exceeds = T.local_scalar("int32") if self.marks else None  # whether a step's references were too low
        self.finished = Finished(self.softmax)
        self.n = T.local_scalar("int32")  # tiles of keys that were scored, over all work tiles
        self.counter = TileCounter(self.n)
        self.first = T.local_scalar("int32")  # step that a work tile begins with, for this warpgroup
        self.total = T.local_scalar("int32")  # of all steps, where they have to be counted
        self.row = index * WARPGROUP_ROWS + warp * 16  # first row of this warp in the work tile

    def _has_room_to_guess(self) -> bool:
        """Whether a thread has registers for a step's scores and its probabilities beside what tensors hold."""
        fetched = sum(x.registers for x in self.softmax.tensors.values())
        needed = self.config.block_n + self.config.block_n // 4 + self.outputs + fetched
        return needed + GUESS_REGISTERS <= self.config.registers[1]

    # ------------------------------------------------------------ tiles

    def k_state(self) -> PipelineState:
        """Of K(n), the tile of keys that is scored next."""
        return self.counter.state(self.k.stages)

    def v_state(self) -> PipelineState:
        """Of V(n−1), which the probabilities that are packed belong to."""
        return self.counter.state(self.v.stages, behind=1)

    def boxed_state(self) -> PipelineState:
        """Of what a tensor holds for K(n)."""
        return self.counter.state(self.boxes.stages)

    def q_state(self) -> PipelineState:
        """Of the work tile's queries."""
        return self.q.state(self.block.tile)

    # ------------------------------------------------------------ products

    @T.inline
    def issue_qk(self, k):
        """Start the scores of the work tile and K tile ``k``."""
        T.ptx.wgmma.fence.sync.aligned()
        self.products.qk(self.acc_s, self._q_descriptor(), self._k_descriptor(k))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_pv(self, v):
        """Start the product of the packed probabilities and V tile ``v``."""
        self.v.consumer_wait(v)
        T.ptx.wgmma.fence.sync.aligned()
        self.products.pv(self.acc_o, self.p, self._v_descriptor(v))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue(self, k, v):
        """Start both products of a step, and wait for the scores."""
        self.issue_both(k, v)
        T.ptx.wgmma.wait_group.sync.aligned(1)

    @T.inline
    def issue_both(self, k, v):
        """Start both products of a step."""
        if static(self.config.pingpong):
            self.barriers.await_turn(self.index)
        self.issue_qk(k)
        self.issue_pv(v)
        if static(self.config.pingpong):
            self.barriers.pass_turn(self.index)

    def _q_descriptor(self):
        first = k_major(self.q.tiles.ptr_to([0, 0, 0, 0])) + rows_offset(self.index * WARPGROUP_ROWS, 1)
        if self.pattern.head_dim > MANY_COLUMNS:  # add 0, which only looks as if it changed from step to step
            first = first + T.Cast("uint64", T.shift_right(self.counter.count, 31))
        return first + T.Cast("uint64", self.q_state().index) * rows_offset(self.config.block_m, self.q.panels)

    def _k_descriptor(self, k):
        first = k_major(self.k.tiles.ptr_to([0, 0, 0, 0]))
        return first + T.Cast("uint64", k.index) * rows_offset(self.config.block_n, self.k.panels)

    def _v_descriptor(self, v):
        first = mn_major(self.v.tiles.ptr_to([0, 0, 0, 0]), self.config.block_n)
        return first + T.Cast("uint64", v.index) * rows_offset(self.config.block_n, self.v.panels)

    def _more(self, walk, i):
        """Whether another tile of keys comes after step ``i`` of the work tile."""
        if self.pattern.has_gaps:
            return self.counter.count + 1 < self.total
        if not self.config.overlap_tiles:
            return i + 1 < walk.steps
        return T.Or(i + 1 < walk.steps, self.block.tile < self.block.tiles - 1)

    @T.inline
    def next_k(self, k, more):
        """Wait for the K tile after ``k`` if there is one; it is the one to be scored next.

        It stands between softmax and the wait for O on purpose: a branch is what keeps ptxas from moving that wait up
        in front of the exponentials (72 to 77% of the tensor cores' time).
        """
        if more:
            self.k.consumer_wait(k.next())
        self.counter.advance()

    @T.inline
    def finish_pv(self, v):
        """Wait for the output and let V tile ``v`` go."""
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.v.consumer_release(v, self.lane)

    # ------------------------------------------------------------ steps

    def _row0(self):
        return self.block.row_first + self.row + self.softmax.fragment.row(self.lane)

    def _column0(self, key_first):
        return key_first + self.softmax.fragment.column(self.lane)

    @T.inline
    def fetch(self, key_first):
        """Fetch what tensors hold for the scores of the tile of keys from ``key_first`` on."""
        if static(self.boxes is not None):
            self.take(self.boxed_state(), key_first)
        elif len(self.softmax.tensors) > 0:
            self.softmax.fetch(self._row0(), self._column0(key_first), key_first + (self.config.block_n - 1))

    @T.inline
    def take(self, boxed, key_first):
        """Take what a tensor holds for the scores of the tile of keys from ``key_first`` on from its boxes."""
        last = T.meta_var(key_first + (self.config.block_n - 1))
        self.softmax.take(boxed, self._row0(), self._column0(key_first), last)

    @T.inline
    def fetch_now(self, key_first):
        """At the beginning of a step, fetch for its own scores, unless the step before has."""
        if static(not self.fetches_ahead):
            self.fetch(key_first)

    @T.inline
    def fetch_ahead(self, walk, i):
        """When step ``i`` has its scores, fetch for those of the next one, if the work tile has another."""
        if static(self.fetches_ahead):
            if i + 1 < walk.steps:
                self.fetch(walk.key_first(i + 1))

    @T.inline
    def step(self, walk, i, masked):
        """Step ``i`` of the work tile, which may be masked."""
        if static(self.marks):
            self.step_unchecked(walk, i, True)
        elif static(self.boxes is not None):
            self.step_boxed(walk, i, masked)
        else:
            self.step_with_maximum(walk, i, masked)

    @T.inline
    def step_with_maximum(self, walk, i, masked):
        """A step that finds the maximum of its scores."""
        key_first = T.meta_var(walk.key_first(i))
        k = T.meta_var(self.k_state())
        v = T.meta_var(self.v_state())
        self.fetch_now(key_first)
        self.issue(k, v)
        self.k.consumer_release(k, self.lane)
        self.weigh(walk, i, masked)
        self.next_k(k, self._more(walk, i))
        self.finish_pv(v)
        self.take_in()

    @T.inline
    def weigh(self, walk, i, masked):
        """Make probabilities of the scores of step ``i``, by references that are raised where they have to be."""
        key_first = T.meta_var(walk.key_first(i))
        if static(self.guesses):
            self.softmax.scores_of_existing(self.acc_s, self._row0(), self._column0(key_first), masked)
            self.guess(walk, i)
        else:
            self.softmax.scores(self.acc_s, self._row0(), self._column0(key_first), masked)
            self.fetch_ahead(walk, i)
            self.softmax.track(self.acc_s, LAZY)
            self.softmax.probabilities(self.acc_s, self.softmax.scale, self.acc_s)

    @T.inline
    def pack(self):
        """Pack the probabilities of a step, and count them in."""
        self.softmax.pack(self.weights, self.p)
        self.softmax.add_sums()

    @T.inline
    def take_in(self):
        """Pack the probabilities of a step, and bring the output to the references that it has left."""
        self.pack()
        self.rescale()

    @T.inline
    def rescale(self):
        """Bring the output to the references that a step has left."""
        if self.softmax.grown != 0:
            self.softmax.rescale(self.acc_o, self.outputs)

    @T.inline
    def guess(self, walk, i):
        """Probabilities of step ``i`` by the references that there are, while the maximum is found and tensors are
        fetched for the next step; where scores turn out to exceed references, once more by higher ones.

        The second half of the exponentials is beside the loads, in a text of its own where they are loads of pairs.
        """
        softmax, S, W = T.meta_var((self.softmax, self.acc_s, self.weights))
        half = T.meta_var(softmax.groups // 2)
        softmax.guess(S, W, 0, half)
        softmax.find_peak(S)
        if T.And(i + 1 < walk.steps, softmax.lie_together()):
            softmax.turn_left()
            for g in range(half):
                softmax.load(2 * g)
                softmax.load(2 * g + 1)
                softmax.guess(S, W, half + g, half + g + 1)
        else:
            if i + 1 < walk.steps:
                softmax.fetch(self._row0(), self._column0(walk.key_first(i + 1)), 0, False)
            softmax.guess(S, W, half, softmax.groups)
        softmax.follow_peak(LAZY)
        if softmax.grown != 0:
            softmax.guess(S, W, 0, softmax.groups)

    @T.inline
    def step_unchecked(self, walk, i, masked):
        """A step without maximum, whose mask is bits if there is one; a warp whose references are too low takes it
        again from the scores on."""
        key_first = T.meta_var(walk.key_first(i))
        k = T.meta_var(self.k_state())
        v = T.meta_var(self.v_state())
        boxed = T.meta_var(self.boxed_state() if self.marks else None)
        self.fetch(key_first)
        self.issue(k, v)
        if static(masked):
            self.softmax.visible_probabilities(
                self.acc_s, self.softmax.signed_scale(), self._row0(), self._column0(key_first)
            )
        else:
            self.softmax.modify(self.acc_s, self._row0(), self._column0(key_first), False)
            self.softmax.probabilities(self.acc_s, self.softmax.signed_scale(), self.acc_s)
        if static(masked):
            # A vote, which keeps ptxas from moving exponentials behind the wait for the output.
            self.softmax.sum_up(self.acc_s)
            self.exceeds = T.Cast("int32", self.softmax.overflowed())
        self.next_k(k, self._more(walk, i))
        self.finish_pv(v)
        if static(masked):
            self.softmax.pack_pairs(self.acc_s, self.p)
        else:
            self.softmax.pack(self.acc_s, self.p)
        if self.exceeds != 0 if masked else self.softmax.overflowed():
            # The scores are lost, and a probability may be infinite; K and Q are still in place.
            self.products.qk_again(self.acc_s, self.q.pointer(self.q_state()), self.k.pointer(k), self.row, self.lane)
            if static(masked):
                self.softmax.forget_tests()
            self.softmax.scores(self.acc_s, self._row0(), self._column0(key_first), masked)
            self.softmax.track(self.acc_s, 0.0)
            self.softmax.probabilities(self.acc_s, self.softmax.scale, self.acc_s)
            self.softmax.pack(self.acc_s, self.p)
            if self.softmax.grown != 0:
                self.softmax.rescale(self.acc_o, self.outputs)
        self.k.consumer_release(k, self.lane)
        if static(self.marks):
            self.boxes.release(boxed, self.index, self.lane)
        self.softmax.add_sums()

    @T.inline
    def step_boxed(self, walk, i, masked):
        """A step without maximum, of which products are kept, so that K can go at once: a warp whose references are too
        low makes its probabilities again.  What a tensor holds is taken from its boxes before the products begin, and
        what it adds is computed while they run.
        """
        softmax, S, W = T.meta_var((self.softmax, self.acc_s, self.weights))
        key_first = T.meta_var(walk.key_first(i))
        k = T.meta_var(self.k_state())
        v = T.meta_var(self.v_state())
        boxed = T.meta_var(self.boxed_state())
        at_once = T.meta_var(softmax.added is not None and (self.hides or not masked))
        self.take(boxed, key_first)
        self.issue_both(k, v)
        softmax.add_beforehand(self._row0(), self._column0(key_first), at_once)
        T.ptx.wgmma.wait_group.sync.aligned(1)
        self.k.consumer_release(k, self.lane)
        if static(at_once):
            softmax.probabilities_of_products(S, W)
        else:
            softmax.scores(S, self._row0(), self._column0(key_first), masked)
            softmax.probabilities(S, softmax.scale, W)
        self.next_k(k, self._more(walk, i))
        self.finish_pv(v)
        softmax.pack(W, self.p)
        if softmax.overflowed():
            if static(at_once):
                self.take(boxed, key_first)
                softmax.add_beforehand(self._row0(), self._column0(key_first), False)
                softmax.scores(S, self._row0(), self._column0(key_first), masked)
            softmax.track(S, 0.0)
            softmax.find_near()
            softmax.probabilities(S, softmax.scale, W)
            softmax.pack(W, self.p)
            if softmax.grown != 0:
                softmax.rescale(self.acc_o, self.outputs)
        self.boxes.release(boxed, self.index, self.lane)
        softmax.add_sums()

    @T.inline
    def first_softmax(self, walk, k):
        """Probabilities of a work tile's first step, with the exact maximum; ``k`` is its tile of keys."""
        column0 = T.meta_var(self._column0(walk.key_first(self.first)))
        self.k.consumer_release(k, self.lane)
        self.softmax.reset()
        self.softmax.add_beforehand(self._row0(), column0, False)
        if T.And(walk.full_begin <= self.first, self.first < walk.full_end):
            self.softmax.scores(self.acc_s, self._row0(), column0, False)
        else:
            self.softmax.scores(self.acc_s, self._row0(), column0, True)
        self.fetch_ahead(walk, self.first)
        self.softmax.track(self.acc_s, 0.0)
        self.softmax.find_near()
        if static(self.guesses):
            self.softmax.guess(self.acc_s, self.weights, 0, self.softmax.groups)
        else:
            self.softmax.probabilities(self.acc_s, self.softmax.scale, self.weights)
