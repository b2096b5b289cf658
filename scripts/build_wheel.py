"""Build the packs of every arch (what is up to date stays), and a wheel that holds them, or the folder of a kernel for
the Hugging Face Hub."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # worker processes import this file
    from schedules.builder.hub import lay_out
    from schedules.builder.plan import default_jobs
    from schedules.builder.wheel import build_wheel
    from schedules.commands.build import main as build_kernels
    from schedules.families import FAMILY

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default=",".join(FAMILY), help="a comma list (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="where the wheel goes (default: dist)")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes (default: %(default)s)")
    parser.add_argument("--hub", type=Path, metavar="FOLDER", help="lay out a kernel for the Hub, in place of a wheel")
    options = parser.parse_args()
    begin = time.monotonic()
    isa = ["--isa", "all"] if {"cpu", "native"} & set(options.arch.split(",")) else []
    status = build_kernels(["--arch", options.arch, *isa, "--jobs", str(options.jobs)])
    if status == 0 and options.hub:
        print(*lay_out(options.hub), sep="\n")
    elif status == 0:
        wheel = build_wheel(options.output)
        minutes = (time.monotonic() - begin) / 60
        print(f"{wheel.path}: {wheel.size / 2**20:.1f} MiB, {minutes:.1f} minutes for what was not up to date")
    sys.exit(status)
