"""Time definitions made of FlexAttention's functions beside FlexAttention, compiled, and SDPA with a mask, on the CPU.

Each function is written once, as FlexAttention takes it; ``from_flex`` makes our definition of it.  One thread,
forward, all of a cell in one process in turns, medians of CPU time, so that other work beside it matters little.  What
differs by more than 1e-3 isn't timed.

    python scripts/compare_flex.py --build /tmp/packs     # kernels of this machine's best instruction set
    python scripts/compare_flex.py --packs /tmp/packs --output docs/benchmarks/flex_attention_cpu.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tvm_flash.machine import cpu  # noqa: E402

LENGTHS, HEAD_DIMS, HEADS = (1024, 2048, 4096), (64, 128), 4
ROUNDS, SECONDS = 7, 0.05
NAMES = ("documents", "prefix", "window", "bias", "softcap_alibi", "neighbourhood")


# ---------------------------------------------------------------- the functions, as FlexAttention takes them

ids = torch.zeros(1, dtype=torch.int32)
slopes = torch.zeros(HEADS)
position_bias = torch.zeros(HEADS, 1, 1)
width, reach = torch.tensor(64, dtype=torch.int32), torch.tensor(6, dtype=torch.int32)
prefix_length = torch.tensor(256, dtype=torch.int32)


def of_documents(b, h, q_idx, kv_idx):
    return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)


def of_prefix(b, h, q_idx, kv_idx):
    return (kv_idx < prefix_length) | (q_idx >= kv_idx)


def of_window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 256)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def with_bias(score, b, h, q_idx, kv_idx):
    return score + position_bias[h, q_idx, kv_idx]


def capped_alibi(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20) + slopes[h] * (kv_idx - q_idx)


def in_square(b, h, q_idx, kv_idx):
    down = q_idx // width - kv_idx // width
    right = q_idx % width - kv_idx % width
    return (down.abs() <= reach) & (right.abs() <= reach)


#: ``(score_mod, mask_mod)`` by name.
FUNCTIONS = {
    "documents": (None, of_documents),
    "prefix": (None, of_prefix),
    "window": (None, of_window),
    "bias": (with_bias, None),
    "softcap_alibi": (capped_alibi, causal),
    "neighbourhood": (None, in_square),
}


def definitions():
    """Ours, by name; PyTorch traces the functions, and nothing of a build is needed where they aren't asked for."""
    from schedules.definition.flex import from_flex

    return {name: from_flex(*functions, name=name) for name, functions in FUNCTIONS.items()}


def __getattr__(name):
    """``build --definition scripts/compare_flex.py:documents``."""
    if name in NAMES:
        return definitions()[name]
    raise AttributeError(name)


# ---------------------------------------------------------------- one cell


def set_tensors(seqlen):
    """The tensors that the functions hold on to, for a length; and ours of these, by name."""
    global ids, slopes, position_bias, width, prefix_length
    generator = torch.Generator().manual_seed(0)
    ids = (torch.arange(seqlen) // 512).int()
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    position_bias = torch.randn(HEADS, seqlen, seqlen, generator=generator)
    width = torch.tensor(32 if seqlen == 1024 else 64, dtype=torch.int32)
    prefix_length = torch.tensor(seqlen // 4, dtype=torch.int32)
    return {
        "documents": {"ids": ids},
        "prefix": {"prefix_length": prefix_length.item()},
        "bias": {"position_bias": position_bias},
        "softcap_alibi": {"slopes": slopes},
        "neighbourhood": {"width": width.item(), "reach": reach.item()},
    }


def attn_mask(name, seqlen):
    """What SDPA takes, or None if it can't say this."""
    if name == "softcap_alibi":
        return None
    if name == "bias":
        return position_bias[None]
    _, mask_mod = FUNCTIONS[name]
    return mask_mod(0, 0, torch.arange(seqlen)[:, None], torch.arange(seqlen)[None])[None, None]


def candidates(name, q, k, v, params):
    """Functions of one cell by implementation."""
    from tvm_flash import custom_attention

    seqlen, (score_mod, mask_mod) = q.shape[2], FUNCTIONS[name]
    ours, flex = custom_attention(name), torch.compile(flex_attention, dynamic=False)
    block_mask = mask_mod and create_block_mask(mask_mod, None, None, seqlen, seqlen, device="cpu")
    mask = attn_mask(name, seqlen)
    found = {
        "ours": lambda: ours(q, k, v, **params),
        "flex": lambda: flex(q, k, v, score_mod=score_mod, block_mask=block_mask),
    }
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        found["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return found


def measured(functions):
    """Milliseconds of CPU time by implementation: in turns, the median of rounds."""
    times = {name: [] for name in functions}
    counts = {}
    for name, function in functions.items():
        start = time.process_time()
        function()
        counts[name] = max(1, round(SECONDS / max(time.process_time() - start, 1e-5)))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(counts[name]):
                function()
            times[name].append((time.process_time() - start) / counts[name] * 1e3)
    return {name: round(statistics.median(x), 4) for name, x in times.items()}


def cells(names, dtypes):
    """Results of each cell, one after another."""
    for dtype in dtypes:
        for seqlen in LENGTHS:
            params = set_tensors(seqlen)
            for head_dim in HEAD_DIMS:
                q, k, v = (torch.randn(1, HEADS, seqlen, head_dim).to(getattr(torch, dtype)) for _ in range(3))
                for name in names:
                    torch._dynamo.reset()
                    functions = candidates(name, q, k, v, params.get(name, {}))
                    results = {n: f().float() for n, f in functions.items()}
                    worst = max((results[n] - results["flex"]).abs().max().item() for n in results)
                    allowed = 1e-3 if dtype == "float32" else 3e-2
                    if not worst < allowed:
                        raise SystemExit(f"{name} {seqlen} {head_dim} {dtype}: results differ by {worst}")
                    what = {"kind": name, "dtype": dtype, "head_dim": head_dim, "seqlen": seqlen}
                    yield {**what, "milliseconds": measured(functions)}


# ---------------------------------------------------------------- the command


def build(folder, names, dtypes, jobs):
    """Kernels of the definitions, in a pack of their own."""
    for name in names:
        command = [sys.executable, ROOT / "scripts" / "build_kernels.py", "--arch", "cpu", "--template", "v1"]
        command += ["--kind", "forward", "--head-dim", ",".join(map(str, HEAD_DIMS)), "--dtype", ",".join(dtypes)]
        command += ["--output", folder, "--jobs", str(jobs), "--definition", f"{Path(__file__).resolve()}:{name}"]
        subprocess.run(list(map(str, command)), check=True)


def table(results):
    """The cells as Markdown, times in milliseconds; how many times faster ours is than each."""
    lines = ["| kind | dtype | head_dim | positions | ours | FlexAttention | SDPA | over FlexAttention | over SDPA |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for cell in results:
        times = cell["milliseconds"]
        row = [cell["kind"], cell["dtype"], cell["head_dim"], cell["seqlen"]]
        row += [f"{times[n]:.2f}" if n in times else "–" for n in ("ours", "flex", "sdpa")]
        row += [f"{times[n] / times['ours']:.2f}" if n in times else "–" for n in ("flex", "sdpa")]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    for peer in ("flex", "sdpa"):
        ratios = [x["milliseconds"][peer] / x["milliseconds"]["ours"] for x in results if peer in x["milliseconds"]]
        if ratios:
            lost = sum(x < 1 for x in ratios)
            lines.append(
                f"\n{peer}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}, "
                f"{lost} of {len(ratios)} lost"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", metavar="FOLDER", help="build the kernels there, and time nothing")
    parser.add_argument("--packs", metavar="FOLDER", help="where they are")
    parser.add_argument("--kind", action="append", choices=NAMES, help="only these")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON of all cells; a table goes beside it")
    options = parser.parse_args()
    names, dtypes = options.kind or NAMES, options.dtype or ("float32",)
    if options.build:
        build(options.build, names, dtypes, options.jobs)
        return
    os.environ["TVM_FLASH_NUM_THREADS"] = "1"
    if options.packs:
        os.environ["TVM_FLASH_PACKS"] = options.packs
    torch.set_num_threads(1)
    results = []
    with torch.no_grad():
        for cell in cells(names, dtypes):
            results.append(cell)
            print(table([cell]).splitlines()[2], flush=True)
            if options.output:
                what = {"processor": cpu.name(), "threads": 1, "torch": torch.__version__, "heads": HEADS}
                text = json.dumps({**what, "cells": results}, indent=1)
                options.output.write_text(text + "\n")
                heading = (
                    f"Forward, one thread of {what['processor']}, torch {what['torch']}, {HEADS} heads; CPU time in ms."
                )
                options.output.with_suffix(".md").write_text(f"{heading}\n\n{table(results)}\n")
    print(table(results))


if __name__ == "__main__":
    main()
