"""Compilers, linkers and what is known of this machine.  Nothing here imports TVM.

=============== =================================================================
``process``     running a compiler: errors that can be read, no orphans
``cuda``        CUDA C++ source → object → module
``elements``    its device half, of definitions of a user's own → one that nvcc takes less time for
``nvcc``        its device half → device image
``nvrtc``       the same for sm_70, with NVRTC of CUDA 12
``host``        its host half and the image → object; ``launch.h`` is what that needs of CUDA
``ptxas``       registers, spills, shared memory and warnings out of a report
``cpu``         objects → module, and the thread pool that CPU modules share
``machine``     instruction sets and GPUs of this machine
``inspection``  what a module must not contain
=============== =================================================================
"""
