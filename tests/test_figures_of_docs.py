"""Figures that a document repeats are those of the tables, records and files that they come from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from schedules.builder import core_set
from tvm_flash.bench import recorded
from tvm_flash.measure.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = {"512": 512, "1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table(page: str, *columns: str) -> list[list[str]]:
    """The rows of the one table of a page whose head begins with ``columns``."""
    lines = text_of(page).splitlines()
    cells = [[x.strip() for x in line.strip().strip("|").split("|")] if line.startswith("|") else [] for line in lines]
    (head,) = (i for i, row in enumerate(cells) if tuple(row[: len(columns)]) == columns)
    rows = [*cells[head + 2 :], []]
    return rows[: rows.index([])]


def said(page: str, pattern: str) -> tuple[str, ...]:
    """What the groups of a pattern match in a page, wherever its lines break; ``…`` stands for some words.  There is
    one such place."""
    (found,) = re.finditer(pattern.replace("…", ".{,400}?"), " ".join(text_of(page).split()))
    return found.groups()


def is_rounded(text: str, value: float) -> bool:
    """Whether a figure is ``value``, to the digits that it has."""
    return text == f"{value:.{len(text.partition('.')[2])}f}"


def assert_rounded(texts, values):
    assert all(map(is_rounded, texts, values)), f"{tuple(texts)} should be {tuple(round(x, 4) for x in values)}"


def mean(values) -> float:
    """Geometric."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


# ---------------------------------------------------------------- gradients

FA4 = "docs/benchmarks/recorded/flash_attention_4_backward.json"


def hopper_backward():
    """Rows of both tables: name, sizes, TFLOP/s of cuDNN, FlashAttention-4, FlashAttention-2 and ours, what is said."""
    plain = table("docs/hopper.md", "head_dim, mask", "batch × heads (on heads of keys), positions", "cuDNN")
    for name, sizes, cudnn, fa4, _, ours, of_cudnn, of_fa4 in plain:
        yield name, sizes, float(cudnn), fa4, None, float(ours), of_cudnn, of_fa4
    wide = table("docs/hopper.md", "head_dim, mask", "batch × heads, positions", "cuDNN", "FlashAttention-4, scaled")
    for name, sizes, cudnn, fa4, fa2, ours, of_cudnn, of_best in wide:
        yield name, sizes, float(cudnn), fa4, float(fa2), float(ours), of_cudnn, of_best


def of_fa4(name: str, sizes: str, cudnn: float) -> float | None:
    """FlashAttention-4's recorded speed in a cell, scaled by cuDNN's; None if there is none."""
    batch, heads, length = re.fullmatch(r"(\d+) × (.+), (\w+)", sizes).groups()
    if not heads.isdigit():
        return None
    head_dim, mask = name.split()
    text = f"b={batch} h={heads} s={LENGTHS[length]} d={head_dim} {mask} backward bfloat16"
    found = recorded.read(ROOT / FA4).figures.get(Workload.parse(text))
    return found and cudnn * found.flops / found.bridge_flops


def test_ratios_of_hoppers_backward():
    cells, beside_best = 0, []
    for name, sizes, cudnn, fa4, fa2, ours, of_cudnn, of_peer in hopper_backward():
        # The medians themselves were divided, and these are whole TFLOP/s.
        assert abs(float(of_cudnn) - ours / cudnn) < 0.5 / cudnn + 0.5 * ours / cudnn**2 + 0.005, (name, sizes)
        scaled = of_fa4(name, sizes, cudnn)
        assert bool(fa4) == bool(scaled), (name, sizes)
        if scaled:
            best = max(scaled, cudnn, fa2) if fa2 else scaled
            assert_rounded((fa4, of_peer), (scaled, ours / best))
            beside_best.append(ours / max(scaled, cudnn, fa2 or 0))
            cells += 1
    assert cells == len(recorded.read(ROOT / FA4).figures) == 24
    count, lost, level = said("docs/hopper.md", r"Of the (\d+) cells … (\d+) are lost to … best is ([\d.]+)\.")
    assert (int(count), int(lost)) == (cells, sum(x < 1 for x in beside_best))
    assert_rounded((level,), (mean(beside_best),))


def test_means_of_hoppers_backward():
    rows = [row for row in hopper_backward() if row[4] is None]
    alone, grouped = ([r for r in rows if (" on " in r[1]) == x] for x in (False, True))
    means = said(
        "docs/hopper.md", r"without groups the geometric mean is ([\d.]+) of cuDNN, of those … ([\d.]+); cuDNN's"
    )
    assert_rounded(means, [mean(float(r[6]) for r in found) for found in (alone, grouped)])
    ratios = [r[5] / of_fa4(*r[:3]) for r in alone if r[3]]
    lost, count, level, worst = said(
        "docs/hopper.md",
        r"Beside it (\d+) of (\d+) cells are lost, the geometric mean is ([\d.]+), the worst ([\d.]+):",
    )
    assert (int(lost), int(count)) == (sum(x < 1 for x in ratios), len(ratios))
    assert_rounded((level, worst), (mean(ratios), min(ratios)))


def test_gradients_in_the_readme():
    rows = list(hopper_backward())
    beside = [
        [float(r[6]) for r in rows],
        [r[5] / of_fa4(*r[:3]) for r in rows if r[3]],
        [r[5] / r[4] for r in rows if r[4]],
    ]
    a100 = [
        float(ours) / float(peer)
        for _, _, *cells in table("docs/cards.md", "head_dim", "mask", "512", "1k", "2k")
        for ours, peer in (cell.split(" / ") for cell in cells)
    ]
    figures = said(
        "README.md",
        r"On an H200 it is ([\d.]+) to ([\d.]+) times as fast as cuDNN's, ([\d.]+) to ([\d.]+) times as "
        r"FlashAttention-4's … ([\d.]+) to ([\d.]+) times as FlashAttention-2's, which "
        r"… it, ([\d.]+) to ([\d.]+) times as",
    )
    assert_rounded(figures, [f(x) for x in (*beside, a100) for f in (min, max)])
    count, level, worst = said("docs/cards.md", r"geometric mean of the (\d+) cells is ([\d.]+), the lowest ([\d.]+);")
    assert int(count) == len(a100)
    assert_rounded((level, worst), (mean(a100), min(a100)))
    cpu = table("docs/cpu.md", "batch, heads, length, head_dim", "float32 full", "causal", "bfloat16 full", "causal")
    ratios = [[float(x.split()[0]) for x in row[1:]] for row in cpu]
    float32, bfloat16 = ([x for row in ratios for x in row[i : i + 2]] for i in (0, 2))
    figures = said(
        "README.md", r"is ([\d.]+) to ([\d.]+) times as fast as PyTorch's … of 8 cells: ([\d.]+) in … ([\d.]+) in"
    )
    every = float32 + bfloat16
    assert_rounded(figures, (min(every), max(every), mean(float32), mean(bfloat16)))


# ---------------------------------------------------------------- the forward


def test_speeds_in_the_readme():
    lines = re.findall(
        r"^\* V2 (\w+), steady: ([\d.]+) × .* of 36 \(cuDNN ([\d.]+), FA2 ([\d.]+)",
        text_of("docs/benchmarks.md"),
        flags=re.MULTILINE,
    )
    found = {dtype: [float(x) for x in figures] for dtype, *figures in lines}
    half, brain = found["float16"], found["bfloat16"]
    figures = said(
        "README.md",
        r"V2 is ([\d.]+) × cuDNN in both dtypes, ([\d.]+) × FlashAttention-2 in float16 and ([\d.]+) × in bfloat16, … "
        r"In float16 it is ([\d.]+) × the best",
    )
    assert_rounded((figures[0], *figures), (brain[1], half[1], half[2], brain[2], half[0]))
    rows = table("docs/cards.md", "head_dim, mask", "positions", "V2", "V1", "FlashAttention-2")
    half_a100 = mean(float(r[5]) for r in rows)
    turing = [float(x.split(", ")[1]) for r in table("docs/cards.md", "head_dim, mask", "512", "1k") for x in r[1:]]
    figures = said("README.md", r"`sm_80` is ([\d.]+) × FlashAttention-2 on the same card, code for `sm_75` ([\d.]+) ×")
    assert_rounded(figures, (half_a100, mean(turing)))


def test_speeds_of_cpus_in_the_readme():
    rows = table("docs/cpu.md", "batch, heads, queries, head_dim", "float32 full", "causal", "bfloat16 full")
    ratios = [float(x.split()[0]) for row in rows for x in row[1:]]
    figures = said("README.md", r"V1 is ([\d.]+) to ([\d.]+) times as fast as … mean of (\d+) cells: ([\d.]+)\)")
    assert_rounded(figures, (min(ratios), max(ratios), len(ratios), mean(ratios)))


def test_shapes_in_the_readme():
    rows = table("docs/shapes.md", "model", "batch × positions", "heads", "head_dim", "mask", "cuDNN")
    ratios = [(float(r[9].strip("*")), "decod" in r[0]) for r in rows if r[9]]
    plain, decoding = ([x for x, decodes in ratios if decodes == y] for y in (False, True))
    figures = said(
        "README.md",
        r"Over (\d+) shapes … mean is ([\d.]+) × …, none lost, and ([\d.]+) over five of decoding, four lost",
    )
    assert_rounded(figures, (len(plain), mean(plain), mean(decoding)))
    assert (len(decoding), sum(x < 1 for x in plain), sum(x < 1 for x in decoding)) == (5, 0, 4)


# ---------------------------------------------------------------- kernels


def core_kernels(arch: str) -> dict[str, str]:
    """Hashes of the core set's kernels of an arch, or why there is none, by symbol."""
    groups = json.loads(core_set.PATH.read_text(encoding="utf-8"))["groups"].values()
    return {name.split()[1]: x for group in groups for name, x in group.items() if name.startswith(f"{arch} ")}


def test_number_of_hoppers_kernels_for_gradients():
    symbols = core_kernels("sm_90a")
    ragged = [s for s in symbols if s.endswith("_ragged_backward")]
    dense = [s for s in symbols if s.endswith("_backward") and s not in ragged]
    assert said("docs/hopper.md", r"All (\d+) kernels of the core set for sequences of one length") == (
        str(len(dense)),
    )
    assert said("docs/hopper.md", r"All (\d+) kernels were verified") == (str(len(ragged)),)


def test_what_sm_70_lacks():
    """The section of docs/cards.md names what the core set refuses up to a head_dim of 128, and nothing else."""
    refused = {
        re.fullmatch(r"v1_float16_d128_(\w+)", symbol)[1]
        for symbol, why in core_kernels("sm_70").items()
        if why.startswith("refused") and re.search(r"_d(64|96|128)_", symbol)
    }
    section = re.search(
        r"^### What `sm_70` lacks$(.*?)^#", text_of("docs/cards.md") + "\n#", flags=re.MULTILINE | re.DOTALL
    )
    assert set(re.findall(r"`(\w+_optional\w*)`", section[1])) == refused


@pytest.mark.parametrize("arch", ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_90a"))
def test_other_gpus_lack_nothing_up_to_128(arch):
    refused = [s for s, why in core_kernels(arch).items() if why.startswith("refused")]
    assert not [s for s in refused if re.search(r"_d(64|96|128)_", s)]


# ---------------------------------------------------------------- operations of torch


def operations(call) -> int:
    """How many operations of torch a call takes, views apart, which cost a GPU nothing."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    views = re.compile(
        r"aten\.(view|expand|slice|select\.int|unsqueeze|empty|detach|alias|as_strided|permute|_unsafe_view)"
    )

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += not views.match(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Counting() as counting:
        call()
    return counting.count


def test_operations_that_append_to_a_cache():
    torch = pytest.importorskip("torch")
    from tvm_flash.tracing import torch_cache

    cache, (k, v) = torch.zeros(2, 8, 16, 2, 64), torch.randn(2, 2, 1, 2, 64)
    table, before = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([3, 9], dtype=torch.int32)
    starts, scale = torch.arange(3, dtype=torch.int32), torch.ones(2)
    cos, sin, new = *torch.randn(2, 32, 32), (k[:, 0], v[:, 0])
    rows = k[:, 0].bfloat16()
    found = (
        operations(lambda: torch_cache._append(*cache, *new, starts, before, table)),
        operations(lambda: torch_cache._append(*cache.char(), *new, starts, before, table, scale, scale)),
        operations(lambda: torch_cache._rotate(rows, cos, sin, torch_cache._positions(before, starts, 2, True), True)),
    )
    rows = r"about (\d+) small ones for appending, (\d+) with a cache of 8 bits,? and (\d+) for each rotation"
    figures = said("docs/serving.md", rows)
    assert figures == said("tvm_flash/tracing/torch_cache.py", rows)
    plain, more, turned = map(int, figures)
    assert max(abs(plain - found[0]), abs(more - max(found)), abs(turned - found[-1])) <= 5, found


# ---------------------------------------------------------------- processors


def test_a_xeon_in_the_readme():
    page = "docs/processors/intel_xeon_emerald_rapids.md"
    rows = table(page, "", "dtype", "threads", "mean", "worst", "where", "lost")
    means = {(dtype, threads, template): mean for template, dtype, threads, mean, *_ in rows}
    one_core = [means[dtype, "1", t] for dtype in ("float32", "bfloat16", "float16") for t in ("V1", "V2")]
    two_cores = [mean for (_, threads, _), mean in means.items() if threads == "2"]
    pattern = (
        r"on a Xeon … means are (\S+) \(V1\) and (\S+) \(V2\) in float32 on one core, (\S+) and (\S+) in bfloat16, "
    )
    pattern += (
        r"(\S+) and (\S+) in float16; on two cores (\S+) to (\S+)\. No cell is lost in that run, the worst is (\S+):"
    )
    assert said("README.md", pattern) == (*one_core, min(two_cores), max(two_cores), min(row[4] for row in rows))
    assert {row[6] for row in rows} == {"0"}
    (torch_version,) = said("README.md", r"Emerald Rapids, AMX; torch (\S+), 20 cells")
    assert said(page, r"\| torch \| (\d+\.\d+)\.") == (torch_version,)
