"""Check the installed CUDA kernels on this machine's GPU, and write a record of each into tuning_logs/.

Needs a pack (scripts/build_kernels.py, perhaps on another machine), torch and a GPU; no TVM.
"""

import argparse
import dataclasses
import multiprocessing
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from schedules.builder import assemble, records
from tests import verification


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", default=[], help="only kernels of this arch; may be repeated")
    parser.add_argument("--symbol", default="", metavar="REGEX", help="only kernels whose symbol matches")
    parser.add_argument("--log", type=Path, help="file to append to (default: that of the device in tuning_logs/)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that check kernels at a time")
    parser.add_argument(
        "--emitted", type=Path, help="what build_kernels.py --emit wrote: archs with the same sources get records too"
    )
    options = parser.parse_args()
    twins = assemble.twins(options.emitted) if options.emitted else {}
    log = options.log or records.log_of(torch.cuda.get_device_name())
    kernels = [k for k in verification.cuda_kernels(options.arch) if re.search(options.symbol, k.entry.symbol)]
    right = []
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        # Processes with a thread for each processor wait for one another: 76 kernels, 14 jobs on 16 cores took 38 s in
        # place of more than 100.
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // options.jobs)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is right by then is recorded all the same
    # CUDA can't be used in a forked process, and a kernel that faults must not take the others' results along.
    pool = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"))
    try:
        checks = {pool.submit(verification.verify, k): k for k in kernels}
        for check in as_completed(checks):
            kernel = checks[check]
            try:
                right.append((kernel, *check.result()))
            except Exception as e:  # whatever a kernel does wrong is told with its name
                print(f"✗ {kernel.entry.arch} {kernel.entry.symbol}: {type(e).__name__}: {e}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        write(log, right, twins)
    return int(len(right) < len(kernels))


def write(log: Path, right: list[tuple], twins: dict) -> None:
    """Time each kernel that was right, with nothing beside it, and record it and those of the same source."""
    for kernel, count, error in sorted(right, key=lambda r: (r[0].entry.arch, r[0].entry.symbol)):
        record = verification.record(kernel, count, error)
        same = [
            dataclasses.replace(
                record,
                arch=twin.arch,
                source_hash=twin.source_hash,
                config=twin.config,
                run_as=f"the same source for {record.arch}, {record.run_as}",
            )
            for twin in twins.get((record.arch, record.symbol), [])
        ]
        records.append(log, [record, *same])
        share = f"{record.error:.2f} of the allowed error"
        print(f"✓ {record.arch} {record.symbol}  {count} cases, {share}, {record.tflops:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
