"""Sources of CUDA kernels, to be compiled on another machine (:mod:`schedules.builder.assemble`).

A folder for each arch has one ``<symbol>.cu`` a kernel, and ``emission.json`` with what a pack's manifest will say.
Where an arch has the same source as another one of its family (``same_as``), the file is in the other's folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

from schedules.builder.assemble import EMISSION_NAME
from schedules.builder.compile import Refused, entry_of, lower_for_each, versions_for
from schedules.builder.pack import write_atomically
from schedules.builder.plan import BuildRequest, select
from schedules.families import FAMILY
from schedules.families.interface import Rejected, Target


def emit(request: BuildRequest, folder: Path, progress: Callable[[str], None] = lambda _: None) -> list[Refused]:
    """Write the sources of all kernels that a request names; those that were refused, with their reasons.

    Raises
    ------
    ValueError, DefinitionError: the request can't be understood, or names the CPU, whose kernels have no source.
    """
    for target in request.targets:
        if target.arch == "cpu":
            raise ValueError("--emit: is for CUDA archs; CPU kernels are compiled where TVM is")
        select(request, target)
    refused = []
    # Archs of one family together, whose sources are largely the same.
    for _, targets in itertools.groupby(sorted(request.targets, key=_family), key=_family):
        refused += _emit_family(request, tuple(targets), folder, progress)
    return refused


def _family(target: Target) -> str:
    return FAMILY[target.arch]


def _emit_family(
    request: BuildRequest, targets: tuple[Target, ...], folder: Path, progress: Callable[[str], None]
) -> list[Refused]:
    kernels: dict[Target, list[dict]] = {target: [] for target in targets}
    refused = []
    for target in targets:
        (folder / target.arch).mkdir(parents=True, exist_ok=True)
    for spec in select(request, targets[0]):
        written: dict[str, Target] = {}  # texts of this spec, by the arch that has the file
        for one, target, pattern, lowered, origin in lower_for_each(
            spec, targets, request.configs, request.definition, request.tuned
        ):
            if isinstance(lowered, Rejected):
                refused.append(Refused(one.symbol, lowered.reason))
                continue
            owner = written.setdefault(lowered.text, target)
            source = folder / owner.arch / f"{one.symbol}.cu"
            if owner is target:
                source.write_text(lowered.text)
            entry = entry_of(one, target, pattern, lowered, origin, {}, request.tuned(spec, target))
            kernels[target].append(
                {
                    "source": os.path.relpath(source, folder / target.arch),
                    "same_as": owner.arch if owner is not target else "",
                    "group": one.group,
                    "entry": dataclasses.asdict(entry),
                }
            )
            progress(f"{target.arch} {one.symbol}")
    for target in targets:
        emission = {
            "arch": target.arch,
            "versions": versions_for(target),
            "kernels": kernels[target],
        }
        write_atomically(folder / target.arch / EMISSION_NAME, json.dumps(emission, indent=1))
    return refused
