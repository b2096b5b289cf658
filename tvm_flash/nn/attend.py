"""Attention for callers that are sure of their layout: the drop-ins and the integrations."""

from __future__ import annotations

from typing import Any

import torch

from tvm_flash.call.dispatch import entrance
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE, LAYOUTS
from tvm_flash.call.signature import signature

_attend = {layout: entrance(signature(layout, layout_known=True)) for layout in LAYOUTS}
_attend_with_sinks = {
    layout: entrance(signature(layout, parameters=("alibi_slopes", "sinks"), layout_known=True)) for layout in LAYOUTS
}


def attend(
    layout: str,
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """:func:`tvm_flash.flash_attention` in a layout, by whichever template is better, without a look at the layout."""
    # fmt: off
    if sinks is not None:
        return _attend_with_sinks[layout](q, k, v, alibi_slopes, sinks, out,
                                          "auto", return_lse, softmax_scale, causal, window_size, softcap)
    return _attend[layout](q, k, v, alibi_slopes, out,
                           "auto", return_lse, softmax_scale, causal, window_size, softcap)
    # fmt: on


def fit(x: torch.Tensor) -> torch.Tensor:
    """The same as kernels take it: a contiguous last dimension, with zeros up to a multiple of what they count in."""
    beyond = -x.shape[-1] % HEAD_DIM_MULTIPLE
    if beyond:
        return torch.nn.functional.pad(x, (0, beyond))
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
