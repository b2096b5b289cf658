"""What a call in a PyTorch program is told before it becomes an operator: what a call that nobody watches is told.

Whatever is still a symbol then (a size of a program with dynamic shapes, a number that a program takes) is left to the
kernel's own checks when the program runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from tvm_flash.call import checks, memory
from tvm_flash.call.prepare import request_of
from tvm_flash.call.signature import Options
from tvm_flash.call.suspicion import warn_of_layout
from tvm_flash.errors import ArgumentTypeError, NotSupportedError
from tvm_flash.frameworks import TensorView, contiguous_strides
from tvm_flash.frameworks.torch import CAN_ASK_SYMBOLS, Torch, check_dense, is_functorch_wrapped, is_wrapper, name_of
from tvm_flash.operators import OPERATORS
from tvm_flash.packs.manifest import PAGED

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool, torch.fx.Proxy)


def check_options(options: Options) -> Options:
    """The options as the operators take them.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError: one of them is wrong.
    """
    window = options.window_size
    if not any(isinstance(x, _SYMBOLS) for x in (window if isinstance(window, (tuple, list)) else ())):
        window = checks.check_window(window)
    scale = options.softmax_scale
    return Options(
        layout=options.layout,
        variant=checks.check_variant(options.variant),
        flag=checks.check_flag(OPERATORS[options.op].flag, options.flag),
        softmax_scale=scale if scale is None or isinstance(scale, _SYMBOLS) else checks.check_scale(scale, 0),
        causal=checks.check_flag("causal", options.causal),
        window_size=window,
        softcap=options.softcap if isinstance(options.softcap, _SYMBOLS) else checks.check_softcap(options.softcap),
        definition=options.definition,
        params=tuple(
            (name, x if isinstance(x, _SYMBOLS) else checks.check_real(name, x)) for name, x in options.params
        ),
        accept=options.accept,
        layout_known=options.layout_known,
        op=options.op,
        gradients=options.gradients,
        longest=options.longest,
        head_dim_v=options.head_dim_v,
        split_length=options.split_length,
    )


def check_kinds(tensors: dict[str, Any]) -> None:
    """That each of the tensors (by name) is of a kind that the operators know, and where q is.

    Raises
    ------
    ArgumentTypeError, NotSupportedError
    """
    q = tensors["q"]
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor):
            check_dense(x, name)
            if x.is_quantized or x.is_complex():
                raise ArgumentTypeError(
                    f"{name}: has dtype {x.dtype}, expected float32, float16 or bfloat16; convert it"
                )
            if x.device.type not in ("cpu", "cuda", "meta"):
                raise NotSupportedError(
                    f"{name}: is on {x.device}, expected a tensor on the CPU or a CUDA device; move it"
                )
        elif not hasattr(type(x), "__torch_function__"):
            raise ArgumentTypeError(
                f"{name}: is a {type(x).__qualname__}, but q is a tensor of torch; use torch.as_tensor({name})"
            )
        if name not in ("k", "v") and isinstance(x, torch.Tensor) and isinstance(q, torch.Tensor):  # not torch.fx's
            check_place(name, x, q)


def check_place(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """That a tensor is where q is: shapes are all that comes of a call with one that has no memory.

    Raises
    ------
    ArgumentTypeError
    """
    if x.device != q.device:
        raise ArgumentTypeError(f"{name}: is on {x.device}, expected {q.device}, where q is; move it")


def check_call(options: Options, tensors: dict[str, Any]) -> None:
    """All that a plain call checks, but whether there is a kernel, and its warning; where every size is known.

    Raises
    ------
    TvmFlashError: see :mod:`tvm_flash.errors`.
    """
    if not all(isinstance(x, torch.Tensor) and is_known(x) for x in tensors.values()):
        return
    if OPERATORS[options.op].form != PAGED:
        _check_same(*(tensors[name] for name in ("q", "k", "v")))
    request = request_of(options, _ABSTRACT, tensors)
    if not tensors["q"].is_meta:
        options.accept(request.device)
    if request.suspicion is not None:
        warn_of_layout(request.suspicion, options.layout)
    given = [name for name in request.outputs if name in tensors]
    if given and not any(map(is_wrapper, tensors.values())):
        footprints = {name: memory.footprint(view) for name, view in request.given.items()}
        memory.check_overlap(given, footprints, {name: x.data_ptr() for name, x in tensors.items()})


def warn_in_program(options: Options, q: torch.Tensor, k: torch.Tensor) -> None:
    """The warning of a plain call, once, while ``torch.compile`` or ``torch.export`` makes a program; a size that may
    vary is no reason for it."""
    if not CAN_ASK_SYMBOLS or options.layout_known or q.ndim != 4 or k.ndim != 4:
        return
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    heads, seq = (1, 2) if options.layout == "bhsd" else (2, 1)
    if (
        statically_known_true(q.shape[heads] > q.shape[seq])
        and statically_known_true(q.shape[seq] > 1)
        and statically_known_true(k.shape[heads] > k.shape[seq])
        and statically_known_true(q.stride(1) >= q.stride(2))
    ):
        _warn_while_compiling(checks.suspicion_text(options.layout), options.layout)


def _warn_while_compiling(text: str, layout: str) -> None:
    warn_of_layout(text, layout)


# What torch.compiler.assume_constant_result sets, which would import torch._dynamo: 1.3 s.
_warn_while_compiling._dynamo_marked_constant = True


def check_shapes(layout: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> None:
    """Devices, dtypes and ranks of the inputs, and, where all sizes are known, what must fit together.

    ``others`` are what else an operator was given, of which tensors must be where q is.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError, LayoutError
    """
    _check_same(q, k, v)
    check_places(q, *others)
    shapes = [tuple(x.shape) for x in (q, k, v)]
    dtype = name_of(q.dtype)
    views = [TensorView(s, contiguous_strides(s), dtype, "cpu", 0, pointer=0) for s in shapes]
    if all(map(is_known, (q, k, v))):
        checks.check_tensors(layout, *views)
    else:
        checks.check_kinds(layout, *views)


def check_places(q: torch.Tensor, *others: Any) -> None:
    """:func:`check_place` of all tensors that an operator was given, which have no names there."""
    for x in pytree.tree_leaves(others):
        if isinstance(x, torch.Tensor):
            check_place("a tensor", x, q)


def _check_same(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, but q is on {q.device}; move one to the other's device")
        if x.dtype != q.dtype:
            found, wanted = name_of(x.dtype), name_of(q.dtype)
            raise ArgumentTypeError(f"{name}: has dtype {found}, but q has {wanted}; convert one to the other's")


def is_known(x: torch.Tensor) -> bool:
    return not any(isinstance(n, _SYMBOLS) for n in x.shape)


class _Abstract(Torch):
    """Tensors that are known by shape, strides and dtype.  Of gradients the operators say what there is to say."""

    def view(self, tensor, name):
        shape = tuple(tensor.shape)
        # What is mapped over any dimension, or stands negated in memory, is copied before a kernel reads it.
        copied = is_functorch_wrapped(tensor) or tensor.is_neg()
        strides = contiguous_strides(shape) if copied else tensor.stride()
        kind = "cpu" if tensor.is_meta else tensor.device.type
        return TensorView(shape, strides, name_of(tensor.dtype), kind, tensor.device.index or 0, pointer=0)


_ABSTRACT = _Abstract()
