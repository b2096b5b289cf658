"""The joint launch: a block owns keys, visits queries as that for dk and dv does, and adds its part to dq.

Five products in place of seven.  Sums over blocks are taken in the order of their keys, through memory, so that the
same call has the same bits on every run (:mod:`schedules.tile.ordered_sums`).

From ``SHARED_FROM`` keys on, each query head of a group has blocks of its own, which add up dk and dv of their keys in
the same way: there are as many blocks as without grouped heads, and under a causal mask none waits at the beginning of
a head for a block that has more tiles of the one before.  With fewer keys a block visits all heads of the group: what
passes through memory would take longer than that where there are many sequences, and their number has no say, so that
a sequence's bits are its own.
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
from schedules.tile.tile_scheduler import SeqOuter, Traversal, Work, ceildiv
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Scalar, Workspace

#: Roles of the kernel's arguments.
ROLES = (
    *("q", "k", "v", "do", SHIFTS, STARTS, "dq", "dk", "dv", "softmax_scale"),
    *("dq_sums", "progress", "heads_per_block", "key_sums", "key_progress"),
)
#: Heads of keys whose blocks are started together: those of the same keys after each other.  With 16, where more blocks
#: of a head wait for one another, a causal mask at head_dim 64 had 0.94 of the rate over 8k keys.
SECTION = 64
#: Keys from which on query heads of a group have blocks of their own.
#: Where it is 1000, of 16k tokens a batch, a quarter of the heads for keys, 8k and more have 1.03 to 1.13 of the rate,
#: 2k 0.97 to 1.07 and 1k 0.90 to 1.0; one sequence of 1024 with 8 heads on 4 has 1.7 times it, of 3000 with 12 on 2
#: twice to four times.
SHARED_FROM = 1000
#: Keys of all heads of a sequence from which on the joint launch is taken before three launches at head_dim 64 where
#: all is seen: with fewer, blocks wait for those of the keys before.  TFLOP/s of one sequence on an H200, joint launch
#: and three: 4 heads on 4096 keys 125 and 207, 8 on 4096 203 and 261, 16 on 2048 197 and 254; from here on 244 to 258
#: and 255 to 279.  With many sequences it has up to 1.08 of the rate of three, but their number has no say.  Heads that
#: share keys have blocks of their own in the joint launch alone: 12 on 2 on 3000 keys 162 and 98.
FILLED_FROM = 65536
_GROUP = ("ceildiv", "heads", ("max", "kv_heads", 1))


def _shares() -> tuple:
    """Into how many blocks a group's heads are divided at most."""
    return ("steps", "seqlen_kv", (0, 1), (SHARED_FROM, 2**30))


def scalars() -> tuple[Scalar, ...]:
    """How many query heads of a group a block visits."""
    return (Scalar("heads_per_block", ("ceildiv", _GROUP, _shares())),)


def meant_for(pattern: Pattern) -> sizes.Expression | None:
    """Where it is meant to be taken before three launches, if there are kernels with both."""
    if not pattern.is_unmasked or pattern.head_dim > 64:
        return None
    filled = ("steps", ("*", "heads", "seqlen_kv"), (0, 0), (FILLED_FROM, 1))
    return ("max", filled, ("steps", _GROUP, (0, 0), (2, 1)))


def counters(config: Config) -> tuple[Workspace, ...]:
    """How far blocks have come in each query head, and how many heads are in the sums of their keys."""
    blocks = ("ceildiv", "seqlen_kv", config.block_n)
    return (
        Workspace("progress", "int32", (("*", "batch", "heads", blocks),)),
        Workspace("key_progress", "int32", (("*", "batch", "kv_heads", blocks),)),
    )


def workspaces(pattern: Pattern, config: Config) -> tuple[Workspace, ...]:
    """Sums of dq, tile by tile, and of dv and dk, block by block where heads share keys, as accumulators lie."""
    tile = config.block_m * pattern.head_dim
    block = config.block_n * (pattern.head_dim + pattern.head_dim_v)
    shared = ("steps", ("min", _GROUP, _shares()), (0, 0), (2, 1))
    blocks = ("*", "batch", "kv_heads", ("ceildiv", "seqlen_kv", config.block_n))
    return (
        Workspace("dq_sums", "float32", (("*", tiles_of(config.block_m, False), tile),)),
        Workspace("key_sums", "float32", (("max", ("*", shared, blocks, block), 1),)),
    )


def narrow_axes(config: Config) -> tuple[sizes.Expression, ...]:
    """What the launch has along the second and the third axis of its grid, where that may be a large number."""
    return ("ceildiv", "seqlen_kv", config.block_n), ("ceildiv", ("*", "batch", "heads"), SECTION)


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
        heads_per_block: T.int32,
        key_sums: T.handle,
        key_progress: T.handle,
    ):
        # 1. Arguments.
        handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dq": dq, "dk": dk, "dv": dv})
        tensors = T.meta_var(tensors_of(pattern, traversal, handles, None, softmax_scale, values))
        gradients = T.meta_var(tensors.gradients)
        rows_length, sums_length, progress_length = T.int64(), T.int64(), T.int32()
        key_sums_length, key_progress_length = T.int64(), T.int32()
        shifts = T.match_buffer(row_shifts, (rows_length,), "float32", align=16)
        starts = T.match_buffer(row_starts, (rows_length,), "float32", align=16)
        sums = T.match_buffer(dq_sums, (sums_length,), "float32", align=16)
        counts = T.match_buffer(progress, (progress_length,), "int32", align=4)
        sums_of_keys = T.match_buffer(key_sums, (key_sums_length,), "float32", align=16)
        counts_of_keys = T.match_buffer(key_progress, (key_progress_length,), "int32", align=4)
        blocks = T.bind(tensors.keys.tiles(launch.own_rows))
        tiles_of_head = T.bind(tensors.tiles_of_rows(launch.step_rows))
        shares = T.bind(ceildiv(tensors.group, heads_per_block))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": launch.min_blocks_per_sm})
        work = T.meta_var(Work(blocks, tensors.kv_heads * shares, tensors.batch))
        order = T.meta_var(DenseKeyBlocks(SeqOuter(work, T.min(work.batch * work.heads, SECTION))))
        _x, _y, _z = T.cta_id([*order.grid()])
        _tid = T.thread_id([launch.threads])
        if order.exists(this_place()):
            # 2. Which keys of which head this block owns, or shares with those of the group's other query heads.
            block = T.meta_var(order.work_tile(this_place()))
            own_batch: T.int32 = block.batch
            own_head: T.int32 = block.head
            kv_head: T.int32 = own_head
            share: T.int32 = 0
            if shares > 1:
                kv_head = T.truncdiv(own_head, shares)
                share = own_head - kv_head * shares
            key_first = T.meta_var(block.m_block * launch.own_rows)  # computed anew where it is used
            keys = T.meta_var(tensors.keys.of(own_batch))
            own = T.meta_var(
                Sides(
                    ContiguousRows(tensors.k, own_batch, kv_head, keys),
                    ContiguousRows(tensors.v, own_batch, kv_head, keys),
                )
            )
            views = T.meta_var(map(flat, (shifts, starts, sums, counts, sums_of_keys, counts_of_keys)))
            memory = T.meta_var(JointMemory(*views, tiles_of_head, blocks, shares))
            machine = machine_type(pattern, launch, own, block.m_block, tensors, memory)
            machine.begin()
            # 3. The queries of each of its heads, from the last to the first that sees a key.
            machine.keep_place(kv_head, share)
            skipped = T.meta_var(share * heads_per_block)
            machine.enter(own_batch, kv_head * tensors.group + skipped, T.min(heads_per_block, tensors.group - skipped))
            while machine.place[2] > 0:
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
                machine.enter(b, head + 1, machine.place[2] - 1)
            # 4. Results.  Where the block is waits in shared memory, so that it isn't kept in registers until here.
            machine.finish()
            place = T.meta_var(machine.own_place(order.work_tile(this_place()).m_block))
            if shares > 1:
                machine.add_up(place)
            if machine.share == shares - 1:
                dK = flat(gradients["dk"].buffer)
                dV = flat(gradients["dv"].buffer)
                machine.store(
                    gradients["dv"], tensors.keys, dV, place, machine.sum_p, machine.own_tiles.gradients, T.float32(1)
                )
                machine.store(
                    gradients["dk"], tensors.keys, dK, place, machine.sum_ds, machine.own_tiles.scores, softmax_scale
                )

    return backward.with_attr("global_symbol", name)
