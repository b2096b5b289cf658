"""What a call costs its caller, part by part, beside PyTorch's; the tables of docs/overhead.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tvm_flash.bench.overhead import main

if __name__ == "__main__":
    sys.exit(main())
