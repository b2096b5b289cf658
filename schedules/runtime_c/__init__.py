"""The C that ships: in every pack, or in the host half of every CUDA kernel.

=================== ==================================================================================
``call.c``          a repeated call in one C function, with ``call_key.h`` (what a call looks like) and
                    ``python_abi.h`` (what it uses of Python's stable ABI)
``threads.c``       the threads of CPU kernels
``scratch.c``       their scratch memory
``sequences.c``     whether lengths and pages make sense
``processor.c``     what kernels ask of the processor
``launch.h``        launching a CUDA kernel through the driver
``old_glibc.h``     what keeps CPU modules loadable where glibc is old
=================== ==================================================================================

``schedules.toolchain`` compiles them.
"""

from pathlib import Path

#: The folder of the sources.
SOURCES = Path(__file__).resolve().parent
