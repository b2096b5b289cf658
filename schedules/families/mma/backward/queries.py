"""The launch for dq: a block owns queries of a head, as the forward's does, and visits the keys that they see."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.blocks import looks_up, query_blocks, tensors_of_block
from schedules.families.mma.backward.config import Config
from schedules.families.mma.backward.machine import Sides
from schedules.families.mma.backward.parts import of_keys
from schedules.families.mma.mma import this_place
from schedules.families.mma.registers import anew
from schedules.tile.geometry import flat, parameterised, site
from schedules.tile.gradients import Starts, tensors_of
from schedules.tile.key_range import KeyTiles
from schedules.tile.key_source import ContiguousRows
from schedules.tile.parameters import Parameters
from schedules.tile.place_gradients import Targets
from schedules.tile.static import static
from schedules.tile.table_gradients import TableSums, learnt_tables
from schedules.tile.tile_scheduler import Traversal
from schedules.tile.weights import asks_for_whole, summed

#: Roles of the kernel's arguments, before those of the pattern's parameters.
ROLES = ("q", "k", "v", "do", "lse", "delta", "dq", "softmax_scale")


def build(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    name: str,
    machine_type,
    starts: Starts | None = None,
    adds: bool = False,
) -> PrimFunc:
    """The kernel of a pattern; its arguments have the ``ROLES``, then come the pattern's parameters, ``parameter_sums``
    if there are any, those of ``Targets`` and of ``TableSums``, and ``starts`` if sequences are ragged.  ``adds``: to
    what is there."""
    launch, targets = config.queries, Targets(pattern, transposed=False)
    of_tables = TableSums(learnt_tables(pattern))
    asked = len(summed(pattern))
    sums = tirx.decl_buffer([tirx.Var("sums_length", "int32")], "float32", name="parameter_sums")

    def make(values):
        @T.prim_func(check_well_formed=False)
        def backward(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            do: T.handle,
            lse: T.handle,
            delta: T.handle,
            dq: T.handle,
            softmax_scale: T.float32,
        ):
            # 1. Arguments.
            handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dq": dq, "lse": lse, "delta": delta})
            tensors = T.meta_var(tensors_of(pattern, traversal, handles, starts, softmax_scale, values, adds=adds))
            gradients = T.meta_var(tensors.gradients)
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": launch.min_blocks_per_sm})
            order = T.meta_var(query_blocks(pattern, config, traversal, tensors))
            _x, _y, _z = T.cta_id([*order.grid()])
            _tid = T.thread_id([launch.threads])
            if static(looks_up(order)):
                order.find(tensors, launch.own_rows)
            own_tensors = T.meta_var(tensors_of_block(order, tensors))
            if order.exists(this_place()):
                # 2. Which queries of which head this block owns, and which keys they see.
                block = T.meta_var(order.work_tile(this_place()))
                b: T.int32 = block.batch
                h: T.int32 = block.head
                row_first = T.meta_var(block.m_block * launch.own_rows)  # computed anew where it is used
                queries = T.meta_var(own_tensors.queries.of(b))
                keys = T.meta_var(own_tensors.keys.of(b))
                row_last: T.int32 = T.min(row_first + launch.own_rows, queries.length) - 1
                kv_head: T.int32 = tensors.kv_head(h)
                parameters = Parameters(own_tensors, b, h)
                at = T.meta_var(site(own_tensors, parameters, b, h))
                tiles = KeyTiles(pattern, at, row_first, row_last, launch.step_rows)
                own = T.meta_var(
                    Sides(
                        ContiguousRows(tensors.q, b, h, queries),
                        ContiguousRows(gradients["do"], b, h, queries),
                    )
                )
                machine = machine_type(pattern, launch, own, row_first, own_tensors, order.pool)
                machine.begin()
                machine.read_numbers(at)
                places = T.meta_var(machine.place_gradients(targets, at))
                machine.clear_places(places, tiles)
                # 3. The keys, from the first that is seen to the last.
                sources = T.meta_var(
                    (
                        ContiguousRows(tensors.k, anew(b), anew(kv_head), keys),
                        ContiguousRows(tensors.v, anew(b), anew(kv_head), keys),
                    )
                )
                visited = T.meta_var(machine.rows_of(sources))
                tables = T.meta_var(machine.table_gradients(of_tables, at))
                weights = T.meta_var(machine.weights(at, places, tables))
                machine.visit(visited, weights, of_keys(tiles))
                # 4. Results.  Where the block is comes anew, so that it isn't kept until here.
                machine.finish()
                machine.store_places(places)
                if static(tables is not None):
                    tables.leave()
                if not pattern.is_unmasked:
                    machine.clear_blind_rows()
                place = T.meta_var(order.work_tile(this_place()))
                dQ = flat(gradients["dq"].buffer)
                machine.store(
                    gradients["dq"], own_tensors.queries, dQ, place, machine.sum_ds, machine.own_tiles.scores,
                    softmax_scale,
                )  # fmt: skip
                if asked > 0:
                    machine.store_parameters(sums, place)
            if static(starts is not None and asks_for_whole(pattern)):
                order.leave_nothing(own_tensors, launch.own_rows, sums, asked)

        return backward.with_attr("global_symbol", name)

    func = parameterised(pattern, make)
    others = [*([sums] if asked > 0 else []), *targets.arguments, *of_tables.arguments]
    return append_arguments(func, [*others, *(starts.arguments if starts else ())])
