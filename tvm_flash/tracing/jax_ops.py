"""Attention as a step of a JAX program: under ``jax.jit``, ``jax.vmap`` and ``jax.grad``, by XLA's foreign function
interface.

A kernel is registered with XLA (package ``jax-tvm-ffi``), so that a compiled program calls it on its own stream; one
with a single launch that takes nothing but q, k, v and numbers as it is, without Python.  Importing this module imports
jax.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from tvm_flash.call.backward import why_no_backward
from tvm_flash.call.choice import choose
from tvm_flash.call.keyless import check_sees_nothing, hidden_key, is_keyless, lacks_only_keys
from tvm_flash.call.prepare import params_of, request_of
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Options
from tvm_flash.call.suspicion import warn_of_layout
from tvm_flash.catalogue import DEFAULTS, PARAMS
from tvm_flash.errors import ArgumentTypeError, NotSupportedError, TvmFlashError
from tvm_flash.frameworks.base import TensorView, contiguous_strides
from tvm_flash.frameworks.jax import Jax
from tvm_flash.machine import cuda, ffi
from tvm_flash.machine.device import Device
from tvm_flash.operators import OPERATORS, RAGGED_LAYOUT, gradient_of, role_of, tensor
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, DENSE, PAGED, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: Name of a platform in JAX's programs, in its foreign function interface, and of its devices here.
_PLATFORMS = {"cpu": ("cpu", "cpu"), "cuda": ("gpu", "cuda")}

_NO_DERIVATIVE = (
    "q, k, v: a derivative of the gradients of attention is asked for, or one in forward mode, and there are first "
    "gradients in reverse mode only (jax.grad, jax.vjp); use jax.lax.stop_gradient on them, or jax.nn's attention"
)


def attention(options: Options, tensors: dict[str, Any]) -> Any:
    """:func:`tvm_flash.call.dispatch.attention` as a step of a program.

    Raises
    ------
    NotSupportedError: jax-tvm-ffi isn't installed, no platform has a kernel, or a derivative is asked for that there
        isn't.
    TvmFlashError: an argument is wrong, as outside of a program.
    """
    if OPERATORS[options.op].form == PAGED:
        caches = ", ".join(OPERATORS[options.op].inputs[1:])
        raise NotSupportedError(
            f"{caches}: are traced by JAX, and keys on pages have no operator there; call outside of jax.jit"
        )
    for name in OPERATORS[options.op].all_outputs(options.gradients):
        if name in tensors:
            raise ArgumentTypeError(f"{name}: arrays of jax can't be written; leave it out to get a new one")
    _check_sizes(tensors)
    tensors = {name: jnp.asarray(x) for name, x in tensors.items()}
    suspicion = request_of(options, _Abstract("cpu", options.op), tensors).suspicion
    if suspicion is not None:
        warn_of_layout(suspicion, options.layout)
    results = (_step if OPERATORS[options.op].differentiates else _differentiable)(options, tensors)
    return results[0] if len(results) == 1 else results


def _check_sizes(tensors: dict[str, Any]) -> None:
    for name, x in tensors.items():
        if not all(isinstance(n, int) for n in x.shape):
            raise NotSupportedError(
                f"{name}: has the shape {x.shape} with symbols, expected numbers, since a kernel is chosen for them; "
                f"export a program for each size"
            )


# ---------------------------------------------------------------- gradients


def _differentiable(options: Options, tensors: dict[str, Any]):
    names, arrays = tuple(tensors), tensors.values()
    if any(jnp.issubdtype(tensors[name].dtype, jnp.floating) for name in names if name not in "qkv"):
        try:
            return _attention_with_parameters(options, names, *arrays)
        except NotImplementedError as e:  # JAX has no such rules in shard_map
            if isinstance(e, TvmFlashError):
                raise
    return _attention(options, names, *arrays)


def _attend(options: Options, names: tuple[str, ...], *arrays):
    return _step(options, dict(zip(names, arrays, strict=True)))


def _forward(options, names, *primals):
    return _keep(options, dict(zip(names, primals, strict=True)), names)


def _forward_with_parameters(options, names, *primals):
    """The same by a rule that is told by which arrays the program differentiates."""
    asked = (name for name, x in zip(names, primals, strict=True) if x.perturbed)
    return _keep(options, {name: x.value for name, x in zip(names, primals, strict=True)}, asked)


def _keep(options, arrays, asked):
    # What is differentiated is known when the program is traced, and so is told by a structure, not by a value.
    asked = {name: None for name in asked if jnp.issubdtype(arrays[name].dtype, jnp.floating)}
    _check_backward(options, arrays, tuple(asked))
    out, lse = _step(options._replace(flag=True), arrays)
    return (out, lse) if options.flag else (out,), (arrays, out, lse, asked)


def _check_backward(options, arrays, asked):
    """That some platform has kernels for the gradients."""
    q, k, v = (arrays[name] for name in "qkv")
    queries = {"bhsd": 2, "bshd": 1, RAGGED_LAYOUT: 0}[options.layout]
    parameters = {name: x.dtype.name for name, x in arrays.items() if name not in "qkv"}
    what = (q.dtype.name, (q.shape[queries], k.shape[queries]), (q.shape[-1], v.shape[-1]), parameters)
    learnt = tuple(name for name in asked if name in parameters)
    kinds = [kind for _, kind in _PLATFORMS.values() if kind == "cpu" or cuda.device_count()]
    reasons = [why_no_backward(options, Device(kind), *what, learnt) for kind in kinds]
    if None not in reasons:
        raise NotSupportedError(
            f"{', '.join(asked)}: a gradient is required, and nothing here computes it: {reasons[0]}; or use "
            f"jax.lax.stop_gradient on them"
        )


def _backward(options, names, kept, cotangents):
    arrays, out, lse, asked = kept
    dout, *dlse = cotangents
    tensors = {"dout": _array(dout), **{name: arrays[name] for name in "qkv"}, "out": out, "lse": lse}
    if dlse and not isinstance(dlse[0], SymbolicZero):
        tensors["dlse"] = dlse[0]
    parameters = [name for name in names if name not in "qkv"]
    learnt = tuple(name for name in parameters if name in asked)
    options = options._replace(op=OPERATORS[options.op].backward, flag=False, gradients=learnt)
    dq, dk, dv, *others = _step(options, {**tensors, **{name: arrays[name] for name in parameters}})
    found = {"q": dq, "k": dk, "v": dv}
    builtin = options.definition == BUILTIN_DEFINITION
    declared = PARAMS if builtin else params_of(options.definition)
    for name, x in zip(learnt, others, strict=True):
        found[name] = _reduced(x, declared[name], arrays[name])
    return tuple(found.get(name) for name in names)


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention.defvjp(_forward, _backward)
_attention_with_parameters = jax.custom_vjp(_attend, nondiff_argnums=(0, 1))
_attention_with_parameters.defvjp(_forward_with_parameters, _backward, symbolic_zeros=True)


def _array(x):
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


def _reduced(gradient, param, x):
    """The gradient of a parameter in its dtype and shape, in which one value may stand for all of an axis."""
    axes = tuple(i for i, n in enumerate(param.aligned(x.shape)) if n == 1)
    return gradient.sum(axes, keepdims=True).reshape(x.shape).astype(x.dtype)


# ---------------------------------------------------------------- a step


def _step(options: Options, tensors: dict[str, Any]):
    return _without_derivatives(options, tuple(tensors), *tensors.values())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _without_derivatives(options: Options, names: tuple[str, ...], *arrays):
    return _mapped(options, names)(*arrays)


@_without_derivatives.defjvp
def _refuse(options, names, primals, tangents):
    raise NotSupportedError(_NO_DERIVATIVE)


def _mapped(options: Options, names: tuple[str, ...]) -> Callable:
    """The call as a function of arrays that ``jax.vmap`` turns into one with a larger batch."""
    operator = OPERATORS[options.op]

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        return _call(options, dict(zip(names, arrays, strict=True)))

    @call.def_vmap
    def larger_batch(size, mapped, *arrays):
        if operator.starts:
            raise NotSupportedError(
                "q, k, v: are mapped by jax.vmap, and sequences of different lengths can't be; they are a batch: "
                "give all of them in one call"
            )
        arrays = [
            x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_mapped in zip(arrays, mapped, strict=True)
        ]
        if options.definition != BUILTIN_DEFINITION:
            wide = [p.name for p in params_of(options.definition).values() if p.is_tensor and not p.per_head]
            if any(name in wide for name in names):
                raise NotSupportedError(
                    f"{', '.join(wide)}: the call is mapped by jax.vmap, and such parameters can't be; use the batch "
                    f"dimension of q, k and v"
                )
        batch = arrays[0].shape[1]
        for i, (name, x) in enumerate(zip(names, arrays, strict=True)):
            if name not in (*operator.inputs, *operator.optional):  # one value a head, or also a batch entry
                x = x[:, None] if x.ndim == 2 else x
                arrays[i] = jnp.broadcast_to(x, (size, batch, x.shape[-1]))
        results = call(*(x.reshape(size * batch, *x.shape[2:]) for x in arrays))
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True,) * len(results)

    return call


def _call(options: Options, arrays: dict[str, Any]):
    branches, refusals = {}, {}
    for platform, (_, kind) in _PLATFORMS.items():
        if kind == "cuda" and not cuda.device_count():
            continue
        request = request_of(options, _Abstract(kind, options.op), arrays)
        if request.is_empty:
            return _empty(options, request, arrays)
        try:
            options.accept(Device(kind))
            kernel = choose(request.problem, Device(kind), request.variant).kernel
            branches[platform] = functools.partial(_call_kernel, _target(kernel, platform), request, kernel)
        except TvmFlashError as e:
            refusals[platform] = e
    if not branches:
        raise next(iter(refusals.values()))
    if (platform := _default_platform()) in refusals:
        raise NotSupportedError(
            f"q, k, v: are traced for {platform}, where JAX computes unless told otherwise, and there: "
            f"{refusals[platform]}; to compute on the processor, trace under jax.default_device(jax.devices('cpu')[0])"
        ) from refusals[platform]
    if len(branches) == 1:
        return next(iter(branches.values()))(*arrays.values())
    return jax.lax.platform_dependent(*arrays.values(), **branches)


def _default_platform() -> str:
    """The platform, as in JAX's programs, where JAX computes what nobody has put elsewhere."""
    device = jax.config.jax_default_device
    name = device if isinstance(device, str) else jax.default_backend() if device is None else device.platform
    return {"gpu": "cuda"}.get(name, name)


def _empty(options: Options, request: Request, arrays: dict[str, Any]):
    """What :func:`tvm_flash.call.prepare.prepare` makes plans for: nothing to compute, but for rows with sinks."""
    found: dict[str, Any] = {}
    if lacks_only_keys(request):
        if is_keyless(request):
            instead = {name: jnp.zeros(*x) for name, x in hidden_key(request).items()}
            found = dict(zip(request.results, _call(options, {**arrays, **instead}), strict=True))
            found = {name: x for name, x in found.items() if name not in ("dk", "dv")}
        else:
            check_sees_nothing(request)

    def fill(name):
        return -jnp.inf if name in request.operator.on_request else 0

    return tuple(
        found[n] if n in found else jnp.full(request.shape_of(n), fill(n), request.dtype_of(n)) for n in request.results
    )


class _Abstract(Jax):
    """Arrays that are known by shape and dtype: XLA will lay them out without gaps."""

    def __init__(self, kind: str, op: str):
        self._kind, self._op = kind, op

    def allocates(self, device_kind):
        # A forward with workspaces takes what no foreign function gives it: zeros.
        return OPERATORS[self._op].differentiates

    def view(self, tensor, name):
        shape = tuple(tensor.shape)
        return TensorView(shape, contiguous_strides(shape), tensor.dtype.name, self._kind, 0, pointer=0)


# ---------------------------------------------------------------- the foreign function


def _written(entry: KernelEntry) -> tuple[str, ...]:
    """The roles that a kernel writes, in the order in which XLA gives memory for them: workspaces are results too."""
    operator = OPERATORS[entry.op]
    results = [role_of(name) for name in (*operator.outputs, *operator.on_request)]
    gradients = [gradient_of(p.name) for p in entry.params if p.gradient and operator.differentiates]
    return (*results, *gradients, *(w.name for w in entry.workspaces))


def _read(entry: KernelEntry) -> tuple[str, ...]:
    """The roles of the tensors that a kernel reads, in the order in which XLA gives them."""
    return tuple(x.role for x in entry.arguments if x.rank and x.role not in _written(entry))


def _numbers(entry: KernelEntry) -> tuple[str, ...]:
    """The roles of the numbers that a kernel takes."""
    return tuple(x.role for x in entry.arguments if not x.rank)


def _target(kernel: Installed, platform: str) -> str:
    """Name of a kernel as a foreign function, which it becomes at the first call."""
    name = f"tvm_flash.{kernel.pack.arch}.{kernel.entry.symbol}.{kernel.entry.source_hash[:16]}"
    with _lock:
        if (name, platform) not in _registered:
            _register(name, kernel, platform)
            _registered.add((name, platform))
    return name


_registered: set[tuple[str, str]] = set()
_lock = threading.Lock()


def _register(name: str, kernel: Installed, platform: str) -> None:
    """Make a foreign function of a kernel.

    XLA gives arrays, results, then numbers.  A kernel that doesn't take them so, or has several launches, gets them
    from a Python function.
    """
    ffi.tvm_ffi()
    try:
        import jax_tvm_ffi
    except ImportError as e:
        raise NotSupportedError(
            "q: is traced by JAX, which takes the package jax-tvm-ffi to call a kernel; run `pip install jax-tvm-ffi`, "
            "or call outside of jax.jit"
        ) from e
    entry = kernel.entry
    if any(w.zeroed for w in entry.workspaces):
        raise NotSupportedError(f"q: is traced by JAX, which can't call {entry.symbol}: it needs zeros to begin with")
    functions = [x.function for x in registry().load(kernel)]
    given = (*_read(entry), *_written(entry), *_numbers(entry))
    direct = len(functions) == 1 and tuple(x.role for x in entry.launches[0].arguments) == given
    function = functions[0] if direct else ffi.tvm_ffi().convert(_by_role(functions, entry, given))
    jax_tvm_ffi.register_ffi_target(
        name,
        function,
        ["args", "rets", *(f"attrs.{role}" for role in _numbers(entry))],
        platform=_PLATFORMS[platform][0],
        allow_cuda_graph=True,
        pass_owned_tensor=not direct,
    )


def _by_role(functions: list[Callable], entry: KernelEntry, given: tuple[str, ...]) -> Callable:
    def call(*arguments):
        values = dict(zip(given, arguments, strict=True))
        for function, launch in zip(functions, entry.launches, strict=True):
            if launch.is_needed(values):
                function(*(values[x.role] for x in launch.arguments))

    return call


def _call_kernel(target: str, request: Request, kernel: Installed, *arrays):
    entry = kernel.entry
    swap = entry.form == DENSE and entry.layout != request.layout
    given = {role_of(name): (name, x) for name, x in zip(request.given, arrays, strict=True)}
    names = {role_of(n): n for n in (*request.outputs, *request.operator.on_request)}
    extents = entry.extents(request.sizes.by_name, request.shape_of)
    workspaces = {w.name: w for w in entry.workspaces}
    params = {p.name: p for p in entry.params}

    def in_layout(name, x):
        if tensor(name).flat:
            return x.reshape(-1)
        return jnp.swapaxes(x, 1, 2) if swap and len(tensor(name).axes) == 4 else x

    def read(argument):
        name, x = given.get(argument.role, (None, None))
        param = params.get(argument.role)
        if param is not None and param.axes:  # one that isn't given isn't used
            default = sizes.evaluate(DEFAULTS.get(argument.role, 0), extents)
            whole = request.sizes.of_axes(param.axes)
            return jnp.broadcast_to(jnp.full((), default, argument.dtype) if x is None else x, whole)
        return jnp.zeros(1, argument.dtype) if x is None else in_layout(name, x)

    def written(role):
        if role in workspaces:
            shape = tuple(sizes.evaluate(n, extents) for n in workspaces[role].shape)
            return jax.ShapeDtypeStruct(shape, workspaces[role].dtype)
        name = names.get(role, role)
        if name in request.operator.on_request and name not in request.results:
            return jax.ShapeDtypeStruct((1,), entry.dtype_of(role))
        return jax.eval_shape(functools.partial(in_layout, name), _abstract(request, name))

    types = {x.role: x for x in entry.arguments}
    values = {"softmax_scale": request.softmax_scale, **request.scalars, **extents}
    results = jax.ffi.ffi_call(target, tuple(map(written, _written(entry))))(
        *(read(types[role]) for role in _read(entry)),
        **{role: np.dtype(types[role].dtype).type(values[role]) for role in _numbers(entry)},
    )
    found = dict(zip(_written(entry), results, strict=True))

    def as_asked(name):
        x = found[role_of(name)]
        return x.reshape(request.shape_of(name)) if tensor(name).flat else in_layout(name, x)

    return tuple(as_asked(name) for name in request.results)


def _abstract(request: Request, name: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(request.shape_of(name), request.dtype_of(name))
