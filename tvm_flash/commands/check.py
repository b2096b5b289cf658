"""One small case for each installed kernel, against float64: what ``python -m tvm_flash check`` runs.

Kernels are called directly, with memory that is made here: no framework is needed, not even for a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_flash import numerics, reference
from tvm_flash.call.memory import MAX_ALIGNMENT
from tvm_flash.commands.check_sequences import on_pages, one_after_another, packed
from tvm_flash.display import Entry, Table, table
from tvm_flash.errors import TvmFlashError
from tvm_flash.frameworks import contiguous_strides
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, TensorSpec
from tvm_flash.measure.sample import BATCH, HEADS, KV_HEADS, PARAMS, SEQLEN_KV, SEQLEN_Q, params_of
from tvm_flash.operators import ACCUMULATE, FORWARD, TENSORS, gradient_of, role_of
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, DENSE, PAGED, RAGGED, Argument, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: Keys that a kernel for longer sequences gets beyond those of the case, at most: enough for several tiles.  Without a
#: limit (``--thorough``) float64 alone took 0.5 s a kernel.
LONGER_BY = 512
#: Further lengths of queries and keys of a thorough check: several row tiles, the last of them not whole.
THOROUGH_LENGTHS = (300, 333)


@dataclass(frozen=True)
class Result:
    """What became of one kernel: largest error and what is allowed, of the result and, if it has one, the log-sum-exp.

    Of a backward kernel, those of the gradient that comes nearest to what is allowed.

    ``note`` says why there are no figures, or what failed.
    """

    symbol: str
    arch: str
    device: str
    ok: bool
    seconds: float
    error: float | None = None
    bound: float | None = None
    lse_error: float | None = None
    lse_bound: float | None = None
    note: str = ""

    def line(self) -> str:
        """The result in a line."""
        figures = "" if self.error is None else f"error {self.error:.1e} (≤ {self.bound:.1e})  "
        mark = "✓" if self.ok else "✗"
        return f"{mark} {self.device} {self.symbol}  {figures}{self.seconds:.2f} s  {self.note}".rstrip()


def check_kernels(
    arch: str | None = None, begins: Callable[[str], None] = lambda _: None, *, thorough: bool = False
) -> Iterator[Result]:
    """Run every installed kernel that a device of this machine can, or those of one arch.

    ``begins`` hears the symbol of a kernel before it runs.  A ``thorough`` check has more and longer cases, and runs
    each twice: the bits must be the same.
    """
    with contextlib.ExitStack() as held:
        for index in {device.index for _, device in _runnable(arch) if device.kind == "cuda"}:
            held.enter_context(cuda.held(index))
        for kernel, device in _runnable(arch):
            begins(kernel.entry.symbol)
            yield check_kernel(kernel, device, thorough=thorough)


def count(arch: str | None = None) -> int:
    """How many results :func:`check_kernels` gives."""
    return sum(1 for _ in _runnable(arch))


def _runnable(arch: str | None) -> Iterator[tuple[Installed, Device]]:
    devices = [Device("cpu"), *(Device("cuda", i) for i in range(cuda.device_count()))]
    return (
        (kernel, device)
        for device in devices
        for candidate in device.archs()
        if arch in (None, candidate)
        for kernel in sorted(registry().kernels(candidate), key=lambda k: _kind(k.entry))
        if kernel.entry.kind != ACCUMULATE
    )


def summary(results: Iterable[Result]) -> Table:
    """What the results come to, by device and arch."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.device, result.arch), []).append(result)
    rows = []
    for (device, arch), found in groups.items():
        shares = [r.error / r.bound for r in found if r.error is not None and r.bound]
        failed = sum(not r.ok for r in found)
        rows.append(
            (
                *(device, arch, str(len(found)), Entry(str(failed), "bad" if failed else "")),
                *(f"{max(shares):.2g}" if shares else "–", f"{sum(r.seconds for r in found):.1f}"),
            )
        )
    return table("", ("device", "arch", "kernels", "failed", "error / allowed", "seconds"), rows, labels=2)


def check_kernel(kernel: Installed, device: Device, *, thorough: bool = False) -> Result:
    """Run one kernel."""
    entry, start = kernel.entry, time.perf_counter()
    identity = (entry.symbol, entry.arch, str(device))
    if entry.definition != BUILTIN_DEFINITION:
        return Result(
            *identity, True, 0.0, note="not checked: a definition of the user's own, without a numpy twin here"
        )
    try:
        lengths = [(SEQLEN_Q, SEQLEN_KV + (entry.bucket if thorough else min(entry.bucket, LONGER_BY)))]
        lengths += [THOROUGH_LENGTHS] if thorough else []
        found = [_compare(kernel, device, *length, repeat=thorough) for length in lengths]
    except TvmFlashError as e:
        return Result(*identity, False, time.perf_counter() - start, note=str(e))
    ok = all(error <= bound for errors, _ in found for error, bound in errors.values())
    note = "" if all(same for _, same in found) else "another run gives other bits"
    worst = {role: max((e[role] for e, _ in found), key=_share) for role in found[0][0]}
    results = max((x for role, x in worst.items() if role != "lse"), key=_share)
    figures = (*results, *worst.get("lse", (None, None)))
    return Result(*identity, ok and not note, time.perf_counter() - start, *figures, note)


def _share(figures: tuple[float, float]) -> float:
    """How much of what is allowed an error takes."""
    error, bound = figures
    return math.inf if math.isnan(error) else error / bound if bound else 0.0


def _compare(kernel: Installed, device: Device, seqlen_q: int, seqlen_kv: int, *, repeat: bool):
    """Of each result its error and bound, by role; whether a second run, if asked for, had the same bits."""
    entry = kernel.entry
    lengths = seqlen_q, seqlen_kv
    expected = _EXPECTED[entry.form](*_kind(entry)[:-1], lengths, *lengths)
    head_dims = entry.head_dim, entry.head_dim_v

    def computed():
        return run(kernel, device, expected.inputs, expected.scale, head_dims, params_of(*lengths))

    found = computed()
    again = computed() if repeat else found
    same = all(np.array_equal(x, again[role], equal_nan=True) for role, x in found.items())
    errors = {role: (numerics.largest_error(found[role], x), bound) for role, (x, bound) in expected.exact.items()}
    return errors, same


def _kind(entry: KernelEntry) -> tuple:
    """What the exact results of a kernel follow from, and its bucket: kernels of one kind share them."""
    names, learnt = (tuple(p.name for p in entry.params if p.gradient or not only) for only in (False, True))
    return entry.op, entry.dtype, entry.head_dim, entry.head_dim_v, entry.mask, entry.score, names, learnt, entry.bucket


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
    lengths: tuple[int, int],
    seqlen_q: int,
    seqlen_kv: int,
) -> _Expected:
    """Those of one case, with the parameters for ``lengths``, which are its own or those of the longest sequence."""
    q, k, v = random_inputs(dtype, head_dim, head_dim_v, (BATCH, HEADS, KV_HEADS), (seqlen_q, seqlen_kv))
    what = {
        "softmax_scale": 1 / math.sqrt(head_dim),
        "mask": reference.MASKS[mask],
        "score": reference.SCORES[score],
        "params": {name: x for name, x in params_of(*lengths).items() if name in params},
    }
    inputs = {"q": q, "k": k, "v": v}
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
    return dataclasses.replace(found, inputs=on_pages(found.inputs))


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
    kernel: Installed,
    device: Device,
    inputs: Mapping[str, np.ndarray],
    scale: float,
    head_dims: tuple[int, int],
    params: Mapping[str, Any] = PARAMS,
) -> dict[str, np.ndarray]:
    """What a kernel writes, by role, as float32 in the layout bhsd; memory is NaN before.

    ``inputs`` are q, k, v and whatever else the operator takes, by role, in the layout bhsd, or those of sequences as
    :mod:`tvm_flash.commands.check_sequences` has them.  A kernel that has parameters of each head takes ``BATCH`` and
    ``HEADS``.
    """
    entry, q, k = kernel.entry, inputs["q"].shape, inputs["k"].shape
    order = (0, 2, 1, 3) if entry.form == DENSE and entry.layout == "bshd" else (0, 1, 2, 3)
    of = dict(zip(("head_dim", "head_dim_v"), head_dims, strict=True))
    if entry.form != DENSE:
        starts = len(inputs["cu_seqlens_q"])
        of |= {"batch": starts - 1, "heads": q[1], "kv_heads": k[-2], "total_q": q[0]}
        if entry.form == PAGED:
            per_sequence = inputs["page_table"].shape[1]
            of |= {"pages": k[0], "page_size": k[1], "pages_per_sequence": per_sequence}
            extents = entry.extents(sizes.of_pages(**of))
        else:
            of |= {"total_k": k[0]}
            extents = entry.extents(sizes.of_sequences(**of))
        shapes = {
            role_of(name): tuple({**of, "starts": starts}.get(a, 0) for a in x.ragged) for name, x in TENSORS.items()
        }
    else:
        of |= {"batch": q[0], "heads": q[1], "kv_heads": k[1], "seqlen_q": q[2], "seqlen_kv": k[2]}
        extents = entry.extents(sizes.of(**of))
        shapes = {role_of(name): tuple(of[a] for a in x.axes if a in of) for name, x in TENSORS.items()}
    shapes |= {gradient_of(p.name): (of["batch"], of["heads"]) if p.per_head else (1,) for p in entry.params}
    written, numbers, arrays = [], {"softmax_scale": scale}, {}
    numbers |= {
        p.name: (float if p.dtype == "float32" else int)(params[p.name]) for p in entry.params if not p.per_head
    }
    numbers |= {scalar.name: extents[scalar.name] for scalar in entry.scalars}
    per_head = {p.name: params[p.name] for p in entry.params if p.per_head}
    workspaces = {w.name: w for w in entry.workspaces}
    for argument in entry.arguments:
        role = argument.role
        if not argument.rank:
            continue
        if role in per_head:
            arrays[role] = per_head[role]
        elif role in inputs:
            arrays[role] = _encoded(inputs[role], argument, order)
        elif role in workspaces:
            shape = tuple(sizes.evaluate(n, extents) for n in workspaces[role].shape)
            first = 0.0 if workspaces[role].zeroed else np.nan
            arrays[role] = _aligned(numerics.encode(np.full(shape, first, np.float32), argument.dtype))
        else:
            written.append(role)
            arrays[role] = _encoded(np.full(shapes[role], np.nan, np.float32), argument, order)
    arguments: dict[str, TensorSpec | int | float] = dict(numbers)
    for role, x in arrays.items():
        strides = contiguous_strides(x.shape)
        arguments[role] = TensorSpec(x.shape, strides, entry.dtype_of(role), device.kind, device.index)
    launches = []
    for function, launch in zip(registry().load(kernel), entry.launches, strict=True):
        roles = [x.role for x in launch.arguments]
        launches.append((Frame(function, [arguments[role] for role in roles]), [r for r in roles if r in arrays]))
    _run(launches, device, arrays, written)
    found = {role: numerics.decode(arrays[role], entry.dtype_of(role)) for role in written}
    return {r: x.transpose(order) if x.ndim == 4 else x.reshape(shapes[r]) for r, x in found.items()}


def _aligned(x: np.ndarray) -> np.ndarray:
    """The same in memory that begins where that of a workspace does."""
    room = np.empty(x.nbytes + MAX_ALIGNMENT, np.uint8)
    start = -room.ctypes.data % MAX_ALIGNMENT
    found = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    found[...] = x
    return found


def _encoded(x: np.ndarray, argument: Argument, order: tuple[int, ...]) -> np.ndarray:
    """Memory as a kernel takes it: its layout, a vector for what is flat."""
    x = x.transpose(order) if argument.rank == 4 else x.reshape(-1) if argument.rank == 1 else x
    return numerics.encode(x, argument.dtype)


def _run(
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
