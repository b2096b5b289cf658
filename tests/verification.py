"""Verification of CUDA kernels on hardware: trials against float64, then the time of one usual problem.

What an operator's trials are, and what of it is usual, is in a row of ``OPERATORS``.

``test_gpu.py`` asserts with it and ``scripts/verify_kernels.py`` writes records with it.  Kernels are called by their
ABI, whatever the selector would choose.  Needs a GPU, torch and a pack; no TVM.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from schedules.builder.records import Record
from tests import (
    append_trials,
    backward_trials,
    forward_trials,
    latent_trials,
    merged_trials,
    paged_trials,
    ragged_backward_trials,
    ragged_trials,
    scaled_trials,
    torch_cases,
)
from tests.installed import functions_of
from tests.trials import Trial, Usual
from tvm_flash.machine import cuda
from tvm_flash.machine.arch import runs_on
from tvm_flash.packs import by_role
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, CACHE_OF_KIND, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: Timed runs: fewer where they would take longer than so many seconds, as those of products that a newer arch emulates
#: would.
REPEATS, FEWEST, SECONDS = 20, 3, 0.2


@dataclasses.dataclass(frozen=True)
class Operator:
    """``trials`` of a kernel, and the ``usual`` problem that it is timed on."""

    trials: Callable[[KernelEntry], Iterator[Trial]]
    usual: Callable[[KernelEntry], Usual]


#: By operator, or by kind where kernels of a kind take other tensors.
OPERATORS = {
    "forward": Operator(forward_trials.trials, forward_trials.usual),
    "merged": Operator(merged_trials.trials, merged_trials.usual),
    "ragged": Operator(ragged_trials.trials, ragged_trials.usual),
    "ragged_backward": Operator(ragged_backward_trials.trials, ragged_backward_trials.usual),
    "paged": Operator(paged_trials.trials, paged_trials.usual),
    "paged_decode": Operator(paged_trials.trials, paged_trials.usual),
    "paged_decode_any": Operator(paged_trials.trials, paged_trials.usual),
    "paged_latent": Operator(latent_trials.trials, latent_trials.usual),
    **dict.fromkeys(CACHE_OF_KIND, Operator(scaled_trials.trials, scaled_trials.usual)),
    "append": Operator(append_trials.trials, append_trials.usual),
    "backward": Operator(backward_trials.trials, backward_trials.usual),
}


def operator_of(entry: KernelEntry) -> Operator:
    """The row of a kernel."""
    return OPERATORS[entry.kind if entry.kind in OPERATORS else entry.op]


def verify(kernel: Installed) -> tuple[int, float]:
    """Run all trials of a kernel; how many, and the largest error as a share of what is allowed.

    Raises
    ------
    AssertionError: a result is wrong, unwritten, or differs from run to run; the message names the case.
    """
    entry, worst, count = kernel.entry, 0.0, 0
    compute = torch_cases.by_entry(entry, functions_of(kernel), "cuda")
    for trial in operator_of(entry).trials(entry):
        at = f"{entry.symbol} [{entry.arch}], {trial.label}"
        runs = [trial.run(compute, "cuda") for _ in range(2)]
        try:
            worst = max(worst, trial.check(runs[0], "cuda"))
        except AssertionError as e:
            raise AssertionError(f"{at}: {e}") from e
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*runs, strict=True))
        assert same, f"{at}: two runs differ"
        count += 1
    assert count, f"{entry.symbol} [{entry.arch}]: no case applies to it"
    return count, worst


def measure(entry: KernelEntry, functions: Sequence[Callable]) -> tuple[str, list[float], float]:
    """Time the usual problem: its name, microseconds of each repeat, and its floating-point operations."""
    usual = operator_of(entry).usual(entry)

    def make(shape: tuple[int, ...], dtype: str, zeroed: bool) -> torch.Tensor:
        return (torch.zeros if zeroed else torch.empty)(shape, dtype=getattr(torch, dtype), device="cuda")

    run = by_role.bind(entry, functions, usual.values, usual.sizes, make)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    run()  # loads the module
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    events = events[: 1 + max(FEWEST, min(REPEATS, int(SECONDS * 1e3 / events[0].elapsed_time(events[1]))))]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return usual.name, [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)], usual.flops


def run_as(kernel: Installed) -> str:
    """Whether the GPU runs the machine code of a kernel's arch, a newer arch's of the same source, or its PTX."""
    recompiled = kernel.pack.manifest.versions.get("recompiled_for")
    if recompiled:
        return f"recompiled for {recompiled}"
    return "native" if runs_on(kernel.entry.arch, torch.cuda.get_device_capability()) else "ptx"


def record(kernel: Installed, count: int, error: float) -> Record:
    """Measure a kernel that :func:`verify` gave ``count`` and ``error`` for."""
    entry = kernel.entry
    problem, times, flops = measure(entry, functions_of(kernel))
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    return Record(
        kind="verified",
        device=torch.cuda.get_device_name(),
        driver=cuda.driver_version(),
        arch=entry.arch,
        run_as=run_as(kernel),
        **{
            name: getattr(entry, name)
            for name in ("symbol", "template", "dtype", "head_dim", "head_dim_v", "mask", "score", "bucket", "config")
        },
        source_hash=entry.source_hash,
        cases=count,
        error=round(error, 3),
        problem=problem,
        microseconds=round(median, 2),
        spread=(round(deciles[0], 2), round(deciles[-1], 2)),
        tflops=round(flops / median / 1e6, 1),
        versions={**kernel.pack.manifest.versions, "torch": torch.__version__},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def cuda_kernels(archs: Iterable[str] = ()) -> list[Installed]:
    """The installed kernels of the package's own definition for CUDA archs: all, or those given.

    Their order is the same in every process.
    """
    packs = registry()
    kernels = [k for arch in archs or sorted(packs.archs()) if arch != "cpu" for k in packs.kernels(arch)]
    return [k for k in kernels if k.entry.definition == BUILTIN_DEFINITION]
