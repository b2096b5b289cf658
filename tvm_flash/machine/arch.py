"""CUDA archs: which code is made for which GPU, and which runs on which."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CUDA_ARCH = re.compile(r"sm_(\d+)(\d)([af]?)")


def arch_of(capability: tuple[int, int]) -> str:
    """The arch that is built for a compute capability: ``(9, 0)`` → ``"sm_90a"``."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def capability_of(arch: str) -> tuple[int, int] | None:
    """The compute capability that an arch is built for: ``"sm_90a"`` → ``(9, 0)``; None if it is no CUDA arch."""
    parts = _CUDA_ARCH.fullmatch(arch)
    return (int(parts[1]), int(parts[2])) if parts else None


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``arch`` runs on a GPU.

    It runs on every later minor version of its major version; code with the suffix ``a`` only on exactly its own
    (CUDA C++ Programming Guide, "Compute Capability" and "Family-Specific Features").
    """
    parts = _CUDA_ARCH.fullmatch(arch)
    if not parts:
        return False
    own, suffix = (int(parts[1]), int(parts[2])), parts[3]
    return own == capability if suffix == "a" else own[0] == capability[0] and own[1] <= capability[1]


def by_closeness(archs: Iterable[str], capability: tuple[int, int]) -> list[str]:
    """The archs that run on a GPU, the one made for it first, then ever older ones."""

    def closeness(arch):
        major, minor, suffix = _CUDA_ARCH.fullmatch(arch).groups()
        return int(major), int(minor), suffix == "a", suffix == "f"

    return sorted((a for a in archs if runs_on(a, capability)), key=closeness, reverse=True)
