"""Run the installed CUDA kernels under the tools of compute-sanitizer, which find faults that right numbers hide.

memcheck: accesses out of bounds; racecheck: hazards in shared memory; initcheck: reads of memory that nobody wrote;
synccheck: wrong barriers.  Needs a pack, a GPU and compute-sanitizer (of the CUDA toolkit); no torch, no TVM.
"""

import argparse
import collections
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np

from tvm_flash import numerics
from tvm_flash.machine.device import Device
from tvm_flash.measure import small_append, small_case
from tvm_flash.measure.sample import BATCH, HEADS, KV_HEADS, params_of
from tvm_flash.measure.small_sequences import on_pages, packed
from tvm_flash.operators import SCALES
from tvm_flash.packs.registry import registry

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

#: (batch, heads, kv_heads), (seqlen_q, seqlen_kv): query heads that share a tile; several row tiles and tiles of keys.
SHAPES = (
    ((BATCH, HEADS, KV_HEADS), (33, 70)),
    ((BATCH, HEADS, KV_HEADS), (300, 333)),
)
#: More row tiles than a GPU has room for, for kernels whose blocks go on to others.
MANY = ((4, 50, 50), (20, 140))
#: Of keys on pages: one sequence whose keys many blocks share, and so many that a block has one to itself.
SEQUENCES = (((1, 4, 2), (2, 5000)), ((300, 4, 2), (2, 90)))

#: How many lines of a tool's reports are shown, and of what else was printed.
SHOWN_REPORTS, SHOWN_ELSE = 30, 8


def outputs(q: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """What a backward takes beside q, k and v: some output and its gradient, and about as large a log-sum-exp."""
    rng = np.random.default_rng(1)
    rows, dim = q.shape[:3], v.shape[3]
    o, do = (rng.standard_normal((*rows, dim), np.float32) for _ in range(2))
    return {"o": o, "do": do, "lse": np.full(rows, 5, np.float32), "dlse": np.ones(rows, np.float32)}


def run(arch: str, symbol: str) -> int:
    """Run the kernels once on each shape, and name each before it runs; how many there were."""
    device = Device("cuda", 0)
    kernels = [k for k in registry().kernels(arch) if re.search(symbol, k.entry.symbol)]
    for number, kernel in enumerate(kernels, start=1):
        e = kernel.entry
        shapes = list(SHAPES)
        if not any(p.is_tensor for p in e.params):
            shapes += [MANY] if e.config.get("waves") else []
            shapes += SEQUENCES if e.form == "paged" else []
        for heads, seqlens in shapes:
            print(f"{number} of {len(kernels)}: {e.symbol}, {heads}, {seqlens}", flush=True)
            if e.op == "append":
                case = small_append.case_of(e, seqlens[0])
                found = small_append.run(e, registry().load(kernel), device, case)
                assert np.isfinite(found["o"]).all(), "not all of o is written"
                continue
            q, k, v = small_case.random_inputs(e.dtype, e.head_dim, e.head_dim_v, heads, seqlens)
            if e.cache_dtype != e.dtype:
                k, v = (numerics.round_to(x, e.cache_dtype) for x in (k, v))
            given = {"q": q, "k": k, "v": v}
            if e.op == "backward":
                given |= outputs(q, v)
            if e.form != "dense":
                given = packed([{role: x[b] for role, x in given.items()} for b in range(len(q))], after=3)
            if e.form == "paged":
                given = on_pages(given)
            if e.cache_dtype != e.dtype:
                given |= dict.fromkeys(SCALES, np.ones((len(given["k"]), heads[2]), np.float32))
            head_dims, params = (e.head_dim, e.head_dim_v), params_of(*seqlens)
            scale = 1 / math.sqrt(e.head_dim)
            found = small_case.run(e, registry().load(kernel), device, given, scale, head_dims, params)
            for role in found.keys() - {"lse"}:
                assert np.isfinite(found[role]).all(), f"not all of {role} is written"
    if not kernels:
        print(f"there are no kernels for {arch} that match {symbol!r}; the packs are of {sorted(registry().archs())}")
    return len(kernels)


def sanitize(command: list[str], tool: str, seconds: float, log: Path | None) -> bool:
    """Run a command under one tool and tell in a few lines what came of it; whether it ended and the tool found
    nothing."""
    start, late = time.monotonic(), ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also the program under the tool
            output, _ = process.communicate()
            late = f"stopped after {seconds:.0f} s; "
    if log:
        log.write_text(output)
    lines = output.splitlines()
    reports = [line for line in lines if line.startswith("=========")]
    others = [line for line in lines if line and not line.startswith("=========")]
    summary = next((line.strip("= ") for line in reversed(reports) if "SUMMARY:" in line), "the tool gave no summary")
    clean = process.returncode == 0 and "SUMMARY: 0 " in summary
    told = [f"{'✓' if clean else '✗'} {tool}: {late}{summary} ({time.monotonic() - start:.0f} s)"]
    if not clean:
        found = collections.Counter(name for line in reports for name in re.findall(r"\b(\w+)_kernel\b", line))
        told += [f"  exit status {process.returncode}; last: {others[-1] if others else 'nothing was printed'}"]
        told += [f"  {count} lines name {name}" for name, count in found.most_common()]
        told += reports[:SHOWN_REPORTS] + others[-SHOWN_ELSE:]
    print("\n".join(told), flush=True)
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="the pack")
    parser.add_argument("--symbol", default="", metavar="REGEX", help="only kernels whose symbol matches")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this tool; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="tools that run at a time")
    parser.add_argument("--seconds", type=float, default=3600, help="how long a tool may take (default: %(default)s)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="write there all that the tools print")
    parser.add_argument("--run", action="store_true", help="run the kernels without a tool")
    options = parser.parse_args()
    if options.run:
        return int(run(options.arch, options.symbol) == 0)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        parser.error("compute-sanitizer isn't on PATH; it comes with the CUDA toolkit")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)

    def one(tool: str) -> bool:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
        command += ["--run", "--arch", options.arch, "--symbol", options.symbol]
        log = options.logs and options.logs / f"{options.arch}_{tool}.log"
        return sanitize(command, tool, options.seconds, log)

    with ThreadPoolExecutor(options.jobs) as pool:
        clean = list(pool.map(one, options.tool or TOOLS))
    return int(not all(clean))


if __name__ == "__main__":
    sys.exit(main())
