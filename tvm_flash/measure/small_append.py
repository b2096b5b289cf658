"""The small case of a kernel that turns new queries and keys, and puts new keys and values into a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tvm_flash import numerics
from tvm_flash.frameworks import contiguous_strides
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, Kernel, TensorSpec
from tvm_flash.measure.sample import BATCH, HEADS, KV_HEADS
from tvm_flash.measure.small_case import aligned, run_launches
from tvm_flash.measure.small_sequences import PAGE_SIZE
from tvm_flash.packs.manifest import HALVES, KernelEntry

#: Keys that each sequence has before.
_BEFORE = (5, 31)
#: What is in the cache before.
_THERE = 1.0


@dataclass(frozen=True)
class Case:
    """Memory by role, what results are exactly, by role, and the kernel's numbers."""

    arrays: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]
    numbers: dict[str, int]


def case_of(entry: KernelEntry, rows: int) -> Case:
    """Sequences of ``rows`` new tokens and fewer, half of whose elements are turned."""
    rng, dtype = np.random.default_rng(0), entry.dtype
    added = [max(1, rows - 9 * b) for b in range(BATCH)]
    starts = np.cumsum([0, *added]).astype(np.int32)
    total, half = int(starts[-1]), entry.head_dim // 4
    columns = -(-(max(_BEFORE) + rows) // PAGE_SIZE)
    table = rng.permutation(BATCH * columns).astype(np.int32).reshape(BATCH, columns)
    widths = {"q": (HEADS, entry.head_dim), "k": (KV_HEADS, entry.head_dim), "v": (KV_HEADS, entry.head_dim_v)}
    new = {n: numerics.round_to(rng.standard_normal((total, *of), np.float32), dtype) for n, of in widths.items()}
    angles = rng.uniform(0, 6, (max(_BEFORE) + rows, half))
    cos, sin = (numerics.round_to(x.astype(np.float32), dtype) for x in (np.cos(angles), np.sin(angles)))
    cached = {n: np.full((BATCH * columns, PAGE_SIZE, *widths[n]), _THERE) for n in "kv"}
    exact = {"o": new["q"].astype(np.float64), **cached}
    for b, before in enumerate(_BEFORE):
        for row in range(starts[b], starts[b + 1]):
            position = before + row - starts[b]
            place = table[b, position // PAGE_SIZE], position % PAGE_SIZE
            exact["o"][row] = _turned(new["q"][row], cos[position], sin[position])
            exact["k"][place] = _turned(new["k"][row], cos[position], sin[position])
            exact["v"][place] = new["v"][row]
    arrays = {"q": new["q"], "o": np.full_like(new["q"], np.nan), "k_new": new["k"], "v_new": new["v"]}
    arrays |= {"rotary_cos": cos, "rotary_sin": sin}
    arrays |= {n: np.full(x.shape, _THERE, np.float32) for n, x in cached.items()}
    arrays = {role: numerics.encode(x, dtype) for role, x in arrays.items()}
    arrays |= {role: arrays[role].view(np.uint8) for role in "kv"}
    arrays |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), starts)
    arrays |= dict.fromkeys(("cache_seqlens", "rotary_seqlens"), np.array(_BEFORE, np.int32))
    arrays |= {"page_table": table}
    arrays |= dict.fromkeys(("k_scale", "v_scale"), np.ones((BATCH * columns, KV_HEADS), np.float32))
    return Case(
        {role: aligned(x) for role, x in arrays.items()}, exact, {"turns": HALVES, "along": 1, "cache_format": 0}
    )


def _turned(row: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """``(heads, dim)`` by the definition of the rotation, in float64."""
    half, row = len(cos), row.astype(np.float64)
    a, b = row[:, :half], row[:, half : 2 * half]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos, row[:, 2 * half :]), 1)


def run(entry: KernelEntry, functions: Sequence[Kernel], device: Device, case: Case) -> dict[str, np.ndarray]:
    """What a kernel makes of a case, by role, as float32."""
    specs = {
        role: TensorSpec(x.shape, contiguous_strides(x.shape), entry.dtype_of(role), device.kind, device.index)
        for role, x in case.arrays.items()
    }
    roles = [x.role for x in entry.arguments]
    frame = Frame(functions[0], [specs[role] if role in specs else case.numbers[role] for role in roles])
    run_launches([(frame, [role for role in roles if role in specs])], device, case.arrays, list(case.exact))
    memory = {role: case.arrays[role] for role in case.exact}
    memory |= {role: memory[role].view(memory["o"].dtype) for role in "kv"}
    return {role: numerics.decode(x, entry.dtype) for role, x in memory.items()}


def compare(
    entry: KernelEntry, functions: Sequence[Kernel], device: Device, rows: int, *, repeat: bool
) -> tuple[dict[str, tuple[float, float]], bool]:
    """As :func:`tvm_flash.measure.small_case.compare`."""
    found = [run(entry, functions, device, case_of(entry, rows)) for _ in range(1 + repeat)]
    exact, rounding = case_of(entry, rows).exact, numerics.EPSILON[entry.dtype]
    bounds = {role: 0.0 if role == "v" else 2 * rounding * numerics.magnitude(x) for role, x in exact.items()}
    errors = {role: (numerics.largest_error(found[0][role], x), bounds[role]) for role, x in exact.items()}
    return errors, all(np.array_equal(x, found[-1][role]) for role, x in found[0].items())
