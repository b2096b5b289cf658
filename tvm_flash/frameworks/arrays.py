"""Arithmetic on the arrays of NumPy, PyTorch and JAX: the few functions whose names or ways differ, by framework."""

from __future__ import annotations

import contextlib
from typing import Any

from tvm_flash.errors import ArgumentTypeError
from tvm_flash.frameworks import framework_of


def arrays_of(x: Any, name: str) -> Any:
    """The functions, of the framework of a tensor.

    Raises
    ------
    ArgumentTypeError: it is of another framework.
    """
    framework = framework_of(x, name).name
    if framework not in _FRAMEWORKS:
        raise ArgumentTypeError(f"{name}: is a {framework} tensor, expected one of {', '.join(_FRAMEWORKS)}")
    return _made_once(framework)


class _NumPy:
    def __init__(self, module: Any, gradient_stopped: Any = None):
        self._module, self._gradient_stopped = module, gradient_stopped
        self.clip, self.round, self.where = module.clip, module.round, module.where
        self.exp, self.log, self.maximum = module.exp, module.log, module.maximum

    def check(self, x, name):
        """That a tensor is an array and nothing more."""
        import numpy as np

        if isinstance(x, np.ndarray):
            framework_of(x, name).view(x, name)

    def name_of(self, x):
        return x.dtype.name

    def float32(self, x):
        return x.astype(self._module.float32)

    def largest(self, x, axes):
        return self._module.max(x, axis=axes)

    def quotient(self, x, y):
        with self.quiet():
            return x / y

    def quiet(self):
        """Infinities and NaN have their places, and are no reason for a warning."""
        import numpy as np

        return np.errstate(divide="ignore", invalid="ignore", over="ignore")

    def stopped(self, x):
        """The same as a constant, by which nobody differentiates."""
        return x if self._gradient_stopped is None else self._gradient_stopped(x)

    def device(self, x):
        """Where a tensor is, if the framework leaves the question to its callers."""
        return

    def cast(self, x, dtype):
        from tvm_flash.frameworks.numpy import dtype_of

        return x.astype(dtype_of(dtype))


class _Torch:
    def __init__(self):
        import torch

        self._module = torch
        self.clip, self.round, self.where = torch.clamp, torch.round, torch.where
        self.exp, self.log, self.maximum = torch.exp, torch.log, torch.maximum

    def check(self, x, name):
        from tvm_flash.frameworks.torch import check_dense

        check_dense(x, name)

    def name_of(self, x):
        return str(x.dtype).removeprefix("torch.")

    def float32(self, x):
        return x.float()

    def largest(self, x, axes):
        return x.amax(axes)

    def quotient(self, x, y):
        return x / y

    def quiet(self):
        return contextlib.nullcontext()

    def stopped(self, x):
        return x.detach()

    def device(self, x):
        return x.device

    def cast(self, x, dtype):
        return x.to(getattr(self._module, dtype))


def _numpy() -> _NumPy:
    import numpy

    return _NumPy(numpy)


def _jax() -> _NumPy:
    import jax

    return _NumPy(jax.numpy, jax.lax.stop_gradient)


def torch_arrays() -> _Torch:
    """PyTorch's functions, for whoever has its tensors at hand."""
    return _made_once("torch")


def _made_once(framework: str) -> Any:
    found = _made.get(framework)
    if found is None:
        found = _made[framework] = _FRAMEWORKS[framework]()
    return found


_FRAMEWORKS = {"numpy": _numpy, "torch": _Torch, "jax": _jax}
#: In a dictionary, since torch.compile sees through it and not through a function that remembers.
_made: dict[str, Any] = {}
