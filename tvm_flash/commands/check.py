"""One small case for each installed kernel, against float64: what ``python -m tvm_flash check`` runs.

Kernels are called directly, with memory that is made here: no framework is needed, not even for a GPU.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tvm_flash import numerics, reference
from tvm_flash.display import Entry, Table, table
from tvm_flash.errors import TvmFlashError
from tvm_flash.frameworks import contiguous_strides
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, TensorSpec
from tvm_flash.measure.sample import BATCH, HEADS, KV_HEADS, PARAMS, SEQLEN_KV, SEQLEN_Q
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: Keys that a kernel for longer sequences gets beyond those of the case, at most: enough for several tiles.  Without a
#: limit (``--thorough``) float64 alone took 0.5 s a kernel.
LONGER_BY = 512
#: Further lengths of queries and keys of a thorough check: several row tiles, the last of them not whole.
THOROUGH_LENGTHS = (300, 333)


@dataclass(frozen=True)
class Result:
    """What became of one kernel: largest error and what is allowed, of the result and of its log-sum-exp.

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
        if kernel.entry.op == "forward"
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
    ok = all(error <= bound and lse_error <= lse_bound for error, bound, lse_error, lse_bound, _ in found)
    note = "" if all(same for *_, same in found) else "another run gives other bits"
    figures = max(found, key=lambda f: math.inf if math.isnan(f[0]) else f[0] / f[1] if f[1] else 0.0)[:-1]
    return Result(*identity, ok and not note, time.perf_counter() - start, *figures, note)


def _compare(kernel: Installed, device: Device, seqlen_q: int, seqlen_kv: int, *, repeat: bool):
    """Error and bound of the result and of the log-sum-exp; whether a second run, if asked for, had the same bits."""
    problem = _problem(*_kind(kernel.entry)[:-1], seqlen_q, seqlen_kv)
    out, lse = run(kernel, device, problem.q, problem.k, problem.v, problem.scale)
    again = run(kernel, device, problem.q, problem.k, problem.v, problem.scale) if repeat else (out, lse)
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip((out, lse), again, strict=True))
    return (
        *(numerics.largest_error(out, problem.out), problem.bound),
        *(numerics.largest_error(lse, problem.lse), numerics.lse_bound(problem.lse)),
        same,
    )


def _kind(entry: KernelEntry) -> tuple:
    """What the exact result of a kernel follows from, and its bucket: kernels of one kind share it."""
    names = tuple(p.name for p in entry.params)
    return entry.dtype, entry.head_dim, entry.head_dim_v, entry.mask, entry.score, names, entry.bucket


@dataclass(frozen=True)
class _Problem:
    """Inputs that a dtype holds, exact results, and how far off a result may be."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    out: np.ndarray
    lse: np.ndarray
    bound: float


@functools.lru_cache(maxsize=2)
def _problem(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    score: str,
    params: tuple[str, ...],
    seqlen_q: int,
    seqlen_kv: int,
) -> _Problem:
    q, k, v = random_inputs(dtype, head_dim, head_dim_v, (BATCH, HEADS, KV_HEADS), (seqlen_q, seqlen_kv))
    what = {
        "softmax_scale": 1 / math.sqrt(head_dim),
        "mask": reference.MASKS[mask],
        "score": reference.SCORES[score],
        "params": {name: PARAMS[name] for name in params},
    }
    out, lse = reference.attention(q, k, v, **what)
    usual = numerics.usual_attention(q, k, v, dtype=dtype, **what)
    return _Problem(q, k, v, what["softmax_scale"], out, lse, numerics.bound(usual, out, dtype))


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
    kernel: Installed, device: Device, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Result ``(batch, heads, seqlen_q, head_dim_v)`` and log-sum-exp of a kernel, as float32, with ``PARAMS``.

    A kernel that has parameters of each head takes ``BATCH`` and ``HEADS``.
    """
    entry, rows = kernel.entry, q.shape[:3]
    order = (0, 1, 2, 3) if entry.layout == "bhsd" else (0, 2, 1, 3)
    unwritten = np.full((*rows, entry.head_dim_v), np.nan, np.float32)
    inputs = {"q": q, "k": k, "v": v, "o": unwritten}
    arrays = {role: numerics.encode(x.transpose(order), entry.dtype_of(role)) for role, x in inputs.items()}
    arrays["lse"] = np.full(math.prod(rows), np.nan, np.float32)
    numbers: dict[str, float | int] = {"softmax_scale": scale}
    for param in entry.params:
        value = PARAMS[param.name]
        if param.per_head:
            arrays[param.name] = value
        else:
            numbers[param.name] = float(value) if param.dtype == "float32" else int(value)
    extents = entry.extents(sizes.of(*rows, k.shape[1], k.shape[2], entry.head_dim, entry.head_dim_v))
    numbers |= {scalar.name: extents[scalar.name] for scalar in entry.scalars}
    for workspace in entry.workspaces:
        shape = tuple(sizes.evaluate(n, extents) for n in workspace.shape)
        arrays[workspace.name] = numerics.encode(
            np.full(shape, 0.0 if workspace.zeroed else np.nan, np.float32), workspace.dtype
        )
    arguments: dict[str, TensorSpec | int | float] = dict(numbers)
    for argument in entry.arguments:
        if argument.role in arrays:
            shape = arrays[argument.role].shape
            strides = contiguous_strides(shape)
            arguments[argument.role] = TensorSpec(shape, strides, argument.dtype, device.kind, device.index)
    launches = []
    for function, launch in zip(registry().load(kernel), entry.launches, strict=True):
        roles = [x.role for x in launch.arguments]
        launches.append((Frame(function, [arguments[role] for role in roles]), [r for r in roles if r in arrays]))
    _run(launches, device, arrays)
    out = numerics.decode(arrays["o"], entry.dtype_of("o")).transpose(order)
    return out, arrays["lse"].reshape(rows)


def _run(launches: list[tuple[Frame, list[str]]], device: Device, arrays: dict[str, np.ndarray]) -> None:
    """Run launches, each with the roles of its tensors, on host arrays; a GPU gets copies, and results come back."""
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
            for role in ("o", "lse"):
                buffers[role].download(addresses[role])
        finally:
            for buffer in buffers.values():
                buffer.free()
