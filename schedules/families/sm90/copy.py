"""Data movement of the Hopper family: TMA between global memory and rings of tiles in shared memory."""

from __future__ import annotations

from tvm.backend.cuda.lang import MBarrier
from tvm.script import tirx as T

from schedules.families.sm90.config import PANEL
from schedules.families.sm90.rows import Rows
from schedules.tile.geometry import Tensor

_LOAD = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
_STORE = "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group"
_SWIZZLE_128B = 3
_L2_PROMOTION_128B = 2

#: Until the shared memory of all stores that this thread has committed has been read; a block mustn't end before.
WAIT_STORED = (
    '__forceinline__ __device__ void wait_stored() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }\n'
)


def encode_keys(descriptor, tensor: Tensor, box_rows: int):
    """Make the TMA descriptor of k or v, on the host: its box is one panel of ``box_rows`` rows of a head.

    What of a box lies outside the tensor reads as zero and isn't written.
    """
    axes = ("seq", "heads", "batch")
    return T.tensormap_encode_tiled(
        descriptor, tensor.buffer.data,
        tensor.sizes["dim"], *(tensor.sizes[axis] for axis in axes),
        *(_stride_bytes(tensor.sizes[axis], tensor.strides[axis]) for axis in axes),
        PANEL, box_rows, 1, 1,
        1, 1, 1, 1,
        descriptor_dtype=str(tensor.buffer.dtype), rank=4, swizzle=_SWIZZLE_128B, l2_promotion=_L2_PROMOTION_128B,
    )  # fmt: skip


def encode_queries(descriptor, tensor: Tensor, rows: Rows, box_rows: int):
    """The same of q or o, with the query heads of a group as an axis: a box is ``box_rows`` rows of a row tile."""
    seq, heads, batch = (_stride_bytes(tensor.sizes[axis], tensor.strides[axis]) for axis in ("seq", "heads", "batch"))
    return T.tensormap_encode_tiled(
        descriptor, tensor.buffer.data,
        tensor.sizes["dim"], tensor.sizes["seq"], rows.group, rows.geometry.kv_heads, tensor.sizes["batch"],
        seq, heads, heads * T.Cast("int64", rows.group), batch,
        PANEL, *rows.box(box_rows), 1, 1,
        1, 1, 1, 1, 1,
        descriptor_dtype=str(tensor.buffer.dtype), rank=5, swizzle=_SWIZZLE_128B, l2_promotion=_L2_PROMOTION_128B,
    )  # fmt: skip


def _stride_bytes(size, stride):
    """A stride in bytes; that of a dimension of size 1 is never used, but must be a multiple of 16 all the same."""
    return T.Select(size > 1, T.Cast("int64", stride) * 2, T.int64(16))


@T.meta_class
class Ring:
    """Tiles ``[stages][panels][rows][64]`` in shared memory, each with a barrier for "full" and one for "empty".

    Tile ``n`` of those that pass through the ring stands in slot ``n % stages``; the number is all the state that who
    walks the ring has to keep.
    """

    def __init__(self, pool, stages: int, panels: int, rows: int, dtype: str):
        self.stages, self.panels, self.rows = stages, panels, rows
        self.tiles = pool.alloc((stages, panels, rows, PANEL), dtype, align=1024)

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all rings."""
        self.full = MBarrier(pool, self.stages, leader=T.bool(True))
        self.empty = MBarrier(pool, self.stages, leader=T.bool(True))

    def init(self, releases: int):
        """One thread: initialise the barriers; a slot is empty when it has been released that many times."""
        self.full.init(1)
        self.empty.init(releases)

    def slot(self, n):
        """Where tile ``n`` stands."""
        return T.bitwise_and(n, self.stages - 1)

    def phase(self, n):
        """Parity of tile ``n``'s turn in its slot."""
        return T.bitwise_and(T.shift_right(n, self.stages.bit_length() - 1), 1)

    def pointer(self, n):
        """``[panel, row, column]`` of tile ``n``, as a pointer."""
        return lambda panel, row, column: self.tiles.ptr_to([self.slot(n), panel, row, column])

    @T.inline
    def load(self, n, descriptor, place):
        """Producer: fill the slot of tile ``n`` once it is empty."""
        self.empty.wait(self.slot(n), T.bitwise_xor(self.phase(n), 1))
        self.fetch(n, descriptor, place)

    @T.inline
    def fetch(self, n, descriptor, place):
        """Producer: fill the slot of tile ``n``, which is known to be empty, from ``place`` (a box's coordinates)."""
        T.ptx.mbarrier.arrive.expect_tx.shared.b64(
            self.full.ptr_to([self.slot(n)]), T.uint32(self.panels * self.rows * PANEL * 2)
        )
        for p in T.unroll(self.panels):
            T.ptx[_LOAD.format(len(place) + 1)](
                self.pointer(n)(p, 0, 0), T.address_of(descriptor),
                p * PANEL, *place, self.full.ptr_to([self.slot(n)]),
            )  # fmt: skip

    @T.inline
    def wait(self, n):
        """Consumer: until tile ``n`` is there."""
        self.full.wait(self.slot(n), self.phase(n))

    @T.inline
    def release(self, n, lane):
        """Consumer, every warp: this warp needs tile ``n`` no more."""
        if lane == 0:
            self.empty.arrive(self.slot(n))

    @T.inline
    def store(self, n, descriptor, panels, row, place):
        """One thread: write the box of tile ``n`` from ``row`` on to global memory, as one bulk group."""
        for p in T.unroll(panels):
            T.ptx[_STORE.format(len(place) + 1)](
                T.address_of(descriptor), p * PANEL, *place, self.pointer(n)(p, row, 0)
            )
        T.ptx.cp.async_.bulk.commit_group()
