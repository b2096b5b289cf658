"""The way into a call: by the fast path, over tensors in memory, or as a step of a program that somebody watches."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from tvm_flash.call import eager, fast
from tvm_flash.call.prepare import same_framework
from tvm_flash.call.signature import Options, Signature
from tvm_flash.frameworks import Framework, Traced, framework_of
from tvm_flash.operators import OPERATORS

#: What makes a call a step of a framework's program: modules with a function ``attention``, by the framework's name.
#: Where a framework differentiates as it goes, ``recorded`` does the same for tensors in memory.
_TRACING = {"torch": "tvm_flash.tracing.torch_ops", "jax": "tvm_flash.tracing.jax_ops"}
#: The same where sequences lie one after the other.
_TRACING_RAGGED = {**_TRACING, "torch": "tvm_flash.tracing.torch_ragged"}


def slow(signature: Signature, *arguments: Any) -> Any:
    """What ``signature.call`` gives, without the fast path, and for it if there is one."""
    count = len(signature.tensors)
    named = zip(signature.tensors, arguments[:count], strict=True)  # torch 2.4 compiles no other zip
    tensors = {name: x for name, x in named if x is not None or name in signature.inputs or name in signature.starts}
    options = signature.options(*arguments[count:])
    answer = eager.attention if signature.below else attention
    return answer(options, tensors, (signature, arguments))


fast.install(slow)


@functools.cache
def entrance(signature: Signature) -> Callable[..., Any]:
    """The function that a public one calls: ``attend(tensors …, options …)``.

    The tensors are those of ``signature.tensors``, with None for what isn't given, the options those of
    :meth:`Signature.options`, all by position: passing them on as one tuple costs the least.
    """

    def attend(*arguments: Any) -> Any:
        return signature.call(*arguments)

    def inlined(*arguments: Any) -> Any:
        return slow(signature, *arguments)

    attend._torchdynamo_inline = inlined  # torch.compile can't look into C
    return attend


def attention(options: Options, tensors: dict[str, Any], call: tuple | None = None) -> Any:
    """An operator over tensors in memory, or over what stands for tensors.

    ``tensors`` are those that are given, by name.  ``call`` are a signature and a call's arguments, which the fast path
    shall know from now on.
    """
    framework = framework_of(tensors["q"], "q")
    given = tuple(tensors.values())
    if framework.watched(given):
        same_framework(tensors, watched=True)
        return _tracing(framework, options).attention(options, tensors)
    try:
        if _differentiated(framework, given):
            same_framework(tensors)
            return _tracing(framework, options).recorded(options, tensors, call)
        return eager.attention(options, tensors, call)
    except Traced as e:
        return _tracing(e.framework, options).attention(options, tensors)


def _differentiated(framework: Framework, tensors: tuple[Any, ...]) -> bool:
    try:
        return framework.differentiated(*tensors)
    except AttributeError:  # not tensors of one framework: the checks say so
        return False


def _torch_program(options: Options, tensors: dict[str, Any], call: tuple | None = None) -> Any:
    """What ``torch.compile`` sees in place of :func:`attention`."""
    from tvm_flash.tracing import torch_ops, torch_ragged

    return (torch_ragged if OPERATORS[options.op].starts else torch_ops).program(options, tensors)


attention._torchdynamo_inline = _torch_program


def _tracing(framework: Framework, options: Options) -> Any:
    modules = _TRACING_RAGGED if OPERATORS[options.op].starts else _TRACING
    return importlib.import_module(modules[framework.name])
