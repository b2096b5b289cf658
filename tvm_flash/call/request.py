"""A call after its checks, before a kernel is chosen for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from tvm_flash.call import memory
from tvm_flash.call.checks import Sizes
from tvm_flash.call.problem import Problem
from tvm_flash.frameworks import Framework, TensorView
from tvm_flash.machine.device import Device
from tvm_flash.operators import OPERATORS, Operator, gradient_of, tensor
from tvm_flash.packs.manifest import Param


@dataclass(frozen=True)
class Request:
    """A call after all checks that don't need pointers.

    ``given`` are its tensors by name, in the order of the call; ``parameters`` and ``outputs`` name those that are
    parameters of mask and score, and the outputs, given or not.  ``results`` names what the call returns, in order.
    ``scalars`` are the run-time parameters that are numbers, by name, and ``declared`` says what is known of each one.
    ``suspicion`` is the text of a warning that heads and sequence may be swapped.
    """

    framework: Framework
    layout: str
    sizes: Sizes
    problem: Problem
    device: Device
    variant: str
    softmax_scale: float
    scalars: Mapping[str, float | int]
    declared: Mapping[str, Param]
    given: Mapping[str, TensorView]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    results: tuple[str, ...]
    suspicion: str | None

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.problem.op]

    @property
    def q(self) -> TensorView:
        """The queries, which say on which device and in which dtype everything is."""
        return self.given["q"]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        keys = self.given[self.operator.inputs[1 + self.operator.differentiates]]
        return 0 in (*self.q.shape, *keys.shape, self.sizes.batch, self.sizes.seqlen_kv)

    @functools.cached_property
    def footprints(self) -> dict[str, memory.Footprint]:
        """What bytes the given tensors touch, by name, in the order of the call."""
        return {name: memory.footprint(x) for name, x in self.given.items()}

    @functools.cached_property
    def given_outputs(self) -> tuple[str, ...]:
        """The outputs that the caller brought memory for."""
        return tuple(name for name in self.outputs if name in self.given)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the operator, in the layout of the call."""
        param = self.declared.get(name.removeprefix("d_"))
        if param is not None and name == gradient_of(param.name):
            if param.rank:
                return self.given[param.name].shape
            return self.sizes.of_axes(param.of_gradient) if param.axes else (1,)
        return self.sizes.shape_of(name, self.layout)

    def dtype_of(self, name: str) -> str:
        """The dtype of a tensor of the operator."""
        if name in self.operator.float32 or (self.problem.accumulate and name in self.outputs):
            return "float32"
        if name in ("k_cache", "v_cache"):
            return self.problem.cache_dtype or self.problem.dtype
        return tensor(name).dtype or self.problem.dtype
