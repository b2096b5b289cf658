"""Partial results that are folded from left to right: by the blocks that compute them, or by another launch.

What the rows of a range of keys leave is a *state*: the output relative to the row's reference, which isn't divided by
the row sum, that sum, and the reference (:mod:`schedules.tile.softmax`).  A warp folds the states of a row
(:class:`Fold`): those that a cluster of blocks holds in shared memory, or that a launch has left in global memory.  It
takes them in the order of the keys and computes the same expressions, so that it makes no difference to a row's bits
where they were.

References are whole numbers: what is multiplied here are powers of two, and rounded is one addition for each range.
All are relative to the highest reference of the row, which is looked for first, so that factors don't wait for one
another.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.dtypes import element_type
from schedules.tile.geometry import Tensor, flat
from schedules.tile.score import LN_2, LOG2_E
from schedules.tile.softmax import LOWEST
from schedules.tile.softmax import from_lane as from_other_lane
from schedules.tile.tile_scheduler import ceildiv

_ALL_LANES = 0xFFFFFFFF
_FUSED = "__forceinline__ __device__ float fused(float x, float y, float z) { return fmaf(x, y, z); }\n"
_WARP = 32
#: States of which each lane of a warp looks one up.
BATCH = _WARP
#: States whose outputs a lane has on the way at a time.
_AHEAD = 8
#: Columns of a lane.
COLUMNS = 2
#: Columns of a warp.
WARP_COLUMNS = _WARP * COLUMNS


def _fused(x: Expr, y: Expr, z: Expr) -> Expr:
    """``x * y + z``, rounded once: what of such an expression is contracted isn't left to the compiler."""
    return T.cuda.func_call("fused", x, y, z, source_code=_FUSED, return_type="float32")


def _of_lane(value: Expr, lane: Expr) -> Expr:
    """``value`` of another lane."""
    return T.cuda.__shfl_sync(T.uint32(_ALL_LANES), value, lane, _WARP)


@T.meta_class
class PartialStates:
    """States of the rows for each part of the keys: ``o (rows, parts, columns)``, and reference and sum in
    ``sums (rows, parts, 2)``, float32.

    ``rows`` are those of the whole output in the order (batch, heads, seqlen_q).  A sum of 0 says that a row sees
    nothing of a part, and then its ``o`` may be anything.  Made before ``T.device_entry()`` of the handles of the two.
    """

    def __init__(self, handles, columns: int):
        o, sums = handles
        self.rows, self.parts = tirx.Var("partial_rows", "int32"), tirx.Var("parts", "int32")
        self.columns = columns
        self.o = T.match_buffer(o, (self.rows, self.parts, columns), "float32", align=16)
        self.sums = T.match_buffer(sums, (self.rows, self.parts, 2), "float32", align=8)


@T.meta_class
class Fold:
    """A warp folds the states of a row, ``COLUMNS`` columns a lane.

    Attributes
    ----------
    states: where they are.  ``states.look_up(number, place, sums)`` brings the place of a state, an unsigned number, to
        ``place[0]``, and its reference and sum to ``sums``; ``states.load(number, place, column, to, first)`` two
        outputs of a batch's state ``number``, from a column on, to ``to[first]`` and the one behind.  A batch is
        ``BATCH`` states: ``states.fetch(batch)`` is called as early as may be, ``states.fetched()`` before its outputs
        are loaded, and ``states.done()`` when they have been.
    columns: of an output.
    peak, total, values: what is left: reference, sum, and the outputs of this lane.
    """

    def __init__(self, states, columns: int, lane):
        self.states, self.columns, self.lane = states, columns, lane
        self.peak, self.total = (T.local_scalar("float32") for _ in range(2))
        self.values = T.alloc_local([COLUMNS], "float32")
        # Of a batch this lane has a state.
        self.own_place = T.alloc_local([1], "uint32")
        self.own_sums = T.alloc_local([2], "float32")
        self.loaded = T.alloc_local([_AHEAD * COLUMNS], "float32")

    @T.inline
    def look_up(self, batch, count):
        """Each lane looks up its state of a batch; behind the last one of ``count`` are some that weigh nothing."""
        number: T.int32 = batch * BATCH + self.lane
        self.states.look_up(T.min(number, count - 1), self.own_place, self.own_sums)
        if number >= count:
            self.own_sums[1] = T.float32(0)

    @T.inline
    def clear(self):
        """What is left of no state."""
        self.peak = T.float32(LOWEST)
        self.total = T.float32(0)
        for x in T.unroll(COLUMNS):
            self.values[x] = T.float32(0)

    @T.inline
    def fold(self, count, column):
        """Fold ``count`` states, at least one; this lane has the columns from ``column`` on."""
        batches: T.int32 = ceildiv(count, BATCH)
        own_column: T.int32 = T.min(column, self.columns - COLUMNS)
        self.states.fetch(0)
        # 1. The highest reference, batches from the last to the first.
        self.peak = T.float32(LOWEST)
        for b in T.serial(batches):
            self.look_up(batches - 1 - b, count)
            self.peak = T.max(self.peak, self.own_sums[0])
        for step in T.unroll(5):
            self.peak = T.max(self.peak, from_other_lane(self.peak, 1 << step))
        # 2. The sums, relative to that.
        self.total = T.float32(0)
        for x in T.unroll(COLUMNS):
            self.values[x] = T.float32(0)
        for b in T.serial(batches):
            weight: T.float32 = T.exp2(self.own_sums[0] - self.peak)
            if self.own_sums[1] == T.float32(0):
                weight = T.float32(0)
            self.states.fetched()
            for i in T.serial(ceildiv(T.min(count - b * BATCH, BATCH), _AHEAD)):
                for a in T.unroll(_AHEAD):
                    number = T.meta_var(i * _AHEAD + a)
                    place = T.meta_var(_of_lane(self.own_place[0], number))
                    self.states.load(number, place, own_column, self.loaded, a * COLUMNS)
                for a in T.unroll(_AHEAD):
                    self.add(_of_lane(weight, i * _AHEAD + a), _of_lane(self.own_sums[1], i * _AHEAD + a), a)
            if b + 1 < batches:
                self.states.done()
                self.states.fetch(b + 1)
                self.look_up(b + 1, count)

    @T.inline
    def fold_near(self, count, column):
        """The same where states are near: every lane looks at all of them, and none waits for another's."""
        of_batch: T.int32 = ceildiv(count, _AHEAD)
        own_column: T.int32 = T.min(column, self.columns - COLUMNS)
        weights = T.alloc_local([_AHEAD], "float32")
        totals = T.alloc_local([_AHEAD], "float32")
        self.clear()
        for i in T.serial(of_batch):
            for a in T.unroll(_AHEAD):
                self.states.look_up(T.min(i * _AHEAD + a, count - 1), self.own_place, self.own_sums)
                self.peak = T.max(self.peak, self.own_sums[0])
        for i in T.serial(of_batch):
            for a in T.unroll(_AHEAD):
                number: T.int32 = i * _AHEAD + a
                self.states.look_up(T.min(number, count - 1), self.own_place, self.own_sums)
                self.states.load(number, self.own_place[0], own_column, self.loaded, a * COLUMNS)
                totals[a] = T.Select(number < count, self.own_sums[1], T.float32(0))
                weights[a] = T.Select(totals[a] == T.float32(0), T.float32(0), T.exp2(self.own_sums[0] - self.peak))
            for a in T.unroll(_AHEAD):
                self.add(weights[a], totals[a], a)

    @T.inline
    def add(self, weight, total, a):
        """Add the loaded state number ``a``, which has the sum ``total``, with a weight; one of 0 may hold anything."""
        w: T.float32 = weight
        self.total = _fused(total, w, self.total)
        for x in T.unroll(COLUMNS):
            sum_: T.float32 = _fused(self.loaded[a * COLUMNS + x], w, self.values[x])
            self.values[x] = T.Select(w == T.float32(0), self.values[x], sum_)

    @T.inline
    def add_sink(self, sink):
        """Count in a logit without a key; −inf is none."""
        exponent: T.float32 = sink * T.float32(LOG2_E)
        higher: T.float32 = T.max(self.peak, T.ceil(exponent))
        factor: T.float32 = T.exp2(self.peak - higher)
        self.total = _fused(self.total, factor, T.exp2(exponent - higher))
        for x in T.unroll(COLUMNS):
            self.values[x] = self.values[x] * factor
        self.peak = higher

    @T.inline
    def store(self, o: Tensor, place, head_dim_v):
        """Write this lane's columns of a row, at batch, head, position and column of ``o``, divided by the sum."""
        factor: T.float32 = T.Select(self.total == T.float32(0), T.float32(0), T.float32(1) / self.total)
        packed = T.alloc_local([1], "uint32")
        pack = T.meta_var(element_type(str(o.buffer.dtype)).pack)
        T.ptx[pack](packed[0], self.values[1] * factor, self.values[0] * factor)
        to = T.meta_var(flat(o.buffer))
        if place[3] < head_dim_v:
            T.ptx["st.global.b32"](to.ptr_to([o.offset(*place)]), packed[0])

    @property
    def log_sum_exp(self) -> Expr:
        """Natural logarithm of the sum of exponentials of the row; −inf if it saw nothing."""
        return (self.peak + T.log2(self.total)) * T.float32(LN_2)
