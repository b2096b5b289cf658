"""The launch after the joint one: sums of dq, tile by tile in the order of accumulators, scaled and rounded to dq."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.sm90.backward.config import Config
from schedules.families.sm90.backward.sums import take_tile
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.config import PANEL, panels
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import Geometry, Parameters, Tensor, flat, parameterised, site, wide
from schedules.tile.gradients import ALIGNMENT
from schedules.tile.tile_scheduler import Traversal, ceildiv

ROLES = ("q", "k", "v", "dq", "softmax_scale", "dq_sums")


def build(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> ScheduledLaunch:
    """The launch of a pattern; of q, k and v it takes the sizes."""
    func = parameterised(pattern, lambda parameters: _kernel(pattern, config, traversal, parameters))
    return ScheduledLaunch(func.with_attr("global_symbol", name), (*ROLES, *(p.name for p in pattern.params)))


def _kernel(pattern: Pattern, config: Config, traversal: Traversal, parameters: dict) -> PrimFunc:
    M, columns = config.block_m, panels(pattern.head_dim)
    pack = element_type(pattern.dtype).pack

    @T.prim_func(check_well_formed=False)
    def convert(q: T.handle, k: T.handle, v: T.handle, dq: T.handle, softmax_scale: T.float32, dq_sums: T.handle):
        at = Geometry(pattern, traversal, (q, k, v), softmax_scale, parameters, ALIGNMENT)
        element = T.meta_var(tensor_types(pattern).q.name)
        to = Tensor(dq, "dq", at.q.sizes, element, traversal.layout, ALIGNMENT)
        length = T.int64()
        sums = T.match_buffer(dq_sums, (length,), "float32", align=16)
        tiles = T.bind(ceildiv(at.seqlen_q, M))
        T.device_entry()
        tile, head, batch = T.cta_id([tiles, at.heads, at.batch])
        thread = T.thread_id([32 * WARPS])
        source, elements = T.meta_var((flat(sums), flat(to.buffer)))
        total = T.alloc_local([32], "float32")
        packed = T.alloc_local([1], "uint32")
        lane: T.int32 = thread % 32
        warp: T.int32 = thread // 32
        # A tile that sees no key was visited by no block.
        last = T.meta_var(T.min(tile * M + (M - 1), at.seqlen_q - 1))
        keys = T.meta_var(pattern.keys_of(site(at, Parameters(at, batch, head), batch, head), tile * M, last).visible)
        seen: T.bool = keys[0] < keys[1]
        first: T.int64 = ((wide(batch) * wide(at.heads) + wide(head)) * wide(tiles) + wide(tile)) * (
            M * columns * PANEL
        )
        for chunk in T.unroll(M // PANEL * columns):
            from_: T.int64 = first + wide((chunk * WARPS + warp) * (16 * PANEL) + lane * 4)
            for i in T.unroll(8):
                if seen:
                    T.evaluate(take_tile(T.address_of(total[i * 4]), source.ptr_to([from_ + i * 128])))
                else:
                    for x in T.unroll(4):
                        total[i * 4 + x] = T.float32(0)
            column: T.int32 = chunk % columns * PANEL + M16N8.column(lane)
            row: T.int32 = tile * M + chunk // columns * PANEL + warp * 16 + M16N8.row(lane)
            for r in T.unroll(2):
                out: T.int64 = to.offset(batch, head, row + r * M16N8.row_step, column)
                for i in T.unroll(8):
                    if T.And(row + r * M16N8.row_step < at.seqlen_q, column + i * 8 < at.head_dim):
                        x = T.meta_var(i * 4 + r * 2)
                        T.ptx[pack](packed[0], total[x + 1] * softmax_scale, total[x] * softmax_scale)
                        T.ptx["st.global.b32"](elements.ptr_to([out + i * 8]), packed[0])

    return convert
