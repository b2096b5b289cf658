"""One layer's attention, as transformers asks for it: by our kernels where they can, else by torch."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch

from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.frameworks.torch_watch import is_differentiated
from tvm_flash.integrations.transformers import by_torch
from tvm_flash.integrations.transformers.masks import UNBOUNDED, KeyRanges, Mask
from tvm_flash.integrations.transformers.models import passes_by
from tvm_flash.kvcache import flash_attention_with_kvcache
from tvm_flash.nn.attend import WholeMask, attend, fit, whole_mask_of
from tvm_flash.nn.flash_attn import flash_attn_varlen_func
from tvm_flash.nn.masks import KeyMask, key_mask_of
from tvm_flash.nn.sdpa import for_kernels, no_kernel, refusal, warn_of_fallback
from tvm_flash.operators import BACKWARD, FORWARD
from tvm_flash.padded import padded_attention

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # before it, models handed output_attentions to every layer
    _active_collector = None

#: Arguments that models hand to every layer and that say nothing which the mask, the keys and the values don't say.
HARMLESS = frozenset(
    [
        "position_ids",
        "cache_position",
        "seq_idx",
        "deterministic",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "logits_to_keep",
        "num_logits_to_keep",
        "use_top_left_mask",
        "target_dtype",
        "attn_implementation",
        "layer_idx",
        "read_index",
        "write_index",
        "logits_indices",
        "logits_processor_args",
        "carry_over_ids",
        "position_embeddings",
        "input_ids",
    ]
)

_PADDED_SOFTCAP = "softcap" in inspect.signature(padded_attention).parameters


@dataclass(frozen=True)
class Sequences:
    """Sequences one after another in a batch of one: where each starts, int32 ``(count + 1,)``, and the longest."""

    starts_q: torch.Tensor
    starts_k: torch.Tensor
    longest_q: int | None
    longest_k: int | None


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    block_table: torch.Tensor | None = None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer's attention, with the arguments that transformers gives.

    Parameters
    ----------
    query: ``(batch, heads, seqlen_q, head_dim)``; key, value: ``(batch, kv_heads, seqlen_kv, head_dim)``.
    attention_mask: of :func:`make_mask`, or any that transformers' ``"sdpa"`` takes.
    dropout, scaling, softcap: of the weights, and of the scores; ``1/sqrt(head_dim)`` if no scaling is given.
    is_causal: of the module if not given; asked only without a mask.
    sliding_window: how many keys a query sees, its own among them; asked only where the mask doesn't say it.
    s_aux: ``(heads,)``, sinks: ``(batch, heads, seqlen_q, 1)``: the logit of a key without a value.
    position_bias: added to the scores.
    indices: ``(batch, seqlen_q, count)``, the keys that a query sees; those out of range are none.
    block_indices: those of blocks of keys, which the module's ``indexer`` makes a mask of.
    cu_seq_lens_q, cu_seq_lens_k: int32 ``(sequences + 1,)``: where each of several sequences starts in a batch of one.
    block_table: int32 ``(sequences, blocks)``, with a query for each sequence in a batch of one: the blocks of
        ``k_cache`` and ``v_cache``, ``(blocks, block_size, kv_heads, head_dim)``, which have each one's keys and get
        those that are given; ``cu_seq_lens_k`` counts both.

    Returns
    -------
    ``(batch, seqlen_q, heads, head_dim_v)`` and the weights, which are only made for ``output_attentions``, else None.

    Raises
    ------
    NotSupportedError: an argument that isn't known here has a value, and the layer's own eager attention may read it.
    ArgumentTypeError: the mask is a tensor of integers, which transformers' ``"sdpa"`` refuses too.
    """
    for name, x in others.items():
        if x is not None and x is not False and name not in HARMLESS and not passes_by(type(module), name):
            raise NotSupportedError(
                f"{name}: isn't known here, and leaving it out could change the result; "
                f"use attn_implementation='eager' for {type(module).__name__}"
            )
    query, key, value = _cast(query, key, value)
    if block_table is not None:
        window = _window(True, sliding_window, None, query, None)
        caches = (k_cache, v_cache, block_table, cu_seq_lens_k)
        return _decode(query, key, value, caches, window, scaling, softcap, s_aux if s_aux is not None else sinks), None
    sequences = _sequences(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    ranges, mask = _read(attention_mask, query, key, sequences)
    sink = s_aux if s_aux is not None else sinks
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = ranges.window if ranges is not None else _window(bool(causal), sliding_window, mask, query, sequences)
    if block_indices is not None:
        mask, ranges, window = (
            _block_mask(module, block_indices, attention_mask, query, key, others),
            None,
            by_torch.ALL,
        )
    if mask is not None and sequences is not None:  # both hide
        mask, sequences = by_torch.mask_within(mask, sequences, query, key), None
    output_attentions = output_attentions or _are_weights_collected()
    wants = {"position_bias": position_bias, "indices": indices, "output_attentions": output_attentions or None}
    reason = next((f"the layer has {name}" for name, x in wants.items() if x is not None), None)
    reason = reason or refusal(query, key, value, None, dropout, False, scaling, True)
    over_keys = None
    if reason is None and mask is not None:
        over_keys = _over_keys(mask, query, key, scaling)
        if isinstance(over_keys, str):
            whole = None if softcap or sink is not None else _whole_mask(mask, query, key, value)
            if whole is not None:
                return _by_whole_mask(query, key, value, whole, scaling), None
            over_keys, reason = None, over_keys
    known = ranges if over_keys is None else KeyRanges(key.shape[2], over_keys.key_range())
    reason = reason or _no_kernel(query, key, value, known, window, softcap, sequences)
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    if reason is None:
        if over_keys is not None:
            key, value = over_keys.arrange(key), over_keys.arrange(value)
        return _compute(query, key, value, known, window, scaling, softcap or 0.0, sink, sequences), None
    warn_of_fallback(reason)
    if ranges is not None:
        key, value = key[:, :, : ranges.keys], value[:, :, : ranges.keys]
        position_bias = None if position_bias is None else position_bias[..., : ranges.keys]
    return by_torch.attention(
        query,
        key,
        value,
        ends=None if ranges is None else ranges.ends,
        window=window,
        mask=mask,
        indices=indices,
        sequences=sequences,
        position_bias=position_bias,
        scaling=scaling,
        softcap=softcap,
        sink=sink,
        dropout=dropout,
        weights=bool(output_attentions),
    )


def _are_weights_collected() -> bool:
    """Whether transformers takes the weights from the layers' results, which not all models tell their layers."""
    if _active_collector is None or (torch.compiler.is_compiling() and not _active_collector.compiling):
        return False  # a program of one layer can't ask
    collected = _active_collector.get()
    return any(name.endswith("attentions") for name in collected or ())


def _cast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As torch's attention does under autocast; and one entry of learned queries stands for a whole batch."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value))
    if query.shape[0] != key.shape[0]:
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    return query, key, value


def _sequences(starts_q, starts_k, longest_q, longest_k) -> Sequences | None:
    if starts_q is None and starts_k is None:
        return None
    if starts_q is None or starts_k is None:
        given, other = ("cu_seq_lens_k", "cu_seq_lens_q") if starts_q is None else ("cu_seq_lens_q", "cu_seq_lens_k")
        raise InvalidArgumentError(f"{other}: is None, but {given} is given; give both")
    return Sequences(starts_q.int(), starts_k.int(), longest_q, longest_k)


def _read(
    attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, sequences: Sequences | None
) -> tuple[KeyRanges | None, torch.Tensor | None]:
    """A mask as key ranges, with ``sequences`` those of each, or as a tensor.

    Raises
    ------
    ArgumentTypeError: it is a tensor of integers.
    """
    if attention_mask is None:
        return None, None
    keys = key.shape[2]
    if isinstance(attention_mask, Mask):
        if sequences is None and attention_mask.ranges is not None:
            return attention_mask.ranges, None
        if sequences is not None and attention_mask.of_each_sequence is not None:
            return KeyRanges(keys, None, attention_mask.of_each_sequence), None
        return None, attention_mask.visible()
    if attention_mask.dtype == torch.uint32:
        ranges = KeyRanges.unpack(attention_mask)
        if sequences is None:
            return ranges, None
        visible = ranges.visible(query.shape[2], key.device)
        return None, torch.nn.functional.pad(visible, (0, keys - ranges.keys))
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ArgumentTypeError(
            f"attention_mask: has dtype {attention_mask.dtype}, expected torch.bool, or numbers that are added to the "
            f"scores; use attention_mask.bool() if it says which keys are seen"
        )
    return None, attention_mask


def _window(causal: bool, sliding_window: int | None, mask: Any, query: torch.Tensor, sequences: Sequences | None):
    """What a layer sees without a mask that says it: as for "sdpa", and its window."""
    if mask is not None:
        return by_torch.ALL
    causal = causal and (query.shape[2] > 1 or sequences is not None)
    left = UNBOUNDED if sliding_window is None or sliding_window <= 0 else sliding_window - 1
    return left, 0 if causal else left


def _block_mask(module, block_indices, attention_mask, query, key, others) -> torch.Tensor:
    indexer = getattr(module, "indexer", None)
    if not hasattr(indexer, "build_block_mask"):
        raise NotSupportedError(
            f"block_indices: {type(module).__name__} has no indexer that makes a mask of them; "
            f"use attn_implementation='sdpa'"
        )
    positions = others.get("position_ids")
    if positions is None:
        positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
    positions = (positions if positions.ndim > 1 else positions[None]).expand(query.shape[0], -1)
    mask = attention_mask.numbers() if isinstance(attention_mask, Mask) else attention_mask
    return indexer.build_block_mask(block_indices, mask, key.shape[2], query.dtype, query.device, positions)


def _over_keys(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> KeyMask | str:
    """A mask as one that is the same for all queries and heads, or why it isn't one."""
    if mask.ndim == 4 and mask.shape[-1] != key.shape[2]:
        return "attn_mask and the keys differ in length"
    return key_mask_of(mask, query, key, scaling)


def _whole_mask(mask: torch.Tensor, query, key, value) -> WholeMask | None:
    """A mask over queries and keys, if there are kernels that take it."""
    whole = whole_mask_of(mask, query, key)
    ops = (FORWARD, BACKWARD) if is_differentiated(mask) else None
    if not isinstance(whole, str):
        whole = for_kernels(whole, query, key, value, ops)
    return None if isinstance(whole, str) else whole


def _by_whole_mask(query, key, value, whole: WholeMask, scaling: float | None) -> torch.Tensor:
    scaling = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    head_dim_v = value.shape[-1]
    query, key, value = (fit(x).transpose(1, 2) for x in (query, key, value))
    return whole.attend("bshd", query, key, value, scaling)[..., :head_dim_v].contiguous()


def _no_kernel(query, key, value, ranges, window, softcap, sequences) -> str | None:
    """Why no kernel computes a call, or None if one does."""
    if ranges is not None and ranges.ends is not None:
        kind = "padded"
        if softcap and not _PADDED_SOFTCAP:
            return "there is no kernel that has both padding and a soft cap"
    elif window == by_torch.ALL:
        kind = "full"
    else:
        kind = "causal" if window == (UNBOUNDED, 0) else "window"
    score = "softcap" if softcap else "identity"
    reason = no_kernel(kind, query, key, value, score, ragged=sequences is not None)
    if reason is not None and sequences is not None and not torch.compiler.is_compiling():
        reason = no_kernel(kind, query, key, value, score)  # a call for each, for which the starts are read
    return reason


# ---------------------------------------------------------------- kernels


def _compute(query, key, value, ranges, window, scaling, softcap, sink, sequences) -> torch.Tensor:
    head_dim_v = value.shape[-1]
    query, key, value = (fit(x).transpose(1, 2) for x in (query, key, value))  # (batch, seq, heads, head_dim)
    if sequences is not None:
        out, lse = _packed(query, key, value, sequences, window, scaling, softcap)
    elif _is_of_kernels(sink, query, key, value, ranges):
        sink, sinks = None, sink.float()
        out, lse = _attend(query, key, value, ranges, window, scaling, softcap, False, sinks=sinks)
    else:
        out, lse = _attend(query, key, value, ranges, window, scaling, softcap, sink is not None)
    if sink is not None:  # exp(lse) / (exp(lse) + exp(sink)) of the weight is that of the keys
        sink = sink[:, None] if sink.ndim == 1 else sink.squeeze(-1)  # (heads, 1) or (batch, heads, seqlen_q)
        sink = sink.float().clamp(min=torch.finfo(torch.float32).min)  # beside −inf, which a row without keys has
        share = torch.sigmoid(lse - sink).transpose(1, 2)[..., None]
        out = (out.float() * share).to(out.dtype)
    return out[..., :head_dim_v].contiguous()


def _is_of_kernels(sink: torch.Tensor | None, query, key, value, ranges: KeyRanges | None) -> bool:
    """Whether kernels know a sink of each head; one of each query they don't."""
    kind = "window" if ranges is None or ranges.ends is None else "padded"
    return sink is not None and sink.ndim == 1 and no_kernel(kind, query, key, value, "optional_sinks") is None


def _attend(query, key, value, ranges: KeyRanges | None, window, scaling, softcap, return_lse, **options):
    if ranges is not None:
        key, value = key[:, : ranges.keys], value[:, : ranges.keys]
    options |= {"causal": window[1] == 0, "window_size": (window[0], UNBOUNDED if window[1] == 0 else window[1])}
    options |= {"softmax_scale": scaling, "return_lse": return_lse}
    if softcap:
        options["softcap"] = softcap
    if ranges is None or ranges.ends is None:
        result = attend("bshd", query, key, value, **options)
    else:
        ends = ranges.ends.expand(query.shape[0], 2)
        result = padded_attention(query, key, value, ends, layout="bshd", **options)
    return result if return_lse else (result, None)


def _decode(query, key, value, caches, window, scaling, softcap, sink) -> torch.Tensor:
    """A new token of each sequence: its key and its value go into a cache of blocks, to which it attends."""
    k_cache, v_cache, table, starts = caches
    q, k, v = (x.transpose(1, 2).reshape(-1, 1, x.shape[1], x.shape[3]) for x in (query, key, value))
    count = q.shape[0]
    out = flash_attention_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=(starts[1 : count + 1] - starts[:count] - 1).int(),
        page_table=table.int(),
        causal=True,
        window_size=(window[0], 0),
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        sinks=None if sink is None else sink.float(),
    )
    return out.view(query.shape[0], -1, *out.shape[2:])


def _packed(query, key, value, sequences: Sequences, window, scaling, softcap):
    """``(batch, seq, heads, head_dim)``: the batch, of one mostly, is a sequence more in the row of sequences."""
    batch, seqlen_q = query.shape[:2]
    longest = sequences.longest_q or seqlen_q * batch, sequences.longest_k or key.shape[1] * batch
    out, lse, _ = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (query, key, value)),
        sequences.starts_q,
        sequences.starts_k,
        *longest,
        causal=window[1] == 0,
        window_size=(window[0], UNBOUNDED if window[1] == 0 else window[1]),
        softmax_scale=scaling,
        softcap=softcap,
        return_attn_probs=True,
    )
    return out.unflatten(0, (batch, seqlen_q)), lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1)
