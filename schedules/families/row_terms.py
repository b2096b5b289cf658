"""The first launch of a backward: what its other launches need to know of each row, tile by tile.

Of a row it is the shift of its scores, ``-lse * log2(e)``, and what the gradients of its probabilities start from,
``-delta`` with ``delta = rowsum(do * o) - dlse``.  Both lie in tiles of ``block_m`` rows, so that a bulk copy brings
those of a tile; what of a tile is past the last row of its sequence has the shift −inf and weighs nothing.

A row is read by as many lanes as it has chunks of 16 bytes, rounded up to a power of two, and summed in an order that
depends on nothing else.  The launch also writes the zeros that nobody else may: dq of rows that see nothing, and
counters at which later launches begin.
"""

from __future__ import annotations

import operator

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.tile.delta import ROWS, THREADS, halves
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import RAGGED_LAYOUT, Tensor, flat, local, wide
from schedules.tile.gradients import ALIGNMENT, Starts, result_types, tiles_of
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.sequences import Ragged
from schedules.tile.softmax import from_lane
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal, ceildiv
from schedules.tile.weights import negative, shift_of
from tvm_flash.packs.manifest import Workspace

#: The workspaces with a number for each row of each tile.
SHIFTS, STARTS = "row_shifts", "row_starts"


def workspaces(block_m: int, ragged: bool) -> tuple[Workspace, ...]:
    """Room for both numbers."""
    size = ("*", tiles_of(block_m, ragged), block_m)
    return tuple(Workspace(name, "float32", (size,)) for name in (SHIFTS, STARTS))


@T.meta_class
class _Outputs:
    """The arguments of the launch, and which row a place in a tile is."""

    def __init__(
        self, pattern: Pattern, traversal: Traversal, block_m: int, starts: Starts | None, handles, adds: bool
    ):
        o, do, lse, dlse, dq = handles
        self.block_m, self.ragged = block_m, starts is not None
        names = ("batch", "heads", "seqlen_q", "head_dim", "head_dim_v")
        batch, self.heads, self.seqlen_q, self.head_dim, self.head_dim_v = (tirx.Var(name, "int32") for name in names)
        layout = RAGGED_LAYOUT if starts else traversal.layout
        sizes = {"batch": batch, "heads": self.heads, "seq": self.seqlen_q}
        of_dq = result_types(pattern, adds).q.name
        self.o, self.do, self.dq = (
            Tensor(handle, name, {**sizes, "dim": dim}, dtype, layout, ALIGNMENT)
            for handle, name, dim, dtype in (
                (o, "o", self.head_dim_v, pattern.dtype),
                (do, "do", self.head_dim_v, pattern.dtype),
                (dq, "dq", self.head_dim, of_dq),
            )
        )
        lengths = T.int32(), T.int32()
        self.lse = T.match_buffer(lse, (lengths[0],), "float32", align=4)
        self.dlse = T.match_buffer(dlse, (lengths[1],), "float32", align=4)
        if starts:
            self.batch = starts.ends - 1
            self.queries = Ragged(starts.arguments[0], self.batch, self.seqlen_q)
            rows, tiles = self.heads * self.seqlen_q, T.truncdiv(self.seqlen_q, block_m) + (self.batch + 1)
            self.head_rows = self.heads
        else:
            self.batch = batch
            rows, tiles = batch * self.heads * self.seqlen_q, ceildiv(self.seqlen_q, block_m)
            self.head_rows = batch * self.heads
        self.of_head = T.bind(tiles * block_m)
        self.count = T.bind(self.head_rows * self.of_head)
        self.has_dlse = lengths[1] >= rows

    def find(self, place: Expr):
        """Head, batch, position in the tensor, number in flat tensors and whether there is such a row, of a place."""
        head_row = T.truncdiv(place, self.of_head)
        within = place - head_row * self.of_head
        if not self.ragged:
            head = T.truncmod(head_row, self.heads)
            at = head_row * self.seqlen_q + within
            return head, T.truncdiv(head_row, self.heads), within, at, within < self.seqlen_q
        slot, sequence = local(T.truncdiv(within, self.block_m)), local(T.int32(0))
        _find(self.queries, self.block_m, slot, sequence)
        found = sequence.source[0]
        own = self.queries.of(found)
        tile = slot.source[0] - self.queries.first_slot(found, self.block_m)
        position = local(tile * self.block_m + T.truncmod(within, self.block_m)).source[0]
        row = local(own.offset + position).source[0]
        return head_row, found, row, head_row * self.seqlen_q + row, position < own.length

    def sees(self, batch: Expr) -> Expr:
        """Whether rows of a batch may see anything: those after the last sequence don't."""
        return batch < self.batch


def _find(queries: Ragged, block_m: int, slot, sequence):
    """Set ``sequence``, which is 0, to the one that has a slot: each thread by itself."""
    left = local(queries.batch + 1)
    with T.While(operator.gt(left, 1)):
        half = local(T.shift_right(left.source[0], 1))
        begun = queries.first_slot(operator.add(sequence, half), block_m) <= slot.source[0]
        # The sequence last, on which ``begun`` depends: asked of the next one, it would read behind the last start.
        T.buffer_store(left.source, T.Select(begun, operator.sub(left, half), half.source[0]), [0])
        T.buffer_store(sequence.source, T.Select(begun, operator.add(sequence, half), sequence.source[0]), [0])


def _clear(counters, thread, threads):
    """Thread number ``thread`` of ``threads``: write its zeros."""
    for counter in counters:
        length = counter.shape[0]
        with T.serial(ceildiv(length, threads)) as i:
            number = i * threads + thread
            with T.If(number < length), T.Then():
                T.buffer_store(counter, T.int32(0), [number])


def build(
    pattern: Pattern,
    traversal: Traversal,
    name: str,
    block_m: int,
    *,
    ragged: bool = False,
    counters: tuple[Workspace, ...] = (),
    adds: bool = False,
) -> ScheduledLaunch:
    """The launch: 16-bit tensors whose strides are multiples of 16 bytes; ``dlse`` that is shorter than there are rows
    means none.  ``counters`` are int32 workspaces that it clears.  ``adds``: dq is added to what is there, so that rows
    which see nothing are left alone.
    """
    starts = Starts() if ragged else None
    cleared = [tirx.decl_buffer([tirx.Var(f"{w.name}_length", "int32")], "int32", name=w.name) for w in counters]
    func = append_arguments(
        _kernel(pattern, traversal, block_m, starts, cleared, adds),
        [*(starts.arguments[:1] if starts else ()), *cleared],
    )
    roles = ("o", "do", "lse", "dlse", "dq", SHIFTS, STARTS, *(Starts.roles[:1] if ragged else ()))
    return ScheduledLaunch(func.with_attr("global_symbol", name), (*roles, *(w.name for w in counters)))


def _kernel(pattern: Pattern, traversal: Traversal, block_m: int, starts: Starts | None, cleared, adds: bool):
    dtype, chunk = pattern.dtype, element_type(pattern.dtype).chunk
    lanes = 1 << (-(-pattern.head_dim_v // chunk) - 1).bit_length()
    steps = lanes.bit_length() - 1
    groups = THREADS // lanes

    @T.prim_func(check_well_formed=False)
    def kernel(
        o: T.handle,
        do: T.handle,
        lse: T.handle,
        dlse: T.handle,
        dq: T.handle,
        row_shifts: T.handle,
        row_starts: T.handle,
    ):
        at = _Outputs(pattern, traversal, block_m, starts, (o, do, lse, dlse, dq), adds)
        length = T.int64()
        shifts = T.match_buffer(row_shifts, (length,), "float32", align=16)
        begins = T.match_buffer(row_starts, (length,), "float32", align=16)
        blocks = T.bind(ceildiv(at.count, groups * ROWS))
        T.device_entry()
        block = T.cta_id([blocks])
        thread = T.thread_id([THREADS])
        outputs, gradients, zeros = T.meta_var((flat(at.o.buffer), flat(at.do.buffer), flat(at.dq.buffer)))
        a = T.alloc_local([ROWS * 4], "uint32")
        b = T.alloc_local([ROWS * 4], "uint32")
        total = T.alloc_local([ROWS], "float32")
        sum_of_exponentials = T.alloc_local([ROWS], "float32")
        outer = T.alloc_local([ROWS], "float32")
        column: T.int32 = T.truncmod(thread, lanes) * chunk
        first: T.int32 = block * (groups * ROWS) + T.truncdiv(thread, lanes)
        # 1. A chunk of each row, zeros past its end and of rows that aren't there or see nothing.
        for r in T.unroll(ROWS):
            for x in T.unroll(4):
                a[r * 4 + x] = T.uint32(0)
                b[r * 4 + x] = T.uint32(0)
            sum_of_exponentials[r] = T.float32(NEGATIVE_INFINITY)
            outer[r] = T.float32(0)
            place: T.int32 = first + r * groups
            if place < at.count:
                head, batch, row, number, exists = T.meta_var(at.find(place))
                if exists:
                    if at.sees(batch):
                        sum_of_exponentials[r] = at.lse[number]
                    if sum_of_exponentials[r] == T.float32(NEGATIVE_INFINITY):
                        if static(not adds):
                            for i in T.serial(ceildiv(T.max(at.head_dim - column, 0), lanes * chunk)):
                                T.ptx["st.global.v4.b32"](
                                    zeros.ptr_to([at.dq.offset(batch, head, row, column + i * (lanes * chunk))]),
                                    *[T.uint32(0)] * 4,
                                )
                    else:
                        if at.has_dlse:
                            outer[r] = at.dlse[number]
                        if column < at.head_dim_v:
                            T.ptx["ld.global.v4.b32"](
                                *[a[r * 4 + x] for x in range(4)],
                                outputs.ptr_to([at.o.offset(batch, head, row, column)]),
                            )
                            T.ptx["ld.global.v4.b32"](
                                *[b[r * 4 + x] for x in range(4)],
                                gradients.ptr_to([at.do.offset(batch, head, row, column)]),
                            )
        # 2. Its share of the sum, then that of all lanes of the row.
        for r in T.unroll(ROWS):
            total[r] = T.float32(0)
            for x in T.unroll(4):
                left = T.meta_var(halves(a[r * 4 + x], dtype))
                right = T.meta_var(halves(b[r * 4 + x], dtype))
                total[r] = total[r] + left[0] * right[0]
                total[r] = total[r] + left[1] * right[1]
            for step in T.unroll(steps):
                total[r] = operator.add(total[r], from_lane(total[r], 1 << step))
        # 3. One lane writes.
        if column == 0:
            for r in T.unroll(ROWS):
                place: T.int32 = first + r * groups
                if place < at.count:
                    shifts[wide(place)] = shift_of(sum_of_exponentials[r])
                    begins[wide(place)] = negative(total[r] - outer[r])
        # 4. Counters.
        _clear(cleared, block * THREADS + thread, blocks * THREADS)

    return kernel
