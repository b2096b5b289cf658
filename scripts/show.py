"""A kernel at a stage of its making, as in ``show.py V2 --arch sm_90a --head-dim 128 --stage cuda``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from schedules.commands.show import main

if __name__ == "__main__":
    sys.exit(main())
