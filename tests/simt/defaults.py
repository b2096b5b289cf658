"""A kernel as it ships, in its default configuration, run on the processor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from schedules.builder.compile import Lowered, entry_of, lower, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.definition.pattern import Pattern
from schedules.families import maker_of
from schedules.families.interface import Target
from tests.simt.simulate import Simulated, with_places
from tvm_flash.packs.manifest import KernelEntry


@dataclass(frozen=True)
class DefaultKernel:
    """The kernel of a spec: its pattern, its source, and what runs that."""

    spec: KernelSpec
    target: Target
    pattern: Pattern
    lowered: Lowered
    simulated: Simulated

    @property
    def program(self):
        """Launches, workspaces and numbers."""
        return self.lowered.program

    @property
    def functions(self) -> tuple:
        """Those of the launches, in order."""
        return tuple(self.simulated.launch(launch.symbol) for launch in self.program.launches)

    @cached_property
    def entry(self) -> KernelEntry:
        """What a manifest would say of it."""
        return entry_of(self.spec, self.target, self.pattern, self.lowered, "default", {})


def default_kernel(
    spec: KernelSpec, arch: str, folder: Path, pattern: Pattern | None = None, configs=None, places: str = "", **changes
) -> DefaultKernel:
    """Lower a spec and compile it in ``folder``; ``pattern`` is that of a definition that has no name, ``configs`` what
    gives the configurations in place of the default's, ``places`` which calls are numbered (``with_places``),
    ``changes`` are fields that are others."""
    target = Target(arch)
    pattern = pattern or pattern_of(spec, target)
    configs = configs or maker_of(target, spec.kind).default_configs
    config = configs(spec.template, pattern, target)[0]
    config = replace(config, **changes)
    lowered = lower(spec, pattern, target, config)
    text = with_places(lowered.text, places)[0] if places else lowered.text
    return DefaultKernel(spec, target, pattern, lowered, Simulated(lowered.program, text, folder))
