"""The launch that folds the states of the parts of rows' keys, from left to right, on any GPU.

Groups of threads, four columns a thread, as in :mod:`schedules.tile.combine`: those that share a row bring its states
to shared memory, each every n-th, and the first of them folds them in the order of the keys
(:mod:`schedules.tile.states`).
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.tile.combine import AHEAD, BLOCKS_PER_SM, COLUMNS, THREADS, Partials
from schedules.tile.geometry import flat, local, wide
from schedules.tile.softmax import LOWEST
from schedules.tile.states import Fold, PartialStates, inverse, log_sum_exp
from schedules.tile.tile_scheduler import Traversal, ceildiv


@T.meta_class
class States(Partials):
    """The arguments of the launch, and sizes: of a row the states of the first run, and of the splits behind it."""

    def __init__(self, pattern: Pattern, traversal: Traversal, handles, run, alignment: int):
        states = PartialStates(handles[:2], pattern.head_dim_v)
        self._tensors(pattern, traversal, handles[2:], alignment)
        self.rows, self.parts, self.run = states.rows, states.parts, run
        self.states_o, self.states_sums = states.o, states.sums
        self.splits = T.bind(T.max(self.parts - run, 0) + 1)

    def part(self, number):
        """Where the state number ``number`` of a row is."""
        return T.Select(number == 0, 0, number + (self.run - 1))


def fold_states(pattern: Pattern, traversal: Traversal, name: str, alignment: int) -> PrimFunc:
    """``(o_partial, sums_partial, o, lse, run)``: states (:mod:`schedules.tile.states`) to o and lse.

    Those of the first ``run`` parts of a row are in the place of part 0.  Where that is all, the launch before has
    written the rows, and nothing is done.  The launch before lets this one begin early.
    """

    @T.prim_func(check_well_formed=False)
    def kernel(o_partial: T.handle, sums_partial: T.handle, o: T.handle, lse: T.handle, run: T.int32):
        _fold(pattern, States(pattern, traversal, (o_partial, sums_partial, o, lse), run, alignment))

    return kernel.with_attr("global_symbol", name)


@T.meta_class
class FoldingBlock:
    """A block's threads, and the memory through which the groups that share a row hand its states to the first one."""

    def __init__(self, pattern: Pattern, at, sharing, rows_of_block, block, thread):
        self.at, self.sharing, self.columns = at, sharing, pattern.head_dim_v
        self.lanes = lanes_of(pattern)
        self.groups = THREADS // self.lanes
        self.o, self.sums = flat(at.states_o), flat(at.states_sums)
        self.o_shared = T.alloc_shared([self.groups * AHEAD * self.lanes * COLUMNS], "float32")
        self.sums_shared = T.alloc_shared([self.groups * AHEAD * 2], "float32")
        self.words = T.alloc_local([AHEAD * COLUMNS], "uint32")
        self.loaded = T.alloc_local([AHEAD * 2], "float32")
        self.acc = T.alloc_local([COLUMNS], "float32")
        self.peak, self.total = (T.alloc_local([1], "float32") for _ in range(2))
        self.next_peak, self.next_total = (T.alloc_local([1], "float32") for _ in range(2))
        self.values = T.alloc_local([AHEAD * COLUMNS], "float32")
        self.fold = Fold(1)
        self.group = local(T.truncdiv(thread, self.lanes))
        self.lane = local(T.truncmod(thread, self.lanes))
        self.column = local(self.lane * COLUMNS)
        self.place = local(T.truncdiv(self.group, sharing))
        self.member = local(self.group - self.place * sharing)
        self.row = local(block * rows_of_block + self.place)
        self.first = local(wide(self.row) * wide(at.parts))
        self.memory = local(self.place * (sharing * AHEAD))  # first place of the row's states in shared memory

    @property
    def at_once(self):
        """How many states of a row are brought at a time."""
        return self.sharing * AHEAD

    @T.inline
    def start(self):
        """Nothing is folded yet."""
        self.peak[0] = T.float32(LOWEST)
        self.total[0] = T.float32(0)
        for x in T.unroll(COLUMNS):
            self.acc[x] = T.float32(0)

    @T.inline
    def bring(self, i, end, place):
        """Each group brings its states of round ``i`` up to ``end``, from ``place(number)``, to shared memory."""
        for a in T.unroll(AHEAD):
            number: T.int32 = (i * AHEAD + a) * self.sharing + self.member
            if T.And(self.row < self.at.rows, number < end):
                index: T.int64 = self.first + wide(place(number))
                if self.column < self.columns:
                    T.ptx["ld.global.v4.b32"](
                        *[self.words[a * COLUMNS + x] for x in range(COLUMNS)],
                        self.o.ptr_to([index * self.columns + wide(self.column)]),
                    )
                T.ptx["ld.global.v2.f32"](self.loaded[a * 2], self.loaded[a * 2 + 1], self.sums.ptr_to([index * 2]))
        for a in T.unroll(AHEAD):
            to: T.int32 = self.memory + a * self.sharing + self.member
            for x in T.unroll(COLUMNS):
                self.o_shared[(to * self.lanes + self.lane) * COLUMNS + x] = T.reinterpret(
                    "float32", self.words[a * COLUMNS + x]
                )
            if self.lane == 0:
                self.sums_shared[to * 2] = self.loaded[a * 2]
                self.sums_shared[to * 2 + 1] = self.loaded[a * 2 + 1]

    @T.inline
    def take(self, n, is_state):
        """The first group of a row folds ``AHEAD`` states from number ``n`` on of those that were brought, but for
        those of which ``is_state(number)`` isn't true."""
        for a in T.unroll(AHEAD):
            self.loaded[a * 2] = self.sums_shared[(self.memory + n + a) * 2]
            self.loaded[a * 2 + 1] = self.sums_shared[(self.memory + n + a) * 2 + 1]
            for x in T.unroll(COLUMNS):
                self.values[a * COLUMNS + x] = self.o_shared[
                    ((self.memory + n + a) * self.lanes + self.lane) * COLUMNS + x
                ]
        for a in T.unroll(AHEAD):
            self.next_peak[0] = T.Select(is_state(n + a), self.loaded[a * 2], T.float32(LOWEST))
            self.next_total[0] = T.Select(is_state(n + a), self.loaded[a * 2 + 1], T.float32(0))
            self.fold.begin(self.peak, self.total, self.next_peak, self.next_total)
            for x in T.unroll(COLUMNS):
                self.acc[x] = self.fold.folded(0, self.acc[x], self.values[a * COLUMNS + x])

    @T.inline
    def write(self):
        """It writes the row."""
        self.at.write(
            self.row,
            self.column,
            self.lane,
            self.acc,
            inverse(self.total[0]),
            log_sum_exp(self.peak[0], self.total[0]),
        )


def lanes_of(pattern: Pattern) -> int:
    """Threads of a group, a power of two."""
    return 1 << (-(-pattern.head_dim_v // COLUMNS) - 1).bit_length()


@T.inline
def _fold(pattern: Pattern, at: States):
    """The kernel's text."""
    sharing = T.bind(at.sharing(THREADS // lanes_of(pattern)))
    rows_of_block = T.bind(T.truncdiv(T.int32(THREADS // lanes_of(pattern)), sharing))
    blocks = T.bind(T.Select(at.splits > 1, ceildiv(at.rows, rows_of_block), 1))
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_SM})
    block = T.cta_id([blocks])
    thread = T.thread_id([THREADS])
    own = FoldingBlock(pattern, at, sharing, rows_of_block, block, thread)
    own.start()
    T.ptx.griddepcontrol.wait()
    if at.splits > 1:
        for i in T.serial(ceildiv(at.splits, own.at_once)):
            own.bring(i, at.splits, at.part)
            T.cuda.cta_sync()
            if T.And(own.member == 0, own.row < at.rows):
                left: T.int32 = T.min(at.splits - i * own.at_once, own.at_once)
                for n in T.serial(ceildiv(left, AHEAD)):
                    own.take(n * AHEAD, lambda number: number < left)  # noqa: B023, evaluated here
            T.cuda.cta_sync()
        if T.And(own.member == 0, own.row < at.rows):
            own.write()
