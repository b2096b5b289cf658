"""Attention for callers that are sure of their layout: the drop-ins and the integrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tvm_flash.call.dispatch import entrance
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE, LAYOUTS
from tvm_flash.call.signature import signature
from tvm_flash.frameworks.torch import is_aligned
from tvm_flash.frameworks.torch_watch import is_differentiated
from tvm_flash.nn.far_rows import rows_of

_attend = {layout: entrance(signature(layout, layout_known=True)) for layout in LAYOUTS}
_attend_with_sinks = {
    layout: entrance(signature(layout, parameters=("alibi_slopes", "sinks"), layout_known=True)) for layout in LAYOUTS
}

_attend_masked = {
    (layout, name): entrance(signature(layout, parameters=(name,), layout_known=True))
    for layout in LAYOUTS
    for name in ("visible", "bias")
}


#: Scores for an element of a small mask.
_SMALL = 32

_KINDS = {torch.bool: ("given", "identity"), torch.float32: ("full", "biased")}


@dataclass(frozen=True)
class WholeMask:
    """A mask of torch's that differs between queries: which keys are seen, or what is added to scores.

    ``values`` is boolean, or float32, or of the 16 bits of the queries, and broadcasts to ``(batch, heads, seqlen_q,
    seqlen_kv)``.
    """

    values: torch.Tensor

    @property
    def kind(self) -> tuple[str, str]:
        """Mask and score of the kernels that take it."""
        return _KINDS.get(self.values.dtype, ("full", "biased_16"))

    @property
    def has_16_bits(self) -> bool:
        """Whether each element has."""
        return self.values.dtype not in _KINDS

    def wider(self) -> WholeMask:
        """The same in float32."""
        return WholeMask(self.values.float())

    def is_small(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether a GPU makes it float32 in no time beside a call with it: of one that is the same for all queries, or
        whose rows don't lie as TMA reads them, float32 is faster by up to a quarter (docs/hopper.md).

        In a program it goes by what is known of all sizes.
        """
        if torch.compiler.is_compiling():
            return self.values.shape[-2] == 1
        return _SMALL * self.values.numel() <= query[..., 0].numel() * key.shape[-2]

    @property
    def name(self) -> str:
        """The parameter that it is for those kernels."""
        return "visible" if self.values.dtype == torch.bool else "bias"

    def attend(self, layout: str, q: Any, k: Any, v: Any, softmax_scale: float | None = None) -> Any:
        """Attention with it."""
        rows = None
        if self.name == "bias" and any(map(is_differentiated, (q, k, v, self.values))):
            rows = rows_of(self.values, k.shape[1 if layout == "bshd" else 2])
        # fmt: off
        out = _attend_masked[layout, self.name](q, k, v, self.values if rows is None else rows.bias, None,
                                                "auto", False, softmax_scale, False, (-1, -1), 0.0)
        # fmt: on
        return out if rows is None else rows.with_gradients(out, layout)


def whole_mask_of(attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> WholeMask | str:
    """A mask of torch's over queries and keys ``(…, seq, head_dim)`` as one of scores, or why it isn't one."""
    scores = (*query.shape[:-1], key.shape[-2])
    shape = attn_mask.shape
    sizes = zip(reversed(shape), reversed(scores), strict=False)
    # Two comparisons: of sizes that are symbols in a program, `in` says no.
    if len(shape) > len(scores) or any(n != 1 and n != m for n, m in sizes):
        return f"attn_mask has shape {tuple(shape)}, which doesn't broadcast to {tuple(scores)}"
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(shape))
    return WholeMask(attn_mask if attn_mask.dtype in (*_KINDS, query.dtype) else attn_mask.float())


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


def has_rows(x: Any) -> bool:
    """Whether it is a tensor with memory whose last dimension has elements, which :func:`fit` looks at."""
    return (
        isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested and x.ndim > 0 and x.shape[-1] > 0
    )


def fit(x: torch.Tensor) -> torch.Tensor:
    """The same as kernels take it: a contiguous last dimension, with zeros up to a multiple of what they count in, of
    rows that begin where a GPU reads them."""
    beyond = -x.shape[-1] % HEAD_DIM_MULTIPLE
    if beyond:
        x = torch.nn.functional.pad(x, (0, beyond))  # which leaves dimensions in the order that they had
    if (x.stride(-1) == 1 or x.shape[-1] == 1) and is_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def order_of(x: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest, as ``torch.empty_like`` lays them out: an expanded one stays."""
    strides = x.stride()
    if 0 in strides:
        strides = torch.empty_like(torch.empty_strided(tuple(x.shape), strides, device="meta")).stride()
    return tuple(sorted(range(x.ndim), key=lambda dim: -strides[dim]))
