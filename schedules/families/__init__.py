"""Arch families: one module each for how tiles are copied, multiplied and laid out on a machine.

The interface of a family is described in :mod:`schedules.families.interface`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import Pattern
from schedules.families.interface import FORWARD, Program, Rejected, Target
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import why_no_places

#: Family module for each arch that packs can be built for.
FAMILY = {
    "cpu": "cpu",
    "sm_70": "mma.sm70",
    "sm_75": "mma.sm75",
    "sm_80": "mma.sm80",
    "sm_86": "mma.sm80",
    "sm_89": "mma.sm80",
    "sm_90a": "sm90",
    "sm_120": "mma.sm80",
}


def family_of(target: Target):
    """The family module of a target.

    Raises
    ------
    ValueError: no family knows the arch.
    """
    if target.arch not in FAMILY:
        raise ValueError(f"arch {target.arch!r} is unknown; expected one of {', '.join(FAMILY)}")
    return importlib.import_module(f"schedules.families.{FAMILY[target.arch]}")


def kinds_of(target: Target) -> tuple[str, ...]:
    """The kinds of kernels that a target's family makes, the usual one first."""
    return (FORWARD, *getattr(family_of(target), "KINDS", {}))


def core_kinds_of(target: Target) -> tuple[str, ...]:
    """The kinds of which the core set has kernels, and a definition of the user's own: those whose kernels were
    verified on hardware.  Others are built if they are asked for by name."""
    unverified = getattr(family_of(target), "UNVERIFIED_KINDS", ())
    return tuple(kind for kind in kinds_of(target) if kind not in unverified)


def is_verified_size(target: Target, kind: str, head_dim: int, head_dim_v: int) -> bool:
    """Whether kernels of a kind that the core set has were verified on hardware at a size: the core set has those."""
    return (head_dim, head_dim_v) not in getattr(family_of(target), "UNVERIFIED_HEAD_DIMS", {}).get(kind, ())


def further_sizes(target: Target) -> Mapping[str, Mapping[tuple[str, str], tuple[tuple[int, int], ...]]]:
    """Pairs of head_dim and head_dim_v, beside those of all GPUs, for which the core set has kernels of the target's
    own: by kind, then by mask and score."""
    return getattr(family_of(target), "FURTHER_SIZES", {})


def has_core_kernels(target: Target, kind: str, mask: str, score: str) -> bool:
    """Whether the core set has kernels of a kind for a mask and a score that read tensors, or have sinks: the target's
    family knows how, and they were verified on hardware."""
    family = family_of(target)
    of_tensors, of_sinks = (getattr(family, name, ()) for name in ("TENSOR_KINDS", "SINK_KINDS"))
    reads = any(p.is_tensor and not p.per_head for p in (*MASKS[mask].params, *SCORES[score].params))
    knows = (kind in of_tensors or not reads) and (kind in of_sinks or SCORES[score].sink is None)
    return knows and (mask, score) not in getattr(family, "UNVERIFIED_VARIANTS", {}).get(kind, ())


def maker_of(target: Target, kind: str = FORWARD):
    """What makes the kernels of a kind: the family's module itself for the usual one, else one of its ``KINDS``.

    Raises
    ------
    KeyError: the family makes no such kernels.
    """
    family = family_of(target)
    return family if kind == FORWARD else family.KINDS[kind]


def schedule(
    traversal: Traversal, pattern: Pattern, target: Target, name: str, config=None, kind: str = FORWARD
) -> Program | Rejected:
    """What both templates do: ask the family whether it can, then let it.

    Parameters
    ----------
    traversal: the template's.
    pattern: what the matcher found in the definition.
    target: the machine.
    name: global symbol of the kernel.
    config: the kind's ``Config``; its default for this pattern and target if not given.
    kind: of kernel, one of those that the target's family makes.
    """
    family = family_of(target)
    # 1. The family must serve the kind, the template and the element type.
    if kind not in kinds_of(target):
        return Rejected(f"{target} has no {kind} kernels; it has {', '.join(kinds_of(target))}")
    if traversal.template not in family.TEMPLATES:
        return Rejected(f"{target} has no {traversal.template} kernels; it has {', '.join(family.TEMPLATES)}")
    if pattern.dtype not in family.DTYPES:
        return Rejected(f"{target} can't compute {pattern.dtype}; it can {', '.join(family.DTYPES)}")
    # 2. It must know what the definition reads.
    reads = _unknown(pattern, target, kind)
    if reads:
        return Rejected(reads)
    # 3. The configuration must fit the machine.
    maker = maker_of(target, kind)
    config = config or maker.default_configs(traversal.template, pattern, target)[0]
    refusal = maker.feasible(pattern, config, target)
    if refusal:
        return refusal
    # 4. The family writes the kernel in the template's order and layout.
    return maker.program(pattern, config, target, traversal, name)


def _unknown(pattern: Pattern, target: Target, kind: str) -> str:
    """What of a definition no kernel of a kind and a target knows; empty if there is none."""
    family = family_of(target)
    of_tensors, of_tables, of_sinks = (
        getattr(family, name, ()) for name in ("TENSOR_KINDS", "TABLE_KINDS", "SINK_KINDS")
    )
    if kind in of_tables and (placed := [p for p in pattern.params if p.is_placed]):
        return f"the definition has {', '.join(p.name for p in placed)} {why_no_places(placed[0])}"
    spread = ", ".join(p.name for p in pattern.params if p.is_tensor and not p.per_head)
    if spread and kind not in (*of_tensors, *of_tables):
        others = f"; those of {', '.join(of_tensors)} read tensors and tables too" if of_tensors else ""
        only = "read a value for each head only"
        return f"the definition has {spread}, and {target} kernels of the kind {kind} {only}{others}"
    if pattern.has_sink and kind not in of_sinks:
        return f"the definition has a sink, and {target} kernels of the kind {kind} have none"
    return ""
