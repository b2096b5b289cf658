"""The way into a call: by the fast path, over tensors in memory, or as a step of a program that somebody watches."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from tvm_flash.call import eager, fast
from tvm_flash.call.prepare import named, same_framework
from tvm_flash.call.signature import Options, Signature
from tvm_flash.frameworks import Framework, Traced, framework_of

#: What makes a call a step of a framework's program: modules with a function ``attention``, by the framework's name.
_TRACING = {"torch": "tvm_flash.tracing.torch_ops", "jax": "tvm_flash.tracing.jax_ops"}


def slow(signature: Signature, *arguments: Any) -> Any:
    """What ``signature.call`` gives, without the fast path, and for it if there is one."""
    given = dict(zip(signature.tensors, arguments[: len(signature.tensors)], strict=True))  # alike long: torch 2.4
    q, k, v, out = (given[name] for name in ("q", "k", "v", "out"))
    parameters = {name: given[name] for name in signature.parameters if given[name] is not None}
    options = signature.options(*arguments[len(signature.tensors) :])
    answer = eager.attention if signature.below else attention
    return answer(options, q, k, v, parameters, out, (signature, arguments))


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


def attention(
    options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any, call: tuple | None = None
) -> Any:
    """Attention over tensors in memory, or over what stands for tensors.

    ``per_head`` are the parameters that are tensors, by name.  ``call`` are a signature and a call's arguments, which
    the fast path shall know from now on.
    """
    framework = framework_of(q, "q")
    if framework.watched((q, k, v, *per_head.values(), out)):
        same_framework(named(q, k, v, per_head, out), watched=True)
        return _tracing(framework).attention(options, q, k, v, per_head, out)
    try:
        return eager.attention(options, q, k, v, per_head, out, call)
    except Traced as e:
        return _tracing(e.framework).attention(options, q, k, v, per_head, out)


def _torch_program(
    options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any, call: tuple | None = None
) -> Any:
    """What ``torch.compile`` sees in place of :func:`attention`."""
    from tvm_flash.tracing import torch_ops

    return torch_ops.program(options, q, k, v, per_head, out)


attention._torchdynamo_inline = _torch_program


def _tracing(framework: Framework) -> Any:
    return importlib.import_module(_TRACING[framework.name])
