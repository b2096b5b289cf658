"""Which work tile a block of either launch has: dense ones by their place, those of ragged sequences look it up."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.config import Config
from schedules.families.mma.mma import DenseBlocks, RaggedBlocks, scheduler
from schedules.families.mma.registers import fresh
from schedules.tile.dtypes import tensor_types
from schedules.tile.gradients import RaggedTensors, Tensors
from schedules.tile.tile_scheduler import Order, Place, Traversal, Work, WorkTile


@dataclass(frozen=True)
class _Tiling:
    """What :func:`schedules.families.mma.mma.scheduler` asks of a configuration."""

    block_m: int
    section_mib: int


@dataclass(frozen=True)
class DenseKeyBlocks(DenseBlocks):
    """Blocks of keys.

    The first keys of a head come first, which a causal mask shows to most queries: the longest blocks.
    """

    def work_tile(self, place: Place) -> WorkTile:
        return self.order.work_tile(place)


@T.meta_class
class RaggedKeyBlocks(RaggedBlocks):
    """Blocks of ragged sequences' keys, those of each sequence in the same order."""

    @T.inline
    def find(self, geometry, rows):
        """All threads: look up the block's tile of ``rows`` keys."""
        thread: T.int32 = fresh("tid.x")
        if thread < 32:
            place: T.int32 = fresh("ctaid.x")
            at = T.meta_var(Place(place, 0, 0, 0))
            slot: T.int32 = self.order.work_tile(at).m_block
            self.found.look_up_keys(geometry.queries, geometry.keys, rows, slot, thread)
            if T.And(thread == 0, T.Not(self.order.exists(at))):
                self.found.leave_out()
        T.cuda.cta_sync()

    def work_tile(self, place: Place) -> WorkTile:
        return WorkTile(self.found.sequence, self.order.work_tile(place).head, self.found.m_block)


@T.meta_class
class RaggedQueryBlocks(RaggedBlocks):
    """Blocks of ragged sequences' queries, as the forward's."""

    @T.inline
    def leave_nothing(self, tensors, rows, sums, count):
        """All threads: zeros as the ``count`` shares of a slot without rows of a sequence, in ``sums`` over all slots.

        What a slot with rows has, :meth:`QueryMachine.store_parameters` leaves.
        """
        thread: T.int32 = fresh("tid.x")
        place: T.int32 = fresh("ctaid.x")
        at = T.meta_var(Place(place, 0, 0, 0))
        has_rows = T.meta_var(T.And(self.found.exists, tensors.has_sequence(self.found.sequence)))
        if T.And(thread < count, T.And(self.order.exists(at), T.Not(has_rows))):
            item = T.meta_var(self.order.work_tile(at))
            head_row: T.int32 = thread * tensors.heads + item.head
            sums[head_row * tensors.tiles_of_rows(rows) + item.m_block] = T.float32(0)


def query_blocks(pattern: Pattern, config: Config, traversal: Traversal, tensors: Tensors | RaggedTensors):
    """Blocks of the launch for dq."""
    order = scheduler(pattern, _Tiling(config.queries.own_rows, config.section_mib), traversal, tensors)
    return (RaggedQueryBlocks if isinstance(tensors, RaggedTensors) else DenseBlocks)(order)


def key_blocks(pattern: Pattern, config: Config, traversal: Traversal, tensors: Tensors | RaggedTensors):
    """Blocks of the launch for dk and dv."""
    ragged = isinstance(tensors, RaggedTensors)
    batch = T.int32(1) if ragged else tensors.batch
    work = Work(tensors.keys.tiles(config.keys.own_rows), tensors.kv_heads, batch)
    order = _key_order(pattern, config, traversal, tensors, work)
    return RaggedKeyBlocks(order) if ragged else DenseKeyBlocks(order)


def _key_order(pattern: Pattern, config: Config, traversal: Traversal, tensors: Tensors, work: Work) -> Order:
    """Blocks of keys in a template's order; a section is as many heads as ``section_mib`` MiB of visited rows are."""
    types = tensor_types(pattern)
    row_bytes = types.q.bytes * pattern.head_dim + types.o.bytes * pattern.head_dim_v

    def section():
        rows = T.max(tensors.queries.usual_length * tensors.group, 1)
        heads = T.truncdiv(config.section_mib * 2**20 // row_bytes, rows)
        return T.min(T.max(heads, 1), work.batch * work.heads)

    return traversal.order(work, section)


def looks_up(blocks: DenseBlocks | RaggedBlocks) -> bool:
    """Whether blocks look their work tile up, and have shared memory for it."""
    return blocks.pool is not None


def tensors_of_block(blocks: DenseBlocks | RaggedBlocks, tensors: Tensors | RaggedTensors) -> Tensors | RaggedTensors:
    """The tensors with the sequences of a block's own work tile."""
    return tensors.at(*blocks.sequences()) if looks_up(blocks) else tensors
