"""``nn.scaled_dot_product_attention``: masks and biases of every shape that broadcasts, with gradients of them."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.doors.draw import Draw, sizes_of
from tests.doors.formula import attention, compare, compare_gradients
from tests.random_cases import DTYPES
from tvm_flash import nn


def call(draw: Draw) -> float:
    """``nn.scaled_dot_product_attention``: masks and biases of every shape, with gradients."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    rows, keys, batch, (heads, kv_heads), dims = sizes_of(draw)
    lead_q, lead_kv = (batch, heads), (batch, kv_heads)
    if draw.chance("three dimensions", 0.1):
        lead_q = lead_kv = (batch,)
    q = draw.normal(*lead_q, rows, dims[0], dtype=dtype, factor=draw.one_of("magnitude", 0.3, 1.0, 1.0, 3.0))
    k, v = (draw.normal(*lead_kv, keys, n, dtype=dtype) for n in dims)
    scale = draw.one_of("scale", None, None, 0.05, 1.0)
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    if lead_q != lead_kv or draw.chance("grouped", 0.1):
        options["enable_gqa"] = True
    visible = torch.ones(rows, keys, dtype=torch.bool, device=draw.device)
    mask = None
    if draw.chance("is_causal", 0.2):
        options["is_causal"] = True
        visible = visible.tril()
    elif draw.chance("masked", 0.85):
        mask = draw.placed("mask", _mask(draw, (*lead_q, rows, keys), dtype))
        visible = mask if mask.dtype == torch.bool else ~mask.isneginf()
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    trains = draw.chance("gradients", 0.3)
    leaves = {n: draw.placed(n, x).requires_grad_(trains) for n, x in (("q", q), ("k", k), ("v", v))}
    if bias is not None and trains and draw.chance("gradient of the bias", 0.5):
        leaves["bias"] = mask = mask.detach().requires_grad_()
    found = nn.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], mask, **options)
    scale = 1 / math.sqrt(dims[0]) if scale is None else scale
    worst = compare(found.detach(), q, k, v, scale, visible, None if bias is None else bias.detach())
    if trains:
        dout = draw.normal(*found.shape, dtype=dtype)
        found.backward(dout)

        def formula(own, rounded):
            return attention(own["q"], own["k"], own["v"], scale, visible, own.get("bias", bias), rounded=rounded)[0]

        compare_gradients(leaves, dout, formula, q, k, v)
    return worst


def _mask(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A mask or a bias that broadcasts to ``shape``, and isn't always of its size."""
    own = [n if draw.random() < 0.7 else 1 for n in shape]
    while len(own) > 1 and own[0] == 1 and draw.random() < 0.7:
        own = own[1:]
    draw.say("shape of the mask", tuple(own))
    rows, keys = (own[-2] if len(own) > 1 else 1), own[-1]
    share = draw.one_of("visible", 0.05, 0.5, 0.95, 1.0)
    visible = torch.rand(own, generator=draw.generator) < share
    kind = draw.one_of("kind", "random", "random", "band", "padding", "rows")
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    if kind == "band":
        visible = ((i - j).abs() <= draw.randint(0, keys)).expand(*own[:-2], rows, keys).reshape(own).clone()
    elif kind == "padding":
        visible = (j < draw.randint(0, keys)).expand(own).clone()
    elif kind == "rows":
        visible &= (torch.rand(*own[:-1], 1, generator=draw.generator) < 0.7) if len(own) > 1 else True
    visible = visible.to(draw.device)
    if draw.chance("of bits", 0.5):
        found = visible
    else:
        own_dtype = dtype if draw.chance("bias of 16 bits", 0.5) else torch.float32
        bias = draw.normal(*own, dtype=own_dtype, factor=draw.one_of("size of the bias", 0.0, 1.0, 30.0))
        found = bias.masked_fill(~visible, -torch.inf)
    if draw.chance("expanded", 0.2):
        found = found.expand(shape)
    return found
