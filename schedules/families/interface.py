"""What the two templates and the arch families agree on: target, traversal, program, refusal.

A template (``v1.py``, ``v2.py``) chooses the traversal: in which order row tiles are visited, and in which physical
layout.  A family (``families/``) knows the machine: how tiles are copied and multiplied, where an accumulator element
sits.  It is a module with

* ``DTYPES``: the element types it can compute, ``TEMPLATES``: the templates it serves, ``Config``: its frozen
  dataclass of schedule parameters, ``INDEX_DTYPE``: the index type that definitions for it should have;
* ``default_configs(template, pattern, target) -> {bucket: Config}``: bucket 0 always, and further ones where a longest
  sequence of at least that many keys is better served by another configuration;
* ``space(template, pattern, target) -> {field of Config: values worth trying}``, for tuning;
* ``feasible(pattern, config, target) -> Rejected | None``, before anything is compiled;
* ``program(pattern, config, target, traversal, name) -> Program``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx import PrimFunc

from schedules.tile.tile_scheduler import Order, Work


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for: ``"cpu"`` with an instruction set, or a CUDA arch such as ``"sm_90a"``.

    ``isa`` names one of ``families.cpu.ISAS`` and is empty for CUDA.
    """

    arch: str
    isa: str = ""

    @property
    def folder(self) -> str:
        """Name of its pack's folder: a machine takes the best of the CPU packs that it can run."""
        return f"{self.arch}-{self.isa}" if self.isa else self.arch

    def __str__(self) -> str:
        return f"{self.arch} ({self.isa})" if self.isa else self.arch


@dataclass(frozen=True)
class Traversal:
    """What a template decides: the order in which work tiles are visited, and the physical layout of q, k, v and o.

    ``order(work, section)`` is the tile scheduler's order of a launch's work; ``section()`` is how many heads the
    caches have room for, asked only by an order that wants to know.
    """

    template: str
    layout: str
    order: Callable[[Work, Callable[[], Expr]], Order]


@dataclass(frozen=True)
class Rejected:
    """Why a template can't make a kernel."""

    reason: str


@dataclass(frozen=True)
class Program:
    """A scheduled kernel, ready to be compiled.

    ``func`` follows the ABI of :mod:`tvm_flash.packs.manifest`; its global symbol is the kernel's name.  ``pipeline``
    is the lowering that it needs: ``"s_tir"`` or ``"tirx"``.  ``alignment`` (bytes) and ``index_bits`` are as in the
    manifest.
    """

    func: PrimFunc
    pipeline: str
    alignment: int
    index_bits: int
