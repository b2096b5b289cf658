"""One run: every workload on every implementation, the device's matmul peak, and the smallest call."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tvm_flash.bench import machine
from tvm_flash.bench.results import Cell, Measurement, Peak, Run
from tvm_flash.machine.device import Device
from tvm_flash.measure import accuracy, timing
from tvm_flash.measure.peaks import matmul_peak
from tvm_flash.measure.peers import Contestant
from tvm_flash.measure.timing import Effort, digits
from tvm_flash.measure.workloads import Workload, smallest
from tvm_flash.selector import BackendSelector


@dataclass(frozen=True)
class Bench:
    """A run to be made: where, who, what, and how long."""

    device: Device
    contestants: Sequence[Contestant]
    workloads: Sequence[Workload]
    effort: Effort
    command: str
    seed: int = 0
    _order: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    def run(self, begins: Callable[[str], None] = lambda _: None) -> Iterator[Run]:
        """The run as it grows: once for each peak, workload and smallest call; ``begins`` hears what comes next."""
        run = Run(
            created=machine.now(),
            command=self.command,
            machine=machine.describe(self.device),
            method=timing.describe(self.device.kind, self.effort),
            implementations=tuple(c.about for c in self.contestants),
        )
        dtypes = dict.fromkeys(w.dtype for w in self.workloads)
        for dtype in dtypes:
            begins(f"matrix product, {dtype}")
            run = dataclasses.replace(run, peaks=(*run.peaks, self.peak(dtype)))
            yield run
        for workload in self.workloads:
            begins(str(workload))
            run = dataclasses.replace(run, cells=(*run.cells, self.cell(workload)))
            yield run
        for number, dtype in enumerate(dtypes):
            begins(f"matrix product again, {dtype}")  # a slow moment at the start mustn't make a low peak
            peaks = list(run.peaks)
            peaks[number] = _faster(peaks[number], self.peak(dtype))
            run = dataclasses.replace(run, peaks=tuple(peaks))
            yield run
        for dtype in dtypes:
            begins(f"smallest call, {dtype}")
            call = self.smallest_call(smallest(self.device.kind, dtype, self.workloads[0].backward))
            run = dataclasses.replace(run, calls=(*run.calls, call))
            yield run

    def steps(self) -> int:
        """How many runs :meth:`run` gives."""
        return len(self.workloads) + 3 * len({w.dtype for w in self.workloads})

    def peak(self, dtype: str) -> Peak:
        """The speed of torch.matmul, timed as all else is."""
        size, flops = matmul_peak(dtype, str(self.device), self._rounds)
        return Peak(dtype, size, {mode: digits(x) for mode, x in flops.items()})

    def cell(self, workload: Workload) -> Cell:
        """All implementations on one workload; one that can't run it has its reason in place of figures."""
        tensors = self._tensors(workload)
        *qkv, dout = tensors["bshd"]
        exact = accuracy.exact_rows(*qkv, workload, dout)
        found: dict[str, Measurement] = {}
        calls = {}
        for contestant in self.contestants:
            with _failing(contestant, found):
                call = contestant.call(*tensors[contestant.layout][:3], workload, tensors[contestant.result][3])
                error = accuracy.relative_error(_compared(call(), contestant, workload), exact)
                kernel = kernel_of(contestant, workload, str(self.device))
                found[contestant.about.key] = Measurement(contestant.about.key, {}, {}, digits(error), *kernel)
                calls[contestant.about.key] = call
        rounds = self._rounds(calls) if calls else {}
        for key in calls:
            seconds = {mode: digits(timing.figure(mode, times[key])) for mode, times in rounds.items()}
            spread = {mode: (digits(min(times[key])), digits(max(times[key]))) for mode, times in rounds.items()}
            found[key] = dataclasses.replace(found[key], seconds=seconds, spread=spread)
        return Cell(workload, tuple(found.values()))

    def smallest_call(self, workload: Workload) -> Cell:
        """How long the caller of a function is held up."""
        tensors = self._tensors(workload)
        found: dict[str, Measurement] = {}
        for contestant in self.contestants:
            with _failing(contestant, found), contestant.around():
                call = contestant.prepare(*tensors[contestant.layout][:3], workload, tensors[contestant.result][3])
                call()
                seconds = digits(timing.call_time(call))
                found[contestant.about.key] = Measurement(
                    contestant.about.key, {"call": seconds}, {"call": (seconds, seconds)}
                )
        return Cell(workload, tuple(found.values()))

    def _rounds(self, calls) -> timing.Rounds:
        return timing.measure(self.device.kind, calls, self.effort, self._order)

    def _tensors(self, workload: Workload):
        """q, k, v and the gradient of the result, of standard normal numbers by layout, contiguous in each."""
        import torch

        generator = torch.Generator(str(self.device)).manual_seed(self.seed)
        w, dtype = workload, getattr(torch, workload.dtype)
        made = tuple(
            torch.randn(w.batch, s, w.heads, w.head_dim, generator=generator, device=str(self.device)).to(dtype)
            for s in (w.seqlen_q, w.seqlen_kv, w.seqlen_kv, w.seqlen_q)
        )
        return {"bshd": made, "bhsd": tuple(x.transpose(1, 2).contiguous() for x in made)}


def _compared(found, contestant: Contestant, workload: Workload):
    """The rows of a result, or of the queries' gradient, that are compared."""
    if workload.backward:
        return accuracy.same_rows(found[0], contestant.layout, workload)
    return accuracy.same_rows(found, contestant.result, workload)


def kernel_of(contestant: Contestant, workload: Workload, device: str) -> tuple[str, str]:
    """Symbol and source hash of the kernel that one of ours runs for a workload; empty for a peer."""
    if not contestant.about.ours:
        return "", ""
    explanation = BackendSelector(device).explain(
        workload.batch,
        workload.heads,
        workload.seqlen_q,
        workload.head_dim,
        seq_len_kv=workload.seqlen_kv,
        dtype=workload.dtype,
        causal=workload.causal,
        layout=contestant.layout,
        variant=contestant.about.key,
        backward=workload.backward,
    )
    chosen = explanation.chosen
    return (chosen.symbol, chosen.source_hash) if chosen else ("", "")


def _faster(first: Peak, second: Peak) -> Peak:
    """Of two peaks of one dtype the higher in each mode, with the size of that in the main mode."""
    main = next(iter(first.flops))
    winner = first if first.flops[main] >= second.flops[main] else second
    return dataclasses.replace(winner, flops={m: max(first.flops[m], second.flops[m]) for m in first.flops})


@contextlib.contextmanager
def _failing(contestant: Contestant, found: dict[str, Measurement]) -> Iterator[None]:
    """Notes the failure of an implementation, which is what it has for a result where it can't run."""
    try:
        yield
    except Exception as e:  # whatever a peer raises
        reason = f"{type(e).__name__}: {e}".split("\n")[0]
        found[contestant.about.key] = Measurement(contestant.about.key, failure=reason)
