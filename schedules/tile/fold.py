"""The launch that folds the states of the parts of rows' keys, from left to right, on any GPU.

Groups of threads, four columns a thread, as in :mod:`schedules.tile.combine`: those that share a row bring its states to
shared memory, each every n-th, and the first of them folds them in the order of the keys
(:mod:`schedules.tile.states`).
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.tile.combine import AHEAD, BLOCKS_PER_SM, COLUMNS, THREADS, Partials
from schedules.tile.geometry import flat, wide
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


@T.inline
def _fold(pattern: Pattern, at: States):
    """The kernel's text."""
    columns = T.meta_var(pattern.head_dim_v)
    lanes = T.meta_var(1 << (-(-columns // COLUMNS) - 1).bit_length())  # of a group, a power of two
    groups = T.meta_var(THREADS // lanes)
    # 1. Which row of the block a thread's group belongs to.
    sharing = T.bind(at.sharing(groups))
    rows_of_block = T.bind(T.truncdiv(T.int32(groups), sharing))
    blocks = T.bind(T.Select(at.splits > 1, ceildiv(at.rows, rows_of_block), 1))
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_SM})
    states_o, states_sums = T.meta_var((flat(at.states_o), flat(at.states_sums)))
    block = T.cta_id([blocks])
    thread = T.thread_id([THREADS])
    o_shared = T.alloc_shared([groups * AHEAD * lanes * COLUMNS], "float32")
    sums_shared = T.alloc_shared([groups * AHEAD * 2], "float32")
    words = T.alloc_local([AHEAD * COLUMNS], "uint32")
    sums = T.alloc_local([AHEAD * 2], "float32")
    acc = T.alloc_local([COLUMNS], "float32")
    peak, total, next_peak, next_total = T.meta_var([T.alloc_local([1], "float32") for _ in range(4)])
    fold = Fold(1)
    group: T.int32 = T.truncdiv(thread, lanes)
    lane: T.int32 = T.truncmod(thread, lanes)
    column: T.int32 = lane * COLUMNS
    place: T.int32 = T.truncdiv(group, sharing)
    member: T.int32 = group - place * sharing
    row: T.int32 = block * rows_of_block + place
    first: T.int64 = wide(row) * wide(at.parts)
    peak[0] = T.float32(LOWEST)
    total[0] = T.float32(0)
    for x in T.unroll(COLUMNS):
        acc[x] = T.float32(0)
    T.ptx.griddepcontrol.wait()
    if at.splits > 1:
        for i in T.serial(ceildiv(at.splits, sharing * AHEAD)):
            # 2. Each group brings its states to shared memory.
            for a in T.unroll(AHEAD):
                number: T.int32 = (i * AHEAD + a) * sharing + member
                if T.And(row < at.rows, number < at.splits):
                    index: T.int64 = first + wide(at.part(number))
                    if column < columns:
                        T.ptx["ld.global.v4.b32"](
                            *[words[a * COLUMNS + x] for x in range(COLUMNS)],
                            states_o.ptr_to([index * columns + wide(column)]),
                        )
                    T.ptx["ld.global.v2.f32"](sums[a * 2], sums[a * 2 + 1], states_sums.ptr_to([index * 2]))
            for a in T.unroll(AHEAD):
                at_shared: T.int32 = (a * groups + group) * lanes + lane
                for x in T.unroll(COLUMNS):
                    o_shared[at_shared * COLUMNS + x] = T.reinterpret("float32", words[a * COLUMNS + x])
                if lane == 0:
                    sums_shared[(a * groups + group) * 2] = sums[a * 2]
                    sums_shared[(a * groups + group) * 2 + 1] = sums[a * 2 + 1]
            T.cuda.cta_sync()
            # 3. The first group of a row folds them.
            if T.And(member == 0, row < at.rows):
                for n in T.serial(T.min(at.splits - i * (sharing * AHEAD), sharing * AHEAD)):
                    from_group: T.int32 = T.truncdiv(n, sharing) * groups + group + T.truncmod(n, sharing)
                    next_peak[0] = sums_shared[from_group * 2]
                    next_total[0] = sums_shared[from_group * 2 + 1]
                    fold.begin(peak, total, next_peak, next_total)
                    for x in T.unroll(COLUMNS):
                        acc[x] = fold.folded(0, acc[x], o_shared[(from_group * lanes + lane) * COLUMNS + x])
            T.cuda.cta_sync()
        # 4. It writes the row.
        if T.And(member == 0, row < at.rows):
            at.write(row, column, lane, acc, inverse(total[0]), log_sum_exp(peak[0], total[0]))
