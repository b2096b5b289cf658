"""Search for fast configurations, measure them, and look at what was found; ``--help`` says how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # worker processes import this file
    from schedules.commands.tune import main

    sys.exit(main())
