"""A cache of keys and values in PyTorch: the rotation and the appending of new ones, and attention to all of it.

Importing this module registers ``torch.ops.tvm_flash.append_to_cache`` and ``rotate_and_append``, which programs see as
operators.  Each is one launch of a kernel (:mod:`tvm_flash.call.append`).  Where the packs have none for the tensors
they are made of torch's own operations: about 52 small ones for appending, 68 with a cache of 8 bits, and 24 for each
rotation, none of which waits, allocates otherwise than through torch, or depends on what is in a tensor.  On the CPU
the operators check the numbers in tensors before they write, since nobody has who compiles a program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from tvm_flash.call import eager
from tvm_flash.call.append import append as by_kernel
from tvm_flash.call.over_cache import OverCache
from tvm_flash.call.signature import Options
from tvm_flash.errors import NotSupportedError
from tvm_flash.frameworks.arrays import torch_arrays
from tvm_flash.frameworks.torch import TORCH, name_of
from tvm_flash.frameworks.torch_watch import are_plain, is_mapped
from tvm_flash.operators import PAGED, PAGED_SCALED, RAGGED_LAYOUT, SCALES
from tvm_flash.packs.manifest import HALVES, INTERLEAVED
from tvm_flash.quantised import rounded
from tvm_flash.tracing import torch_cache_checks as cache_checks
from tvm_flash.tracing import torch_ragged  # noqa: F401  the operator of the attention
from tvm_flash.tracing.torch_cache_contents import check_contents
from tvm_flash.tracing.torch_gradients import is_recorded

_library = torch.library.Library("tvm_flash", "FRAGMENT")
_tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_library.define(
    "append_to_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? cu_seqlens, "
    "Tensor cache_seqlens, Tensor page_table, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    tags=_tags,
)
_library.define(
    "rotate_and_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor cache_seqlens, Tensor rotary_seqlens, Tensor page_table, Tensor cos, Tensor sin, "
    "bool interleaved, bool along, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    tags=_tags,
)


_DIFFERENTIABLE = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")


def attend(
    tensors: Mapping[str, Any],
    cache_seqlens: Any,
    longest: int | None,
    interleaved: Any,
    num_splits: Any,
    how: OverCache,
) -> Any:
    """What :func:`tvm_flash.flash_attention_with_kvcache` does with its tensors by name and the rest of its options."""
    compiling = torch.compiler.is_compiling()
    along, return_lse = how.is_ordered, how.options["return_lse"]
    sizes = cache_checks.check(tensors, how.parameters, cache_seqlens, longest, interleaved, num_splits)
    q, k = tensors["q"], tensors["k"]
    everything = {**tensors, **how.parameters}
    floats = {n: everything[n] for n in (*_DIFFERENTIABLE, *how.parameters, *SCALES)}
    floats = {n: x for n, x in floats.items() if isinstance(x, torch.Tensor)}
    if is_recorded([*floats.values()]):
        asked_of = ", ".join(n for n, x in floats.items() if x.requires_grad)
        raise NotSupportedError(
            f"{asked_of}: a gradient is required, and of keys in a cache there is none; call under torch.no_grad(), or "
            f"use flash_attention"
        )
    starts = tensors["cu_seqlens_q"]
    if starts is None:
        starts, longest = multiples(q.device, sizes.batch, q.shape[1]), q.shape[1]
    before = cache_seqlens
    if not isinstance(before, torch.Tensor):
        number = sizes.capacity if before is None else int(before)
        before = torch.full((sizes.batch,), number, dtype=torch.int32, device=q.device)
    before = before.contiguous()
    k_cache, v_cache, table = _on_pages(tensors, sizes.batch)
    after, added = before, tensors["cu_seqlens_k_new"]
    if k is not None:
        after = before + (k.shape[1] if added is None else added.diff())
    leftpad = tensors["cache_leftpad"]
    call = {
        "q": q if q.ndim == 3 else q.flatten(0, 1),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cu_seqlens_q": starts,
        "seqlens_k": after,
        "page_table": table,
    }
    scales = {name: tensors[name] for name in SCALES if tensors[name] is not None}
    call |= scales
    parameters = dict(how.parameters) | ({} if leftpad is None else {"kv_start": leftpad[:, None]})
    given = tuple(x for x in (*everything.values(), before, after) if isinstance(x, torch.Tensor))
    plain = not compiling and not TORCH.watched(given)
    if not compiling and not plain and any(map(is_mapped, given)):
        raise NotSupportedError(
            "q, k_cache, v_cache: they or others are mapped by torch.vmap, and a cache is written once; its sequences "
            "are a batch already: give all of them in one call"
        )
    if plain or (not compiling and are_plain(given)):
        with contextlib.nullcontext() if plain else _without_modes():
            everything["cache_seqlens"] = cache_seqlens
            cache_checks.check_present(everything)
            _check_all(call, parameters, longest, how)
            shift = 0 if k is None else cache_checks.check_memory(everything)
            if q.device.type == "cpu":
                check_contents(tensors, before, after, table, sizes, along, shift)
    to = (k_cache, v_cache)
    if tensors["rotary_cos"] is not None:
        rotate = _rotate_and_append if plain else torch.ops.tvm_flash.rotate_and_append
        begins = multiples(q.device, sizes.batch, k.shape[1]) if added is None else added
        new = (x.reshape(-1, *x.shape[-2:]) for x in (k, tensors["v"]))
        first = tensors["rotary_seqlens"]
        first = before if first is None else first.contiguous()
        angles = (tensors["rotary_cos"], tensors["rotary_sin"], bool(interleaved), along)
        call["q"] = rotate(call["q"], *to, *new, starts, begins, before, first, table, *angles, *scales.values())
    elif k is not None:
        append = _append_to_cache if plain else torch.ops.tvm_flash.append_to_cache
        append(*to, k, tensors["v"], added, before, table, *scales.values())
    result = how.attend(**call, max_seqlen_q=longest, **parameters, **how.numbers, **how.options)
    if q.ndim == 3:
        return result
    out, lse = result if return_lse else (result, None)
    out = out.view(*q.shape[:3], v_cache.shape[-1])
    return (out, lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1)) if return_lse else out


def _without_modes() -> contextlib.AbstractContextManager[Any]:
    """While this is on, no mode answers operators: what is made for checks is memory."""
    return torch.utils._python_dispatch._disable_current_modes()


def _check_all(call: Mapping[str, Any], parameters: Mapping[str, Any], longest: int | None, how: OverCache) -> None:
    """Everything that the attention will check, a kernel for it included.

    Raises
    ------
    TvmFlashError: see :mod:`tvm_flash.errors`.
    """
    of_mask = {n: how.options[n] for n in ("causal", "window_size", "softcap") if n in how.options}
    asked = Options(
        *(RAGGED_LAYOUT, "auto", how.options["return_lse"], how.options["softmax_scale"]),
        **of_mask,
        definition=how.definition,
        params=tuple(how.numbers.items()),
        op=PAGED_SCALED if SCALES[0] in call else PAGED,
        layout_known=True,
        longest=longest,
    )
    eager.plan_of(asked, TORCH, {**call, **{n: x for n, x in parameters.items() if x is not None}})


def _on_pages(tensors: Mapping[str, Any], batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The caches and a table of their pages: one without pages has one for each entry."""
    k_cache, table = tensors["k_cache"], tensors["page_table"]
    if table is None:
        entries = tensors["cache_batch_idx"]
        entries = multiples(k_cache.device, batch - 1, 1) if entries is None else entries
        table = entries[:, None]
    return k_cache, tensors["v_cache"], table


_kept: dict[tuple[torch.device, int, int], torch.Tensor] = {}


def multiples(device: torch.device, count: int, step: int) -> torch.Tensor:
    """``0, step, …, count * step`` as int32; kept, since a captured graph may read it as long as it lives."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # a mode may know its own tensors only
        return torch.arange(count + 1, dtype=torch.int32, device=device) * step
    key = (device, count, step)
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = torch.arange(count + 1, dtype=torch.int32, device="cpu") * step
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # nothing may be copied from here
                return torch.arange(count + 1, dtype=torch.int32, device=device) * step
            found = found.to(device)  # waits for the copy, once
        if not torch._subclasses.fake_tensor.is_fake(found):
            _kept[key] = found
    return found


def _positions(first: torch.Tensor, starts: torch.Tensor, total: int, along: bool) -> torch.Tensor:
    """By which each of ``total`` rows is turned: those from ``first`` on in each sequence, or ``first`` for all; by
    any without a sequence."""
    if not first.shape[0]:
        return first.new_zeros(total)
    rows, b = _sequence_of_rows(starts, total)
    return first[b] + (rows - starts[b] if along else 0)


def _sequence_of_rows(starts: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's number, and the sequence that it is in; a row after the last sequence counts as the last row of it."""
    rows = torch.arange(total, dtype=torch.int32, device=starts.device)
    rows = torch.minimum(rows, starts[-1] - 1).clamp_min(0)
    b = torch.bucketize(rows, starts[1:], right=True, out_int32=True)
    return rows, b.clamp_max(starts.shape[0] - 2)


# ---------------------------------------------------------------- operators


def _append_to_cache(k_cache, v_cache, k, v, cu_seqlens, cache_seqlens, page_table, k_scale=None, v_scale=None):
    """Write each new row to its place, if it has one; where several have the same, the last row stands there."""
    if 0 in (k.numel() + v.numel(), *k_cache.shape[:2], *page_table.shape):
        return
    if cu_seqlens is None:
        cu_seqlens = multiples(k.device, *k.shape[:2])
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    given = {"k_cache": k_cache, "v_cache": v_cache, "k_new": k, "v_new": v, "cu_seqlens_k_new": cu_seqlens}
    given |= {"cache_seqlens": cache_seqlens, "page_table": page_table}
    given |= {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    if by_kernel(TORCH, given):
        _has_changed(k_cache, v_cache)
    else:
        _append(k_cache, v_cache, k, v, cu_seqlens, cache_seqlens, page_table, k_scale, v_scale)


def _rotate_and_append(
    q, k_cache, v_cache, k, v, cu_seqlens_q, cu_seqlens_k, cache_seqlens, rotary_seqlens, page_table, cos, sin,
    interleaved, along, k_scale=None, v_scale=None,
):  # fmt: skip
    """The same with new keys that are turned first; the queries, turned too."""
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    given = {"k_cache": k_cache, "v_cache": v_cache, "k_new": k, "v_new": v, "cu_seqlens_k_new": cu_seqlens_k}
    given |= {"cache_seqlens": cache_seqlens, "page_table": page_table, "q": q, "turned": turned}
    given |= {"cu_seqlens_q": cu_seqlens_q, "rotary_seqlens": rotary_seqlens, "rotary_cos": cos, "rotary_sin": sin}
    given |= {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    if by_kernel(TORCH, given, INTERLEAVED if interleaved else HALVES, along):
        _has_changed(k_cache, v_cache)
        return turned
    keys = _rotate(k, cos, sin, _positions(rotary_seqlens, cu_seqlens_k, k.shape[0], True), interleaved)
    if 0 not in (k.numel() + v.numel(), *k_cache.shape[:2], *page_table.shape):
        _append(k_cache, v_cache, keys, v, cu_seqlens_k, cache_seqlens, page_table, k_scale, v_scale)
    return _rotate(q, cos, sin, _positions(rotary_seqlens, cu_seqlens_q, q.shape[0], along), interleaved)


def _has_changed(*caches: torch.Tensor) -> None:
    """Tell autograd, which keeps no version of tensors of inference."""
    for cache in caches:
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


# ---------------------------------------------------------------- where there is no kernel


def _append(k_cache, v_cache, k, v, cu_seqlens, cache_seqlens, page_table, k_scale=None, v_scale=None):
    """The same by torch's operations."""
    pages, size = k_cache.shape[:2]
    rows, b = _sequence_of_rows(cu_seqlens, k.shape[0])
    positions = cache_seqlens[b] + rows - cu_seqlens[b]
    valid = (positions >= 0) & (torch.arange(k.shape[0], device=k.device) < cu_seqlens[-1])
    column = positions // size
    page = page_table[b, column.clamp(0, page_table.shape[1] - 1)].long()
    valid &= (column < page_table.shape[1]) & (page >= 0) & (page < pages)
    inside = (positions % size).long()
    if k_scale is not None:
        at = page.clamp(0, pages - 1)
        k, v = (_in_8_bits(x, s, at, k_cache.dtype) for x, s in ((k, k_scale), (v, v_scale)))
        k_cache, v_cache = (x.view(torch.uint8) for x in (k_cache, v_cache))
    # What has no place is written where the first that has one is, with its values; if none has one, nothing changes.
    first, some = valid.to(torch.int32).argmax(keepdim=True), valid.any()
    page, inside = (torch.where(valid, x, torch.where(some, x[first], 0)) for x in (page, inside))
    last = _last_at(page * size + inside, torch.where(valid, torch.arange(len(valid), device=k.device), first))
    for cache, x in ((k_cache, k), (v_cache, v)):
        cache[page, inside] = torch.where(some, x[last], cache[:1, 0])


#: Rows that are compared with each other; more of them are sorted.
_FEW_ROWS = 256


def _last_at(places: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """For each row the greatest of the ``numbers``, each less than their count, of the rows with its place."""
    count = len(places)
    if count == 1:
        return numbers
    if count <= _FEW_ROWS:
        return torch.where(places[:, None] == places, numbers, -1).amax(1)
    ordered = (places * count + numbers).sort().values
    return ordered[torch.searchsorted(ordered, (places + 1) * count) - 1] - places * count


def _in_8_bits(x, scale, page, dtype):
    """Rows that come to pages, as the bytes that a cache of a dtype has of them."""
    if scale.ndim == 2:
        scale = scale[page] if scale.shape[0] > 1 else scale[0]
    return rounded(torch_arrays(), x.float() / scale[..., None], name_of(dtype)).view(torch.uint8)


def _rotate(x, cos, sin, positions, interleaved):
    at = positions.clamp(0, cos.shape[0] - 1)
    cos, sin = (t.index_select(0, at)[:, None].float() for t in (cos, sin))
    width = 2 * cos.shape[-1]
    places = (
        (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(0, width // 2), slice(width // 2, width))
    )
    a, b = (x[..., p].float() for p in places)
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned[..., width:] = x[..., width:]
    turned[..., places[0]] = a * cos - b * sin
    turned[..., places[1]] = a * sin + b * cos
    return turned


def _append_to_cache_of_cpu(k_cache, v_cache, k, v, cu_seqlens, cache_seqlens, page_table, *scales):
    """The same, once it is known that every new row has a place."""
    new = {"k_cache": k_cache, "k": k, "cu_seqlens_k_new": cu_seqlens, "page_table": page_table}
    _check_new(new, cache_seqlens, along=False)
    _append_to_cache(k_cache, v_cache, k, v, cu_seqlens, cache_seqlens, page_table, *scales)


def _rotate_and_append_of_cpu(
    q, k_cache, v_cache, k, v, cu_seqlens_q, cu_seqlens_k, cache_seqlens, rotary_seqlens, page_table, cos, sin,
    interleaved, along, *scales,
):  # fmt: skip
    """The same, once it is known that every new row has a place, and every position an angle."""
    new = {"k_cache": k_cache, "k": k, "cu_seqlens_k_new": cu_seqlens_k, "page_table": page_table}
    new |= {"q": q, "cu_seqlens_q": cu_seqlens_q, "rotary_cos": cos, "rotary_seqlens": rotary_seqlens}
    _check_new(new, cache_seqlens, along)
    return _rotate_and_append(
        *(q, k_cache, v_cache, k, v, cu_seqlens_q, cu_seqlens_k, cache_seqlens, rotary_seqlens, page_table),
        *(cos, sin, interleaved, along, *scales),
    )


_NAMES = ("q", "k", "cu_seqlens_q", "cu_seqlens_k_new", "cache_batch_idx", "rotary_cos", "rotary_seqlens")


def _check_new(given: Mapping[str, torch.Tensor], before: torch.Tensor, along: bool) -> None:
    """What is in the tensors of an operator on the CPU, by their names in a call.

    Raises
    ------
    InvalidArgumentError
    """
    added, table = given["cu_seqlens_k_new"], given["page_table"]
    sizes = cache_checks.Sizes(before.shape[0], table.shape[1] * given["k_cache"].shape[1])
    after = before + (given["k"].shape[1] if added is None else added.diff())
    check_contents(dict.fromkeys(_NAMES) | given, before, after, table, sizes, along, shift=0)


for _name, _on_cpu, _on_cuda in (
    ("append_to_cache", _append_to_cache_of_cpu, _append_to_cache),
    ("rotate_and_append", _rotate_and_append_of_cpu, _rotate_and_append),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
torch.library.register_fake("tvm_flash::append_to_cache", lambda *_: None, lib=_library)
torch.library.register_fake(
    "tvm_flash::rotate_and_append",
    lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
    lib=_library,
)
