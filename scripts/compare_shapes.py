"""Time attention at the shapes of models that people run, on a GPU, beside PyTorch's cuDNN and FlashAttention-2.

Tensors lie as models make them, (batch, seq, heads, head_dim), in bfloat16.  Calls of less than 30 GFLOP are timed in
replayed CUDA graphs, the others one after another, the second half of each round; implementations take turns in random
order, and the median over the rounds counts.  A result that is further from float64 than four times the nearest one
isn't timed.

    python scripts/compare_shapes.py --output docs/benchmarks/shapes_nvidia_h200.json
    python scripts/compare_shapes.py --from docs/benchmarks/shapes_nvidia_h200.json --page docs/shapes.md
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Calls of a graph, and the operations below which one is replayed.
CALLS, SHORT = 20, 3e10
#: Queries whose results are compared with float64.
CHECKED = 512
OURS = "tvm_flash"


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention; ``window`` keys before a query's own, 0 for all."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    head_dim_v: int = 0

    @property
    def flops(self) -> float:
        """Operations of the two products, over what is seen."""
        last = self.seqlen_kv - self.seqlen_q
        most = self.window + 1 if self.window else self.seqlen_kv
        seen = (min(i + last + 1, most) for i in range(self.seqlen_q))
        pairs = sum(seen) if self.causal else self.seqlen_q * self.seqlen_kv
        return 2.0 * self.batch * self.heads * pairs * (self.head_dim + (self.head_dim_v or self.head_dim))

    def __str__(self) -> str:
        lengths = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q} on {self.seqlen_kv}"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads} on {self.kv_heads}"
        sizes = f"{self.head_dim}:{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        words = ["causal"] * (self.causal and not self.window) + [f"window {self.window}"] * bool(self.window)
        words += [f"soft cap {self.softcap:g}"] * bool(self.softcap)
        return " | ".join((f"{self.batch} × {lengths}", heads, sizes, ", ".join(words)))


SHAPES = (
    Shape("Llama 3 8B, prompt", 1, 32, 8, 8192, 8192, 128, True),
    Shape("Llama 3 8B, prompts", 8, 32, 8, 1024, 1024, 128, True),
    Shape("Llama 3 70B, one of 8 GPUs", 1, 8, 1, 4096, 4096, 128, True),
    Shape("Llama 3, chunk of a prompt", 1, 32, 8, 512, 8192, 128, True),
    Shape("Llama 3, chunk of a long prompt", 1, 32, 8, 2048, 32768, 128, True),
    Shape("Llama 3, decoding", 1, 32, 8, 1, 8192, 128),
    Shape("Llama 3, decoding", 1, 32, 8, 1, 131072, 128),
    Shape("Llama 3, decoding", 32, 32, 8, 1, 4096, 128),
    Shape("Llama 2 7B, decoding", 16, 32, 32, 1, 4096, 128),
    Shape("speculative decoding", 8, 32, 8, 4, 8192, 128, True),
    Shape("Qwen 3 0.6B", 4, 16, 8, 2048, 2048, 128, True),
    Shape("Mistral", 1, 32, 8, 16384, 16384, 128, True, 4095),
    Shape("Gemma 2 9B", 1, 16, 8, 4096, 4096, 256, True, 0, 50.0),
    Shape("Gemma 2 9B, local", 1, 16, 8, 8192, 8192, 256, True, 4095, 50.0),
    Shape("GPT-2", 8, 12, 12, 1024, 1024, 64, True),
    Shape("BERT base", 32, 12, 12, 512, 512, 64),
    Shape("MiniLM", 64, 12, 12, 128, 128, 32),
    Shape("ViT-B", 64, 12, 12, 197, 197, 64),
    Shape("ViT-H", 32, 16, 16, 257, 257, 80),
    Shape("SigLIP So400m", 16, 16, 16, 729, 729, 72),
    Shape("DINOv2-L", 16, 16, 16, 1370, 1370, 64),
    Shape("SAM", 1, 16, 16, 4096, 4096, 80),
    Shape("SDXL", 2, 10, 10, 4096, 4096, 64),
    Shape("SDXL", 2, 20, 20, 1024, 1024, 64),
    Shape("SDXL, text", 2, 10, 10, 4096, 77, 64),
    Shape("Stable Diffusion 1.5", 2, 8, 8, 4096, 4096, 40),
    Shape("Flux", 1, 24, 24, 4608, 4608, 128),
    Shape("Stable Diffusion 3.5", 2, 38, 38, 4250, 4250, 64),
    Shape("Wan 2.1 14B", 1, 40, 40, 32760, 32760, 128),
    Shape("HunyuanVideo", 1, 24, 24, 30000, 30000, 128),
    Shape("Wan 2.1 14B, text", 1, 40, 40, 32760, 512, 128),
    Shape("Whisper, encoder", 8, 20, 20, 1500, 1500, 64),
    Shape("Whisper, decoder", 8, 20, 20, 1, 1500, 64),
    Shape("DeepSeek, prompt", 1, 128, 128, 4096, 4096, 192, True, head_dim_v=128),
    Shape("Phi 3", 1, 32, 32, 4096, 4096, 96, True),
    Shape("GPT-J", 1, 16, 16, 2048, 2048, 256, True),
    Shape("ESM-2", 16, 20, 20, 1024, 1024, 64),
    Shape("Evoformer", 256, 8, 8, 256, 256, 32),
)


def measure(rounds: int, seconds: float, only: str):
    """A dictionary for each shape."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import tvm_flash

    def ours(q, k, v, shape):
        window = (shape.window, 0) if shape.window else (-1, -1)
        return lambda: tvm_flash.flash_attention_v2(
            q, k, v, causal=shape.causal, window_size=window, softcap=shape.softcap
        )

    def sdpa(backend):
        def make(q, k, v, shape):
            if shape.window or shape.softcap or (shape.causal and shape.seqlen_q != shape.seqlen_kv):
                return None  # it has no such argument, or another causal mask
            a, b, c = (x.transpose(1, 2) for x in (q, k, v))

            def run():
                with sdpa_kernel(backend):
                    gqa = shape.heads != shape.kv_heads
                    return F.scaled_dot_product_attention(a, b, c, is_causal=shape.causal, enable_gqa=gqa)

            return run

        return make

    def times(run, count):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]

    def captured(run):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(CALLS):
                    run()
        return graph

    def expected(q, k, v, shape):
        """The last queries of the last head, in float64."""
        count = min(shape.seqlen_q, CHECKED)
        last = shape.seqlen_kv - shape.seqlen_q
        i = torch.arange(shape.seqlen_q - count, shape.seqlen_q, device="cuda")[:, None] + last
        j = torch.arange(shape.seqlen_kv, device="cuda")
        scores = q[-1, -count:, -1].double() @ k[-1, :, -1].double().T / math.sqrt(shape.head_dim)
        scores = shape.softcap * torch.tanh(scores / shape.softcap) if shape.softcap else scores
        if shape.causal:
            scores.masked_fill_((j > i) | (j < i - (shape.window or shape.seqlen_kv)), -math.inf)
        return torch.softmax(scores, -1) @ v[-1, :, -1].double()

    makers = {OURS: ours}
    makers |= {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "FlashAttention-2": sdpa(SDPBackend.FLASH_ATTENTION)}
    for shape in SHAPES:
        if only not in shape.name:
            continue
        torch.manual_seed(1)

        def tensor(seqlen, heads, dim, batch=shape.batch):
            return torch.randn(batch, seqlen, heads, dim, device="cuda", dtype=torch.bfloat16)

        q, k = (
            tensor(shape.seqlen_q, shape.heads, shape.head_dim),
            tensor(shape.seqlen_kv, shape.kv_heads, shape.head_dim),
        )
        v = tensor(shape.seqlen_kv, shape.kv_heads, shape.head_dim_v or shape.head_dim)
        want, errors, runs, failed = expected(q, k, v, shape), {}, {}, {}
        for name, make in makers.items():
            run = make(q, k, v, shape)
            if run is None:
                continue
            try:
                got = run()
            except RuntimeError as e:  # a peer that doesn't take the shape
                if name == OURS:
                    raise
                failed[name] = str(e).splitlines()[0][:80]
                continue
            got = got if name == OURS else got.transpose(1, 2)
            errors[name] = ((got[-1, -len(want) :, -1].double() - want).norm() / want.norm()).item()
            runs[name] = run
        for name in [n for n in runs if not errors[n] <= 4 * min(errors.values())]:
            failed[name] = f"its error is {errors[name]:.1e}"
            del runs[name]
        replayed = shape.flops < SHORT or shape.seqlen_q < 16
        calls = {n: captured(r).replay if replayed else r for n, r in runs.items()}
        found = {name: [] for name in calls}
        for _ in range(rounds):
            for name in random.sample(list(calls), len(calls)):
                each = CALLS if replayed else 1
                one = times(calls[name], 2)[1]
                count = max(6, int(seconds * 1e6 / one))
                found[name].append(statistics.median(times(calls[name], count)[count // 2 :]) / each)
        microseconds = {name: round(statistics.median(t), 2) for name, t in found.items()}
        row = {"name": shape.name, "shape": str(shape), "flops": shape.flops, "replayed": replayed}
        yield {**row, "microseconds": microseconds, "errors": errors, "failed": failed}


def machine() -> dict[str, str]:
    import torch

    versions = {"torch": torch.__version__, "cuDNN": str(torch.backends.cudnn.version())}
    return {"device": torch.cuda.get_device_name(), **versions}


def ratio(row: dict) -> float | None:
    """The best peer's time over ours."""
    peers = [t for name, t in row["microseconds"].items() if name != OURS]
    return min(peers) / row["microseconds"][OURS] if peers else None


def summary(rows: list[dict]) -> str:
    known = [(ratio(r), r) for r in rows if ratio(r) is not None]
    decoding = [x for x, r in known if "decod" in r["name"]]
    others = [x for x, r in known if "decod" not in r["name"]]
    means = [
        f"{math.exp(statistics.fmean(map(math.log, x))):.2f} {what}"
        for x, what in ((others, "without decoding"), (decoding, "of decoding"))
        if x
    ]
    lost = sum(x < 1 for x, _ in known)
    return (
        f"Geometric mean of the best peer's time over ours: {', '.join(means)}; {lost} of {len(known)} shapes are lost."
    )


def page(found: dict) -> str:
    """The table, with what is lost in bold."""
    about, rows = found["machine"], found["rows"]
    peers = list(dict.fromkeys(n for r in rows for n in r["microseconds"] if n != OURS))
    lines = [
        "# Shapes of models",
        "",
        f"One {about['device']}, bfloat16, torch {about['torch']}, cuDNN {about['cuDNN']}, all in one process;",
        "tensors are (batch, seq, heads, head_dim). µs of a call, those of less than 30 GFLOP in replayed graphs.",
        "The last column is the best peer's time over ours, bold where that is less than 1; a peer without one has",
        "no such mask, or doesn't take the shape. Measured and written by `scripts/compare_shapes.py`.",
        "",
        summary(rows),
        "",
        "| model | batch × positions | heads | head_dim | mask | "
        f"{' | '.join(peers)} | ours | TFLOP/s | best peer over ours |",
        "|---|---|---|---|---|" + "---|" * len(peers) + "---|---|---|",
    ]
    for r in rows:
        us, x = r["microseconds"], ratio(r)
        times = " | ".join(f"{us[p]:.1f}" if p in us else "" for p in peers)
        over = "" if x is None else f"{x:.2f}" if x >= 1 else f"**{x:.2f}**"
        speed = r["flops"] / us[OURS] / 1e6
        lines.append(f"| {r['name']} | {r['shape']} | {times} | {us[OURS]:.1f} | {speed:.0f} | {over} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose name has this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.06, help="of an implementation in a round")
    parser.add_argument("--output", type=Path, help="write the figures, after each shape")
    parser.add_argument("--from", dest="file", type=Path, help="measure nothing, and read this")
    parser.add_argument("--page", type=Path, help="write the table")
    options = parser.parse_args()
    if options.file:
        found = json.loads(options.file.read_text())
    else:
        found = {"machine": machine(), "rows": []}
        for row in measure(options.rounds, options.seconds, options.only):
            found["rows"].append(row)
            times = ", ".join(f"{name} {t:.1f}" for name, t in row["microseconds"].items())
            print(f"{row['name']:32} {times}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(summary(found["rows"]))
    if options.page:
        options.page.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
