#!/usr/bin/env python3
"""Time full waves of the installed kernels that differ in the height of their work tiles, and record them.

Needs a pack (scripts/build_kernels.py, perhaps on another machine), torch and a GPU; no TVM.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from schedules.builder import records
from schedules.tuning import waves
from tests import verification
from tests.installed import functions_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", default=[], help="only kernels of this arch; may be repeated")
    parser.add_argument("--symbol", default="", metavar="REGEX", help="only kernels whose symbol matches")
    parser.add_argument("--log", type=Path, help="file to append to (default: that of the device in tuning_logs/)")
    options = parser.parse_args()
    log = options.log or records.log_of(torch.cuda.get_device_name())
    kernels = verification.cuda_kernels(options.arch)
    several = {_but_height(k.entry.symbol) for k in kernels if k.entry.block_m}
    for kernel in kernels:
        entry = kernel.entry
        if _but_height(entry.symbol) in several and re.search(options.symbol, entry.symbol):
            versions, run_as = kernel.pack.manifest.versions, verification.run_as(kernel)
            record = waves.record(entry, functions_of(kernel), versions, run_as)
            records.append(log, [record])
            times = ", ".join(f"{p['microseconds']:g}" for p in record.points)
            print(f"{entry.arch} {entry.symbol}: {times} µs; {record.launch} ps, {record.tiles}", flush=True)
    return 0


def _but_height(symbol: str) -> str:
    """What kernels have in common that differ in the height of their work tiles."""
    return re.sub(r"_m\d+(?=$|_s\d+$)", "", symbol)


if __name__ == "__main__":
    sys.exit(main())
