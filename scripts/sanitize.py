"""Run the installed CUDA kernels under the tools of compute-sanitizer, which find faults that right numbers hide.

memcheck: accesses out of bounds; racecheck: hazards in shared memory; initcheck: reads of memory that nobody wrote;
synccheck: wrong barriers.  Needs a pack, a GPU and compute-sanitizer (of the CUDA toolkit); no torch, no TVM.
"""

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

import numpy as np

from tvm_flash import selfcheck
from tvm_flash.device import Device
from tvm_flash.registry import registry

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

#: (batch, heads, kv_heads), (seqlen_q, seqlen_kv): query heads that share a tile; several row tiles and tiles of keys.
SHAPES = (
    ((selfcheck.BATCH, selfcheck.HEADS, selfcheck.KV_HEADS), (33, 70)),
    ((selfcheck.BATCH, selfcheck.HEADS, selfcheck.KV_HEADS), (300, 333)),
)
#: More row tiles than a GPU has room for, for kernels whose blocks go on to others.
MANY = ((4, 50, 50), (20, 140))


def run(arch: str, symbol: str) -> int:
    """Run the kernels once on each shape; how many there were."""
    device = Device("cuda", 0)
    kernels = [k for k in registry().kernels(arch) if re.search(symbol, k.entry.symbol)]
    for kernel in kernels:
        for heads, seqlens in (*SHAPES, *([MANY] if kernel.entry.config.get("waves") else [])):
            q, k, v = selfcheck.random_inputs(kernel.entry, heads, seqlens)
            out, _ = selfcheck.run(kernel, device, q, k, v, 1 / math.sqrt(kernel.entry.head_dim))
            assert np.isfinite(out).all(), (
                f"{kernel.entry.symbol}, {heads}, {seqlens}: not all of the output is written"
            )
    print(f"{len(kernels)} kernels")
    return len(kernels)


def sanitize(sanitizer: str, tool: str, arguments: list[str]) -> bool:
    """Run this script under one tool; whether it found nothing."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    print(f"{'✗' if done.returncode else '✓'} {tool}: {lines[-1] if lines else 'no output'}", flush=True)
    if done.returncode:
        print("\n".join(lines[:40]))
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="the pack")
    parser.add_argument("--symbol", default="", metavar="REGEX", help="only kernels whose symbol matches")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this tool; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="tools that run at a time")
    parser.add_argument("--run", action="store_true", help="run the kernels without a tool")
    options = parser.parse_args()
    if options.run:
        return int(run(options.arch, options.symbol) == 0)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        parser.error("compute-sanitizer isn't on PATH; it comes with the CUDA toolkit")
    arguments = ["--arch", options.arch, "--symbol", options.symbol]
    with ThreadPoolExecutor(options.jobs) as pool:
        clean = list(pool.map(lambda tool: sanitize(sanitizer, tool, arguments), options.tool or TOOLS))
    return int(not all(clean))


if __name__ == "__main__":
    sys.exit(main())
