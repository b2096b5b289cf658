"""Build kernel packs; ``--help`` says how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # worker processes import this file
    from schedules.builder.workers import import_tvm

    import_tvm()
    from schedules.commands.build import main

    sys.exit(main())
