"""A small case of each kernel against float64: what ``python -m tvm_flash check`` and the tuner run.

Kernels are called directly, with memory that is made here: no framework is needed, not even for a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_flash import numerics, reference
from tvm_flash.call.memory import WORKSPACE_ALIGNMENT, workspace_start
from tvm_flash.frameworks import contiguous_strides
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, Kernel, TensorSpec
from tvm_flash.measure.sample import BATCH, HEADS, KV_HEADS, PARAMS, params_of
from tvm_flash.measure.small_sequences import on_pages, one_after_another, packed
from tvm_flash.operators import ACCUMULATE, FORWARD, MERGED, SCALES, TENSORS, gradient_of, role_of
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import DENSE, PAGED, RAGGED, Argument, KernelEntry

#: What is in the results that a kernel adds to.
_THERE = 1.0
#: The tensors that kernels write, gradients of parameters apart.
_RESULTS = ("out", "lse", "dq", "dk", "dv")
#: Of each head of an 8-bit cache, what its elements are multiplied with.
CACHE_SCALES = np.linspace(0.03, 0.05, KV_HEADS, dtype=np.float32)


def share(figures: tuple[float, float]) -> float:
    """How much of what is allowed an error takes."""
    error, bound = figures
    return math.inf if math.isnan(error) else error / bound if bound else 0.0


def compare(
    entry: KernelEntry, functions: Sequence[Kernel], device: Device, seqlen_q: int, seqlen_kv: int, *, repeat: bool
) -> tuple[dict[str, tuple[float, float]], bool]:
    """Of each result its error and bound, by role; whether a second run, if asked for, had the same bits.

    Memory is full of NaN before each run.  ``functions`` are those of the kernel's launches.
    """
    lengths = seqlen_q, seqlen_kv
    expected = _EXPECTED[entry.form](*kind_of(entry)[:-1], lengths, *lengths)
    head_dims = entry.head_dim, entry.head_dim_v

    def computed():
        return run(entry, functions, device, expected.inputs, expected.scale, head_dims, params_of(*lengths))

    found = computed()
    again = computed() if repeat else found
    same = all(np.array_equal(x, again[role], equal_nan=True) for role, x in found.items())
    errors = {role: (numerics.largest_error(found[role], x), bound) for role, (x, bound) in expected.exact.items()}
    return errors, same


def kind_of(entry: KernelEntry) -> tuple:
    """What the exact results of a kernel follow from, and its bucket: kernels of one kind share them."""
    names, learnt = (tuple(p.name for p in entry.params if p.gradient or not only) for only in (False, True))
    what = entry.op, entry.dtype, entry.head_dim, entry.head_dim_v, entry.mask, entry.score, names, learnt
    return *what, entry.cache_dtype, entry.values_in_keys, entry.bucket


@dataclass(frozen=True)
class _Expected:
    """Inputs that a dtype holds; exact results by role, and how far off each may be."""

    inputs: Mapping[str, np.ndarray]
    scale: float
    exact: Mapping[str, tuple[np.ndarray, float]]


@functools.lru_cache(maxsize=2)
def _expected(
    op: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    score: str,
    params: tuple[str, ...],
    learnt: tuple[str, ...],
    cache_dtype: str,
    values_in_keys: bool,
    lengths: tuple[int, int],
    seqlen_q: int,
    seqlen_kv: int,
) -> _Expected:
    """Those of one case, with the parameters for ``lengths``, which are its own or those of the longest sequence.

    Where keys and values have 8 bits, the inputs are their elements, each head's with a scale of ``CACHE_SCALES``.
    """
    q, k, v = random_inputs(dtype, head_dim, head_dim_v, (BATCH, HEADS, KV_HEADS), (seqlen_q, seqlen_kv))
    if values_in_keys:
        v = k[..., :head_dim_v]
    elements = k, v
    if cache_dtype != dtype:
        scales = CACHE_SCALES[:, None, None]
        elements = tuple(numerics.round_to(x / scales, cache_dtype) for x in (k, v))
        k, v = (numerics.round_to(x * scales, dtype) for x in elements)
    what = {
        "softmax_scale": 1 / math.sqrt(head_dim),
        "mask": reference.MASKS[mask],
        "score": reference.SCORES[score],
        "params": {name: x for name, x in params_of(*lengths).items() if name in params},
    }
    inputs = {"q": q, "k": elements[0], "v": elements[1]}
    out, lse = reference.attention(q, k, v, **what)
    if op == FORWARD:
        bound = numerics.bound(numerics.usual_attention(q, k, v, dtype=dtype, **what), out, dtype)
        exact = {"o": (out, bound), "lse": (lse, numerics.lse_bound(lse))}
        return _Expected(inputs, what["softmax_scale"], exact)
    rng = np.random.default_rng(1)
    dout = numerics.round_to(rng.standard_normal(out.shape, np.float32), dtype)
    inputs |= {"do": dout, "o": numerics.round_to(out.astype(np.float32), dtype), "lse": lse.astype(np.float32)}
    inputs["dlse"] = rng.standard_normal(lse.shape, np.float32)
    asked = {**what, "dlse": inputs["dlse"], "gradients": learnt}
    exact, usual = (
        {"dq": x.dq, "dk": x.dk, "dv": x.dv, **{gradient_of(name): y for name, y in x.params.items()}}
        for x in (
            reference.attention_backward(dout, q, k, v, **asked),
            numerics.usual_gradients(dout, q, k, v, dtype=dtype, **asked),
        )
    )
    bounds = {role: numerics.gradient_bound(usual[role], x, dtype) for role, x in exact.items()}
    return _Expected(inputs, what["softmax_scale"], {role: (x, bounds[role]) for role, x in exact.items()})


@functools.lru_cache(maxsize=2)
def _expected_of_sequences(*what) -> _Expected:
    """The same of ``BATCH`` sequences, each shorter than the one before, with rows and keys after the last."""
    *what, seqlen_q, seqlen_kv = what
    alone = [_expected(*what, seqlen_q - 9 * b, seqlen_kv - 4 * b) for b in range(BATCH)]
    inputs = packed([{role: x[b] for role, x in found.inputs.items()} for b, found in enumerate(alone)], after=5)
    exact = {}
    for role, (first, _) in alone[0].exact.items():
        bound = max(found.exact[role][1] for found in alone)
        rows = [found.exact[role][0][b] for b, found in enumerate(alone)]
        per_head = first.ndim == 2
        exact[role] = (
            np.stack(rows) if per_head else one_after_another(rows, 5, -np.inf if role == "lse" else 0),
            bound,
        )
    return _Expected(inputs, alone[0].scale, exact)


@functools.lru_cache(maxsize=2)
def _expected_on_pages(*what) -> _Expected:
    """The same with the keys on pages."""
    found = _expected_of_sequences(*what)
    inputs = on_pages(found.inputs)
    scales = np.tile(CACHE_SCALES, (len(inputs["k"]), 1))
    return dataclasses.replace(found, inputs=inputs | dict.fromkeys(SCALES, scales))


_EXPECTED = {DENSE: _expected, RAGGED: _expected_of_sequences, PAGED: _expected_on_pages}


def random_inputs(
    dtype: str, head_dim: int, head_dim_v: int, heads: tuple[int, int, int], seqlens: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v in the layout bhsd: float32 numbers that a dtype holds exactly.

    ``heads`` are batch, heads, kv_heads; ``seqlens`` seqlen_q, seqlen_kv.
    """
    rng = np.random.default_rng(0)
    (batch, heads, kv_heads), (seqlen_q, seqlen_kv) = heads, seqlens
    shapes = (
        (batch, heads, seqlen_q, head_dim),
        (batch, kv_heads, seqlen_kv, head_dim),
        (batch, kv_heads, seqlen_kv, head_dim_v),
    )
    return tuple(numerics.round_to(rng.standard_normal(shape, dtype=np.float32), dtype) for shape in shapes)


def run(
    entry: KernelEntry,
    functions: Sequence[Kernel],
    device: Device,
    inputs: Mapping[str, np.ndarray],
    scale: float,
    head_dims: tuple[int, int],
    params: Mapping[str, Any] = PARAMS,
) -> dict[str, np.ndarray]:
    """What a kernel writes, by role, as float32 in the layout bhsd; memory is NaN before.

    Of a kernel that adds to what is there, what it adds; one that merges finds rows that have seen nothing.

    ``functions`` are those of its launches.  ``inputs`` are q, k, v and whatever else the operator takes, by role, in
    the layout bhsd, or those of sequences as :mod:`tvm_flash.measure.small_sequences` has them.  A kernel that has
    parameters of each head takes ``BATCH`` and ``HEADS``.

    Raises
    ------
    ValueError: a parameter isn't of the problem's sizes, so that the kernel would read outside of it.
    """
    q, k = inputs["q"].shape, inputs["k"].shape
    order = (0, 2, 1, 3) if entry.form == DENSE and entry.layout == "bshd" else (0, 1, 2, 3)
    of = dict(zip(("head_dim", "head_dim_v"), head_dims, strict=True))
    if entry.form != DENSE:
        batch = len(inputs["cu_seqlens_q"]) - 1
        of |= {"batch": batch, "heads": q[1], "kv_heads": k[-2], "total_q": q[0]}
        if entry.form == PAGED:
            per_sequence = inputs["page_table"].shape[1]
            of |= {"pages": k[0], "page_size": k[1], "pages_per_sequence": per_sequence}
            extents = entry.extents(sizes.of_pages(**of))
        else:
            of |= {"total_k": k[0]}
            extents = entry.extents(sizes.of_sequences(**of))
        shapes = {role_of(name): tuple(of[a] for a in TENSORS[name].ragged if a in of) for name in _RESULTS}
    else:
        of |= {"batch": q[0], "heads": q[1], "kv_heads": k[1], "seqlen_q": q[2], "seqlen_kv": k[2]}
        extents = entry.extents(sizes.of(**of), lambda role: np.shape(params[role.removeprefix("d_")]))
        shapes = {role_of(name): tuple(of[a] for a in TENSORS[name].axes) for name in _RESULTS}
    axes = {"b": of["batch"], "h": of["heads"], "i": of.get("seqlen_q"), "j": of.get("seqlen_kv")}
    for p in entry.params:
        expected = tuple(axes[a] for a in p.axes)
        if p.is_tensor and not p.rank and np.shape(params[p.name]) != expected:
            raise ValueError(f"params: {p.name} has shape {np.shape(params[p.name])}, the problem {expected}")
    shapes |= {gradient_of(p.name): tuple(axes[a] for a in p.of_gradient) or (1,) for p in entry.params if not p.rank}
    shapes |= {gradient_of(p.name): np.shape(params[p.name]) for p in entry.params if p.rank}
    learnt = {gradient_of(p.name) for p in entry.params}
    written, numbers, arrays = [], {"softmax_scale": scale}, {}
    numbers |= {
        p.name: (float if p.dtype == "float32" else int)(params[p.name]) for p in entry.params if not p.is_tensor
    }
    numbers |= {scalar.name: extents[scalar.name] for scalar in entry.scalars}
    tensors = {p.name: params[p.name] for p in entry.params if p.is_tensor}
    workspaces = {w.name: w for w in entry.workspaces}
    for argument in entry.arguments:
        role = argument.role
        if not argument.rank:
            continue
        if role in tensors:
            arrays[role] = numerics.encode(tensors[role], argument.dtype)
        elif role in inputs:
            cached = entry.cache_dtype != entry.dtype and role in ("k", "v")
            arrays[role] = _encoded(inputs[role], argument, order, entry.cache_dtype if cached else "")
        elif role in workspaces:
            shape = tuple(sizes.evaluate(n, extents) for n in workspaces[role].shape)
            first = 0.0 if workspaces[role].zeroed else np.nan
            arrays[role] = aligned(numerics.encode(np.full(shape, first, np.float32), argument.dtype))
        else:
            written.append(role)
            own = (0, 1, 2, 3) if role in learnt else order
            before = np.full(shapes[role], _before(entry, role), np.float32)
            arrays[role] = _encoded(before, argument, own)
    arguments: dict[str, TensorSpec | int | float] = dict(numbers)
    for role, x in arrays.items():
        strides = contiguous_strides(x.shape)
        arguments[role] = TensorSpec(x.shape, strides, entry.dtype_of(role), device.kind, device.index)
    launches = []
    for function, launch in zip(functions, entry.launches, strict=True):
        if not launch.is_needed(numbers):
            continue
        roles = [x.role for x in launch.arguments]
        launches.append((Frame(function, [arguments[role] for role in roles]), [r for r in roles if r in arrays]))
    run_launches(launches, device, arrays, written)
    found = {role: numerics.decode(arrays[role], entry.dtype_of(role)) for role in written}
    if entry.kind == ACCUMULATE:
        found = {role: x - _THERE for role, x in found.items()}
    laid_out = {r for r, x in found.items() if x.ndim == 4 and r not in learnt}
    return {r: x.transpose(order) if r in laid_out else x.reshape(shapes[r]) for r, x in found.items()}


def _before(entry: KernelEntry, role: str) -> float:
    """What is in the memory of a result before."""
    if entry.kind == ACCUMULATE:
        return _THERE
    return -np.inf if entry.kind == MERGED and role == "lse" else np.nan


def aligned(x: np.ndarray) -> np.ndarray:
    """The same in memory that begins where that of a workspace does."""
    room = np.empty(x.nbytes + WORKSPACE_ALIGNMENT, np.uint8)
    start = workspace_start(room.ctypes.data) - room.ctypes.data
    found = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    found[...] = x
    return found


def _encoded(x: np.ndarray, argument: Argument, order: tuple[int, ...], dtype: str = "") -> np.ndarray:
    """Memory as a kernel takes it: its layout, a vector for what is flat; of another ``dtype`` than it says, if any."""
    x = x.transpose(order) if argument.rank == 4 else x.reshape(-1) if argument.rank == 1 else x
    return numerics.encode(x, dtype or argument.dtype)


def run_launches(
    launches: list[tuple[Frame, list[str]]], device: Device, arrays: dict[str, np.ndarray], written: list[str]
) -> None:
    """Run launches, each with the roles of its tensors, on host arrays; a GPU gets copies, and gives back what is
    ``written``."""
    addresses = {role: a.ctypes.data for role, a in arrays.items()}
    if device.kind == "cpu":
        for frame, roles in launches:
            frame.run([addresses[role] for role in roles])
        return
    with cuda.primary_context(device.index) as driver:
        buffers = {role: cuda.Buffer(driver, addresses[role], a.nbytes) for role, a in arrays.items()}
        try:
            for frame, roles in launches:
                frame.run([buffers[role].pointer for role in roles])
            for role in written:
                buffers[role].download(addresses[role])
        finally:
            for buffer in buffers.values():
                buffer.free()
