"""Compile and link what build_kernels.py --emit wrote, on a machine with nvcc and the headers of tvm-ffi."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from schedules.builder.assemble import assemble

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, help="the folder that build_kernels.py --emit wrote")
    parser.add_argument("--output", type=Path, default=Path("tvm_flash/packs"), help="folder of the packs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers that run at a time")
    parser.add_argument(
        "--recompile-for", default="", metavar="ARCH", help="make a newer arch's code, for verification"
    )
    options = parser.parse_args()
    for manifest in assemble(options.sources, options.output, options.jobs, options.recompile_for):
        print(f"{manifest.arch}: {len(manifest.kernels)} kernels in {options.output / manifest.arch}")
