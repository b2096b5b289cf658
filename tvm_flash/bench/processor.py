"""``python -m tvm_flash bench --processor``: each template beside torch's attention on the template's own memory.

V2 reads q, k and v with the heads inside; torch gets views of that same memory.  All four take turns, call by call, on
one thread and on two.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tvm_flash.bench import machine
from tvm_flash.display import Entry, Screen, Table, as_markdown, table
from tvm_flash.machine.device import Device
from tvm_flash.measure import peers, timing
from tvm_flash.measure.peaks import matmul_peak
from tvm_flash.measure.workloads import CPU_DTYPES, MASKS, Workload, of_shapes

#: ``(batch, heads, length, head_dim)``.  Rows of a position of V2 are 4096 bytes or a multiple apart in float32 where
#: 16 heads have 64 elements, or 8 have 128, and in 16 bits where there are twice as many.
SHAPES = (
    (4, 12, 384, 32),
    (4, 12, 384, 64),
    (2, 8, 512, 64),
    (1, 32, 512, 64),
    (1, 16, 1024, 64),
    (1, 16, 2048, 64),
    (2, 8, 512, 128),
    (1, 16, 768, 128),
    (1, 8, 1024, 128),
    (1, 8, 2048, 128),
)
#: One new token with a cache of 4096.
ONE_QUERY = (1, 32, 1, 128, 4096)
#: Threads, where the process may use as many processors.
THREADS = (1, 2)
#: Layout of each template's memory.
LAYOUTS = {"v1": "bhsd", "v2": "bshd"}


def cells(dtypes: Sequence[str], masks: Sequence[str]) -> list[Workload]:
    """What is measured: the shapes full and causal, or as ``masks`` says, and one query, in each dtype."""
    found = []
    for dtype in dtypes or CPU_DTYPES:
        found += of_shapes(SHAPES, (dtype,), masks or MASKS) + of_shapes((ONE_QUERY,), (dtype,), ("full",))
    return found


@dataclass(frozen=True)
class Result:
    """Median seconds of one cell, and how many times as fast as torch each template was; by template."""

    workload: Workload
    threads: int
    ours: dict[str, float]
    torch: dict[str, float]
    ratio: dict[str, float]


@dataclass(frozen=True)
class Product:
    """FLOP/s of torch's own matrix product."""

    dtype: str
    threads: int
    flops: float


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and with it our kernels, use so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def calls_of(workload: Workload) -> dict[tuple[str, str], Callable]:
    """What computes a cell, by template and ``"torch"`` or ``"ours"``, torch first."""
    import torch

    generator = torch.Generator().manual_seed(0)
    w, contestants = workload, {c.about.key: c for c in peers.contestants("cpu")}
    made = [
        torch.randn(w.batch, s, w.heads, w.head_dim, generator=generator).to(getattr(torch, w.dtype))
        for s in (w.seqlen_q, w.seqlen_kv, w.seqlen_kv)
    ]
    inside = [x.transpose(1, 2) for x in made]
    outside = [x.contiguous() for x in inside]
    return {
        ("v1", "torch"): contestants["torch"].call(*outside, w),
        ("v1", "ours"): contestants["v1"].call(*outside, w),
        ("v2", "torch"): contestants["torch"].call(*inside, w),
        ("v2", "ours"): contestants["v2"].call(*made, w),
    }


def _usable_threads() -> list[int]:
    return [n for n in THREADS if n <= len(os.sched_getaffinity(0))]


def steps(work: Sequence[Workload]) -> int:
    """How many cells begin."""
    return len(work) * len(_usable_threads())


def measure(
    work: Sequence[Workload], effort: timing.Effort, begins: Callable[[str], None] = lambda _: None
) -> Iterator[Result | Product]:
    """Time the cells in turns, and before those of a dtype torch's matrix product, for each number of threads."""
    seen = set()
    for threads in _usable_threads():
        for workload in work:
            with torch_threads(threads):
                if (workload.dtype, threads) not in seen:
                    seen.add((workload.dtype, threads))
                    _, flops = matmul_peak(workload.dtype, "cpu", lambda calls: {"": timing.in_blocks(calls, effort)})
                    yield Product(workload.dtype, threads, timing.digits(flops[""]))
                begins(f"{workload}, threads={threads}")
                calls = calls_of(workload)
                for call in calls.values():
                    call()
                times = timing.in_turns(calls, effort)
            yield _result(workload, threads, times)


def _result(workload: Workload, threads: int, times: dict[tuple[str, str], list[float]]) -> Result:
    def by_template(one: Callable[[str], float]) -> dict[str, float]:
        return {template: timing.digits(one(template)) for template in LAYOUTS}

    return Result(
        workload,
        threads,
        by_template(lambda t: statistics.median(times[t, "ours"])),
        by_template(lambda t: statistics.median(times[t, "torch"])),
        # The two calls of a turn follow each other: whatever slows the machine for longer slows both.
        by_template(
            lambda t: statistics.median(x / y for x, y in zip(times[t, "torch"], times[t, "ours"], strict=True))
        ),
    )


def run(
    device: Device,
    work: Sequence[Workload],
    effort: timing.Effort,
    screen: Screen,
    begins: Callable[[str], None],
    files: tuple[Path | None, Path | None],
    command: str,
) -> int:
    """Measure, show, and write the ``files``, JSON after each cell and in the end a page; always 0."""
    json_file, page = files
    found: list[Result | Product] = []
    about, created = machine.describe(device) | {"threads": "as in the tables"}, machine.now()
    for one in measure(work, effort, begins):
        found.append(one)
        if json_file:
            data = {"machine": about, "created": created, "command": command}
            for key, kind in (("products", Product), ("results", Result)):
                data[key] = [dataclasses.asdict(x) for x in found if isinstance(x, kind)]
            json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if page:
        page.write_text(markdown(about, created, command, found), encoding="utf-8")
    screen.line("; ".join(f"{name}: {value}" for name, value in about.items()))
    screen.line()
    for shown in tables(found):
        screen.table(shown)
    screen.line("the time of torch over ours, medians of calls in turns: above 1 ours is faster; ▼ is a loss", "quiet")
    return 0


def tables(found: Sequence[Result | Product]) -> list[Table]:
    """The summary, and for each number of threads a table of all cells."""
    results = [x for x in found if isinstance(x, Result)]
    dtypes, threads = (
        list(dict.fromkeys(r.workload.dtype for r in results)),
        list(dict.fromkeys(r.threads for r in results)),
    )
    return [
        _summary(found, dtypes, threads),
        *(_cells([r for r in results if r.threads == n], dtypes) for n in threads),
    ]


def _summary(found: Sequence[Result | Product], dtypes: Sequence[str], threads: Sequence[int]) -> Table:
    """Of each template, dtype and number of threads the geometric mean, the worst cell and the one query."""
    rows = []
    for count in threads:
        for dtype in dtypes:
            own = [x for x in found if x.threads == count]
            results = [x for x in own if isinstance(x, Result) and x.workload.dtype == dtype]
            many = [x for x in results if x.workload.seqlen_q > 1]
            product = next(x.flops for x in own if isinstance(x, Product) and x.dtype == dtype)
            for template in LAYOUTS:
                row = [template.upper(), dtype, str(count)]
                if many:
                    worst = min(many, key=lambda x: x.ratio[template])
                    row += [
                        f"{statistics.geometric_mean(x.ratio[template] for x in many):.2f}",
                        _ratio(worst, template),
                    ]
                    row += [f"{_shape(worst.workload)} {worst.workload.mask}"]
                    row += [str(sum(x.ratio[template] < 1 for x in many))]
                else:
                    row += ["–"] * 4
                row += [_ratio(x, template) for x in results if x.workload.seqlen_q == 1] or ["–"]
                rows.append([*row, f"{product / 1e9:.0f}"])
    heads = ("", "dtype", "threads", "mean", "worst", "where", "lost", "one query", "torch.matmul, GFLOP/s")
    return table("torch's time over ours", heads, rows, labels=3)


def _cells(results: Sequence[Result], dtypes: Sequence[str]) -> Table:
    """A row for each shape and mask; for each dtype and template the ratio, and GFLOP/s of ours."""
    by_row: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        by_row.setdefault((_shape(r.workload), r.workload.mask), {})[r.workload.dtype] = r
    rows = []
    for (shape, mask), own in by_row.items():
        row: list[str | Entry] = [shape, mask]
        for dtype in dtypes:
            for template in LAYOUTS:
                r = own.get(dtype)  # a run that was stopped lacks the last ones
                row += [_ratio(r, template), f"{r.workload.flops / r.ours[template] / 1e9:.0f}"] if r else ["–"] * 2
        rows.append(row)
    heads = [x for d in dtypes for t in LAYOUTS for x in (f"{t.upper()} {d}", "GFLOP/s")]
    threads = results[0].threads
    title = f"{threads} thread{'s' if threads > 1 else ''}"
    return table(title, ("batch, heads, length, head_dim", "mask", *heads), rows, labels=2)


def _ratio(result: Result, template: str) -> Entry:
    value = result.ratio[template]
    return Entry(f"{value:.2f}" if value >= 1 else f"▼{value:.2f}", "" if value >= 1 else "bad")


def _shape(w: Workload) -> str:
    keys = f" with {w.seqlen_kv} keys" if w.seqlen_kv != w.seqlen_q else ""
    return f"{w.batch}, {w.heads}, {w.seqlen_q}, {w.head_dim}{keys}"


def markdown(about: dict[str, str], created: str, command: str, found: Sequence[Result | Product]) -> str:
    """The page of a run."""
    lines = [f"# {about['device']} beside torch's attention", "", f"Measured {created[:10]} with", ""]
    lines += ["```", command, "```", "", "| | |", "|---|---|", *(f"| {n} | {v} |" for n, v in about.items()), ""]
    lines += [
        "Each template in turns with torch's attention, call by call, both on the template's memory: torch's time over",
        "ours, the median over the turns; a loss is marked ▼. GFLOP/s are ours.",
    ]
    for shown in tables(found):
        lines += ["", f"## {shown.title}", "", *as_markdown(shown)]
    return "\n".join(lines) + "\n"
