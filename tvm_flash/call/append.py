"""New queries and keys turned, and new keys and values put into a cache, by one kernel.

Nothing is checked here but whether there is a kernel that takes the tensors: callers have checked them, and have other
ways where there is none, as in packs of earlier versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tvm_flash.call import memory
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE, INT32_MAX
from tvm_flash.frameworks import Framework, TensorView
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, TensorSpec
from tvm_flash.operators import APPEND, OPERATORS, SCALES, role_of
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, CACHE_FORMATS, UNTURNED, KernelEntry
from tvm_flash.packs.registry import Installed, on_refresh, registry

#: Tensors whose addresses and strides a kernel may ask to be aligned.
_ROWS = ("k_cache", "v_cache", "k_new", "v_new", "q", "turned")
_CACHES = ("k_cache", "v_cache")
#: What lends its memory to a tensor that isn't there, and which no kernel reads then.
_STAND_INS = {"q": "k_new", "turned": "k_new", "cu_seqlens_q": "cu_seqlens_k_new", "rotary_seqlens": "cache_seqlens"}
_STAND_INS |= {"rotary_cos": "k_new", "rotary_sin": "k_new", "k_scale": "cache_seqlens", "v_scale": "cache_seqlens"}

#: Plans that are kept; the oldest goes first.
_MAX_PLANS = 1024
_plans: dict[Any, _Plan | None] = {}
on_refresh(_plans.clear)


def append(framework: Framework, tensors: Mapping[str, Any], turns: int = UNTURNED, along: bool = True) -> bool:
    """Turn and append; whether it was done, as there is a kernel for these tensors.

    Parameters
    ----------
    tensors: those that are given of the operator ``APPEND``, by name: rows of all sequences one after the other, as in
        :mod:`tvm_flash.packs.manifest`; ``turned`` gets the queries.
    turns, along: as there.

    Raises
    ------
    PackError: no pack for the device, or a damaged one.
    KernelError: the kernel failed to launch.
    """
    key = (turns, along, *tensors, framework.keys(tensors.values()))
    try:
        plan = _plans[key]
    except KeyError:
        plan = _plan_of({name: framework.view(x, name) for name, x in tensors.items()}, turns, along)
        while len(_plans) >= _MAX_PLANS:
            _plans.pop(next(iter(_plans)), None)
        _plans[key] = plan
    return plan is not None and plan.run(framework, tensors)


class _Plan:
    """A kernel with its arguments laid out but for their pointers."""

    def __init__(self, kernel: Installed, given: Mapping[str, TensorView], numbers: Mapping[str, int]):
        entry = kernel.entry
        (self._function,) = registry().load(kernel)
        specs = _specs(given)
        self._arguments = [specs[x.role] if x.rank else numbers[x.role] for x in entry.arguments]
        names = {role_of(name): name for name in OPERATORS[APPEND].tensors(())}
        found = (names[x.role] for x in entry.arguments if x.rank)
        self._names = [name if name in given else _STAND_INS[name] for name in found]
        self._rows, self._misaligned = [name for name in _ROWS if name in given], entry.alignment - 1
        device = given["k_cache"]
        self._gpu = device.device_index if device.device_kind == "cuda" else None
        self._frames: list[Frame] = []  # append and pop are atomic: threads never share a frame

    def run(self, framework: Framework, tensors: Mapping[str, Any]) -> bool:
        """Launch the kernel, unless it can't take addresses like those of the tensors."""
        at = {name: framework.pointer(x) for name, x in tensors.items()}
        bits = 0
        for name in self._rows:
            bits |= at[name]
        if bits & self._misaligned:
            return False
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = Frame(self._function, self._arguments)
        pointers = [at[name] for name in self._names]
        if self._gpu is None:
            frame.run(pointers)
        else:
            frame.run_on_stream(pointers, framework.stream(self._gpu))
        self._frames.append(frame)
        return True


def _plan_of(given: Mapping[str, TensorView], turns: int, along: bool) -> _Plan | None:
    """The plan of a call, if a kernel takes tensors like these."""
    cache, new = given["k_cache"], given["k_new"]
    packs, device = registry(), Device(cache.device_kind, cache.device_index)
    for arch in device.archs():
        for kernel in packs.candidates(arch, BUILTIN_DEFINITION, new.dtype, APPEND):
            if _takes(kernel.entry, given):
                format_ = CACHE_FORMATS.get(cache.dtype, 0)
                return _Plan(kernel, given, {"turns": turns, "along": int(along), "cache_format": format_})
    return None


def _takes(entry: KernelEntry, given: Mapping[str, TensorView]) -> bool:
    """Whether a kernel takes sizes, strides and dtypes like these."""
    table, widths = given["page_table"], tuple(given[name].shape[-1] for name in ("k_new", "v_new"))
    if widths[0] > entry.head_dim or widths[1] > entry.head_dim_v or any(x % HEAD_DIM_MULTIPLE for x in widths):
        return False
    dense = [x for name, x in given.items() if name not in (*SCALES, "rotary_cos", "rotary_sin")]
    if any(0 in x.shape for x in given.values()) or any(x.strides[-1] != 1 for x in dense if x.shape[-1] > 1):
        return False
    bits = 0
    for name in _ROWS:
        bits |= memory.stride_bits(given[name]) if name in given else 0
    if bits & (entry.alignment - 1):
        return False
    numbers = [table.shape[1] * given["k_cache"].shape[1]]
    for name, x in given.items():
        size = memory.ITEM_SIZE[x.dtype] if name in _CACHES else 1
        numbers += [*x.shape, *(size * abs(s) for s, n in zip(x.strides, x.shape, strict=True) if n > 1)]
    return entry.index_bits > 32 or max(numbers) <= INT32_MAX


def _specs(given: Mapping[str, TensorView]) -> dict[str, TensorSpec]:
    """All tensors of a kernel by role, those that aren't given too."""
    place = given["k_cache"].device_kind, given["k_cache"].device_index
    pages, _, heads, _ = given["k_cache"].shape
    found = {}
    for name in OPERATORS[APPEND].tensors(()):
        x = given.get(name)
        if x is None and name in SCALES:
            found[name] = TensorSpec((pages, heads), (0, 0), "float32", *place)
        elif x is None and name in ("rotary_cos", "rotary_sin"):
            found[name] = TensorSpec((1, 1), (1, 1), given["k_new"].dtype, *place)
        elif name in SCALES:
            of_pages = x.strides[0] if len(x.shape) > 1 and x.shape[0] > 1 else 0
            found[name] = TensorSpec((pages, heads), (of_pages, x.strides[-1]), x.dtype, *place)
        else:
            x = given[_STAND_INS[name]] if x is None else x
            shape, strides = x.shape, _used(x)
            if name in _CACHES:
                size = memory.ITEM_SIZE[x.dtype]
                shape, strides = (*shape[:-1], shape[-1] * size), (*(s * size for s in strides[:-1]), 1)
            found[name] = TensorSpec(shape, strides, "uint8" if name in _CACHES else x.dtype, *place)
    return {role_of(name): x for name, x in found.items()}


def _used(x: TensorView) -> tuple[int, ...]:
    """The strides of a tensor, where those that are never used are those of a contiguous one: kernels may ask all of
    them to be aligned."""
    return tuple(
        math.prod(x.shape[i + 1 :]) if n == 1 else s for i, (s, n) in enumerate(zip(x.strides, x.shape, strict=True))
    )
