"""``nn.flash_attn_func``, those of packed tensors, and all of these of sequences of different lengths."""

from __future__ import annotations

import math

import torch

from tests.doors.draw import Draw, options_of, sizes_of
from tests.doors.formula import attention, compare, compare_gradients, of_sequence
from tests.random_cases import DTYPES
from tvm_flash import nn


def call(draw: Draw) -> float:
    """``nn.flash_attn_func``, those of packed tensors, and all of these of sequences of different lengths."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    rows, keys, batch, (heads, kv_heads), dims = sizes_of(draw)
    form, varlen = draw.one_of("form", "", "", "kvpacked_", "qkvpacked_"), draw.chance("sequences", 0.5)
    if form:
        dims = dims[0], dims[0]
    if form == "qkvpacked_":
        kv_heads, rows = heads, keys
    lengths = [(rows, keys)] * batch
    if varlen:
        batch = draw.one_of("batch", 1, 2, 5)
        lengths = [(draw.choice((0, 1, draw.randint(1, rows), rows)), draw.randint(0, keys)) for _ in range(batch)]
        lengths = draw.say("lengths", [(n, n) if form == "qkvpacked_" else (m, n) for m, n in lengths])
    options = options_of(draw, (batch, heads), keys)
    total_q, total_k = (sum(x) + (draw.choice((0, 0, 3)) if varlen else 0) for x in zip(*lengths, strict=True))
    total_k = total_q if form == "qkvpacked_" else total_k
    q = draw.normal(total_q, heads, dims[0], dtype=dtype)
    k, v = (draw.normal(total_k, kv_heads, n, dtype=dtype) for n in dims)
    starts = [torch.tensor([0, *x]).cumsum(0).tolist() for x in zip(*lengths, strict=True)]

    # How q, k and v are made of what a call is given, and what it returns is made rows one after the other.
    packs = {
        "": {"q": [q], "k": [k], "v": [v]},
        "kvpacked_": {"q": [q], "kv": [k, v]},
        "qkvpacked_": {"qkv": [q, k, v]},
    }
    trains = draw.chance("gradients", 0.3)
    leaves = {}
    for name, parts in packs[form].items():
        x = torch.stack(parts, 1) if len(parts) > 1 else parts[0]
        x = x if varlen else x.reshape(batch, -1, *x.shape[1:])
        leaves[name] = draw.placed(name, x).requires_grad_(trains)

    def unpacked(own):
        flat = ((x if varlen else x.flatten(0, 1), len(packs[form][n])) for n, x in own.items())
        return [y for x, count in flat for y in (x.unbind(1) if count > 1 else [x])]

    where = []
    if varlen:
        where = [torch.tensor(x, dtype=torch.int32, device=draw.device) for x in starts]
        where += [max(x) for x in zip(*lengths, strict=True)]
        where = where[::2] if form == "qkvpacked_" else where
    function = getattr(nn, f"flash_attn_{'varlen_' if varlen else ''}{form}func")
    out, lse, _ = function(*leaves.values(), *where, return_attn_probs=True, **options)
    found = out.detach() if varlen else out.detach().flatten(0, 1)
    found_lse = lse.detach() if varlen else lse.detach().transpose(0, 1).flatten(1)
    scale = options.get("softmax_scale", 1 / math.sqrt(dims[0]))

    def sequences(own):
        """Of each sequence its rows, and what :func:`attention` takes."""
        own_q, own_k, own_v = own
        for b, (m, n) in enumerate(lengths):
            of_q, of_k = (slice(x[b], x[b + 1]) for x in starts)
            tensors = (x.transpose(0, 1) for x in (own_q[of_q], own_k[of_k], own_v[of_k]))
            yield of_q, *tensors, scale, *of_sequence(options, b, m, n, draw.device)

    worst = 0.0
    for place, *of in sequences((q, k, v)):
        worst = max(worst, compare(found[place].transpose(0, 1), *of, lse=found_lse[:, place]))
    after = starts[0][-1]
    assert not found[after:].any() and found_lse[:, after:].isneginf().all(), (
        "rows after the last sequence aren't empty"
    )
    if trains:
        dout = draw.normal(*out.shape, dtype=dtype)
        out.backward(dout)

        def formula(own, rounded):
            pieces = [attention(*of, rounded=rounded)[0].transpose(0, 1) for _, *of in sequences(unpacked(own))]
            pieces.append(pieces[0].new_zeros(total_q - after, heads, dims[1]))
            return torch.cat(pieces).reshape(out.shape)

        compare_gradients(leaves, dout, formula, q, k, v)
    return worst
