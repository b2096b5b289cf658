"""Weights of a step of either launch; what tensors hold for its scores is read where they are, or fetched before."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.families.sm90.backward.mask_bits import MaskBits
from schedules.families.sm90.tensor_tile import FetchedTensors, TensorTile
from schedules.tile.mask_walks import Walked
from schedules.tile.weights import Weights


@T.meta_class
class FetchedWeights(FetchedTensors, Weights):
    """Weights with what tensors hold in registers."""


def step_weights(
    pattern: Pattern,
    at: Site,
    columns: int,
    transposed: bool,
    lane,
    fetches: bool,
    site_anew: Callable[[], Site] | None = None,
    tile_type: Callable[..., TensorTile] = TensorTile,
    **options,
) -> Weights | FetchedWeights | MaskBits:
    """Those of ``columns`` columns a step, with the ``options`` of :class:`Weights`; ``site_anew`` makes ``at`` again
    where it isn't to be kept, and what is fetched comes in tiles of a type."""
    if isinstance(pattern, Walked):
        return MaskBits(pattern, at, columns, lane, site_anew, **options)
    if not fetches:
        return Weights(pattern, at, columns, transposed, asks_once=True, **options)
    found = FetchedWeights(pattern, at, columns, transposed, asks_once=True, **options)
    found.add_tensors(lane, tile_type)
    return found


def has_fetched(weights: Weights | FetchedWeights | MaskBits) -> bool:
    """Whether there is anything to fetch for a step."""
    return isinstance(weights, MaskBits) or (isinstance(weights, FetchedWeights) and len(weights.tensors) > 0)
