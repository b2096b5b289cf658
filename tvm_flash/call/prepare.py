"""From a caller's arguments to a plan: the slow path, taken once for each combination of shapes, dtypes and options."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from tvm_flash.call import checks, memory
from tvm_flash.call.keyless import KeylessPlan, check_sees_nothing, is_keyless, lacks_only_keys
from tvm_flash.call.paged import check_paged
from tvm_flash.call.plan import EmptyPlan, Plan
from tvm_flash.call.problem import (
    INT32_MAX,
    MAX_POSITIONED,
    UNBOUNDED,
    Mask,
    Problem,
    normalise_mask,
)
from tvm_flash.call.ragged import count_sequences
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Options
from tvm_flash.catalogue import OPTIONAL, SCORES, TENSORS, score_of
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.frameworks import Framework, TensorView, Traced, contiguous_strides, framework_of
from tvm_flash.machine.device import Device
from tvm_flash.operators import OPERATORS, PAGED_SCALED, SCALES
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, PAGED, Param
from tvm_flash.packs.registry import build_command, registry


def prepare(options: Options, framework: Framework, tensors: Mapping[str, Any]) -> Plan | EmptyPlan:
    """Check everything but pointers, choose a kernel and lay out its arguments.

    Arguments and errors are those of :func:`request_of`, and what ``options.accept`` raises.
    """
    request = request_of(options, framework, tensors)
    options.accept(request.device)
    if not request.is_empty:
        return Plan(request)
    if lacks_only_keys(request):
        if is_keyless(request):
            return KeylessPlan(request, options, lambda asked, instead: prepare(asked, framework, instead))
        check_sees_nothing(request)
    return EmptyPlan(request)


def request_of(options: Options, framework: Framework, tensors: Mapping[str, Any]) -> Request:
    """A call after all checks that don't need pointers.

    ``tensors`` are those of the call that are given, by name, all of ``framework`` and adopted by it.

    Raises
    ------
    TvmFlashError: see :mod:`tvm_flash.errors`.
    """
    operator = OPERATORS[options.op]
    flag = checks.check_flag(operator.flag, options.flag)
    accumulate = flag and operator.flag == "accumulate"
    outputs = operator.all_outputs(options.gradients)
    if accumulate:
        _check_accumulators(outputs, tensors)
    given = {name: framework.view(x, name) for name, x in tensors.items() if name not in outputs}
    q = given["q"]
    sizes = _sizes(options, given)
    parameters = tuple(name for name in given if name not in operator.all_inputs)
    what, scalars, declared = _computation(options, sizes, q.dtype, {name: given[name].dtype for name in parameters})
    for name in parameters:
        checks.check_parameter(declared[name], given[name], sizes, q)
    request = Request(
        framework=framework,
        layout=options.layout,
        sizes=sizes,
        problem=Problem(
            **vars(sizes),
            **what,
            dtype=q.dtype,
            cache_dtype=given["k_cache"].dtype if options.op == PAGED_SCALED else "",
            layout=options.layout,
            workspaces=framework.allocates(q.device_kind),
            op=options.op,
            accumulate=accumulate,
            gradients=options.gradients,
        ),
        device=Device(q.device_kind, q.device_index),
        variant=checks.check_variant(options.variant),
        softmax_scale=checks.check_scale(options.softmax_scale, sizes.head_dim),
        scalars=scalars,
        declared=declared,
        given=given,
        parameters=parameters,
        outputs=outputs,
        results=(*outputs, *(operator.on_request if flag else ())),
        suspicion=None if options.layout_known else checks.layout_suspicion(options.layout, sizes, q),
    )
    for name in operator.all_inputs:
        if name in given and name not in ("q", "k", "v", *SCALES):
            checks.check_input(name, given[name], request.shape_of(name), request.dtype_of(name), q)
    memory_of = {name: _check_output(request, name, tensors.get(name)) for name in outputs}
    given = {**given, **{name: x for name, x in memory_of.items() if x is not None}}
    request = dataclasses.replace(request, given=given)
    laid_out = [(x.shape, x.strides) for x in given.values()]
    bits = index_bits(sizes, laid_out, map(request.shape_of, outputs))
    problem = dataclasses.replace(request.problem, index_bits=bits)
    return dataclasses.replace(request, problem=problem)


def _sizes(options: Options, given: Mapping[str, TensorView]) -> checks.Sizes:
    """The sizes of a call, once its tensors are known to fit together."""
    operator = OPERATORS[options.op]
    if operator.form == PAGED:
        return check_paged(given, options.longest, options.head_dim_v, options.split_length)
    sizes = checks.check_tensors(options.layout, *(given[name] for name in ("q", "k", "v")))
    if operator.starts:
        batch = count_sequences({name: given[name] for name in operator.starts})
        sizes = dataclasses.replace(sizes, batch=batch)
    return sizes


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


def _check_accumulators(outputs: tuple[str, ...], tensors: Mapping[str, Any]) -> None:
    for name in outputs:
        if name not in tensors:
            raise InvalidArgumentError(
                f"{name}: isn't given, and with accumulate=True results are added to what is there; give a float32 "
                f"tensor for each of {', '.join(outputs)}, zeros at first"
            )


def _computation(
    options: Options, sizes: checks.Sizes, dtype: str, given: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, float | int], Mapping[str, Param]]:
    """What is computed: fields of the problem, the scalar parameters, and the declarations of those that are tensors.

    ``dtype`` is that of q, ``given`` has those of the parameters that are given as tensors, by name.
    """
    mask, what = kinds_of(options, sizes.seqlen_q, sizes.seqlen_kv, given)
    if options.definition != BUILTIN_DEFINITION:
        params = params_of(options.definition, dtype)
        made_for = {**dict.fromkeys(given, True), **{name: False for name, _ in options.params}}
        if wrong := made_for.items() ^ {name: p.is_tensor for name, p in params.items()}.items():
            raise InvalidArgumentError(
                f"{', '.join(sorted({name for name, _ in wrong}))}: None, missing or unknown; the definition "
                f"{options.definition!r} of the packs that are there now takes {', '.join(params) or 'no parameters'}; "
                f"give each, and if packs have changed, make the function anew with custom_attention"
            )
        return what, {name: _scalar(params[name], x) for name, x in options.params}, params
    left, right = (min(x, INT32_MAX) for x in mask.widths(sizes.seqlen_q, sizes.seqlen_kv))
    if "query_start" in given:  # queries may stand anywhere, so that no bound is known to cut nothing off
        if sizes.seqlen_q + sizes.seqlen_kv > MAX_POSITIONED:
            raise NotSupportedError(
                f"query_start: there are {sizes.seqlen_q} queries and {sizes.seqlen_kv} keys, and with it at most "
                f"{MAX_POSITIONED} together; split the queries over several calls"
            )
        left, right = (UNBOUNDED if x == -1 else min(x, UNBOUNDED) for x in checks.check_window(options.window_size))
        right = 0 if options.causal else right
    scalars = {"softcap": checks.check_softcap(options.softcap), "window_left": left, "window_right": right}
    scalars |= {f"has_{name}": int(name in given) for name in OPTIONAL}
    return what, scalars, {**TENSORS, **{p.name: p for p in SCORES[what["score"]].params}}


def kinds_of(
    options: Options, seqlen_q: int, seqlen_kv: int, given: Mapping[str, str]
) -> tuple[Mask | None, dict[str, str]]:
    """The mask in its normal form (None for a definition of the user's own), and definition, mask and score by name.

    ``given`` has the dtypes of the parameters that are given as tensors, by name.

    Raises
    ------
    InvalidArgumentError, ArgumentTypeError: an option of the mask or the score is wrong.
    """
    if options.definition != BUILTIN_DEFINITION:
        return None, {"definition": options.definition, "mask": "", "score": ""}
    window = checks.check_window(options.window_size)
    if OPERATORS[options.op].starts:  # which kernel runs has nothing to do with how long sequences are
        seqlen_q = seqlen_kv = INT32_MAX
    mask = normalise_mask(checks.check_flag("causal", options.causal), window, seqlen_q, seqlen_kv)
    padded = "kv_start" in given or "kv_end" in given
    if "visible" in given:
        kind = "given"
    elif "query_start" in given:
        kind = "positioned"
    else:
        kind = "padded" if padded else mask.kind
    capped = checks.check_softcap(options.softcap) != 0
    return mask, {
        "definition": BUILTIN_DEFINITION, "mask": kind,
        "score": score_of(capped, "alibi_slopes" in given, "sinks" in given, given.get("bias", "")),
    }  # fmt: skip


def params_of(definition: str, dtype: str = "") -> dict[str, Param]:
    """The run-time parameters of a user's own definition, from the packs: as kernels of a dtype have them, if any do.

    Raises
    ------
    InvalidArgumentError: no pack has a kernel of it.
    """
    for entry in sorted(registry().entries_of(definition), key=lambda e: e.dtype != dtype):
        return {p.name: p for p in entry.params}
    known = sorted({e.definition for e in registry().entries if e.definition != BUILTIN_DEFINITION})
    raise InvalidArgumentError(
        f"name: no pack has kernels of the definition {definition!r} (there are: {', '.join(known) or 'none'}); "
        f"run `{build_command('native', '--definition', f'<file.py>:{definition}')}`"
    )


def _scalar(param: Param, value: Any) -> float | int:
    number = checks.check_real(param.name, value)
    if param.dtype.startswith("float"):
        return number
    if not abs(number) <= INT32_MAX or number != int(number):
        raise InvalidArgumentError(f"{param.name}: is {value!r}, expected a whole number that fits 32 bits")
    return int(number)


def _check_output(request: Request, name: str, x: Any) -> TensorView | None:
    """What is known of memory that is given for a result, once it is known to fit; None if none is given."""
    shape, dtype, framework = request.shape_of(name), request.dtype_of(name), request.framework
    if math.prod(shape) * memory.ITEM_SIZE[dtype] > sys.maxsize:
        raise InvalidArgumentError(f"q: the result would have shape {shape}, more bytes than there are addresses")
    if x is None:
        return None
    if not framework.mutable:
        raise ArgumentTypeError(f"{name}: arrays of {framework.name} can't be written; leave it out to get a new one")
    view = framework.view(x, name)
    checks.check_output(name, view, shape, dtype, request.q)
    return view


def index_bits(
    sizes: checks.Sizes,
    given: Iterable[tuple[tuple[int, ...], tuple[int, ...]]],
    outputs: Iterable[tuple[int, ...]],
) -> int:
    """32 if every size, stride and position that a kernel counts fits an int32, else 64.

    ``given`` are shapes and strides of the tensors of a call, ``outputs`` the shapes of its results.
    """
    batch = 1 if isinstance(sizes, checks.RaggedSizes) else sizes.batch
    numbers = [batch * sizes.heads * sizes.seqlen_q, 2 * (sizes.seqlen_q + sizes.seqlen_kv)]
    for shape, strides in given:
        numbers += [*shape, *(abs(s) for s, n in zip(strides, shape, strict=True) if n > 1)]
    for shape in outputs:
        numbers += contiguous_strides(shape)
    return 32 if max(numbers) <= INT32_MAX else 64
