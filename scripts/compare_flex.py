"""Time definitions made of FlexAttention's functions beside FlexAttention, compiled, and SDPA with a mask.

Each function is written once, as FlexAttention takes it; ``from_flex`` makes our definition of it.  On the CPU: one
thread, forward, all of a cell in one process in turns, medians of CPU time, so that other work beside it matters
little.  On a GPU: forward and backward, 16k tokens of 16 heads, bfloat16, medians of the GPU's own time; PyTorch's
programs are compiled beforehand by several processes.  What differs by more than 1e-3 (3e-2 in bfloat16) isn't timed.

    python scripts/compare_flex.py --build packs          # kernels of this machine's best instruction set
    python scripts/compare_flex.py --packs packs --output docs/benchmarks/flex_attention_cpu.json

    python scripts/compare_flex.py --emit sources --arch sm_90a     # where TVM is; --assemble where the GPU is
    python scripts/compare_flex.py --assemble sources --packs packs
    python scripts/compare_flex.py --device cuda --packs packs --output docs/benchmarks/flex_attention_gpu.json
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tvm_flash.machine import cpu  # noqa: E402

HEAD_DIMS, ROUNDS = (64, 128), 7
#: By device: lengths, heads, tokens of a batch (0: one sequence), and how long a measurement lasts, in seconds.
LENGTHS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 16384)}
HEADS = {"cpu": 4, "cuda": 16}
TOKENS = {"cpu": 0, "cuda": 16384}
SECONDS = {"cpu": 0.05, "cuda": 0.03}
#: Of a tensor with as many elements FlexAttention reads outside on an H200, which ends the process (torch 2.11).
MOST_ELEMENTS = 2**31
NAMES = ("documents", "prefix", "window", "bias", "softcap_alibi", "neighbourhood")


# ---------------------------------------------------------------- the functions, as FlexAttention takes them

ids = torch.zeros(1, dtype=torch.int32)
slopes = torch.zeros(4)
position_bias = torch.zeros(4, 1, 1)
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


def set_tensors(seqlen, device="cpu", names=NAMES):
    """The tensors that the functions of some names hold on to, for a length; and ours of these, by name."""
    global ids, slopes, position_bias, width, reach, prefix_length
    generator = torch.Generator(device).manual_seed(0)
    heads = HEADS[device]
    ids = (torch.arange(seqlen, device=device) // 512).int()
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=device).float()
    position_bias = None  # before there is another: of 16k positions it has 16 GiB
    rows = seqlen if "bias" in names else 1
    position_bias = torch.randn(heads, rows, rows, generator=generator, device=device)
    width = torch.tensor({1024: 32, 16384: 128}.get(seqlen, 64), dtype=torch.int32, device=device)
    reach = torch.tensor(6, dtype=torch.int32, device=device)
    prefix_length = torch.tensor(seqlen // 4, dtype=torch.int32, device=device)
    return {
        "documents": {"ids": ids},
        "prefix": {"prefix_length": prefix_length.item()},
        "bias": {"position_bias": position_bias},
        "softcap_alibi": {"slopes": slopes},
        "neighbourhood": {"width": width.item(), "reach": reach.item()},
    }


def attn_mask(name, seqlen, device):
    """What SDPA takes, or None if it can't say this."""
    if name == "softcap_alibi":
        return None
    if name == "bias":
        return position_bias[None]
    _, mask_mod = FUNCTIONS[name]
    at = torch.arange(seqlen, device=device)
    return mask_mod(0, 0, at[:, None], at[None])[None, None]


def candidates(name, q, k, v, params, only=()):
    """Functions of one cell by implementation."""
    from tvm_flash import custom_attention

    seqlen, (score_mod, mask_mod), device = q.shape[2], FUNCTIONS[name], q.device.type
    ours, flex = custom_attention(name) if "flex" not in only else None, torch.compile(flex_attention, dynamic=False)
    block_mask = mask_mod and create_block_mask(mask_mod, None, None, seqlen, seqlen, device=device)
    mask = attn_mask(name, seqlen, device)
    found = {"ours": lambda: ours(q, k, v, **params)}
    if name != "bias" or position_bias.numel() < MOST_ELEMENTS:
        found["flex"] = lambda: flex(q, k, v, score_mod=score_mod, block_mask=block_mask)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        found["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return {n: f for n, f in found.items() if not only or n in only}


def with_gradients(functions, q, k, v, dout):
    """The same functions' backwards, each over the graph of a forward of its own."""

    def backward(function):
        out = function()
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return {name: backward(function) for name, function in functions.items()}


def processor_time(function, count):
    """Milliseconds of the processor for ``count`` calls."""
    start = time.process_time()
    for _ in range(count):
        function()
    return (time.process_time() - start) * 1e3


def device_time(function, count):
    """Milliseconds of the GPU for ``count`` calls, which follow each other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measured(functions, device):
    """Milliseconds by implementation: in turns, the median of rounds."""
    time_of = device_time if device == "cuda" else processor_time
    times, counts = {name: [] for name in functions}, {}
    for name, function in functions.items():
        if device == "cuda":
            function()
        counts[name] = max(1, round(SECONDS[device] * 1e3 / max(time_of(function, 1), 1e-2)))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name].append(time_of(function, counts[name]) / counts[name])
    return {name: round(statistics.median(x), 4) for name, x in times.items()}


def difference(results):
    """The largest between ours and another's, over the largest of any, or over 1; NaN if nothing has any."""
    if "ours" not in results:
        return 0.0 if results else math.nan
    ours = [x.float() for x in results["ours"]]
    return max(
        ((a.float() - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for x in results.values()
        for a, b in zip(x, ours, strict=True)
    )


def cells(names, dtypes, device, head_dims=HEAD_DIMS, compiles_only=False):
    """Results of each cell, one after another; on a GPU of the forward and of the backward."""
    for dtype in dtypes:
        for seqlen in LENGTHS[device]:
            params = set_tensors(seqlen, device, names)
            batch = max(1, TOKENS[device] // seqlen)
            for head_dim, name in itertools.product(head_dims, names):
                torch._dynamo.reset()
                shape = (batch, HEADS[device], seqlen, head_dim)
                q, k, v, dout = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for _ in range(4))
                learns = device == "cuda"
                for x in (q, k, v):
                    x.requires_grad_(learns)
                only = ("flex",) if compiles_only else ()
                functions = candidates(name, q, k, v, params.get(name, {}), only)
                for turn in ("forward", "backward") if learns else ("forward",):
                    what = {"kind": name, "dtype": dtype, "head_dim": head_dim, "seqlen": seqlen}
                    what |= {"turn": turn} if learns else {}
                    if turn == "backward":
                        functions = with_gradients(functions, q, k, v, dout)
                    found = functions = that_run(functions, what)
                    results = {n: f() for n, f in found.items()}
                    worst = difference({n: x if isinstance(x, tuple) else (x,) for n, x in results.items()})
                    del results
                    if not worst < (1e-3 if dtype == "float32" else 3e-2):
                        print(f"{what}: results differ by {worst}", file=sys.stderr)
                    elif not compiles_only:
                        yield {**what, "milliseconds": measured(found, device)}


def that_run(functions, what):
    """Those that don't fail; PyTorch has no kernel of some, and no memory for others."""
    found = {}
    for name, function in functions.items():
        try:
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a fault is that of who ran
            found[name] = function
        except RuntimeError as e:
            print(f"{what}: {name} fails: {e}".splitlines()[0], file=sys.stderr)
    return found


# ---------------------------------------------------------------- the command


def build(folder, names, dtypes, jobs, arch="cpu", emit=False):
    """Kernels of the definitions, in a pack of their own; or for each definition a folder with sources of them."""
    kinds = "forward" if arch == "cpu" else "forward,backward"
    for name in names:
        command = [sys.executable, ROOT / "scripts" / "build_kernels.py", "--arch", arch, "--template", "v1"]
        command += ["--kind", kinds, "--head-dim", ",".join(map(str, HEAD_DIMS)), "--dtype", ",".join(dtypes)]
        command += ["--emit", Path(folder) / name] if emit else ["--output", folder]
        command += ["--jobs", str(jobs), "--definition", f"{Path(__file__).resolve()}:{name}"]
        subprocess.run(list(map(str, command)), check=True)


def assemble(folder, packs, names, jobs):
    """Packs of sources, one in a folder for each definition."""
    for name in names:
        command = [sys.executable, ROOT / "scripts" / "assemble_packs.py", Path(folder) / name]
        command += ["--output", Path(packs) / name, "--jobs", str(jobs)]
        subprocess.run(list(map(str, command)), check=True)


def compile_beforehand(names, dtypes, jobs):
    """Let processes fill PyTorch's cache of compiled programs: one for each kind and head_dim."""
    waiting = [
        [sys.executable, __file__, "--device", "cuda", "--compiles-only", "--kind", n, "--head-dim", str(d)]
        + [word for dtype in dtypes for word in ("--dtype", dtype)]
        for n, d in itertools.product(names, HEAD_DIMS)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, text=True), waiting):
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)


def table(results):
    """The cells as Markdown, times in milliseconds; how many times faster ours is than each."""
    lines = ["| kind | dtype | head_dim | positions | ours | FlexAttention | SDPA | over FlexAttention | over SDPA |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for cell in results:
        times = cell["milliseconds"]
        kind = " ".join(filter(None, (cell["kind"], cell.get("turn"))))
        row = [kind, cell["dtype"], cell["head_dim"], cell["seqlen"]]
        row += [f"{times[n]:.2f}" if n in times else "–" for n in ("ours", "flex", "sdpa")]
        row += [f"{times[n] / times['ours']:.2f}" if {n, "ours"} <= set(times) else "–" for n in ("flex", "sdpa")]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    for peer in ("flex", "sdpa"):
        both = [x["milliseconds"] for x in results if {peer, "ours"} <= set(x["milliseconds"])]
        ratios = [times[peer] / times["ours"] for times in both]
        if ratios:
            lost = sum(x < 1 for x in ratios)
            lines.append(
                f"\n{peer}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}, "
                f"{lost} of {len(ratios)} lost"
            )
    return "\n".join(lines)


def heading(device):
    """What the cells were measured on, as data and in words."""
    where = torch.cuda.get_device_name() if device == "cuda" else cpu.name()
    what = {"processor": where, "torch": torch.__version__, "heads": HEADS[device]}
    if device == "cuda":
        words = f"{where}, torch {torch.__version__}, {HEADS[device]} heads, {TOKENS[device]} tokens; time in ms."
        return {**what, "tokens": TOKENS[device]}, words
    words = f"Forward, one thread of {where}, torch {torch.__version__}, {HEADS[device]} heads; CPU time in ms."
    return {**what, "threads": 1}, words


def compare(options, names, dtypes):
    """Time all cells, and write them as they come."""
    if options.packs:
        found = sorted(str(x.parent.parent) for x in Path(options.packs).glob("**/manifest.json"))
        os.environ["TVM_FLASH_PACKS"] = os.pathsep.join(found)
    if options.device == "cpu":
        os.environ["TVM_FLASH_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    elif not options.compiles_only:
        compile_beforehand(names, dtypes, options.jobs)
    results = []
    with torch.set_grad_enabled(options.device == "cuda"):
        for cell in cells(names, dtypes, options.device, options.head_dim or HEAD_DIMS, options.compiles_only):
            results.append(cell)
            print(table([cell]).splitlines()[2], flush=True)
            if options.output:
                what, words = heading(options.device)
                options.output.write_text(json.dumps({**what, "cells": results}, indent=1) + "\n")
                options.output.with_suffix(".md").write_text(f"{words}\n\n{table(results)}\n")
    if results:
        print(table(results))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", metavar="FOLDER", help="build the kernels there, and time nothing")
    parser.add_argument("--emit", metavar="FOLDER", help="write sources of kernels of --arch there, and time nothing")
    parser.add_argument("--assemble", metavar="FOLDER", help="make --packs of such sources, and time nothing")
    parser.add_argument("--arch", default="sm_90a", help="of --emit")
    parser.add_argument("--packs", metavar="FOLDER", help="where packs are, at any depth")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kind", action="append", choices=NAMES, help="only these")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: by device")
    parser.add_argument("--head-dim", action="append", type=int, choices=HEAD_DIMS, help="only these")
    parser.add_argument("--compiles-only", action="store_true", help="have PyTorch compile its programs")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--output", type=Path, help="JSON of all cells; a table goes beside it")
    options = parser.parse_args()
    on_gpu = options.device == "cuda" or bool(options.emit)
    names, dtypes = options.kind or NAMES, options.dtype or (("bfloat16",) if on_gpu else ("float32",))
    if options.build:
        build(options.build, names, dtypes, options.jobs)
    elif options.emit:
        build(options.emit, names, dtypes, options.jobs, options.arch, emit=True)
    elif options.assemble:
        assemble(options.assemble, options.packs, names, options.jobs)
    else:
        compare(options, names, dtypes)


if __name__ == "__main__":
    main()
