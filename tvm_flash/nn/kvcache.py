"""The functions of the package ``flash_attn`` over a cache of keys and values: its arguments of versions 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tvm_flash.call.paged import CACHE_DTYPES
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.frameworks.torch_watch import are_plain
from tvm_flash.kvcache import flash_attention_with_kvcache
from tvm_flash.nn.attend import fit, has_rows
from tvm_flash.nn.naming import named_call
from tvm_flash.nn.windows import sides
from tvm_flash.paged import flash_attention_paged
from tvm_flash.tracing.torch_cache_checks import check_memory


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
):
    """Attention of new tokens to a cache, to which their keys and values are appended first; FlashAttention 2 and 3.

    It is one call of :func:`tvm_flash.flash_attention_with_kvcache`.  Arguments up to ``return_softmax_lse`` are those
    of version 2, in its order; what version 3 has besides is given by name: ``page_table`` is its ``block_table``.
    A head_dim that is no multiple of 8 is padded with zeros, which copies the whole cache, and back if keys are added.
    As there, ``cache_batch_idx`` says beside it which of its rows each sequence has.
    ``num_splits``, ``scheduler_metadata``, ``pack_gqa`` and ``sm_margin`` change nothing: keys are always split at the
    same positions.  int32 tensors may have another integer dtype, and are converted then.  What is no cache is copied
    if its last dimension isn't contiguous, as there, or if its rows don't begin where a GPU reads them.

    Returns
    -------
    As q, with the head_dim of v_cache; with ``return_softmax_lse`` also the log-sum-exp ``(batch, heads, seqlen_q)``,
    or ``(heads, total_q)`` with ``cu_seqlens_q``.

    Raises
    ------
    NotSupportedError: ``qv``, a scale of queries in 8 bits or a chunk of attention is given; and what
        :func:`tvm_flash.flash_attention_with_kvcache` raises.
    """
    for name, x in (("qv", qv), ("q_descale", q_descale)):
        if x is not None:
            raise NotSupportedError(f"{name}: is given, and there are no kernels for it; leave it out")
    if attention_chunk:
        raise NotSupportedError(f"attention_chunk: is {attention_chunk}, and there is no such mask; give 0")
    if block_table is not None and page_table is not None:
        raise NotSupportedError("page_table: is given beside block_table, which is the same; give one of them")
    q, k, v = map(_fitting, (q, k, v))
    names = {"k_scale": "k_descale", "v_scale": "v_descale", "return_lse": "return_softmax_lse"}
    if block_table is not None:
        names["page_table"] = "block_table"
    integers = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx}
    integers |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new}
    return named_call(
        *(names, _attend_cache),
        {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v},
        as_int32(block_table if page_table is None else page_table),
        {name: as_int32(x) for name, x in integers.items()},
        {"k_descale": k_descale, "v_descale": v_descale},
        softmax_scale,
        return_softmax_lse,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_leftpad=as_int32(cache_leftpad),
        max_seqlen_q=max_seqlen_q,
        rotary_seqlens=as_int32(rotary_seqlens),
        causal=causal,
        window_size=sides(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
    )


def _attend_cache(
    tensors: Mapping[str, Any],
    table: Any,
    given: dict[str, Any],
    descales: Mapping[str, Any],
    softmax_scale: float | None,
    return_lse: bool,
    **options: Any,
):
    """The call with version 3's scales as those of pages, and rows as wide as kernels take them."""
    q, k_cache, v_cache, k, _ = tensors.values()
    if table is not None and given["cache_batch_idx"] is not None:
        table, given["cache_batch_idx"] = _rows_of(table, given["cache_batch_idx"]), None
    scales = {}
    if all(scale is not None for scale in descales.values()):
        known = {"q": q, "k_cache": k_cache, "k": k, "page_table": table, **given}
        _check_for_scales(known, *descales.values())
    for (name, scale), other in zip(descales.items(), reversed(descales.values()), strict=True):
        if scale is None and other is not None:
            raise InvalidArgumentError(f"{name}: is None, and the other isn't; give both, or none")
        scales[name] = None if scale is None else _of_pages(name, scale, q, k_cache, k, table, given)
    rotary_cos = options["rotary_cos"]
    wide = {n: _widened(x) for n, x in tensors.items() if _is_odd(x)} if _have_one_width(tensors, rotary_cos) else {}
    written = [n for n in ("k_cache", "v_cache") if n in wide and k is not None]
    if written and not torch.compiler.is_compiling():
        _check_apart(tensors, written)
    if "q" in wide and softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    result = flash_attention_with_kvcache(
        *{**tensors, **wide}.values(),
        page_table=table,
        **given,
        softmax_scale=softmax_scale,
        k_scale=scales["k_descale"],
        v_scale=scales["v_descale"],
        return_lse=return_lse,
        **options,
    )
    for name in written:
        tensors[name].copy_(wide[name][..., : tensors[name].shape[-1]])
    if "v_cache" not in wide:
        return result
    out, *lse = result if return_lse else (result,)
    out = out[..., : v_cache.shape[-1]]
    return (out, *lse) if return_lse else out


_OF_8_BITS = tuple(getattr(torch, name) for name in CACHE_DTYPES if hasattr(torch, name))


def _is_odd(x: Any) -> bool:
    """Whether kernels take a head_dim only with zeros up to a multiple of what they count in."""
    known = (torch.float32, torch.float16, torch.bfloat16, *_OF_8_BITS)
    return isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] % HEAD_DIM_MULTIPLE != 0 and x.dtype in known


def _have_one_width(tensors: Mapping[str, Any], rotary_cos: Any) -> bool:
    """Whether rows that belong together are of one head_dim, and no more than that is turned: zeros would hide it if
    not, and the checks have something to say."""
    if any(isinstance(x, torch.Tensor) and x.is_nested for x in tensors.values()):
        return False
    width = {n: x.shape[-1] for n, x in tensors.items() if isinstance(x, torch.Tensor) and x.ndim}
    pairs = (("q", "k_cache"), ("k", "k_cache"), ("v", "v_cache"))
    turned = 2 * rotary_cos.shape[-1] if isinstance(rotary_cos, torch.Tensor) and rotary_cos.ndim else 0
    return all(a not in width or width[a] == width.get(b) for a, b in pairs) and turned <= width.get("q", 0)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """A tensor with these zeros."""
    return fit(x.view(torch.uint8)).view(x.dtype) if x.dtype in _OF_8_BITS else fit(x)


def _check_apart(tensors: Mapping[str, Any], written: Sequence[str]) -> None:
    """That caches which are copied, and back once keys are added, share no memory with each other or with a new key.

    Raises
    ------
    InvalidArgumentError
    """
    given = {n: x for n, x in tensors.items() if isinstance(x, torch.Tensor)}
    if len(given.keys() & {"k_cache", "v_cache"}) == 2 and are_plain(tuple(given.values())) and check_memory(given):
        name = written[0]
        raise InvalidArgumentError(
            f"{name}: its pages and those of the other cache take turns in one buffer, and a head_dim of "
            f"{given[name].shape[-1]} is padded in a copy; give both caches memory of their own, or a head_dim that is "
            f"a multiple of {HEAD_DIM_MULTIPLE}"
        )


def _rows_of(table: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The rows of a page table that belong to the sequences, where it has one for each entry of a batch of caches.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError: the entries aren't rows; a GPU isn't asked, and takes the nearest there is.
    """
    if not isinstance(table, torch.Tensor):
        raise ArgumentTypeError(f"page_table: is a {type(table).__qualname__}, expected a tensor of torch")
    if not isinstance(entries, torch.Tensor) or entries.dtype != torch.int32:
        found = entries.dtype if isinstance(entries, torch.Tensor) else type(entries).__qualname__
        raise ArgumentTypeError(f"cache_batch_idx: is {found}, expected a tensor of int32; convert it")
    if entries.ndim != 1 or entries.device != table.device:
        raise InvalidArgumentError(
            f"cache_batch_idx: has shape {tuple(entries.shape)} on {entries.device}, expected (batch,) on "
            f"{table.device}"
        )
    rows = table.shape[0]
    if not rows and entries.shape[0]:
        raise InvalidArgumentError("page_table: has no rows, and cache_batch_idx names some; expected a row for each")
    if not rows:
        return table
    try:
        return table.index_select(0, entries if entries.device.type == "cpu" else entries.clamp(0, rows - 1))
    except IndexError as e:
        raise InvalidArgumentError(
            f"cache_batch_idx: names an entry beyond the {rows} rows of the table of pages; expected 0 to {rows - 1}"
        ) from e


def _check_for_scales(tensors: Mapping[str, Any], *scales: Any) -> None:
    """What :func:`_of_pages` reads: tensors, of as many dimensions as it looks at, and entries that are int32.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError
    """
    ranks = {"q": (3, 4), "k_cache": (4,), "k": (3, 4), "k_descale": (2,), "v_descale": (2,), "page_table": (2,)}
    for name, x in {**tensors, **dict(zip(("k_descale", "v_descale"), scales, strict=True))}.items():
        if x is None and name not in ("q", "k_cache"):
            continue
        if name == "cache_seqlens" and not isinstance(x, torch.Tensor):
            continue  # a number for all sequences, or what a check has something to say of
        if not isinstance(x, torch.Tensor) or x.is_nested:
            raise ArgumentTypeError(f"{name}: is a {type(x).__qualname__}, expected a dense tensor of torch")
        if x.ndim not in ranks.get(name, (1,)):
            raise InvalidArgumentError(
                f"{name}: has shape {tuple(x.shape)}, expected {ranks.get(name, (1,))[0]} dimensions"
            )
        if (name not in ranks or name == "page_table") and x.dtype != torch.int32:
            raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected int32; convert it")
        if x.device != tensors["q"].device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, expected {tensors['q'].device}, where q is; move it")


def _of_pages(name: str, scale: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, new: Any, table: Any, given: dict):
    """Scales ``(batch, kv_heads)`` of sequences as those of pages: each page has that of the sequence it belongs to.

    ``new`` are the keys that are appended, ``given`` the integers of the call by name.  One scale for all sequences
    stays one.

    Raises
    ------
    InvalidArgumentError: another shape; or a page is of two sequences with different scales, looked for on the CPU.
    """
    starts, entries, lengths = (given[n] for n in ("cu_seqlens_q", "cache_batch_idx", "cache_seqlens"))
    batch, heads = q.shape[0] if starts is None else starts.shape[0] - 1, cache.shape[2]
    if tuple(scale.shape) not in ((1, heads), (batch, heads)):
        raise InvalidArgumentError(
            f"{name}: has shape {tuple(scale.shape)}, expected ({batch}, {heads}), (batch, kv_heads), or (1, {heads})"
        )
    if table is not None and table.shape[0] != batch:
        raise InvalidArgumentError(
            f"page_table: has {table.shape[0]} rows, or cache_batch_idx names as many, and q is of {batch} sequences; "
            f"expected one for each"
        )
    for of, x in (("cache_batch_idx", entries), ("cache_seqlens", lengths)):
        if isinstance(x, torch.Tensor) and tuple(x.shape) != (batch,):
            raise InvalidArgumentError(f"{of}: has shape {tuple(x.shape)}, expected ({batch},): one for each sequence")
    if scale.shape[0] == 1 or scale.stride(0) == 0:
        return scale[0]
    pages, size = cache.shape[:2]
    if table is None:
        numbers = torch.arange(batch, device=scale.device) if entries is None else entries
        table, lengths = numbers[:, None], size
    elif lengths is None:
        lengths = size * table.shape[1]
    elif new is not None:
        added = given["cu_seqlens_k_new"]
        lengths = lengths + (new.shape[1] if added is None else added.diff())
    needed = torch.as_tensor(lengths, device=scale.device).reshape(-1, 1)
    first = size * torch.arange(table.shape[1], device=scale.device)
    used = (first < needed) & (table >= 0) & (table < pages)
    at, wanted = torch.where(used, table, pages).long(), scale[:, None].expand(-1, table.shape[1], -1)
    made = scale.new_ones(pages + 1, heads)
    made[at] = wanted
    if scale.device.type == "cpu" and not torch.compiler.is_compiling():
        differ = used & (made[at] != wanted).any(-1)
        if differ.any():
            b, i = differ.nonzero()[0].tolist()
            raise InvalidArgumentError(
                f"{name}: sequence {b} has another scale than a further one of page {int(table[b, i])}, whose elements "
                f"have one; give sequences that share pages the same"
            )
    return made[:pages]


def attend_pages(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    page_table: torch.Tensor,
    max_seqlen_q: int | None,
    **options: Any,
):
    """:func:`tvm_flash.flash_attention_paged` with the starts that sequences of keys would have without pages."""
    starts_q, starts_k, page_table = map(as_int32, (starts_q, starts_k, page_table))
    if not isinstance(starts_k, torch.Tensor):
        raise ArgumentTypeError(f"cu_seqlens_k: is a {type(starts_k).__qualname__}, expected a tensor of torch")
    longest = max_seqlen_q if isinstance(max_seqlen_q, int) else None
    names = {"k_cache": "k", "v_cache": "v", "page_table": "block_table", "seqlens_k": "cu_seqlens_k"}
    tensors = (q, k_cache, v_cache, starts_q, starts_k.diff(), page_table, longest)
    return named_call(names, flash_attention_paged, *tensors, **options)


def _fitting(x: Any) -> Any:
    """New rows as kernels take them; those whose width no kernel has as they are, which :func:`_widened` copies."""
    return fit(x) if has_rows(x) and x.shape[-1] % HEAD_DIM_MULTIPLE == 0 else x


def as_int32(x: Any) -> Any:
    """An integer tensor as int32 with rows that lie together, numbers without room in it at its ends, where checks see
    them; others as they are."""
    if isinstance(x, torch.Tensor) and x.dtype in (torch.int64, torch.int16, torch.uint8, torch.int8):
        x = x.clamp(_INT32.min, _INT32.max).int() if x.dtype == torch.int64 else x.int()  # which keep the order of axes
    return x.contiguous() if has_rows(x) and x.stride(-1) != 1 != x.shape[-1] else x


_INT32 = torch.iinfo(torch.int32)
