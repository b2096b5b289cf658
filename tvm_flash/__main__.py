"""``python -m tvm_flash``."""

import sys

from tvm_flash.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
