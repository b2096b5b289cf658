"""Numbers of rows beside their tiles: the first launch leaves them tile by tile, and bulk copies bring them."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.tile.geometry import flat, wide

_LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@T.meta_class
class RowNumbers:
    """A number for each row of each stage of a pipeline of tiles, and where those of all tiles are in memory."""

    def __init__(self, pool, stages: int, rows: int, memory):
        self.rows, self.memory = rows, flat(memory)
        self.staged = pool.alloc((stages, rows), "float32", align=16)

    @property
    def bytes(self) -> int:
        """What a copy adds to a stage's barrier."""
        return self.rows * 4

    @T.inline
    def load(self, pipeline, state, tile):
        """One thread: start to bring the numbers of tile ``tile`` of all to a stage of ``pipeline``, whose
        barrier knows of their bytes."""
        T.ptx[_LOAD](
            self.staged.ptr_to([state.index, 0]),
            self.memory.ptr_to([wide(tile) * self.rows]),
            T.uint32(self.bytes),
            pipeline.full.ptr_to([state.index]),
        )


def row_numbers(shifts, starts):
    """The buffers of both, of the handles of a launch's arguments."""
    length = T.int64()
    return tuple(T.match_buffer(handle, (length,), "float32", align=16) for handle in (shifts, starts))
