"""The lowering of CPU kernels: TVM's own, without passes that take a third of a kernel's compile time."""

from __future__ import annotations

import tvm
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

#: Buffers have the size that is used already, and LLVM simplifies what the others would.  A kernel of a cache of 8 bits
#: took 15.8 s with these passes and 11.9 s without, a backward kernel 13.1 and 8.6.  On an AMD with AVX2, the least of
#: three runs of eleven float32 cells (causal, windows, soft cap, ALiBi; 16 to 600 positions) was 0 to 7% less without
#: them; code for AVX-512 and AMX has the same number of products, and as many instructions within 1.3%.
LEFT_OUT = (
    "s_tir.CompactBufferAllocation",
    "s_tir.StmtSimplify",
    "s_tir.RenormalizeSplitPattern",
    "tirx.RemoveNoOp",
    # Of swizzled memory and of virtual threads, which only GPUs' kernels have: without them object files have the same
    # bytes, and a backward kernel takes 4% less.
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
)

#: The name that TVM knows the lowering by.
PIPELINE = "tvm_flash_cpu"


def _pipeline():
    lower, *finalize = get_tir_pipeline("s_tir")

    @tvm.transform.module_pass(opt_level=0)
    def run(module: tvm.IRModule, context: tvm.transform.PassContext) -> tvm.IRModule:
        fewer = tvm.transform.PassContext(
            opt_level=context.opt_level,
            required_pass=context.required_pass,
            disabled_pass=[*context.disabled_pass, *LEFT_OUT],
            instruments=context.instruments,
            config=context.config,
        )
        with fewer:
            return lower(module)

    return run, *finalize


register_tir_pipeline(PIPELINE, _pipeline)
