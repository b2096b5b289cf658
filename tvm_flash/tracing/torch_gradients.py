"""Gradients of the operators of PyTorch: an autograd function for each, in programs, under ``torch.func`` and without.

Between the passes q, k, v, the parameters that are tensors, the result and its log-sum-exp are kept, and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.utils import _pytree as pytree

from tvm_flash.errors import NotSupportedError
from tvm_flash.frameworks.torch_watch import has_tangent
from tvm_flash.packs.manifest import Param


class _Function(torch.autograd.function._SingleLevelFunction):
    """Where an operator is answered, a transform of torch.func has chosen its level: a function of this kind adds none.

    ``torch._dynamo.config.compiled_autograd`` asks a function for its key, which torch gives to its own kind alone.
    """

    _compiled_autograd_key = getattr(torch.autograd.Function, "_compiled_autograd_key", None)


NO_TANGENTS = (
    "q, k, v: a tangent (forward-mode derivative, torch.func.jvp) is asked for, and gradients are there in reverse "
    "mode only; use torch.func.grad or vjp"
)
NO_SECOND_GRADIENT = (
    "dout, q, k, v: a gradient of the gradients of attention is asked for, and there is none; leave out "
    "create_graph=True, or use torch's attention with torch.nn.attention.SDPBackend.MATH"
)


@dataclass(frozen=True)
class Pair:
    """A forward and its backward.

    Attributes
    ----------
    forward: ``(q, k, v, *parameters) -> (out, lse)``.
    backward: ``(dout, q, k, v, out, lse, dlse, *parameters, gradients) -> [dq, dk, dv, …]``, those of the parameters
        that are named in ``gradients`` last, with the axes of :attr:`Param.of_gradient`.
    parameters: names of the parameters, of which any may be None in a call.
    declared: what is known of the parameters, by name.
    asked: whether the caller wants the log-sum-exp too.
    check: raises for a call whose gradients nothing computes, given q, k, v, the parameters that are there by name, and
        the names of those whose gradients are wanted.
    """

    forward: Callable[..., Sequence[torch.Tensor]]
    backward: Callable[..., Sequence[torch.Tensor]]
    parameters: tuple[str, ...]
    declared: Mapping[str, Param]
    asked: bool
    check: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor], tuple[str, ...]], None]


def is_recorded(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether a gradient by one of the tensors is asked for.

    Raises
    ------
    NotSupportedError: a forward-mode derivative is.
    """
    given = [x for x in tensors if x is not None]
    if any(map(has_tangent, given)):
        raise NotSupportedError(NO_TANGENTS)
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def record(pair: Pair, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *parameters: torch.Tensor | None) -> Any:
    """``(out, lse)``, the latter empty if nobody asked for it, from which gradients flow back."""
    return _apply(_Attention, pair, q, k, v, *parameters)


def record_once(operator: Callable[..., Any], *arguments: Any, **options: Any) -> list[torch.Tensor]:
    """The results of an operator that gives gradients, and has none itself."""
    leaves, spec = pytree.tree_flatten((arguments, options))
    return list(_apply(_Once, operator, spec, *leaves))


def below(operator: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """An operator without autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments, **options)


@contextlib.contextmanager
def _recording_below() -> Iterator[None]:
    """Have the levels of ``torch.func`` below differentiate too: an autograd function's forward turns that off."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield


def _apply(function: type, *arguments: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return function.apply(*arguments)
    return function.apply(*arguments)


class _Attention(_Function):
    @staticmethod
    def forward(ctx, pair, q, k, v, *parameters):
        given = {name: x for name, x in zip(pair.parameters, parameters, strict=True) if x is not None}
        pair.check(q, k, v, given, tuple(name for name, x in given.items() if x.requires_grad))
        with _recording_below():
            out, lse = pair.forward(q, k, v, *parameters)
        ctx.pair = pair
        ctx.save_for_backward(q, k, v, out, lse, *parameters)
        ctx.set_materialize_grads(False)
        if pair.asked:
            return out, lse
        nothing = lse.new_empty(0)
        ctx.mark_non_differentiable(nothing)
        return out, nothing

    @staticmethod
    def backward(ctx, dout, dlse):
        pair = ctx.pair
        q, k, v, out, lse, *parameters = ctx.saved_tensors
        needed = [name for name, need in zip(pair.parameters, ctx.needs_input_grad[4:], strict=True) if need]
        if dout is None and dlse is None:
            return (None,) * (4 + len(parameters))
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, *others = pair.backward(dout, q, k, v, out, lse, dlse, *parameters, gradients=needed)
        found = dict(zip(needed, others, strict=True))
        of_parameters = (
            _of_parameter(found[name], pair.declared[name], x) if name in found else None
            for name, x in zip(pair.parameters, parameters, strict=True)
        )
        of_inputs = (x if need else None for x, need in zip((dq, dk, dv), ctx.needs_input_grad[1:4], strict=True))
        return None, *of_inputs, *of_parameters


def _of_parameter(gradient, param, x):
    """The gradient of a parameter in its shape, in which one value may stand for all of an axis, and in its dtype."""
    return gradient.sum_to_size(param.aligned(tuple(x.shape))).reshape(x.shape).to(x.dtype)


class _Once(_Function):
    @staticmethod
    def forward(ctx, operator, spec, *leaves):
        arguments, options = pytree.tree_unflatten(list(leaves), spec)
        with _recording_below():
            return tuple(below(operator, *arguments, **options))

    @staticmethod
    def backward(ctx, *gradients):
        raise NotSupportedError(NO_SECOND_GRADIENT)
