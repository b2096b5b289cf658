"""``python -m tvm_flash bench --ragged``: sequences of different lengths beside what else computes them.

On a CPU that is torch's attention called a sequence at a time; on a GPU also torch's ``varlen_attn``, if it has one.
Of equal lengths our own function for a dense batch runs too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tvm_flash import flash_attention_v2, flash_attention_varlen
from tvm_flash.bench import machine
from tvm_flash.display import Entry, Screen, Table, table
from tvm_flash.machine.device import Device
from tvm_flash.measure import ragged_peers, timing
from tvm_flash.measure.workloads import spread

#: Of ``(sequences, mean length, heads, kv_heads, head_dim, causal)`` on a GPU: prompts, short ones, long ones.
GPU_BATCHES = (
    (32, 512, 32, 8, 128, True),
    (64, 256, 12, 12, 64, False),
    (16, 2048, 32, 8, 128, True),
    (128, 128, 16, 16, 64, False),
    (8, 4096, 32, 8, 128, True),
)
CPU_BATCHES = (
    (8, 512, 8, 8, 64, True),
    (8, 512, 8, 8, 64, False),
    (32, 128, 12, 12, 64, False),
    (4, 1024, 8, 2, 128, True),
    (64, 32, 8, 8, 64, False),
)


@dataclass(frozen=True)
class Batch:
    """Sequences of ``lengths`` keys and as many queries."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    backward: bool = False

    def __str__(self) -> str:
        n, equal = len(self.lengths), len(set(self.lengths)) == 1
        lengths = f"{n} × {self.lengths[0]}" if equal else f"{n} of {min(self.lengths)} to {max(self.lengths)}"
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads != self.heads else str(self.heads)
        mask = "causal" if self.causal else "full"
        return f"{lengths}, heads {heads}, d{self.head_dim} {mask}{' backward' if self.backward else ''} {self.dtype}"

    @property
    def flops(self) -> float:
        """Operations of the two products, or of a backward's five."""
        pairs = sum(n * n for n in self.lengths) / (2 if self.causal else 1)
        return (10 if self.backward else 4) * pairs * self.heads * self.head_dim


def batches(kind: str, dtypes: Sequence[str], causal: str, backward: bool) -> list[Batch]:
    """The batches of a kind of device, each of different and of equal lengths."""
    found = []
    for dtype in dtypes:
        for count, mean, *sizes, is_causal in CPU_BATCHES if kind == "cpu" else GPU_BATCHES:
            if causal == "both" or is_causal == (causal == "yes"):
                for lengths in (spread(count, mean), (mean,) * count):
                    found.append(Batch(lengths, *sizes, dtype, is_causal, backward))
    return found


def calls_of(batch: Batch, device: str) -> dict[str, Callable]:
    """What computes a batch, by name; each call does all of it."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    total = sum(batch.lengths)

    def rows(heads: int):
        x = torch.randn(total, heads, batch.head_dim, generator=generator, device=device)
        return x.to(getattr(torch, batch.dtype)).requires_grad_(batch.backward)

    q, k, v = rows(batch.heads), rows(batch.kv_heads), rows(batch.kv_heads)
    starts = torch.tensor([0, *batch.lengths], device=device).cumsum(0).int()
    longest, causal = max(batch.lengths), batch.causal

    def ours():
        return flash_attention_varlen(q, k, v, starts, starts, longest, longest, causal=causal)

    def dense():
        batched = (x.view(len(batch.lengths), longest, *x.shape[1:]) for x in (q, k, v))
        return flash_attention_v2(*batched, causal=causal).flatten(0, 1)

    calls = {"ours": ours, **ragged_peers.peers(q, k, v, batch.lengths, causal)}
    if len(set(batch.lengths)) == 1:
        calls["ours, dense"] = dense
    if not batch.backward:
        return calls
    dout = torch.randn(total, batch.heads, batch.head_dim, generator=generator, device=device).to(q.dtype)
    return {name: _queries_gradient(call, (q, k, v), dout) for name, call in calls.items()}


def _queries_gradient(call: Callable, leaves, dout) -> Callable:
    """All gradients, of which that of the queries is compared."""
    gradients = ragged_peers.backward(call, leaves, dout)
    return lambda: gradients()[0]


@dataclass(frozen=True)
class Result:
    """Seconds by name of what computed a batch, and why the others didn't; the largest difference from torch's."""

    batch: Batch
    seconds: dict[str, float]
    failures: dict[str, str]
    difference: float


def measure(
    device: Device, work: Sequence[Batch], effort: timing.Effort, begins: Callable[[str], None] = lambda _: None
) -> Iterator[Result]:
    """Time all of each batch in turns."""
    for batch in work:
        begins(str(batch))
        calls, failures, first = calls_of(batch, str(device)), {}, {}
        for name, call in list(calls.items()):
            try:
                first[name] = call().detach()
            except Exception as e:  # whatever a peer raises
                failures[name] = f"{type(e).__name__}: {e}".split("\n")[0]
                del calls[name]
        rounds = next(iter(timing.measure(device.kind, calls, effort).values()))
        seconds = {name: timing.digits(timing.figure("", rounds[name])) for name in calls}
        peer = first.get(ragged_peers.ONE_AT_A_TIME)
        difference = float("nan")
        if peer is not None and "ours" in first:
            difference = ((first["ours"].double() - peer.double()).norm() / peer.double().norm()).item()
        yield Result(batch, seconds, failures, timing.digits(difference, 2))


def run(
    device: Device, work: Sequence[Batch], effort: timing.Effort, screen: Screen, begins, json_file: Path | None
) -> int:
    """Measure, show, and write; 0, or 1 if ours ran nowhere."""
    results = []
    for result in measure(device, work, effort, begins):
        results.append(result)
        if json_file:
            data = {
                "machine": machine.describe(device),
                "created": machine.now(),
                "results": list(map(asdict, results)),
            }
            json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    screen.line("; ".join(f"{name}: {value}" for name, value in machine.describe(device).items()))
    screen.line()
    screen.table(as_table(results))
    for result in results:
        for name, reason in result.failures.items():
            screen.line(f"{result.batch}: {name}: {reason}", "warning", whole=True)
    screen.line("times are medians in turns; a ratio above 1 says that ours is faster", "quiet")
    return 0 if any("ours" in r.seconds for r in results) else 1


def as_table(results: Sequence[Result]) -> Table:
    """Milliseconds of ours, and the time of each other one over it."""
    others = list(dict.fromkeys(n for r in results for n in (*r.seconds, *r.failures) if n != "ours"))
    rows = []
    for r in results:
        ours = r.seconds.get("ours")
        row = [str(r.batch), "–" if ours is None else f"{ours * 1e3:.3g}"]
        row.append("–" if ours is None else f"{r.batch.flops / ours / 1e12:.3g}")
        for name in others:
            ratio = r.seconds[name] / ours if ours and name in r.seconds else None
            row.append("–" if ratio is None else Entry(f"{ratio:.2f}", "best" if ratio >= 1 else "bad"))
        rows.append((*row, f"{r.difference:.1e}"))
    heads = ("sequences", "ms", "TFLOP/s", *(f"{n} / ours" for n in others), "difference")
    return table("", heads, rows, labels=1)
