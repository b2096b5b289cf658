"""The families whose warps multiply with ``mma.sync``: Volta, Turing, and Ampere with what came after it."""
