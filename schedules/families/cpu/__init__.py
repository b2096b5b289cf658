"""The CPU: vector lanes over queries, scratch in the cache, work items over threads.

The interface of a family is described in :mod:`schedules.families.interface`.
"""

from functools import partial
from types import SimpleNamespace

from schedules.families.cpu import append, backward, paged, ragged
from schedules.families.cpu.config import Config, default_configs, feasible
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import program
from schedules.families.cpu.paged import latent
from schedules.families.cpu.paged.scaled import ScaledPages
from schedules.families.cpu.space import space
from schedules.families.interface import (
    APPEND,
    BACKWARD,
    BACKWARD_ACCUMULATE,
    FORWARD,
    OF_SEQUENCES,
    PAGED,
    PAGED_LATENT,
    PAGED_SCALED,
    PARTIAL,
    RAGGED,
    RAGGED_BACKWARD,
    Target,
)

DTYPES = ("float32", "float16", "bfloat16")
TEMPLATES = ("v1", "v2")


INDEX_DTYPE = "int64"
KINDS = {
    BACKWARD: backward,
    BACKWARD_ACCUMULATE: backward.accumulate,
    PARTIAL: SimpleNamespace(
        Config=Config,
        default_configs=default_configs,
        feasible=feasible,
        program=partial(program, result_dtype="float32"),
        space=space,
    ),
    RAGGED: ragged,
    RAGGED_BACKWARD: backward.ragged,
    PAGED: paged,
    PAGED_LATENT: latent,
    **{kind: ScaledPages(cache) for cache, kind in PAGED_SCALED.items()},
    APPEND: append,
}
TENSOR_KINDS, TABLE_KINDS = (FORWARD, BACKWARD, BACKWARD_ACCUMULATE), OF_SEQUENCES
SINK_KINDS = (FORWARD, *KINDS)


def mask_tile(config: Config, target: Target) -> tuple[int, int]:
    """The rows and columns that a kernel decides about at once: a group of rows of its tile."""
    return config.row_vectors * ISAS[target.isa].lanes, config.block_n


__all__ = [
    "DTYPES",
    "INDEX_DTYPE",
    "ISAS",
    "KINDS",
    "SINK_KINDS",
    "TABLE_KINDS",
    "TEMPLATES",
    "TENSOR_KINDS",
    "Config",
    "Isa",
    "default_configs",
    "feasible",
    "mask_tile",
    "program",
    "space",
]
