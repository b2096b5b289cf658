"""Weights of a step of either launch; what tensors hold for its scores is read where they are, or fetched before."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.families.sm90.tensor_tile import FetchedTensors
from schedules.tile.weights import Weights


@T.meta_class
class FetchedWeights(FetchedTensors, Weights):
    """Weights with what tensors hold in registers."""


def step_weights(
    pattern: Pattern, at: Site, columns: int, transposed: bool, lane, fetches: bool, **options
) -> Weights | FetchedWeights:
    """Those of ``columns`` columns a step, with the ``options`` of :class:`Weights`."""
    if not fetches:
        return Weights(pattern, at, columns, transposed, asks_once=True, **options)
    found = FetchedWeights(pattern, at, columns, transposed, asks_once=True, **options)
    found.add_tensors(lane)
    return found


def has_fetched(weights: Weights | FetchedWeights) -> bool:
    """Whether there is anything to fetch for a step."""
    return isinstance(weights, FetchedWeights) and len(weights.tensors) > 0
