"""Check the installed CUDA kernels on this machine's GPU, and write a record of each into tuning_logs/.

Needs a pack (scripts/build_kernels.py, perhaps on another machine), torch and a GPU; no TVM.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from schedules import records  # noqa: E402
from tests import verification  # noqa: E402
from tvm_flash.registry import registry  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="only kernels of this arch; may be repeated")
    parser.add_argument("--log", type=Path, help="file to append to (default: that of the device in tuning_logs/)")
    options = parser.parse_args()
    log = options.log or records.log_of(torch.cuda.get_device_name())
    failed = 0
    for arch in options.arch or registry().archs():
        for kernel in verification.cuda_kernels(registry().kernels(arch)):
            try:
                record = verification.record(kernel, verification.function_of(kernel))
            except (AssertionError, RuntimeError, ValueError) as e:
                failed += 1
                print(f"✗ {arch} {kernel.entry.symbol}: {e}", flush=True)
                continue
            records.append(log, [record])
            share = f"{record.error:.2f} of the allowed error"
            print(f"✓ {arch} {record.symbol}  {record.cases} cases, {share}, {record.tflops:.0f} TFLOP/s", flush=True)
    sys.exit(bool(failed))
