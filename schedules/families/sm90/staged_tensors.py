"""Tiles of tensors over queries and keys in shared memory, beside the pipelines of keys and values.

A thread that reads what its own scores need from global memory takes a look-up in the cache for every 32 bytes: an
instruction reads eight rows.  A warp of the producer's brings whole rows of a tile by bulk copies, and rows in shared
memory are as far apart as lets the lanes of a warp read from different banks.

Rows come this way where neighbouring keys are neighbours in memory, at addresses that are multiples of 16 bytes, and
the tile of keys is whole; other tiles come as none, and the consumers read elements from global memory.  The stages are
those of the pipeline of keys by number: tile ``n`` is for the scores of K tile ``n``.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import PRODUCER_ARRIVALS, transaction_barriers
from schedules.families.sm90.config import TENSOR_STAGES, Config, staged_pitch, staged_tensors
from schedules.families.sm90.pipeline import PipelineState
from schedules.families.sm90.tensor_tile import is_aligned
from schedules.families.sm90.tma import load_row
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.element_pairs import BYTES
from schedules.tile.geometry import local, wide
from schedules.tile.parameters import Elements
from tvm_flash.packs.manifest import Param

#: Bytes that a bulk copy's addresses and sizes are multiples of.
UNIT = 16


@T.meta_class
class StagedTensor:
    """Tiles ``(stages, block_m, block_n)`` of ``param``, in words, each stage with barriers as a pipeline's."""

    def __init__(self, pool, param: Param, config: Config):
        self.name, self.bytes = param.name, BYTES[param.dtype]
        self.rows, self.row_bytes = config.block_m, config.block_n * self.bytes
        self.pitch = staged_pitch(param, config) // 4
        self.words = pool.alloc((TENSOR_STAGES, self.rows, self.pitch), "uint32", align=128)

    def add_barriers(self, pool) -> None:
        """Take the barriers from the pool."""
        self.full = transaction_barriers(pool, TENSOR_STAGES)
        self.empty = transaction_barriers(pool, TENSOR_STAGES)

    @T.inline
    def init(self, releases: int):
        """One thread: initialise the barriers."""
        self.full.init(PRODUCER_ARRIVALS)
        self.empty.init(releases)

    def comes(self, elements: Elements) -> Expr:
        """Whether the rows of a head may be copied in bulk."""
        place = elements.memory.ptr_to([elements.first + T.int64(0)])
        apart = T.bitwise_and(elements.strides["i"] * self.bytes, UNIT - 1) == 0
        return T.And(T.And(elements.strides["j"] == 1, apart), is_aligned(place, UNIT))

    @T.inline
    def fill(self, block, known, key_first, n, lane):
        """A whole warp: bring tile ``n``, of the keys from ``key_first`` on, once its stage is empty."""
        state = PipelineState(TENSOR_STAGES, n)
        elements = T.meta_var(block.site.params[self.name])
        self.empty.wait(state.index, T.bitwise_xor(state.phase, 1))
        if T.And(known != 0, key_first + (block.config.block_n - 1) < elements.lengths["j"]):
            if lane == 0:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                    self.full.ptr_to([state.index]), T.uint32(self.rows * self.row_bytes)
                )
            T.cuda.warp_sync()
            for x in T.unroll(self.rows // 32):
                row = T.meta_var(x * 32 + lane)
                query = T.meta_var(T.min(block.rows.position(block.row_first + row), elements.lengths["i"] - 1))
                first: T.int64 = elements.first + wide(query) * wide(elements.strides["i"]) + wide(key_first)
                load_row(
                    self.words.ptr_to([state.index, row, 0]),
                    elements.memory.ptr_to([first]),
                    self.row_bytes,
                    self.full.ptr_to([state.index]),
                )
        else:
            if lane == 0:
                self.full.arrive(state.index)

    def pointer(self, n, row, word):
        """That of a word of a row of tile ``n``."""
        return self.words.ptr_to([PipelineState(TENSOR_STAGES, n).index, row, word])

    @T.inline
    def wait(self, n):
        """Consumer: until tile ``n`` is there."""
        state = PipelineState(TENSOR_STAGES, n)
        self.full.wait(state.index, state.phase)

    @T.inline
    def release(self, n, lane):
        """Consumer, every warp: its lanes have read what they need of tile ``n``."""
        state = PipelineState(TENSOR_STAGES, n)
        T.cuda.warp_sync()
        if lane == 0:
            self.empty.arrive(state.index)


def of_kernel(pattern: Pattern, config: Config, pool) -> tuple[StagedTensor, ...]:
    """Those of a kernel; none unless ``config.stage_tensors``."""
    return tuple(StagedTensor(pool, p, config) for p in staged_tensors(pattern, config))


def add_barriers(staged: tuple[StagedTensor, ...], pool) -> None:
    """Take the barriers of all from the pool."""
    for x in staged:
        x.add_barriers(pool)


def init(staged: tuple[StagedTensor, ...], releases: int) -> None:
    """One thread: initialise the barriers of all."""
    for x in staged:
        x.init(releases)


def _fill(block, staged: tuple[StagedTensor, ...], known, key_first, n, lane) -> None:
    for x, comes in zip(staged, known, strict=True):
        x.fill(block, comes, key_first, n, lane)


def _known(block: Block, staged: tuple[StagedTensor, ...]) -> tuple[Expr, ...]:
    return tuple(local(T.Cast("int32", x.comes(block.site.params[x.name]))) for x in staged)


@T.inline
def fetch_tensors(block, staged, lane):
    """A whole warp: bring the tiles of the block's work tile, the only one."""
    n: T.int32 = 0
    known = T.meta_var(_known(block, staged))
    walk = KeyWalk(block, 0, block.config.block_m)
    for i in T.serial(walk.steps):
        if T.Or(i == 0, walk.visible(i)) if block.pattern.has_gaps else True:
            _fill(block, staged, known, walk.key_first(i), n, lane)
            n = n + 1
