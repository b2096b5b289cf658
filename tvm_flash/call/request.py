"""A call after its checks, before a kernel is chosen for it."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_flash.call.checks import Sizes
from tvm_flash.call.problem import Problem
from tvm_flash.frameworks import Framework, TensorView
from tvm_flash.machine.device import Device


@dataclass(frozen=True)
class Request:
    """A call after all checks that don't need pointers.

    ``scalars`` are the run-time parameters that are numbers, by name; ``per_head`` those that are tensors, in the order
    in which the call gives them.  ``out`` is None if the result is to be allocated.
    ``suspicion`` is the text of a warning that heads and sequence may be swapped.
    """

    framework: Framework
    layout: str
    sizes: Sizes
    problem: Problem
    device: Device
    variant: str
    softmax_scale: float
    scalars: dict[str, float | int]
    q: TensorView
    k: TensorView
    v: TensorView
    per_head: dict[str, TensorView]
    out: TensorView | None
    return_lse: bool
    suspicion: str | None

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.sizes.out_shape(self.layout)
