"""A kernel's launches called with arguments by role, on tensors that its functions take as they are (DLPack's).

For whoever calls kernels as such: the tuner, programs of JAX, tests.  Calls of users go by :mod:`tvm_flash.call`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import KernelEntry


def bind(
    entry: KernelEntry,
    functions: Sequence[Callable[..., Any]],
    values: Mapping[str, Any],
    problem: Mapping[str, int],
    make: Callable[[tuple[int, ...], str, bool], Any],
) -> Callable[[], None]:
    """What runs the launches in order.

    Parameters
    ----------
    entry, functions: a kernel and the functions of its launches.
    values: tensors and numbers by role; more than the kernel takes may be there.
    problem: the sizes that :func:`tvm_flash.packs.sizes.of` gives.
    make: ``make(shape, dtype, zeroed)`` makes the tensor of a workspace.  Zeroed ones are made anew for every run.
    """
    extents = entry.extents(problem, lambda role: values[role].shape)
    shapes = {w.name: tuple(sizes.evaluate(n, extents) for n in w.shape) for w in entry.workspaces}
    values = {**values, **{x.name: extents[x.name] for x in entry.scalars}}
    values |= {w.name: make(shapes[w.name], w.dtype, False) for w in entry.workspaces if not w.zeroed}
    zeroed = [w for w in entry.workspaces if w.zeroed]
    if len(functions) == 1 and not zeroed:
        return functools.partial(functions[0], *(values[x.role] for x in entry.launches[0].arguments))

    def run() -> None:
        own = {**values, **{w.name: make(shapes[w.name], w.dtype, True) for w in zeroed}}
        for function, launch in zip(functions, entry.launches, strict=True):
            if launch.is_needed(own):
                function(*(own[x.role] for x in launch.arguments))

    return run
