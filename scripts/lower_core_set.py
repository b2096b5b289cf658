"""Lower the core set of all GPUs, and write the hashes of its sources to tuning_logs/core_set.json; takes minutes."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from schedules.builder import core_set

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    for name in core_set.write(parser.parse_args().jobs):
        print(name, flush=True)
