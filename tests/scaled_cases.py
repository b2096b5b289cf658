"""Caches of 8 bits: those of :mod:`tests.paged_cases` with elements and scales, and what they stand for.

A scale is of each head, or of each page and head; those of pages that belong to no sequence are NaN, as elements of
theirs and of rows behind a sequence's last key are where the dtype has NaN.
"""

from __future__ import annotations

import numpy as np
import torch

from tests import paged_cases
from tests.paged_cases import PagedCase
from tests.ragged_cases import RaggedInputs
from tvm_flash import dequantise_cache

#: The dtypes of caches.
CACHES = ("float8_e4m3fn", "int8")


def quantised(
    case: PagedCase, data: RaggedInputs, cache: str, of_pages: bool, device: str = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """``k``, ``v``, ``k_scale`` and ``v_scale`` of a case, and ``k`` and ``v`` that those stand for, in q's dtype."""
    made = paged_cases.caches(case, data)
    rng = np.random.default_rng(len(case.id))
    given, plain = {}, {}
    for name in "kv":
        x = torch.from_numpy(getattr(made, name))
        pages, _, heads, _ = x.shape
        scale = torch.from_numpy(
            rng.uniform(0.5, 2, (pages, heads)).astype(np.float32) / (100 if cache == "int8" else 9)
        )
        scale = scale if of_pages else scale[0]
        beside = scale[:, None, :, None] if of_pages else scale[:, None]
        bits = (x / beside).clamp(-127, 127).nan_to_num(127).round() if cache == "int8" else x / beside
        stored = bits.to(getattr(torch, cache))
        if of_pages:
            used = torch.from_numpy(np.isfinite(getattr(made, name)).any((1, 2, 3)))
            scale = torch.where(used[:, None], scale, torch.nan)
        stood_for = dequantise_cache(stored, scale, case.of.dtype)
        if case.strides == "heads":
            stored, stood_for = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (stored, stood_for))
        given |= {name: stored.to(device), f"{name}_scale": scale.to(device)}
        plain[name] = stood_for.to(device)
    return given, plain


def as_kernels_take(case: PagedCase, scaled: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of ``quantised`` by role: a scale for each page and head, numbers of 8 bits as bytes."""
    shape = (case.sizes["pages"], case.of.kv_heads)
    scales = {name: scaled[name].expand(shape) for name in ("k_scale", "v_scale")}
    caches = {name: scaled[name] for name in "kv"}
    return scales | {n: x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for n, x in caches.items()}
