"""What the code of a model asks for: transformers' attention interface, or nothing, having attention of its own.

The functions of a model's class are read, as bytecode: the names that they use, and so on with the classes and
functions that these names stand for.  That holds for models of transformers, for code that comes with a checkpoint, and
for subclasses of either.  Modules that a model makes by an ``Auto`` class are models with a configuration of their own,
and looked at when they are made.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

#: Names of what computes attention, in the code of a layer that takes a mask.
_COMPUTES = {"softmax", "scaled_dot_product_attention", "Softmax", "flex_attention"}

#: Packages and modules that are read no further.
_LIBRARIES = ("torch", "transformers.modeling_utils", "transformers.modeling_outputs", "transformers.modeling_flash")
_LIBRARIES += ("transformers.modeling_rope", "transformers.modeling_gguf", "transformers.utils", "transformers.cache_")
_LIBRARIES += ("transformers.masking_utils", "transformers.integrations", "transformers.configuration_", "numpy")
_LIBRARIES += ("transformers.generation", "builtins", "transformers.activations", "transformers.processing_")

#: Where the classes are that make a model of a configuration, whichever it is of.
_AUTO = "transformers.models.auto"

#: Names of the configurations of models that look into their masks.
_READERS: set[str] = set()


@dataclass(frozen=True)
class Findings:
    """Of a model's class: whether its code asks the attention interface, its layers with attention of their own,
    whether its constructor makes other models by an ``Auto`` class, and whether a layer that asks the interface looks
    into its mask, or makes another of it."""

    asks: bool
    own: tuple[str, ...]
    makes: bool
    reads: bool = False


def findings(model: type) -> Findings:
    """What the code of a model's class asks for, and that of all modules that it makes."""
    return _findings(model)


@functools.lru_cache(maxsize=1024)
def _findings(model: type) -> Findings:
    seen: set[Any] = set()
    waiting: list[Any] = [model]
    asks, makes, reads, own = False, False, False, set()
    while waiting:
        thing = waiting.pop()
        if thing in seen:
            continue
        seen.add(thing)
        functions = list(_functions(thing))
        asking = any(isinstance(x, AttentionInterface) for f in functions for x in _used(f))
        asks = asks or asking
        reads = reads or (asking and any(map(_reads_mask, functions)))
        for function in functions:
            used = list(_used(function))
            if thing is model and function.__name__ == "__init__":
                makes = makes or any(map(_is_auto, used))
            waiting += [x for x in used if _is_read(x) and x not in seen]
        if isinstance(thing, type) and thing is not model and _attends(thing):
            own.add(thing.__name__)
    return Findings(asks, tuple(sorted(own)), makes, reads)


@torch.compiler.assume_constant_result
def passes_by(layer: type, name: str) -> bool:
    """Whether an argument of a model (``labels``, say) goes through a layer to its attention, which never asks for it.

    That is known of layers whose file has eager attention as a function, and no other: it neither has a parameter of
    the name, nor looks into what else it is given.
    """
    return _passes_by(layer, name)


@functools.lru_cache(maxsize=1024)
def _passes_by(layer: type, name: str) -> bool:
    home = next((cls.__module__ for cls in layer.__mro__ if "forward" in vars(cls)), "")
    eager = getattr(sys.modules.get(home), "eager_attention_forward", None)
    if not isinstance(eager, types.FunctionType) or not eager.__code__.co_flags & inspect.CO_VARKEYWORDS:
        return False
    code = eager.__code__
    named = code.co_argcount + code.co_kwonlyargcount
    others = code.co_varnames[named + bool(code.co_flags & inspect.CO_VARARGS)]
    looked_into = any(
        others in (x.argval if isinstance(x.argval, tuple) else (x.argval,)) for x in dis.get_instructions(code)
    )
    return name not in code.co_varnames[:named] and not looked_into


def note_reader(kind: str) -> None:
    """From now on, models with configurations of this name get masks that they can look into, traced or not."""
    _READERS.add(kind)


def reads_masks(config: Any) -> bool:
    return type(config).__name__ in _READERS


def _is_auto(x: Any) -> bool:
    return isinstance(x, type) and x.__module__.startswith(_AUTO) and x.__name__.startswith("AutoModel")


def _is_read(x: Any) -> bool:
    unread = (*_LIBRARIES, _AUTO)
    if isinstance(x, type):
        return issubclass(x, torch.nn.Module) and not x.__module__.startswith(unread)
    return isinstance(x, types.FunctionType) and not (x.__module__ or "").startswith(unread)


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    """A function, or the methods of a class and of its bases."""
    if isinstance(thing, types.FunctionType):
        yield thing
        return
    for cls in thing.__mro__:
        if cls.__module__.startswith(_LIBRARIES) or cls is object:
            continue
        for x in vars(cls).values():
            x = getattr(x, "__func__", x)
            x = getattr(x, "fget", x) if isinstance(x, property) else x
            while isinstance(x, types.FunctionType):
                yield x
                x = getattr(x, "__wrapped__", None)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, types.CodeType):
            yield from _codes(x)


def _used(function: types.FunctionType) -> Iterator[Any]:
    """What the global names, the enclosing functions' variables and the defaults of a function stand for."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    found += list((function.__kwdefaults__ or {}).values()) + list(function.__defaults__ or ())
    for x in found:
        yield from _members(x)


def _members(x: Any) -> Iterable[Any]:
    if isinstance(x, dict) and not isinstance(x, AttentionInterface):
        return x.values()
    if isinstance(x, (list, tuple)):
        return x
    return (x,)


def _attends(layer: type) -> bool:
    """Whether a layer takes a mask and computes attention with it, without asking the interface."""
    functions = list(_functions(layer))
    parameters = {name for f in functions for name in _parameters(f)}
    if not any("mask" in name for name in parameters):
        return False
    helpers = [x for f in functions for x in _used(f) if isinstance(x, types.FunctionType) and _is_read(x)]
    if any(isinstance(x, AttentionInterface) for f in (*functions, *helpers) for x in _used(f)):
        return False
    names = {name for f in (*functions, *helpers) for code in _codes(f.__code__) for name in code.co_names}
    return bool(names & _COMPUTES)


def _reads_mask(function: types.FunctionType) -> bool:
    """Whether a function asks a mask that it is given for an attribute: its shape, its dtype, or a method of it."""
    masks = {name for name in _parameters(function) if "mask" in name}
    before = None
    for x in dis.get_instructions(function.__code__):
        if x.opname in ("LOAD_ATTR", "LOAD_METHOD") and before in masks:
            return True
        if "LOAD_FAST" in x.opname:
            before = x.argval[-1] if isinstance(x.argval, tuple) else x.argval
        elif x.opname != "CACHE":
            before = None
    return False


def _parameters(function: types.FunctionType) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
