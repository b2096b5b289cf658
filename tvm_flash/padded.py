"""Attention over sequences of different lengths, padded to one tensor."""

from __future__ import annotations

import sys
from typing import Any

from tvm_flash.call.checks import check_layout
from tvm_flash.call.dispatch import entrance
from tvm_flash.call.problem import LAYOUTS
from tvm_flash.call.signature import signature
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError

#: The parameters that are tensors, in the order of a call.
PARAMETERS = ("kv_start", "kv_end", "query_start", "alibi_slopes", "sinks")
_attend = {layout: entrance(signature(layout, parameters=PARAMETERS, layout_known=True)) for layout in LAYOUTS}


def padded_attention(
    q: Any,
    k: Any,
    v: Any,
    key_range: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_start: Any = None,
    return_lse: bool = False,
    out: Any = None,
    layout: str = "bhsd",
    variant: str = "auto",
) -> Any:
    """Attention in which each batch entry has its own range of keys; the rest, padding on either side, isn't seen.

    Keys out of range cost no time, and their number need not be known on the host: nothing waits, and a CUDA graph
    replays with other lengths.

    Parameters
    ----------
    key_range: int32 ``(batch, 2)`` on the device of q: entry b sees the keys ``key_range[b, 0]`` up to but not
        ``key_range[b, 1]``, as ``[[0, length], …]`` for padding at the right.
    query_start: int32 ``(batch,)`` on the device of q: the key position that query 0 of each entry stands on;
        ``causal``, ``window_size`` and ``alibi_slopes`` count from there.  ``key_range[:, 1] - seqlen_q`` lets the
        queries end with their entry's keys; if ``lengths_q`` of them are followed by padding, it is
        ``key_range[:, 1] - lengths_q``.  If not given, the last query stands on the last key of the whole tensors, as
        if there were no padding.  Beyond 2^29 either way it counts as that.
    layout: of q, k, v and the result: ``"bhsd"`` or ``"bshd"``.

    The others, the result and the errors are those of :func:`tvm_flash.flash_attention`.
    """
    check_layout(layout)
    query_start = check_placement(key_range, query_start)
    torch = sys.modules.get("torch")
    of_torch = torch is not None and isinstance(q, torch.Tensor) and isinstance(key_range, torch.Tensor)
    if of_torch and q.device != key_range.device:
        raise ArgumentTypeError(f"key_range: is on {key_range.device}, expected {q.device}, where q is; move it")
    # fmt: off
    return _attend[layout](q, k, v, key_range[:, :1], key_range[:, 1:], query_start, alibi_slopes, sinks, out,
                           variant, return_lse, softmax_scale, causal, window_size, softcap)
    # fmt: on


def check_placement(key_range: Any, query_start: Any) -> Any:
    """Check where keys and queries stand; ``query_start`` as kernels take it, with a value for each batch entry."""
    _check_int32("key_range", key_range)
    if len(key_range.shape) != 2 or key_range.shape[1] != 2:
        raise InvalidArgumentError(
            f"key_range: has shape {tuple(key_range.shape)}, expected (batch, 2): where the keys of each batch entry "
            f"start and end"
        )
    if query_start is not None:
        _check_int32("query_start", query_start)
        if len(query_start.shape) != 1:
            raise InvalidArgumentError(
                f"query_start: has shape {tuple(query_start.shape)}, expected (batch,): one position for each entry"
            )
        query_start = query_start[:, None]
    return query_start


def _check_int32(name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not str(x.dtype).endswith("int32"):
        found = getattr(x, "dtype", type(x).__qualname__)
        raise ArgumentTypeError(f"{name}: is {found}, expected an int32 tensor; convert it")
