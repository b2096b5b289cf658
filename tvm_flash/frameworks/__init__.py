"""Tensors in and out: one small class for each framework, none of which is imported before its tensors arrive."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from tvm_flash.errors import ArgumentTypeError
from tvm_flash.frameworks.base import Framework, TensorView, Traced, contiguous_strides

__all__ = ["Framework", "TensorView", "Traced", "contiguous_strides", "dtype_name", "framework_of"]

_BY_TYPE: dict[type, Framework] = {}


def dtype_name(dtype: Any, expected: Collection[str]) -> str:
    """Name of the argument ``dtype``, a string, or an object or class of torch, NumPy or JAX.

    Raises
    ------
    ArgumentTypeError: it is none of the ``expected`` names.
    """
    name = (getattr(dtype, "__name__", None) or str(dtype)).removeprefix("torch.")
    if name not in expected:
        raise ArgumentTypeError(f"dtype: is {dtype!r}, expected one of {', '.join(map(repr, expected))}")
    return name


def framework_of(tensor: Any, name: str) -> Framework:
    """The framework that a tensor belongs to.

    Raises
    ------
    ArgumentTypeError: ``tensor`` (the argument ``name``) isn't one.
    """
    cls = type(tensor)
    framework = _BY_TYPE.get(cls)
    if framework is None:
        framework = _find(tensor, name)
        _BY_TYPE[cls] = framework  # types live as long as their modules, so that this stays small
    return framework


def _find(tensor: Any, name: str) -> Framework:
    loaded = sys.modules
    if (torch := loaded.get("torch")) and (
        isinstance(tensor, torch.Tensor) or hasattr(type(tensor), "__torch_function__")  # as torch.fx.Proxy
    ):
        from tvm_flash.frameworks.torch import TORCH, TRACED_TORCH, stands_for_others

        return TRACED_TORCH if stands_for_others(type(tensor)) else TORCH
    if (numpy := loaded.get("numpy")) and isinstance(tensor, numpy.ndarray):
        from tvm_flash.frameworks.numpy import NUMPY

        return NUMPY
    if (cupy := loaded.get("cupy")) and isinstance(tensor, cupy.ndarray):
        from tvm_flash.frameworks.cupy import CUPY

        return CUPY
    if (jax := loaded.get("jax")) and isinstance(tensor, jax.Array):
        from tvm_flash.frameworks.jax import JAX

        return JAX
    if hasattr(tensor, "__dlpack__"):
        from tvm_flash.frameworks.dlpack import DLPACK

        return DLPACK
    raise ArgumentTypeError(
        f"{name}: is a {type(tensor).__module__}.{type(tensor).__qualname__}, expected a tensor of torch, numpy, cupy "
        f"or jax, or an object with __dlpack__; make one with torch.as_tensor(...) or numpy.asarray(...)"
    )
