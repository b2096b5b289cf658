"""Attention over sequences of different lengths, padded to one tensor."""

from __future__ import annotations

from typing import Any

from tvm_flash.call.checks import check_layout
from tvm_flash.call.eager import entrance
from tvm_flash.call.problem import LAYOUTS
from tvm_flash.call.signature import signature
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError

_attend = {
    layout: entrance(signature(layout, parameters=("kv_start", "kv_end"), layout_known=True)) for layout in LAYOUTS
}


def padded_attention(
    q: Any,
    k: Any,
    v: Any,
    key_range: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
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
    layout: of q, k, v and the result: ``"bhsd"`` or ``"bshd"``.

    The others, the result and the errors are those of :func:`tvm_flash.flash_attention`.  ``causal`` and
    ``window_size`` count positions of the whole tensors, as if there were no padding.
    """
    check_layout(layout)
    if not hasattr(key_range, "dtype") or not str(key_range.dtype).endswith("int32"):
        found = getattr(key_range, "dtype", type(key_range).__qualname__)
        raise ArgumentTypeError(f"key_range: is {found}, expected an int32 tensor; convert it")
    if len(key_range.shape) != 2 or key_range.shape[1] != 2:
        raise InvalidArgumentError(
            f"key_range: has shape {tuple(key_range.shape)}, expected (batch, 2): where the keys of each batch entry "
            f"start and end"
        )
    # fmt: off
    return _attend[layout](q, k, v, key_range[:, :1], key_range[:, 1:], out,
                           variant, return_lse, softmax_scale, causal, window_size, 0.0)
    # fmt: on
