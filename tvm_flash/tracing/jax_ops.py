"""Attention as a step of a JAX program: under ``jax.jit`` and ``jax.vmap``, by XLA's foreign function interface.

A kernel is registered with XLA as it is (package ``jax-tvm-ffi``), so that a compiled program calls it on its own
stream, and Python isn't asked.  Importing this module imports jax.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvm_flash.call.choice import choose
from tvm_flash.call.prepare import request_of
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Options
from tvm_flash.call.suspicion import warn_of_layout
from tvm_flash.errors import ArgumentTypeError, NotSupportedError, TvmFlashError
from tvm_flash.frameworks.base import TensorView, contiguous_strides
from tvm_flash.frameworks.jax import Jax
from tvm_flash.machine import cuda, ffi
from tvm_flash.machine.device import Device
from tvm_flash.packs.registry import Installed, on_refresh, registry

#: Name of a platform in JAX's programs, in its foreign function interface, and of its devices here.
_PLATFORMS = {"cpu": ("cpu", "cpu"), "cuda": ("gpu", "cuda")}

_NO_GRADIENT = (
    "q, k, v: a gradient is required of them, and there is no backward pass yet; take the gradient of a program "
    "without this call, or use jax.lax.stop_gradient on q, k and v"
)


def attention(options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any) -> Any:
    """:func:`tvm_flash.call.dispatch.attention` as a step of a program.

    Raises
    ------
    NotSupportedError: jax-tvm-ffi isn't installed, no platform has a kernel, or a gradient is asked for.
    TvmFlashError: an argument is wrong, as outside of a program.
    """
    if out is not None:
        raise ArgumentTypeError("out: arrays of jax can't be written; leave it out to get a new one")
    _check_sizes(q=q, k=k, v=v)
    names, arrays = tuple(per_head), [q, k, v, *map(jnp.asarray, per_head.values())]
    suspicion = _request(options, names, "cpu", *arrays).suspicion
    if suspicion is not None:
        warn_of_layout(suspicion, options.layout)
    results = _step(options, names, *arrays)
    return results if options.return_lse else results[0]


def _check_sizes(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not all(isinstance(n, int) for n in x.shape):
            raise NotSupportedError(
                f"{name}: has the shape {x.shape} with symbols, expected numbers, since a kernel is chosen for them; "
                f"export a program for each size"
            )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _step(options: Options, names: tuple[str, ...], *arrays):
    return _mapped(options, names)(*arrays)


@_step.defjvp
def _no_gradient(options, names, primals, tangents):
    raise NotSupportedError(_NO_GRADIENT)


def _mapped(options: Options, names: tuple[str, ...]) -> Callable:
    """The call as a function of arrays that ``jax.vmap`` turns into one with a larger batch."""

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        return _call(options, names, *arrays)

    @call.def_vmap
    def larger_batch(size, mapped, *arrays):
        arrays = [
            x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_mapped in zip(arrays, mapped, strict=True)
        ]
        batch = arrays[0].shape[1]
        arrays[3:] = [
            jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, (size, batch, x.shape[-1])) for x in arrays[3:]
        ]
        results = call(*(x.reshape(size * batch, *x.shape[2:]) for x in arrays))
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True,) * len(results)

    return call


def _call(options: Options, names: tuple[str, ...], *arrays):
    branches, refusals = {}, {}
    for platform, (_, kind) in _PLATFORMS.items():
        if kind == "cuda" and not cuda.device_count():
            continue
        request = _request(options, names, kind, *arrays)
        if 0 in (*request.q.shape, *request.k.shape):
            return _empty(request)
        try:
            options.accept(Device(kind))
            kernel = choose(request.problem, Device(kind), request.variant).kernel
            branches[platform] = functools.partial(_call_kernel, _target(kernel, platform), request, kernel)
        except TvmFlashError as e:
            refusals[platform] = e
    if not branches:
        raise next(iter(refusals.values()))
    if len(branches) == 1:
        return next(iter(branches.values()))(*arrays)
    return jax.lax.platform_dependent(*arrays, **branches)


def _request(options: Options, names: tuple[str, ...], kind: str, *arrays) -> Request:
    tensors = dict(zip("qkv", arrays[:3], strict=True))
    return request_of(options, _Abstract(kind), tensors, dict(zip(names, arrays[3:], strict=True)), None)


def _empty(request: Request):
    out = jnp.zeros(request.out_shape, request.problem.dtype)
    return (out, jnp.full(request.sizes.lse_shape, -jnp.inf, jnp.float32)) if request.return_lse else (out,)


class _Abstract(Jax):
    """Arrays that are known by shape and dtype: XLA will lay them out without gaps."""

    def __init__(self, kind: str):
        self._kind = kind

    def allocates(self, device_kind):
        return False  # a foreign function is one launch, which gets no workspace

    def view(self, tensor, name):
        shape = tuple(tensor.shape)
        return TensorView(shape, contiguous_strides(shape), tensor.dtype.name, self._kind, 0, pointer=0)


# ---------------------------------------------------------------- the foreign function


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
on_refresh(_registered.clear)


def _register(name: str, kernel: Installed, platform: str) -> None:
    """Make a foreign function of a kernel.

    XLA gives arrays, results, then numbers, and so the kernel takes them, unless it has parameters that are tensors,
    which stand among the numbers: then a Python function puts all in the kernel's order.
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
    (kernel_function,) = registry().load(kernel)
    function = kernel_function.function
    numbers = [f"attrs.{p.name}" for p in entry.params if not p.per_head]
    if any(p.per_head for p in entry.params):
        function = ffi.tvm_ffi().convert(_in_order(function, entry.params))
    jax_tvm_ffi.register_ffi_target(
        name,
        function,
        ["args", "rets", "attrs.softmax_scale", *numbers],
        platform=_PLATFORMS[platform][0],
        allow_cuda_graph=True,
        pass_owned_tensor=any(p.per_head for p in entry.params),
    )


def _in_order(function: Callable, params: tuple) -> Callable:
    tensors = sum(p.per_head for p in params)

    def call(q, k, v, *others):
        per_head, (out, lse, scale, *numbers) = iter(others[:tensors]), others[tensors:]
        numbers = iter(numbers)
        function(q, k, v, out, lse, scale, *(next(per_head if p.per_head else numbers) for p in params))

    return call


def _call_kernel(target: str, request: Request, kernel: Installed, *arrays):
    entry, sizes = kernel.entry, request.sizes
    swap = entry.layout != request.layout

    def swapped(x):
        return jnp.swapaxes(x, 1, 2) if swap else x

    named = dict(zip(request.per_head, arrays[3:], strict=True))
    per_head = [
        jnp.broadcast_to(named.get(p.name, jnp.zeros((), p.dtype)), (sizes.batch, sizes.heads))
        for p in entry.params
        if p.per_head
    ]
    numbers = {p.name: _number(p.dtype, request.scalars[p.name]) for p in entry.params if not p.per_head}
    results = (
        jax.ShapeDtypeStruct(sizes.out_shape(entry.layout), arrays[0].dtype),
        jax.ShapeDtypeStruct((math.prod(sizes.lse_shape) if request.return_lse else 1,), jnp.float32),
    )
    numbers["softmax_scale"] = np.float32(request.softmax_scale)
    out, lse = jax.ffi.ffi_call(target, results)(*map(swapped, arrays[:3]), *per_head, **numbers)
    return (swapped(out), lse.reshape(sizes.lse_shape)) if request.return_lse else (swapped(out),)


def _number(dtype: str, value: float) -> np.generic:
    return np.dtype(dtype).type(value)
