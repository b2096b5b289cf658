"""Sequences of different lengths for the drop-ins: in one call, or where a pack has no such kernels, in several."""

from __future__ import annotations

import itertools
import numbers

import torch

from tvm_flash.call.ragged import fault_of
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.nn.attend import attend
from tvm_flash.nn.kvcache import as_int32
from tvm_flash.nn.sdpa import no_kernel
from tvm_flash.varlen import flash_attention_varlen


def attend_sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_lse: bool,
):
    """:func:`tvm_flash.flash_attention_varlen`, with starts of any integer dtype, and of ragged kernels that lack.

    Those are missing in packs of some archs; each run of neighbours of one length is a call on views then, for which
    the starts are read on the host.
    """
    starts_q, starts_k = map(as_int32, (starts_q, starts_k))
    options = {"causal": causal, "softmax_scale": softmax_scale, "window_size": window_size, "softcap": softcap}
    mask = "full" if window_size == (-1, -1) and not causal else "window"
    if not is_ragged(mask, q, k, v, softcap, alibi_slopes):
        return _in_runs(q, k, v, starts_q, starts_k, alibi_slopes, return_lse, options)
    return flash_attention_varlen(
        q, k, v, starts_q, starts_k, alibi_slopes=alibi_slopes, return_lse=return_lse, **options
    )


def is_ragged(mask: str, q, k, v, softcap: float, alibi_slopes: torch.Tensor | None) -> bool:
    """Whether one call will do: there are ragged kernels, or the checks have something to say."""
    if any(not isinstance(x, torch.Tensor) or x.ndim != 3 or x.device.type not in ("cpu", "cuda") for x in (q, k, v)):
        return True
    if not isinstance(softcap, (numbers.Real, torch.SymFloat)):
        return True
    score = "softcap_alibi" if softcap and alibi_slopes is not None else "identity"
    return no_kernel(mask, q, k, v, score, ragged=True) is None or no_kernel(mask, q, k, v, score) is not None


def _in_runs(q, k, v, starts_q, starts_k, alibi_slopes, return_lse, options):
    starts = [x.tolist() for x in (starts_q, starts_k)]
    if len(starts[0]) != len(starts[1]):
        raise InvalidArgumentError(
            f"cu_seqlens_k: is of {len(starts[1]) - 1} sequences, but cu_seqlens_q of {len(starts[0]) - 1}; expected "
            f"the same"
        )
    for name, begins, x in (("q", starts[0], q), ("k", starts[1], k)):
        if fault := fault_of(begins, name, x.shape[0]):
            raise InvalidArgumentError(f"cu_seqlens_{name}: {fault}")
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    lengths = list(zip(*([b - a for a, b in itertools.pairwise(x)] for x in starts), strict=True))
    first = 0
    for (length_q, length_k), run in itertools.groupby(lengths):
        count = len(list(run))
        rows, keys = (slice(x[first], x[first + count]) for x in starts)
        views = [
            x[at].view(count, length, *x.shape[1:])
            for x, at, length in ((q, rows, length_q), (k, keys, length_k), (v, keys, length_k))
        ]
        slopes = alibi_slopes
        if slopes is not None and slopes.ndim == 2 and slopes.shape[0] > 1:
            slopes = slopes[first : first + count]
        # Results of their own, not views of one: gradients flow back through them.
        run_out, run_lse = attend("bshd", *views, alibi_slopes=slopes, return_lse=True, **options)
        out[rows] = run_out.flatten(0, 1)
        lse[:, rows] = run_lse.transpose(0, 1).flatten(1)
        first += count
    return (out, lse) if return_lse else out
