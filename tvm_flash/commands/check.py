"""One small case for each installed kernel, against float64: what ``python -m tvm_flash check`` runs.

Kernels are called directly, with memory that is made here: no framework is needed, not even for a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tvm_flash import reference
from tvm_flash.commands.display import Entry, Table, table
from tvm_flash.errors import TvmFlashError
from tvm_flash.frameworks import contiguous_strides
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, TensorSpec
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: The case: odd lengths, grouped heads, more keys than queries.
BATCH, HEADS, KV_HEADS, SEQLEN_Q, SEQLEN_KV = 2, 4, 2, 33, 70

#: Run-time parameters of the builtin definition: small enough that each of them changes the result.
PARAMS = {
    "softcap": 2.5,
    "alibi_slopes": np.array([[2.0 ** -(2 + h + HEADS * b) for h in range(HEADS)] for b in range(BATCH)], np.float32),
    "window_left": 40,
    "window_right": 3,
    "sink_tokens": 4,
    "kv_start": np.array([[2, 3, 0, 1], [11, 0, 5, 12]], np.int32),
    "kv_end": np.array([[70, 60, 50, 40], [70, 41, 52, 63]], np.int32),
    "query_start": np.array([[37, 30, 21, 10], [40, 9, -2, 31]], np.int32),
    "has_query_start": 1,
    "has_alibi_slopes": 1,
}

#: Distance of 1 from the next larger number of each dtype.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

#: Of the log-sum-exp, relative to the largest: 32 roundings, since it ends a sum over all keys, rescaled tile by tile.
LSE_TOLERANCE = 4e-6


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


def check_kernels(arch: str | None = None, begins: Callable[[str], None] = lambda _: None) -> Iterator[Result]:
    """Run every installed kernel that a device of this machine can, or those of one arch.

    ``begins`` hears the symbol of a kernel before it runs.
    """
    for kernel, device in _runnable(arch):
        begins(kernel.entry.symbol)
        yield check_kernel(kernel, device)


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
        for kernel in registry().kernels(candidate)
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


def check_kernel(kernel: Installed, device: Device) -> Result:
    """Run one kernel."""
    entry, start = kernel.entry, time.perf_counter()
    identity = (entry.symbol, entry.arch, str(device))
    if entry.definition != BUILTIN_DEFINITION:
        return Result(
            *identity, True, 0.0, note="not checked: a definition of the user's own, without a numpy twin here"
        )
    try:
        return _compare(kernel, device, identity, start)
    except TvmFlashError as e:
        return Result(*identity, False, time.perf_counter() - start, note=str(e))


def _compare(kernel: Installed, device: Device, identity: tuple[str, str, str], start: float) -> Result:
    entry = kernel.entry
    q, k, v = random_inputs(entry, (BATCH, HEADS, KV_HEADS), (SEQLEN_Q, SEQLEN_KV + entry.bucket))
    scale = 1 / math.sqrt(entry.head_dim)
    out, lse = run(kernel, device, q, k, v, scale)
    what = {
        "softmax_scale": scale,
        "mask": reference.MASKS[entry.mask],
        "score": reference.SCORES[entry.score],
        "params": {p.name: PARAMS[p.name] for p in entry.params},
    }
    want, want_lse = reference.attention(q, k, v, **what)
    usual = usual_attention(q, k, v, dtype=entry.dtype, **what)
    figures = [
        *(largest_error(out, want), bound(usual, want, entry.dtype)),
        *(largest_error(lse, want_lse), lse_bound(want_lse)),
    ]
    ok = figures[0] <= figures[1] and figures[2] <= figures[3]  # false for NaN
    return Result(*identity, ok, time.perf_counter() - start, *figures)


def largest_error(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference, NaN if there is one; equal infinities don't differ."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(got == exact, 0.0, got - exact)).max(initial=0.0))


def bound(usual: np.ndarray, exact: np.ndarray, dtype: str) -> float:
    """How large an error may be: twice that of the usual computation in the same dtype, plus one rounding."""
    return 2 * largest_error(usual, exact) + EPSILON[dtype] * _magnitude(exact)


def lse_bound(exact: np.ndarray) -> float:
    """How large an error of the log-sum-exp may be."""
    return LSE_TOLERANCE * max(1.0, _magnitude(exact))


def _magnitude(x: np.ndarray) -> float:
    return float(np.abs(x[np.isfinite(x)]).max(initial=0.0))


def random_inputs(
    entry: KernelEntry, heads: tuple[int, int, int], seqlens: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v in the layout bhsd: float32 numbers that the kernel's dtype holds exactly.

    ``heads`` are batch, heads, kv_heads; ``seqlens`` seqlen_q, seqlen_kv.
    """
    rng = np.random.default_rng(0)
    (batch, heads, kv_heads), (seqlen_q, seqlen_kv) = heads, seqlens
    shapes = (
        (batch, heads, seqlen_q, entry.head_dim),
        (batch, kv_heads, seqlen_kv, entry.head_dim),
        (batch, kv_heads, seqlen_kv, entry.head_dim_v),
    )
    return tuple(round_to(rng.standard_normal(shape, dtype=np.float32), entry.dtype) for shape in shapes)


def usual_attention(q, k, v, *, softmax_scale, mask, score, params, dtype) -> np.ndarray:
    """The same attention as one would expect it of the dtype: float32 throughout, weights and result rounded.

    Arguments and result are those of :func:`tvm_flash.reference.attention`, but for the log-sum-exp.
    """
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    values = {name: x if np.ndim(x) == 0 else np.asarray(x)[..., None, None] for name, x in params.items()}
    rows, columns = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])[None, :]
    at = reference.Positions(rows, columns, q.shape[2], k.shape[2], values)
    s = np.zeros((*q.shape[:3], k.shape[2]), np.float32)
    for d in range(q.shape[3]):  # one product after another, as kernels sum, where NumPy would sum in pairs
        s += q[..., :, None, d] * k[..., None, :, d]
    s = score(s * np.float32(softmax_scale), at)
    s = np.where(mask(at), s, -np.inf).astype(np.float32)
    row_max = s.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        prob = np.where(row_max == -np.inf, np.float32(0), np.exp(s - row_max))
        row_sum = prob.sum(axis=-1, keepdims=True)
        out = np.where(row_sum == 0, np.float32(0), np.einsum("bhij,bhjd->bhid", round_to(prob, dtype), v) / row_sum)
    return round_to(out, dtype)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers rounded to a dtype, ties to even."""
    return _decode(_encode(x, dtype), dtype)


def _encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Memory of a dtype with the values of ``x``; bfloat16, which NumPy lacks, as uint16."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype=dtype)
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _decode(memory: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return memory.astype(np.float32)
    return (memory.astype(np.uint32) << 16).view(np.float32)


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
    arrays = {role: _encode(x.transpose(order), entry.dtype_of(role)) for role, x in inputs.items()}
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
        arrays[workspace.name] = _encode(
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
    out = _decode(arrays["o"], entry.dtype_of("o")).transpose(order)
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
