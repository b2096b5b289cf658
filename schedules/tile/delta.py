"""The launch before a backward, on any GPU: what each row of the output says about the gradient of its scores.

``delta = rowsum(do * o) - dlse``, one float32 a row in the order (batch, heads, seqlen_q).  A row is read by as many
lanes as it has chunks of 16 bytes, rounded up to a power of two, and summed in an order that depends on nothing else.
"""

from __future__ import annotations

import operator

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import RAGGED_LAYOUT, Tensor, flat
from schedules.tile.softmax import from_lane
from schedules.tile.tile_scheduler import Traversal, ceildiv

THREADS = 256
#: Rows of one lane: so many loads are in flight.
ROWS = 4


@T.meta_class
class Outputs:
    """The arguments of the launch: tensors ``o`` and ``do``, flat ``dlse`` and ``delta``, and sizes."""

    def __init__(self, pattern: Pattern, traversal: Traversal, handles, alignment: int, ragged: bool):
        o, do, dlse, delta = handles
        layout = RAGGED_LAYOUT if ragged else traversal.layout
        names = ("batch", "heads", "seqlen_q", "head_dim_v", "dlse_length", "delta_length")
        self.batch, self.heads, self.seqlen_q, self.head_dim_v, self.dlse_length, self.delta_length = (
            tirx.Var(name, "int32") for name in names
        )
        sizes = {"batch": self.batch, "heads": self.heads, "seq": self.seqlen_q, "dim": self.head_dim_v}
        self.o = Tensor(o, "o", sizes, pattern.dtype, layout, alignment)
        self.do = Tensor(do, "do", sizes, pattern.dtype, layout, alignment)
        if ragged:
            self.batch = T.int32(1)
        self.dlse = T.match_buffer(dlse, (self.dlse_length,), "float32", align=4)
        self.delta = T.match_buffer(delta, (self.delta_length,), "float32", align=4)

    @property
    def rows(self) -> Expr:
        """Rows of all heads."""
        return self.batch * self.heads * self.seqlen_q

    @property
    def has_dlse(self) -> Expr:
        """Whether the log-sum-exp has a gradient."""
        return self.dlse_length >= self.rows


def halves(word: Expr, dtype: str) -> tuple[Expr, Expr]:
    """The two elements of a register as float32, the lower one first."""
    if dtype == "bfloat16":
        return (
            T.reinterpret("float32", T.shift_left(word, T.uint32(16))),
            T.reinterpret("float32", T.bitwise_and(word, T.uint32(0xFFFF0000))),
        )
    low, high = T.bitwise_and(word, T.uint32(0xFFFF)), T.shift_right(word, T.uint32(16))
    return tuple(T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", x))) for x in (low, high))


def delta(pattern: Pattern, traversal: Traversal, name: str, alignment: int, *, ragged: bool = False) -> PrimFunc:
    """``(o, do, dlse, delta)``: 16-bit tensors of the same shape, whose strides are multiples of 16 bytes, to delta.

    ``dlse`` and ``delta`` are flat; a ``dlse`` that is shorter than there are rows means none.  Tensors of ``ragged``
    sequences have no batch axis, and delta is in the order (heads, positions).
    """
    dtype, chunk = pattern.dtype, element_type(pattern.dtype).chunk
    lanes = 1 << (-(-pattern.head_dim_v // chunk) - 1).bit_length()
    steps = lanes.bit_length() - 1
    groups = THREADS // lanes

    @T.prim_func(check_well_formed=False)
    def kernel(o: T.handle, do: T.handle, dlse: T.handle, delta: T.handle):
        at = Outputs(pattern, traversal, (o, do, dlse, delta), alignment, ragged)
        T.device_entry()
        block = T.cta_id([ceildiv(at.rows, groups * ROWS)])
        thread = T.thread_id([THREADS])
        outputs = T.meta_var(flat(at.o.buffer))
        gradients = T.meta_var(flat(at.do.buffer))
        a = T.alloc_local([ROWS * 4], "uint32")
        b = T.alloc_local([ROWS * 4], "uint32")
        total = T.alloc_local([ROWS], "float32")
        column: T.int32 = T.truncmod(thread, lanes) * chunk
        first: T.int32 = block * (groups * ROWS) + T.truncdiv(thread, lanes)
        # 1. A chunk of each row, zeros past its end.
        for r in T.unroll(ROWS):
            for x in T.unroll(4):
                a[r * 4 + x] = T.uint32(0)
                b[r * 4 + x] = T.uint32(0)
            row: T.int32 = first + r * groups
            if T.And(row < at.rows, column < at.head_dim_v):
                position: T.int32 = T.truncmod(row, at.seqlen_q)
                head_row: T.int32 = T.truncdiv(row, at.seqlen_q)
                head: T.int32 = T.truncmod(head_row, at.heads)
                batch: T.int32 = T.truncdiv(head_row, at.heads)
                T.ptx["ld.global.v4.b32"](
                    *[a[r * 4 + x] for x in range(4)],
                    outputs.ptr_to([at.o.offset(batch, head, position, column)]),
                )
                T.ptx["ld.global.v4.b32"](
                    *[b[r * 4 + x] for x in range(4)],
                    gradients.ptr_to([at.do.offset(batch, head, position, column)]),
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
                row: T.int32 = first + r * groups
                if row < at.rows:
                    if at.has_dlse:
                        total[r] = total[r] - at.dlse[row]
                    at.delta[row] = total[r]

    return kernel.with_attr("global_symbol", name)
