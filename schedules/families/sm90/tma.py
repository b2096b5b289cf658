"""TMA: descriptors of the tensors, made on the host, and copies of boxes between global and shared memory."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.config import PANEL
from schedules.families.sm90.packing import Rows
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import Tensor
from schedules.tile.sequences import Sequence

_LOAD = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
_STORE = "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group"
#: Policies of the L2 cache as CUTLASS has them: under the first, what was read goes first (``EVICT_FIRST``); the usual
#: one.
_READ_ONCE, _USUAL = T.uint64(0x12F0000000000000), T.uint64(0x1000000000000000)
_SWIZZLE_128B = 3
#: By the bytes of a panel's row.
_SWIZZLES = {32: 1, 64: 2, 128: _SWIZZLE_128B}
_L2_PROMOTION_128B = 2

_WAIT_STORED = (
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
    """The same of q or o, with the query heads of a group as an axis: a box is ``box_rows`` rows of a work tile."""
    seq, heads, batch = (_stride_bytes(tensor.sizes[axis], tensor.strides[axis]) for axis in ("seq", "heads", "batch"))
    return T.tensormap_encode_tiled(
        descriptor, tensor.buffer.data,
        tensor.sizes["dim"], tensor.sizes["seq"], rows.group, rows.geometry.kv_heads, tensor.sizes["batch"],
        seq, heads, heads * T.Cast("int64", rows.group), batch,
        PANEL, *rows.box(box_rows), 1, 1,
        1, 1, 1, 1, 1,
        descriptor_dtype=str(tensor.buffer.dtype), rank=5, swizzle=_SWIZZLE_128B, l2_promotion=_L2_PROMOTION_128B,
    )  # fmt: skip


def encode_tensor(descriptor, address, sizes, strides, box, dtype: str):
    """The same of a tensor over keys, queries, heads and batch entries, whose ``sizes`` and but for keys ``strides`` in
    bytes these are; ``box`` is the columns and rows of one."""
    return T.tensormap_encode_tiled(
        descriptor, address,
        *sizes,
        *strides,
        *box, 1, 1,
        1, 1, 1, 1,
        descriptor_dtype=dtype, rank=4, l2_promotion=_L2_PROMOTION_128B,
    )  # fmt: skip


def _stride_bytes(size, stride, element_bytes: int = 2):
    """A stride in bytes; that of a dimension of size 1 is never used, but must be a multiple of 16 all the same."""
    return T.Select(size > 1, T.Cast("int64", stride) * element_bytes, T.int64(16))


#: Sizes of the axes of a ragged tensor's descriptor, and bytes that the two strides add up to which cancel out: 2^30
#: times 2^34 is 2^64, and addresses are counted modulo that.
LAST_ROW, _ANY, _TURN = 1 << 30, 0x7FFF0000, 1 << 34


def encode_ragged(descriptor, tensor: Tensor, box_rows: int):
    """The same of a tensor of ragged sequences: a box ends where its sequence does.

    Its axes are dim, row, head, end, turn.  The row of a sequence that ends at ``end`` is counted so that ``LAST_ROW``
    would be the one after its last, which is outside the tensor then: it reads as zero and isn't written, whoever's row
    it is.  Where the rows begin, ``end - LAST_ROW`` rows before the first, follows from ``end`` and from ``turn``,
    which is ``LAST_ROW`` always: it is multiplied with a stride that takes so many rows away.
    The idea is that of Triton's ragged descriptors (triton/tools/ragged_tma.py).
    """
    row, head = (_stride_bytes(tensor.sizes[axis], tensor.strides[axis]) for axis in ("seq", "heads"))
    return T.tensormap_encode_tiled(
        descriptor, tensor.buffer.data,
        tensor.sizes["dim"], LAST_ROW, tensor.sizes["heads"], _ANY, _ANY,
        row, head, row, T.int64(_TURN) - row,
        PANEL, box_rows, 1, 1, 1,
        1, 1, 1, 1, 1,
        descriptor_dtype=str(tensor.buffer.dtype), rank=5, swizzle=_SWIZZLE_128B, l2_promotion=_L2_PROMOTION_128B,
    )  # fmt: skip


def ragged_box(sequence: Sequence, row, head):
    """Where the rows from ``row`` of a sequence are, as a box of such a descriptor."""
    return LAST_ROW - sequence.length + row, head, sequence.offset + sequence.length, T.int32(LAST_ROW)


def lowest_bit(x):
    """The largest power of two that divides ``x``, which isn't 0."""
    return T.bitwise_and(x, 0 - x)


class PageSteps:
    """How far pages of a tensor, and rows of a page, are from one another: ``page`` and ``row`` times ``unit``
    elements, the largest power of two that divides both if they aren't 0; on the host."""

    def __init__(self, tensor: Tensor):
        element = element_type(str(tensor.buffer.dtype))
        row = T.Select(tensor.sizes["seq"] > 1, tensor.strides["seq"], T.int32(element.chunk))
        page = T.Select(tensor.sizes["batch"] > 1, tensor.strides["batch"], T.int32(0))
        self.element_bytes = element.bytes
        self.row_bytes = T.bind(T.Cast("int64", row) * element.bytes)
        # Of one page whose rows lie in one place neither is any way from another.
        self.unit = T.bind(T.max(lowest_bit(T.bitwise_or(row, page)), T.int32(element.chunk)))
        self.page, self.row = T.bind(T.truncdiv(page, self.unit)), T.bind(T.truncdiv(row, self.unit))


def encode_paged(descriptor, tensor: Tensor, steps: PageSteps, box_rows, panel: int = PANEL):
    """The same of keys on pages: a box ends where it is told to, in any page.

    As for ragged sequences, but ``end`` is counted in units, of which both pages and rows are multiples.  A panel has
    ``panel`` columns.
    """
    element_bytes = steps.element_bytes
    head = _stride_bytes(tensor.sizes["heads"], tensor.strides["heads"], element_bytes)
    return T.tensormap_encode_tiled(
        descriptor, tensor.buffer.data,
        tensor.sizes["dim"], LAST_ROW, tensor.sizes["heads"], _ANY, _ANY,
        steps.row_bytes, head, T.Cast("int64", steps.unit) * element_bytes, T.int64(_TURN) - steps.row_bytes,
        panel, box_rows, 1, 1, 1,
        1, 1, 1, 1, 1,
        descriptor_dtype=str(tensor.buffer.dtype), rank=5, swizzle=_SWIZZLES[panel * element_bytes],
        l2_promotion=_L2_PROMOTION_128B,
    )  # fmt: skip


def placed_box(steps: PageSteps, place, rows, head):
    """Where ``rows`` rows are that begin ``place`` steps after the tensor's first, as a box of such a descriptor, zero
    behind them."""
    return LAST_ROW - rows, head, place + rows * steps.row, T.int32(LAST_ROW)


@T.inline
def load_panel(shared, descriptor, panel, at, barrier):
    """One thread: start to copy a panel of the box at ``at`` to shared memory; its bytes count at ``barrier``."""
    T.ptx[_LOAD.format(len(at) + 1)](shared, T.address_of(descriptor), panel * PANEL, *at, barrier)


@T.inline
def load_box(shared, descriptor, at, barrier):
    """The same of a box whose first coordinate isn't a panel's."""
    T.ptx[_LOAD.format(len(at))](shared, T.address_of(descriptor), *at, barrier)


@T.inline
def _load_box_by(shared, descriptor, at, barrier, policy):
    """The same of a box under a policy of the L2 cache."""
    T.ptx[_LOAD.format(len(at)) + ".L2::cache_hint"](shared, T.address_of(descriptor), *at, barrier, policy)


@T.inline
def load_box_once(shared, descriptor, at, barrier):
    """The same of a box that nobody else reads: what it displaces from the L2 cache is itself."""
    _load_box_by(shared, descriptor, at, barrier, _READ_ONCE)


@T.inline
def load_panel_once(shared, descriptor, panel, at, barrier):
    """The same of a panel."""
    load_box_once(shared, descriptor, (panel * PANEL, *at), barrier)


@T.inline
def load_panel_by(shared, descriptor, panel, at, barrier, policy):
    """The same of a panel under a policy of the L2 cache."""
    _load_box_by(shared, descriptor, (panel * PANEL, *at), barrier, policy)


def policy_of_keys(read_once):
    """The policy for keys that nobody else reads if ``read_once`` isn't 0."""
    return T.Select(read_once != 0, _READ_ONCE, _USUAL)


@T.inline
def store_panel(descriptor, panel, at, shared):
    """One thread: start to copy a panel from shared memory to the box at ``at``, in the thread's open bulk group."""
    T.ptx[_STORE.format(len(at) + 1)](T.address_of(descriptor), panel * PANEL, *at, shared)


def wait_stored():
    """Until the shared memory of all stores that this thread has committed has been read; a block can't end before."""
    return T.cuda.func_call("wait_stored", source_code=_WAIT_STORED)
