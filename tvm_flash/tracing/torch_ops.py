"""Attention as operators of PyTorch: what compiled, exported, differentiated and otherwise traced programs call.

Importing this module imports torch and registers ``torch.ops.tvm_flash.attention``, ``custom_attention``, and the
backward of each.  The public functions call kernels directly and come here for tensors that have no memory (under
``torch.compile`` and ``torch.export``, fake and meta ones, in ``torch.vmap``), and for those that need gradients.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from tvm_flash.call import checks
from tvm_flash.call.backward import why_no_backward
from tvm_flash.call.prepare import params_of
from tvm_flash.call.signature import Options, Signature, never_change, signature
from tvm_flash.catalogue import PARAMS
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.frameworks.torch import is_aligned, name_of
from tvm_flash.machine.device import Device
from tvm_flash.operators import BACKWARD, FORWARD, OPERATORS, RAGGED_LAYOUT
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, Param
from tvm_flash.packs.registry import on_refresh
from tvm_flash.tracing import torch_decomposed, torch_inductor
from tvm_flash.tracing.torch_checks import check_call, check_kinds, check_options, check_shapes, warn_in_program
from tvm_flash.tracing.torch_gradients import Pair, below, is_recorded, record, record_once
from tvm_flash.tracing.torch_vmap import larger_batch, larger_batch_of_gradients

_MINIMUM = (2, 4)

if tuple(int(x) for x in torch.__version__.split(".")[:2]) < _MINIMUM:
    raise NotSupportedError(
        f"torch: is version {torch.__version__}, expected {'.'.join(map(str, _MINIMUM))} or later for compiled and "
        f"traced programs, and for gradients; plain calls work with any version"
    )

#: The parameters of the package's own definition that are tensors, in the order of the operators.
_PARAMETERS = ("alibi_slopes", "kv_start", "kv_end", "query_start", "sinks", "visible", "bias")

_library = torch.library.Library("tvm_flash", "DEF")
# Inductor may otherwise hand over tensors whose last dimension isn't contiguous.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_INPUTS = {
    FORWARD: "Tensor q, Tensor k, Tensor v",
    BACKWARD: "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse=None",
}
_LAST = {
    FORWARD: "bool return_lse=False) -> (Tensor, Tensor)",
    # dq, dk, dv, and of each parameter in gradients one for each batch entry and head
    BACKWARD: "str[] gradients) -> Tensor[]",
}
_LAYOUT = 'str layout="bhsd", str variant="auto", float? softmax_scale=None'
# None and −1 are both unbounded, and calls pass −1: AOTInductor of torch 2.13 loses whole numbers that equal a default.
_BUILTIN = (
    f"{', '.join(f'Tensor? {name}=None' for name in _PARAMETERS)}, *, {_LAYOUT}, "
    "bool causal=False, int? window_left=None, int? window_right=None, float softcap=0.0"
)
_CUSTOM = f"Tensor[] parameters, float[] numbers, *, str name, str[] parameter_names, str[] number_names, {_LAYOUT}"

_NAMES = {FORWARD: ("attention", "custom_attention"), BACKWARD: ("attention_backward", "custom_attention_backward")}
for _op, _names in _NAMES.items():
    for _name, _rest in zip(_names, (_BUILTIN, _CUSTOM), strict=True):
        _inputs = _INPUTS[_op] if _rest is _BUILTIN else _INPUTS[_op].replace("=None", "")
        _library.define(f"{_name}({_inputs}, {_rest}, {_LAST[_op]}", tags=_TAGS)


def attention(options: Options, tensors: Mapping[str, Any]) -> Any:
    """:func:`tvm_flash.call.dispatch.attention` by way of the operators.

    Raises
    ------
    TvmFlashError: an argument is wrong, or of a kind that the operators don't know.
    """
    return with_kinds_named(program, options, tensors)


def with_kinds_named(program: Callable[..., Any], options: Options, tensors: Mapping[str, Any]) -> Any:
    """``program(options, tensors)``, with an error that says which of the tensors' types don't know its operator."""
    try:
        return program(options, tensors)
    except TypeError as e:
        if isinstance(e, ArgumentTypeError) or "NotImplemented" not in str(e):
            raise
        kinds = {type(x).__qualname__ for x in tensors.values()} - {"Tensor", "Parameter"}
        raise ArgumentTypeError(
            f"q: is a {', '.join(sorted(kinds))}, which doesn't know this operator; pass the tensors that it stands for"
        ) from e


def program(options: Options, tensors: Mapping[str, Any]) -> Any:
    """The same as ``torch.compile`` traces it."""
    check_kinds(tensors)
    options = check_options(options)
    if any(map(_is_distributed, tensors.values())):
        _distribute()
    if torch.compiler.is_compiling():
        warn_in_program(options, tensors["q"], tensors["k"])
    else:
        check_call(options, tensors)
    operator = OPERATORS[options.op]
    outputs = operator.all_outputs(options.gradients)
    if options.op == BACKWARD and options.flag:
        raise NotSupportedError(
            "accumulate: is True in a program that is traced or differentiated, where nothing is added in place; call "
            "it under torch.no_grad() and not in torch.compile"
        )
    inputs = [tensors[name] for name in operator.inputs] + [tensors.get(name) for name in operator.optional]
    own = {"return_lse": options.flag} if options.op == FORWARD else {"gradients": list(options.gradients)}
    own |= {"layout": options.layout, "variant": options.variant, "softmax_scale": options.softmax_scale}
    builtin, custom = (getattr(torch.ops.tvm_flash, name) for name in _NAMES[options.op])
    if options.op == FORWARD and is_for_onnx():
        builtin = torch_decomposed.attention
    if options.op == BACKWARD:
        builtin = _by_parts(builtin, tensors.values())
    if options.definition == BUILTIN_DEFINITION:
        left, right = options.window_size
        results = builtin(
            *inputs,
            *(tensors.get(name) for name in _PARAMETERS),
            causal=options.causal,
            window_left=left,
            window_right=right,
            softcap=options.softcap,
            **own,
        )
    else:
        results = of_definition(custom, inputs, tensors, outputs, options, own)
    count = len(outputs) + (len(operator.on_request) if options.flag else 0)
    results = [results[i] for i in range(count)]  # a proxy of torch.fx can't be unpacked
    for i, name in enumerate(outputs):
        if name in tensors:
            results[i] = written(name, tensors[name], results[i])
    return results[0] if count == 1 else tuple(results)


def of_definition(
    custom: Callable[..., Any],
    inputs: list,
    tensors: Mapping[str, Any],
    outputs: tuple[str, ...],
    options: Options,
    own: Mapping[str, Any],
) -> Any:
    """What the operator for definitions of the user's own gives: those of the ``tensors`` that are neither an input nor
    one of the ``outputs`` are parameters."""
    parameters = {n: x for n, x in tensors.items() if n not in (*OPERATORS[options.op].all_inputs, *outputs)}
    return custom(
        *inputs,
        list(parameters.values()),
        [value for _, value in options.params],
        name=options.definition,
        parameter_names=list(parameters),
        number_names=[name for name, _ in options.params],
        **own,
    )


def recorded(options: Options, tensors: Mapping[str, Any], call: tuple | None, traced: Callable = attention) -> Any:
    """The same over tensors in memory, of which some require gradients: kernels are called without a dispatcher.

    Where that can't be, by ``traced(options, tensors)``.
    """
    differentiates, tangents = OPERATORS[options.op].differentiates, torch.autograd.forward_ad._current_level >= 0
    if call is None or differentiates or tangents or "out" in tensors:
        return traced(options, tensors)
    made_by, arguments = call
    count = len(made_by.tensors)
    try:
        pair = _pair(made_by, arguments[count:])
    except TypeError:  # an option that can't be a key
        return traced(options, tensors)
    out, lse = record(pair, *arguments[: count - 1])
    return (out, lse) if pair.asked else out


@functools.lru_cache(maxsize=1024)
def _pair(of: Signature, rest: tuple) -> Pair:
    """A forward and its backward by their plans; ``rest`` are the options of a call."""
    if not never_change(rest):
        raise TypeError("an option may become another one")
    variant, asked, *others = rest
    options, passed, op = of.options(*rest), set(), OPERATORS[of.op].backward

    def backward(*tensors, gradients):
        gradients = tuple(gradients)
        kept = {"op": op, "gradients": gradients, "layout_known": True}
        compute = signature(of.layout, of.definition, of.parameters, of.scalars, **kept).call
        outputs = [None] * len(OPERATORS[op].all_outputs(gradients))
        return compute(*readable(*tensors), *outputs, variant, False, *others)

    def check(q, k, v, parameters, wanted):
        dtypes = tuple((name, x.dtype) for name, x in parameters.items())
        key = (q.dtype, q.device, q.shape, k.shape, v.shape, dtypes, wanted)
        if key not in passed:
            check_kernel(options, q, k, v, parameters, wanted)
            passed.add(key)

    asked = checks.check_flag("return_lse", asked)
    names = (*of.starts, *of.parameters)
    declared = declared_of(of.definition)
    return Pair(
        lambda *tensors: of.call(*tensors, None, variant, True, *others), backward, names, declared, asked, check
    )


on_refresh(_pair.cache_clear)


def declared_of(definition: str) -> Mapping[str, Param]:
    """What is known of the parameters of a definition."""
    return PARAMS if definition == BUILTIN_DEFINITION else params_of(definition)


def written(name: str, to: Any, result: Any) -> Any:
    """A result in the memory that the caller gave for it."""
    if to.shape != result.shape:
        raise InvalidArgumentError(
            f"{name}: has shape {tuple(to.shape)}, expected {tuple(result.shape)}; leave it out to get a new tensor"
        )
    if to.dtype != result.dtype:
        raise ArgumentTypeError(f"{name}: has dtype {to.dtype}, expected {result.dtype} as q has")
    if to.requires_grad and to.is_leaf and torch.is_grad_enabled():
        raise NotSupportedError(
            f"{name}: a gradient is required of it, and it is overwritten; leave it out, or pass {name}.detach()"
        )
    return to.copy_(result)


def is_for_onnx() -> bool:
    """Whether ``torch.onnx.export(dynamo=False)`` traces a program, whose format has no such operators."""
    onnx = None if torch.compiler.is_compiling() else sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _is_distributed(x: Any) -> bool:
    return type(x).__name__ == "DTensor"


def _by_parts(backward: Callable[..., Any], tensors: Iterable[Any]) -> Callable[..., Any]:
    """An operator of gradients, which is called on what each process has of a ``DTensor``."""
    if torch.compiler.is_compiling() or not any(map(_is_distributed, tensors)):
        return backward
    from tvm_flash.tracing import torch_distributed

    return functools.partial(torch_distributed.gradients, backward)


def _distribute() -> None:
    from tvm_flash.tracing import torch_distributed  # noqa: F401, tells of placements


_distribute._dynamo_marked_constant = True


# ---------------------------------------------------------------- on real tensors


# Arguments have the defaults of the operators: a dispatcher leaves those out that have them.


def _builtin(op, *arguments, causal=False, window_left=None, window_right=None, softcap=0.0, **others):
    window = tuple(-1 if x is None else x for x in (window_left, window_right))
    count = _count(op) + len(_PARAMETERS)
    tensors = (*arguments, *[None] * (count - len(arguments)))
    return _run(op, {"parameters": _PARAMETERS}, tensors, (causal, window, softcap), **others)


def _custom(op, *arguments, name, parameter_names, number_names, **others):
    *tensors, parameters, numbers = arguments
    what = {"definition": name, "parameters": tuple(parameter_names), "scalars": tuple(number_names)}
    return _run(op, what, (*tensors, *parameters), numbers, **others)


def _count(op):
    """How many tensors come before the parameters."""
    return len(OPERATORS[op].inputs) + len(OPERATORS[op].optional)


def _run(
    op, what, tensors, options, *, layout="bhsd", variant="auto", softmax_scale=None, return_lse=False, gradients=()
):
    gradients = tuple(gradients)
    compute = signature(layout, **what, layout_known=True, op=op, below=True, gradients=gradients).call
    outputs = [None] * len(OPERATORS[op].all_outputs(gradients))
    if op == FORWARD:
        result = compute(*tensors, *outputs, variant, return_lse, softmax_scale, *options)
        return result if return_lse else (result, tensors[0].new_empty(0, dtype=torch.float32))
    return list(compute(*readable(*tensors), *outputs, variant, False, softmax_scale, *options))


def readable(dout, q, k, v, out, lse, dlse, *parameters):
    """The tensors of a backward as kernels take them.

    Gradients lie as whoever computed them saw fit, and one log-sum-exp stands for many where gradients are mapped.
    """
    if not is_aligned(dout) or (dout.shape[-1] > 1 and dout.stride(-1) != 1):
        dout = dout.clone(memory_format=torch.contiguous_format)
    return dout, q, k, v, out, lse.contiguous(), dlse if dlse is None else dlse.contiguous(), *parameters


# ---------------------------------------------------------------- on fake tensors


def _shapes(q, k, v, *others, layout="bhsd", return_lse=False, **_):
    check_shapes(layout, q, k, v, *others)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(_rows(q, layout) if return_lse else (0,), dtype=torch.float32)


def _backward_shapes(
    dout, q, k, v, *rest, layout="bhsd", gradients=(), name=BUILTIN_DEFINITION, parameter_names=(), **_
):
    check_shapes(layout, q, k, v, dout, *rest)
    declared = declared_of(name) if gradients else {}
    given = dict(zip(parameter_names, rest[-2], strict=True)) if parameter_names else {}
    sizes = dict(zip("bhij", (*_rows(q, layout), k.shape[2 if layout == "bhsd" else 1]), strict=True))
    learnt = [
        given[x].shape if declared[x].rank else [sizes[a] for a in declared[x].of_gradient] or [1] for x in gradients
    ]
    return [*(x.new_empty(x.shape) for x in (q, k, v)), *(q.new_empty(n, dtype=torch.float32) for n in learnt)]


def _rows(q, layout):
    return (q.shape[0], q.shape[1], q.shape[2]) if layout == "bhsd" else (q.shape[0], q.shape[2], q.shape[1])


# ---------------------------------------------------------------- gradients


def _where_autograd_listens(op, custom):
    """What answers an operator above those that compute."""
    operators = {o: getattr(torch.ops.tvm_flash, names[custom]).default for o, names in _NAMES.items()}
    operator = operators[op]

    def forward(q, k, v, *rest, **options):
        if custom:
            (parameters, *last), names = rest, options["parameter_names"]
        else:
            parameters, last, names = (*rest, *[None] * (len(_PARAMETERS) - len(rest))), (), _PARAMETERS
        if not is_recorded((q, k, v, *parameters)):
            return below(operator, q, k, v, *rest, **options)

        def arguments(*tensors):
            return (*tensors[: len(tensors) - len(names)], list(tensors[len(tensors) - len(names) :]), *last)

        flat = (lambda *tensors: tensors) if not custom else arguments
        own = {name: x for name, x in options.items() if name != "return_lse"}
        pair = Pair(
            lambda *tensors: below(operator, *flat(*tensors), **own, return_lse=True),
            lambda *tensors, gradients: _by_parts(operators[BACKWARD], tensors)(
                *flat(*tensors), **own, gradients=gradients
            ),
            tuple(names),
            declared_of(options.get("name", BUILTIN_DEFINITION)),
            asked=options.get("return_lse", False),
            check=functools.partial(_check_backward, own),
        )
        return record(pair, q, k, v, *parameters)

    def backward(*arguments, **options):
        flat = arguments if not custom else (*arguments[:-2], *arguments[-2])
        if not is_recorded(flat):
            return below(operator, *arguments, **options)
        return record_once(operator, *arguments, **options)

    return forward if op == FORWARD else backward


def _check_backward(options, q, k, v, parameters, wanted):
    """:func:`_check_kernel` with the options that an operator was given."""
    options = dict(options)
    window = tuple(-1 if x is None else x for x in (options.pop("window_left", -1), options.pop("window_right", -1)))
    asked = Options(
        *(options.get("layout", "bhsd"), options.get("variant", "auto"), False, None),
        *(options.get("causal", False), window, options.get("softcap", 0.0)),
        definition=options.get("name", BUILTIN_DEFINITION),
    )
    check_kernel(asked, q, k, v, parameters, wanted)


def check_kernel(options, q, k, v, parameters, wanted):
    """That gradients of a call can be computed, before it is made.

    Raises
    ------
    NotSupportedError: nothing can.
    """
    if q.device.type not in ("cpu", "cuda"):
        return
    queries = {"bhsd": 2, "bshd": 1, RAGGED_LAYOUT: 0}[options.layout]
    reason = why_no_backward(
        options,
        Device(q.device.type, q.device.index or 0),
        name_of(q.dtype),
        (q.shape[queries], k.shape[queries]),
        (int(q.shape[-1]), int(v.shape[-1])),
        {name: name_of(x.dtype) for name, x in parameters.items()},
        wanted,
    )
    if reason is not None:
        asked_of = [*(n for n, x in zip("qkv", (q, k, v), strict=True) if x.requires_grad), *wanted]
        raise NotSupportedError(
            f"{', '.join(asked_of)}: a gradient is required, and nothing here computes it: {reason}; or call under "
            f"torch.no_grad(), or pass {asked_of[0]}.detach()"
        )


for _op, _names in _NAMES.items():
    for _i, _name in enumerate(_names):
        for _key in ("CPU", "CUDA"):
            _library.impl(_name, functools.partial((_builtin, _custom)[_i], _op), _key)
        _library.impl(_name, _where_autograd_listens(_op, _i), "Autograd")
        _fake = torch_inductor.traced(_shapes if _op == FORWARD else _backward_shapes)
        torch.library.register_fake(f"tvm_flash::{_name}", _fake, lib=_library)
        _operator = getattr(torch.ops.tvm_flash, _name).default
        if hasattr(torch.library, "register_vmap"):  # since torch 2.5; before, vmap calls one after the other
            torch.library.register_vmap(f"tvm_flash::{_name}", larger_batch(_operator), lib=_library)
        if _op == BACKWARD:
            _library.impl(_name, larger_batch_of_gradients(_operator), "Batched")


def _flops(q_shape, k_shape, v_shape, *_, layout="bhsd", **__) -> int:
    """Operations of both products, whatever is masked, as torch counts them for its own attention."""
    return _product(q_shape, v_shape, layout) * (q_shape[3] + v_shape[3])


def _backward_flops(dout_shape, q_shape, k_shape, v_shape, *_, layout="bhsd", **__) -> int:
    """Those of the five products of a backward."""
    return _product(q_shape, v_shape, layout) * (3 * q_shape[3] + 2 * v_shape[3])


def _product(q_shape, v_shape, layout):
    """Operations of a product of all queries and keys, for each element of a head."""
    heads, queries = (1, 2) if layout == "bhsd" else (2, 1)
    return 2 * q_shape[0] * q_shape[heads] * q_shape[queries] * v_shape[queries]


for _op, _formula in ((FORWARD, _flops), (BACKWARD, _backward_flops)):
    register_flop_formula([getattr(torch.ops.tvm_flash, name) for name in _NAMES[_op]])(_formula)

torch_inductor.decompose(torch.ops.tvm_flash.attention.default, torch_decomposed.attention)
