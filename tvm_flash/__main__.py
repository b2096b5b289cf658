"""``python -m tvm_flash``."""

import sys

from tvm_flash.cli import main

if __name__ == "__main__":
    sys.exit(main())
