"""The tensors that a function of FlexAttention holds on to, and what they are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any


def identity(tensor) -> tuple:
    """What two names of one tensor have in common."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def held_by(function: Callable) -> dict[tuple, str]:
    """Names of the tensors that a function and those that it calls hold on to, by their identity.

    They are called as the variable is, the attribute of the function's object, or the argument that has a default; of
    a list or a dictionary as the variable and the place: ``tables_0``.
    """
    import torch

    names: dict[tuple, str] = {}
    seen, todo = set(), [function]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for name, value in _variables(current):
            for own, x in _elements(name, value):
                if isinstance(x, torch.Tensor):
                    names.setdefault(identity(x), own)
                elif inspect.isroutine(x) or isinstance(x, functools.partial):
                    todo.append(x)
    return names


def _variables(function: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of what a function can reach but for its arguments."""
    if isinstance(function, functools.partial):
        yield "function", function.func
        yield from function.keywords.items()
        yield from zip(_arguments(function.func), function.args, strict=False)
    elif inspect.ismethod(function):
        yield "function", function.__func__
        yield from getattr(function.__self__, "__dict__", {}).items()
    elif inspect.isfunction(function):
        found = inspect.getclosurevars(function)
        yield from {**found.globals, **found.nonlocals}.items()
        yield from {n: p.default for n, p in inspect.signature(function).parameters.items()}.items()
    elif not inspect.isroutine(function) and callable(function):
        yield "function", function.__call__


def _arguments(function: Callable) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some of those that aren't written in Python
        return []


def _elements(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{name}_{key}", x) for key, x in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}_{i}", x) for i, x in enumerate(value))
    else:
        yield name, value
