"""From a caller's arguments to a plan: the slow path, taken once for each combination of shapes, dtypes and options."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from tvm_flash.call import checks, memory
from tvm_flash.call.plan import EmptyPlan, Plan
from tvm_flash.call.problem import (
    INT32_MAX,
    MAX_POSITIONED,
    UNBOUNDED,
    Problem,
    normalise_mask,
)
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Options
from tvm_flash.catalogue import OPTIONAL, PER_HEAD, score_of
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.frameworks import Framework, TensorView, Traced, contiguous_strides, framework_of
from tvm_flash.machine.device import Device
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, KernelEntry, Param
from tvm_flash.packs.registry import build_command, registry

NO_BACKWARD = (
    "q, k, v: a gradient is required of them, and there is no backward pass yet; call under torch.no_grad() or "
    "torch.inference_mode(), or pass q.detach() and so on"
)


def no_backward_of(name: str) -> str:
    """The same for a tensor other than q, k and v."""
    return f"{name}: a gradient is required of it, and there is no backward pass yet; pass {name}.detach()"


def prepare(
    options: Options, framework: Framework, tensors: Mapping[str, Any], per_head: Mapping[str, Any], out: Any
) -> Plan | EmptyPlan:
    """Check everything but pointers, choose a kernel and lay out its arguments.

    Arguments and errors are those of :func:`request_of`, and what ``options.accept`` raises.
    """
    request = request_of(options, framework, tensors, per_head, out)
    options.accept(request.device)
    if 0 in (*request.q.shape, *request.k.shape):
        return EmptyPlan(request)
    return Plan(request)


def request_of(
    options: Options, framework: Framework, tensors: Mapping[str, Any], per_head: Mapping[str, Any], out: Any
) -> Request:
    """A call after all checks that don't need pointers.

    ``tensors`` are q, k and v; they, ``per_head`` and ``out`` are of ``framework`` and adopted by it.

    Raises
    ------
    TvmFlashError: see :mod:`tvm_flash.errors`.
    """
    _check_gradients(framework, named(**tensors, per_head=per_head, out=out))
    q, k, v = (framework.view(x, name) for name, x in tensors.items())
    sizes = checks.check_tensors(options.layout, q, k, v)
    per_head_views = {name: framework.view(x, name) for name, x in per_head.items()}
    what, scalars, declared = _computation(options, sizes, per_head_views)
    for name, x in per_head_views.items():
        checks.check_per_head(name, x, declared[name].dtype, sizes, q)
    out_view = _check_out(framework, out, options.layout, sizes, q)
    return Request(
        framework=framework,
        layout=options.layout,
        sizes=sizes,
        problem=Problem(
            **vars(sizes),
            **what,
            dtype=q.dtype,
            layout=options.layout,
            workspaces=framework.allocates(q.device_kind),
            index_bits=_index_bits(sizes, (q, k, v, out_view), options.layout),
        ),
        device=Device(q.device_kind, q.device_index),
        variant=checks.check_variant(options.variant),
        softmax_scale=checks.check_scale(options.softmax_scale, sizes.head_dim),
        scalars=scalars,
        q=q,
        k=k,
        v=v,
        per_head=per_head_views,
        out=out_view,
        return_lse=checks.check_flag("return_lse", options.return_lse),
        suspicion=None if options.layout_known else checks.layout_suspicion(options.layout, sizes, q),
    )


def named(q: Any, k: Any, v: Any, per_head: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """The tensors of a call by name, without ``out`` if it isn't given."""
    return {"q": q, "k": k, "v": v, **per_head, **({} if out is None else {"out": out})}


def same_framework(tensors: Mapping[str, Any], watched: bool = False) -> Framework:
    """The framework of all the tensors; in a program that is ``watched`` some may have no memory.

    Raises
    ------
    ArgumentTypeError: one of them is no tensor, or of another framework than ``q``.
    """
    framework = framework_of(tensors["q"], "q")
    for name, x in tensors.items():
        other = framework_of(x, name)
        if watched and other.name == framework.name:
            continue
        if other.traces and isinstance(other, type(framework)):
            raise Traced(other, f"{name}: is a {type(x).__qualname__} without memory of its own")
        if other is not framework:
            raise ArgumentTypeError(
                f"{name}: is a {other.name} tensor, but q is one of {framework.name}; convert one to the other's"
            )
    return framework


def _check_gradients(framework: Framework, tensors: Mapping[str, Any]) -> None:
    for name, x in tensors.items():
        if framework.differentiated(x):
            raise NotSupportedError(NO_BACKWARD if name in ("q", "k", "v") else no_backward_of(name))


def _computation(
    options: Options, sizes: checks.Sizes, per_head: Mapping[str, TensorView]
) -> tuple[dict[str, Any], dict[str, float | int], dict[str, Param]]:
    """What is computed: fields of the problem, the scalar parameters, and the declarations of the per-head ones."""
    if options.definition != BUILTIN_DEFINITION:
        params = params_of(options.definition)
        scalars = {name: _scalar(params[name], x) for name, x in options.params}
        return {"definition": options.definition, "mask": "", "score": ""}, scalars, params
    causal = checks.check_flag("causal", options.causal)
    window = checks.check_window(options.window_size)
    mask = normalise_mask(causal, window, sizes.seqlen_q, sizes.seqlen_kv)
    left, right = (min(x, INT32_MAX) for x in mask.widths(sizes.seqlen_q, sizes.seqlen_kv))
    kind = "padded" if "kv_end" in per_head else mask.kind
    if "query_start" in per_head:  # queries may stand anywhere, so that no bound is known to cut nothing off
        kind = "positioned"
        if sizes.seqlen_q + sizes.seqlen_kv > MAX_POSITIONED:
            raise NotSupportedError(
                f"query_start: there are {sizes.seqlen_q} queries and {sizes.seqlen_kv} keys, and with it at most "
                f"{MAX_POSITIONED} together; split the queries over several calls"
            )
        left, right = (UNBOUNDED if x == -1 else min(x, UNBOUNDED) for x in window)
        right = 0 if causal else right
    softcap = checks.check_softcap(options.softcap)
    what = {"mask": kind, "score": score_of(softcap != 0, "alibi_slopes" in per_head)}
    scalars = {"softcap": softcap, "window_left": left, "window_right": right}
    scalars |= {f"has_{name}": int(name in per_head) for name in OPTIONAL}
    return what, scalars, PER_HEAD


def params_of(definition: str) -> dict[str, Param]:
    """The run-time parameters of a user's own definition, from the packs.

    Raises
    ------
    InvalidArgumentError: no pack has a kernel of it.
    """
    entries: list[KernelEntry] = [e for p in registry().packs for e in p.manifest.kernels]
    for entry in entries:
        if entry.definition == definition:
            return {p.name: p for p in entry.params}
    known = sorted({e.definition for e in entries if e.definition != BUILTIN_DEFINITION})
    raise InvalidArgumentError(
        f"name: no pack has kernels of the definition {definition!r} (there are: {', '.join(known) or 'none'}); "
        f"run `{build_command('native', '--definition', f'<file.py>:{definition}')}`"
    )


def _scalar(param: Param, value: Any) -> float | int:
    number = checks.check_real(param.name, value)
    if param.dtype.startswith("float"):
        return number
    if number != int(number) or abs(number) > INT32_MAX:
        raise InvalidArgumentError(f"{param.name}: is {value!r}, expected a whole number that fits 32 bits")
    return int(number)


def _check_out(framework: Framework, out: Any, layout: str, sizes: checks.Sizes, q: TensorView) -> TensorView | None:
    shape = sizes.out_shape(layout)
    if math.prod(shape) * memory.ITEM_SIZE[q.dtype] > sys.maxsize:
        raise InvalidArgumentError(f"q: the result would have shape {shape}, more bytes than there are addresses")
    if out is None:
        return None
    if not framework.mutable:
        raise ArgumentTypeError(f"out: arrays of {framework.name} can't be written; leave it out to get a new one")
    view = framework.view(out, "out")
    checks.check_out(view, shape, q)
    return view


def _index_bits(sizes: checks.Sizes, views: tuple[TensorView | None, ...], layout: str) -> int:
    """32 if every size, stride and position that a kernel counts fits an int32, else 64."""
    numbers = [sizes.batch * sizes.heads * sizes.seqlen_q, 2 * (sizes.seqlen_q + sizes.seqlen_kv)]
    for x in views:
        if x is not None:
            numbers += [*x.shape, *(abs(s) for s, n in zip(x.strides, x.shape, strict=True) if n > 1)]
    numbers += contiguous_strides(sizes.out_shape(layout))
    return 32 if max(numbers) <= INT32_MAX else 64
