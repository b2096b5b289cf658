"""Instruction sets that CPU kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

import tvm


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    Attributes
    ----------
    mcpu, mattr: LLVM's names of the processor and of what it has beyond that.
    features: the flags in ``/proc/cpuinfo`` without which its code must not run.
    lanes: float32 elements of a vector register.
    registers: how many vector registers there are.
    bfloat16: how it multiplies bfloat16: as ``floats``, in ``pairs``, or in ``tiles``.
    """

    mcpu: str
    mattr: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    registers: int
    bfloat16: str = "floats"

    def tvm_target(self) -> tvm.target.Target:
        """The target that kernels for it are compiled with."""
        options = {"kind": "llvm", "mcpu": self.mcpu}
        return tvm.target.Target({**options, "mattr": list(self.mattr)} if self.mattr else options)


_V2 = ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_BF16 = (*_V4, "avx512_bf16")
_AMX = (*_BF16, "amx_tile", "amx_bf16")

#: ``prefer-256-bit`` is what LLVM gives to level 4 by itself; it would halve the vectors.
_WIDE = ("-prefer-256-bit",)

#: By name, the most capable first; the last three are the x86-64 levels 4, 3 and 2 of the psABI.
ISAS = {
    "amx": Isa("x86-64-v4", (*_WIDE, "+avx512bf16", "+amx-tile", "+amx-bf16"), _AMX, 16, 32, "tiles"),
    "avx512_bf16": Isa("x86-64-v4", (*_WIDE, "+avx512bf16"), _BF16, 16, 32, "pairs"),
    "avx512": Isa("x86-64-v4", _WIDE, _V4, 16, 32),
    "avx2": Isa("x86-64-v3", (), _V3, 8, 16),
    "baseline": Isa("x86-64-v2", (), _V2, 4, 16),
}
