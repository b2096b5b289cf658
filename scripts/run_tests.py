"""From a fresh clone to passed tests: install, build the native pack, run pytest with the arguments given.

``--few-kernels`` builds the modules that tests need in place of all, 195 kernels of 315 for a processor with AMX.  It
is for a fresh clone on a machine without a GPU: a pack that is there keeps its other kernels as they are.
"""

import sys

from environment import prepare, run

FEW_KERNELS = "--few-kernels"
#: Every kind of kernels, mask and score in each dtype, of both templates for a head_dim of 64, of V2 for larger ones.
#: V1 differs from V2 in the order in which it goes through memory, and one head_dim from another in constants: 128 is
#: here in the dtype of tiles and pairs, and the kernels for 256 serve it in the others, as whatever lies between.
MODULES = ("v?_*_d64", "v2_bfloat16_d128", "v2_*_d256", "v2_*_d576v512")

if __name__ == "__main__":
    python = prepare(*(MODULES if FEW_KERNELS in sys.argv else ()))
    run([python, "-m", "pytest", *(word for word in sys.argv[1:] if word != FEW_KERNELS)])
