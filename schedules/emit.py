"""Sources of CUDA kernels, to be compiled on another machine (:mod:`schedules.assemble`).

A folder for each arch has one ``<symbol>.cu`` a kernel, and ``emission.json`` with what a pack's manifest will say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from schedules.assemble import EMISSION_NAME
from schedules.compile import Refused, configs_of, entry_of, lower, pattern_of, versions_for
from schedules.families import family_of
from schedules.pack import write_atomically
from schedules.plan import Request, select
from schedules.template import Rejected, Target


def emit(request: Request, folder: Path, progress: Callable[[str], None] = lambda _: None) -> list[Refused]:
    """Write the sources of all kernels that a request names; those that were refused, with their reasons.

    Raises
    ------
    ValueError, DefinitionError: the request can't be understood, or names the CPU, whose kernels have no source.
    """
    for target in request.targets:
        if target.arch == "cpu":
            raise ValueError("--emit: is for CUDA archs; CPU kernels are compiled where TVM is")
        select(request, target)
    return [refused for target in request.targets for refused in _emit_arch(request, target, folder, progress)]


def _emit_arch(request: Request, target: Target, folder: Path, progress: Callable[[str], None]) -> list[Refused]:
    out = folder / target.arch
    out.mkdir(parents=True, exist_ok=True)
    kernels, refused = [], []
    for spec in select(request, target):
        pattern = pattern_of(spec, target, request.definition)
        for bucket, (config, config_source) in configs_of(spec, pattern, target, request.configs).items():
            one = spec.with_bucket(bucket)
            lowered = lower(one, pattern, target, config)
            if isinstance(lowered, Rejected):
                refused.append(Refused(one.symbol, lowered.reason))
                continue
            source = out / f"{one.symbol}.cu"
            source.write_text(lowered.text)
            entry = entry_of(one, target, pattern, lowered, config_source, {})
            kernels.append({"source": source.name, "group": one.group, "entry": dataclasses.asdict(entry)})
            progress(one.symbol)
    emission = {
        "arch": target.arch,
        "versions": versions_for(target),
        "spills_allowed": getattr(family_of(target), "SPILLS_ALLOWED", False),
        "kernels": kernels,
    }
    write_atomically(out / EMISSION_NAME, json.dumps(emission, indent=1))
    return refused
