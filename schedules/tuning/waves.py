"""How long waves of a kernel's work tiles take: measured on a GPU, and fitted.  Needs no TVM.

A wave is as many work tiles as a device computes at a time.  Of kernels that differ in the height of their tiles alone
the run time takes the one whose waves take the least time (:class:`tvm_flash.packs.manifest.Waves`).
"""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from schedules.builder.records import WavesRecord
from tvm_flash.machine import cuda
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs import by_role, sizes
from tvm_flash.packs.manifest import KernelEntry

#: Keys of the problems that are timed, full waves of each, and the most queries: whole tiles of 64 to 256 rows.
SEQLENS_KV, WAVES, MOST_QUERIES = (128, 512, 1024), (1, 4), 768
#: Calls in a graph, and how often it is replayed.
CALLS, REPLAYS = 10, 5


def record(entry: KernelEntry, functions: Sequence[Callable], versions: Mapping[str, str], run_as: str) -> WavesRecord:
    """Time a dense forward kernel of Hopper's on the current device."""
    multiprocessors = cuda.gpu(torch.cuda.current_device()).multiprocessors
    block_m, block_n = 64 * entry.config["num_consumer_warpgroups"], entry.config["block_n"]
    at_once = entry.config["blocks_per_sm"]
    points = []
    for tiles, waves, seqlen_kv in _problems(at_once):
        problem = _problem(entry, block_m, multiprocessors * tiles * waves, multiprocessors, seqlen_kv)
        microseconds = round(_microseconds(entry, functions, problem), 2)
        points.append({"problem": str(problem), "at_a_time": tiles, "waves": waves, "microseconds": microseconds})
    launch, tiles = fit(points, block_n)
    return WavesRecord(
        kind="waves",
        device=torch.cuda.get_device_name(),
        driver=cuda.driver_version(),
        arch=entry.arch,
        run_as=run_as,
        symbol=entry.symbol,
        source_hash=entry.source_hash,
        block_m=block_m,
        block_n=block_n,
        multiprocessors=multiprocessors,
        points=tuple(points),
        launch=launch,
        tiles=tiles,
        versions={**versions, "torch": torch.__version__},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
    )


def _problems(at_once: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of a multiprocessor at a time, waves, and keys: fewer than it can compute come in one wave only."""
    for tiles in range(1, at_once + 1):
        yield from itertools.product((tiles,), WAVES if tiles == at_once else (1,), SEQLENS_KV)


def _problem(entry: KernelEntry, block_m: int, tiles: int, multiprocessors: int, seqlen_kv: int) -> Workload:
    """A problem of so many tiles; several of a head, as usual, if they divide."""
    of_head = math.gcd(multiprocessors, MOST_QUERIES // block_m)
    return Workload(1, tiles // of_head, of_head * block_m, entry.head_dim, entry.dtype, seqlen_kv=seqlen_kv)


def fit(points: Sequence[Mapping], block_n: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """``launch`` and ``tiles`` of :class:`tvm_flash.packs.manifest.Waves` that come nearest to what was measured.

    What is small is a ratio's distance from 1, so that short problems count as much as long ones.
    """
    at_once = max(p["at_a_time"] for p in points)
    rows = []
    for p in points:
        steps, row = -(-Workload.parse(p["problem"]).seqlen_kv // block_n), np.zeros(1 + 2 * at_once)
        row[0] = 1
        row[2 * p["at_a_time"] - 1 : 2 * p["at_a_time"] + 1] = p["waves"], p["waves"] * steps
        rows.append(row / p["microseconds"])
    launch, *figures = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0]
    figures = [round(1e6 * x) for x in figures]
    return round(1e6 * launch), tuple(zip(figures[::2], figures[1::2], strict=True))


def _microseconds(entry: KernelEntry, functions: Sequence[Callable], problem: Workload) -> float:
    """Of one call, in replayed graphs."""
    heads, D, E = problem.heads, entry.head_dim, entry.head_dim_v

    def tensor(seqlen: int, dim: int) -> torch.Tensor:
        order = (1, heads, seqlen) if entry.layout == "bhsd" else (1, seqlen, heads)
        return torch.randn(*order, dim, device="cuda", dtype=getattr(torch, entry.dtype))

    q, k, v = tensor(problem.seqlen_q, D), tensor(problem.seqlen_kv, D), tensor(problem.seqlen_kv, E)
    values = {"q": q, "k": k, "v": v, "o": tensor(problem.seqlen_q, E), "lse": torch.empty(1, device="cuda")}
    values["softmax_scale"] = problem.softmax_scale

    def make(shape: tuple[int, ...], dtype: str, zeroed: bool) -> torch.Tensor:
        return (torch.zeros if zeroed else torch.empty)(shape, dtype=getattr(torch, dtype), device="cuda")

    extents = sizes.of(1, heads, problem.seqlen_q, heads, problem.seqlen_kv, D, E)
    run = by_role.bind(entry, functions, values, extents, make)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()  # loads the module
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                run()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)
