"""The launch for dk and dv: a block owns keys of a head of keys, and visits the queries of its group that see them."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.blocks import key_blocks, looks_up, tensors_of_block
from schedules.families.mma.backward.config import Config
from schedules.families.mma.backward.machine import Sides
from schedules.families.mma.backward.parts import of_queries
from schedules.families.mma.mma import this_place
from schedules.families.mma.registers import anew
from schedules.tile.geometry import flat, parameterised, site
from schedules.tile.gradients import Starts, tensors_of
from schedules.tile.key_source import ContiguousRows
from schedules.tile.parameters import Parameters
from schedules.tile.place_gradients import Targets
from schedules.tile.query_range import QueryTiles
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal

#: Roles of the kernel's arguments, before those of the pattern's parameters.
ROLES = ("q", "k", "v", "do", "lse", "delta", "dk", "dv", "softmax_scale")


def build(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    name: str,
    machine_type,
    starts: Starts | None = None,
    adds: bool = False,
) -> PrimFunc:
    """The kernel of a pattern; its arguments have the ``ROLES``, then come the pattern's parameters, those of
    ``Targets``, and ``starts`` if sequences are ragged.  ``adds``: to what is there."""
    launch, targets = config.keys, Targets(pattern, transposed=True)

    def make(values):
        @T.prim_func(check_well_formed=False)
        def backward(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            do: T.handle,
            lse: T.handle,
            delta: T.handle,
            dk: T.handle,
            dv: T.handle,
            softmax_scale: T.float32,
        ):
            # 1. Arguments.
            handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dk": dk, "dv": dv, "lse": lse, "delta": delta})
            tensors = T.meta_var(tensors_of(pattern, traversal, handles, starts, softmax_scale, values, adds=adds))
            gradients = T.meta_var(tensors.gradients)
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": launch.min_blocks_per_sm})
            order = T.meta_var(key_blocks(pattern, config, traversal, tensors))
            _x, _y, _z = T.cta_id([*order.grid()])
            _tid = T.thread_id([launch.threads])
            if static(looks_up(order)):
                order.find(tensors, launch.own_rows)
            own_tensors = T.meta_var(tensors_of_block(order, tensors))
            if order.exists(this_place()):
                # 2. Which keys of which head this block owns.
                block = T.meta_var(order.work_tile(this_place()))
                b: T.int32 = block.batch
                kv_head: T.int32 = block.head
                key_first = T.meta_var(block.m_block * launch.own_rows)  # computed anew where it is used
                queries = T.meta_var(own_tensors.queries.of(b))
                keys = T.meta_var(own_tensors.keys.of(b))
                own = T.meta_var(
                    Sides(
                        ContiguousRows(tensors.k, b, kv_head, keys),
                        ContiguousRows(tensors.v, b, kv_head, keys),
                    )
                )
                machine = machine_type(pattern, launch, own, key_first, own_tensors, order.pool)
                machine.begin()
                # 3. The queries of each head of the group, from the first that sees a key to the last.
                for g in T.serial(tensors.group):
                    head: T.int32 = kv_head * tensors.group + g
                    parameters = Parameters(own_tensors, b, head)
                    at = T.meta_var(site(own_tensors, parameters, b, head))
                    tiles = QueryTiles(pattern, at, key_first, launch.own_rows, launch.step_rows)
                    places = T.meta_var(machine.place_gradients(targets, at))
                    weights = T.meta_var(machine.weights(at, places))
                    sources = T.meta_var(
                        (
                            ContiguousRows(tensors.q, anew(b), anew(head), queries),
                            ContiguousRows(gradients["do"], anew(b), anew(head), queries),
                        )
                    )
                    visited = T.meta_var(machine.rows_of(sources))
                    machine.visit(visited, weights, of_queries(tiles))
                    machine.store_places(places)
                # 4. Results.  Where the block is comes anew, so that it isn't kept until here.
                machine.finish()
                place = T.meta_var(order.work_tile(this_place()))
                dK = flat(gradients["dk"].buffer)
                dV = flat(gradients["dv"].buffer)
                machine.store(
                    gradients["dv"],
                    own_tensors.keys,
                    dV,
                    place,
                    machine.sum_p,
                    machine.own_tiles.gradients,
                    T.float32(1),
                )
                machine.store(
                    gradients["dk"],
                    own_tensors.keys,
                    dK,
                    place,
                    machine.sum_ds,
                    machine.own_tiles.scores,
                    softmax_scale,
                )

        return backward.with_attr("global_symbol", name)

    func = parameterised(pattern, make)
    return append_arguments(func, [*targets.arguments, *(starts.arguments if starts else ())])
