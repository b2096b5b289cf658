"""The joint launch: a block owns keys, visits queries as that for dk and dv does, and adds its part to dq.

Five products in place of seven.  Sums over blocks are taken in the order of their keys, through memory, so that the
same call has the same bits on every run (:mod:`schedules.tile.ordered_sums`).
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.mma.backward.blocks import DenseKeyBlocks
from schedules.families.mma.backward.config import Config
from schedules.families.mma.backward.joint_machine import JointMemory
from schedules.families.mma.backward.machine import Sides
from schedules.families.mma.mma import this_place
from schedules.families.mma.registers import anew
from schedules.families.row_terms import SHIFTS, STARTS
from schedules.tile.geometry import flat, parameterised, site
from schedules.tile.gradients import tensors_of, tiles_of
from schedules.tile.key_source import ContiguousRows
from schedules.tile.parameters import Parameters
from schedules.tile.query_range import QueryTiles
from schedules.tile.tile_scheduler import SeqOuter, Traversal, Work
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Workspace

#: Roles of the kernel's arguments.
ROLES = ("q", "k", "v", "do", SHIFTS, STARTS, "dq", "dk", "dv", "softmax_scale", "dq_sums", "progress")
#: Heads of keys whose blocks are started together: those of the same keys after each other.  With 16, where more blocks
#: of a head wait for one another, a causal mask at head_dim 64 had 0.94 of the rate over 8k keys.
SECTION = 64


def counters(config: Config) -> tuple[Workspace, ...]:
    """How far each block has come in each query head."""
    return (Workspace("progress", "int32", (("*", "batch", "heads", ("ceildiv", "seqlen_kv", config.block_n)),)),)


def workspaces(pattern: Pattern, config: Config) -> tuple[Workspace, ...]:
    """Sums of dq, tile by tile in the order of accumulators."""
    tile = config.block_m * pattern.head_dim
    return (Workspace("dq_sums", "float32", (("*", tiles_of(config.block_m, False), tile),)),)


def narrow_axes(config: Config) -> tuple[sizes.Expression, ...]:
    """What the launch has along the second and the third axis of its grid."""
    return ("ceildiv", "seqlen_kv", config.block_n), ("ceildiv", ("*", "batch", "kv_heads"), SECTION)


def build(pattern: Pattern, config: Config, traversal: Traversal, name: str, machine_type) -> ScheduledLaunch:
    """The launch of a pattern without parameters."""
    func = parameterised(pattern, lambda values: _kernel(pattern, config, traversal, name, machine_type, values))
    return ScheduledLaunch(func, ROLES)


def _kernel(pattern: Pattern, config: Config, traversal: Traversal, name: str, machine_type, values: dict) -> PrimFunc:
    launch = config.keys

    @T.prim_func(check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        row_shifts: T.handle,
        row_starts: T.handle,
        dq: T.handle,
        dk: T.handle,
        dv: T.handle,
        softmax_scale: T.float32,
        dq_sums: T.handle,
        progress: T.handle,
    ):
        # 1. Arguments.
        handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dq": dq, "dk": dk, "dv": dv})
        tensors = T.meta_var(tensors_of(pattern, traversal, handles, None, softmax_scale, values))
        gradients = T.meta_var(tensors.gradients)
        rows_length, sums_length, progress_length = T.int64(), T.int64(), T.int32()
        shifts = T.match_buffer(row_shifts, (rows_length,), "float32", align=16)
        starts = T.match_buffer(row_starts, (rows_length,), "float32", align=16)
        sums = T.match_buffer(dq_sums, (sums_length,), "float32", align=16)
        counts = T.match_buffer(progress, (progress_length,), "int32", align=4)
        blocks = T.bind(tensors.keys.tiles(launch.own_rows))
        tiles_of_head = T.bind(tensors.tiles_of_rows(launch.step_rows))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": launch.min_blocks_per_sm})
        work = T.meta_var(Work(blocks, tensors.kv_heads, tensors.batch))
        order = T.meta_var(DenseKeyBlocks(SeqOuter(work, T.min(tensors.batch * tensors.kv_heads, SECTION))))
        _x, _y, _z = T.cta_id([*order.grid()])
        _tid = T.thread_id([launch.threads])
        if order.exists(this_place()):
            # 2. Which keys of which head this block owns.
            block = T.meta_var(order.work_tile(this_place()))
            own_batch: T.int32 = block.batch
            kv_head: T.int32 = block.head
            key_first = T.meta_var(block.m_block * launch.own_rows)  # computed anew where it is used
            keys = T.meta_var(tensors.keys.of(own_batch))
            own = T.meta_var(
                Sides(
                    ContiguousRows(tensors.k, own_batch, kv_head, keys),
                    ContiguousRows(tensors.v, own_batch, kv_head, keys),
                )
            )
            views = T.meta_var((flat(shifts), flat(starts), flat(sums), flat(counts)))
            memory = T.meta_var(JointMemory(*views, tiles_of_head, blocks))
            machine = machine_type(pattern, launch, own, block.m_block, tensors, memory)
            machine.begin()
            # 3. The queries of each head of the group, from the last to the first that sees a key.
            first = T.meta_var(order.work_tile(this_place()))
            machine.enter(first.batch, first.head * tensors.group, 0)
            while machine.place[2] < tensors.group:
                b, head = T.meta_var(machine.here())
                queries = T.meta_var(tensors.queries.of(b))
                parameters = Parameters(tensors, b, head)
                at = T.meta_var(site(tensors, parameters, b, head))
                tiles = QueryTiles(pattern, at, key_first, launch.own_rows, launch.step_rows)
                weights = T.meta_var(machine.weights(at))
                sources = T.meta_var(
                    (
                        ContiguousRows(tensors.q, anew(b), anew(head), queries),
                        ContiguousRows(gradients["do"], anew(b), anew(head), queries),
                    )
                )
                machine.visit_down(machine.rows_of(sources), weights, tiles)
                machine.enter(b, head + 1, machine.place[2] + 1)
            # 4. Results.  Where the block is comes anew, so that it isn't kept until here.
            machine.finish()
            place = T.meta_var(order.work_tile(this_place()))
            dK = flat(gradients["dk"].buffer)
            dV = flat(gradients["dv"].buffer)
            machine.store(
                gradients["dv"], tensors.keys, dV, place, machine.sum_p, machine.own_tiles.gradients, T.float32(1)
            )
            machine.store(
                gradients["dk"], tensors.keys, dK, place, machine.sum_ds, machine.own_tiles.scores, softmax_scale
            )

    return backward.with_attr("global_symbol", name)
