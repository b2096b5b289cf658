"""The launches of a backward, and the memory between them."""

from __future__ import annotations

from schedules.definition.parameters import gradient_name
from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, ScheduledLaunch
from schedules.families.mma.backward import keys, queries
from schedules.families.mma.backward.config import Config
from schedules.families.mma.mma import ALIGNMENT, INDEX_BITS
from schedules.tile.delta import delta
from schedules.tile.parameter_sums import parameter_sums
from schedules.tile.place_gradients import Targets
from schedules.tile.tile_scheduler import Traversal
from schedules.tile.weights import summed
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Workspace


def program(pattern: Pattern, config: Config, traversal: Traversal, name: str, machines) -> Program:
    """The launches; ``config`` must be feasible, and ``machines`` are those for dk and dv, and for dq."""
    params = tuple(p.name for p in pattern.params)
    asked = summed(pattern)
    of_keys, of_queries = (Targets(pattern, transposed).roles for transposed in (True, False))
    rows, m_blocks = ("*", "batch", "heads", "seqlen_q"), ("ceildiv", "seqlen_q", config.block_m_dq)
    launches = [
        ScheduledLaunch(delta(pattern, traversal, name, ALIGNMENT), ("o", "do", "dlse", "delta")),
        ScheduledLaunch(
            keys.build(pattern, config, traversal, f"{name}_dkdv", machines[0]), (*keys.ROLES, *params, *of_keys)
        ),
        ScheduledLaunch(
            queries.build(pattern, config, traversal, f"{name}_dq", machines[1]),
            (*queries.ROLES, *params, *(["parameter_sums"] if asked else []), *of_queries),
        ),
    ]
    workspaces = [Workspace("delta", "float32", (rows,))]
    if asked:
        count = ("*", len(asked), "batch", "heads", m_blocks)
        workspaces.append(Workspace("parameter_sums", "float32", (count,)))
        func = parameter_sums(asked, f"{name}_parameters")
        launches.append(ScheduledLaunch(func, ("parameter_sums", *map(gradient_name, asked))))
    return Program(
        "backward",
        tuple(launches),
        "tirx",
        alignment=ALIGNMENT,
        index_bits=INDEX_BITS,
        workspaces=tuple(workspaces),
        narrow_axes=_narrow_axes(config, traversal),
    )


def _narrow_axes(config: Config, traversal: Traversal) -> tuple[sizes.Expression, ...]:
    """What either launch has along the second and the third axis of its grid, where that may be a large number."""
    if traversal.layout == "bhsd":
        return "heads", "batch"
    return ("ceildiv", "seqlen_q", config.block_m_dq), ("ceildiv", "seqlen_kv", config.block_n)
