"""What a pack says about itself: plain data, JSON in and out.

A pack is one folder ``packs/<arch>/`` with compiled modules and a ``manifest.json``.  The builder writes the manifest,
the run time reads it; neither needs the other.  Every class here is a frozen dataclass of strings, numbers and tuples.

How a kernel is called (the ABI that ``KernelEntry.symbol`` follows)::

    symbol(q, k, v, o, lse, softmax_scale, *params)

* ``q``, ``o`` and ``k``, ``v``: rank-4 tensors in the template's physical layout, V1 ``(batch, heads, seq, dim)``, V2
  ``(batch, seq, heads, dim)``; any strides with a contiguous last dimension.  The last dimension of ``q`` and ``k`` may
  be any multiple of 8 up to ``head_dim``, that of ``v`` and ``o`` up to ``head_dim_v``: a kernel serves every smaller
  size.
* ``lse``: flat float32, ``batch * heads * seqlen_q`` values in ``(batch, heads, seqlen_q)`` order; a shorter tensor
  (one element, say) means that nobody asked for it, and then it isn't written.
* ``softmax_scale``: float32.
* ``params``: in the order of ``KernelEntry.params``; a scalar, or for a ``per_head`` parameter a ``(batch, heads)``
  tensor with any strides (a stride of 0 broadcasts over the batch).

No size may be 0: the run time answers empty problems itself.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
MANIFEST_NAME = "manifest.json"

#: The name that the definition of the package itself has in manifests; a user's own has the name of its function.
BUILTIN_DEFINITION = "attention"

LAYOUT_OF_TEMPLATE = {"v1": "bhsd", "v2": "bshd"}

#: Largest ``query_start`` of the mask ``positioned``, and the same below 0; those beyond count as it.  So no sum of a
#: position and a window leaves int32.
FARTHEST_START = 2**29


@dataclass(frozen=True)
class Param:
    """A run-time parameter of a mask or a score modification.

    ``dtype`` is ``"float32"`` or ``"int32"``.  A ``per_head`` parameter is a tensor ``(batch, heads)``.  A float one
    may ask for its ``gradient``: then it is learnt, and the backward computes it.
    """

    name: str
    dtype: str
    per_head: bool = False
    gradient: bool = False


@dataclass(frozen=True)
class Speed:
    """How fast a kernel was on one problem, with tensors in its own layout.

    ``device`` is the name of what it ran on, ``record`` that of the line in ``tuning_logs`` that says so.  Sizes are in
    elements; ``tflops`` are operations of the two products (half of them under a causal mask) by the median time.
    """

    device: str
    batch: int
    heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    microseconds: float
    tflops: float
    record: str

    def __str__(self) -> str:
        lengths = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}×{self.seqlen_kv}"
        problem = f"batch {self.batch}, heads {self.heads}, seq {lengths}, head_dim {self.head_dim}"
        speed = f"{self.tflops:.4g} TFLOP/s" if self.tflops >= 1 else f"{1000 * self.tflops:.3g} GFLOP/s"
        return f"{self.microseconds:.1f} µs, {speed} at {problem} ({self.record})"


@dataclass(frozen=True)
class ModuleFile:
    """One shared library of a pack: its file name, size in bytes, and the sha256 that is checked at load."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of a pack.

    Attributes
    ----------
    symbol: name of the function in its module.
    module: file name of the module, one of ``Manifest.modules``.
    template: ``"v1"`` (layout bhsd) or ``"v2"`` (layout bshd).
    arch: ``"cpu"`` or a CUDA arch such as ``"sm_90a"``.
    dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of q, k, v and o.
    head_dim, head_dim_v: the largest sizes it takes, in elements.
    definition, mask, score: which attention it computes.
    params: its run-time parameters, in order.
    bucket: the fewest keys (``seqlen_kv``) it is meant for; of several kernels of one kind the one with the largest
        bucket that fits is the fastest.
    alignment: bytes; data pointers and all strides but the last must be multiples of it.
    index_bits: 32 if sizes and strides (in elements) must fit an int32, else 64.
    config: the schedule's configuration as JSON.
    config_source: where the configuration comes from: ``"default"`` or the name of a tuning record, such as
        ``"nvidia_h200.jsonl#5e1f0a93c2"``.
    source_hash: sha256 of what the kernel was compiled from; the key of its record in ``tuning_logs``.
    registers, shared_memory, spills: per thread, bytes per block, bytes; None where they don't apply.
    speeds: what tuning records say of exactly this kernel, for lengths of its bucket.
    """

    symbol: str
    module: str
    template: str
    arch: str
    dtype: str
    head_dim: int
    head_dim_v: int
    definition: str
    mask: str
    score: str
    params: tuple[Param, ...]
    bucket: int
    alignment: int
    index_bits: int
    config: dict[str, Any]
    config_source: str
    source_hash: str
    registers: int | None = None
    shared_memory: int | None = None
    spills: int | None = None
    speeds: tuple[Speed, ...] = ()

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> KernelEntry:
        """What :func:`dataclasses.asdict` made of an entry, perhaps by way of JSON.

        Raises
        ------
        KeyError, TypeError: a field is missing or unknown.
        """
        params = tuple(Param(**p) for p in raw["params"])
        speeds = tuple(Speed(**s) for s in raw.get("speeds", ()))
        return KernelEntry(**{**raw, "params": params, "speeds": speeds})

    @property
    def layout(self) -> str:
        """Physical layout of the tensors that the symbol takes: ``"bhsd"`` or ``"bshd"``."""
        return LAYOUT_OF_TEMPLATE[self.template]


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    ``cpu_features`` are the processor flags (as in ``/proc/cpuinfo``) without which the pack must not be loaded, and
    ``isa`` is their short name (``"avx512"``, ``"avx2"``, ``"baseline"``); both are empty for a CUDA pack.
    ``versions`` names the compilers: ``tvm``, ``tvm_ffi``, and ``cuda`` for a CUDA pack.
    ``support_files`` are further files of the pack that a module needs at load (the CPU's thread pool).
    """

    arch: str
    versions: dict[str, str]
    modules: tuple[ModuleFile, ...]
    kernels: tuple[KernelEntry, ...]
    isa: str = ""
    cpu_features: tuple[str, ...] = ()
    support_files: tuple[ModuleFile, ...] = ()
    created: str = ""
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        """The manifest as indented JSON text, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read a manifest.

        Raises
        ------
        ValueError: the text isn't JSON, has another schema, or lacks or adds a field.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"manifest schema is {found!r}, expected {SCHEMA}")
        try:
            files = {key: tuple(ModuleFile(**m) for m in raw.pop(key)) for key in ("modules", "support_files")}
            kernels = tuple(KernelEntry.from_dict(k) for k in raw.pop("kernels"))
            return Manifest(**{**raw, **files, "kernels": kernels, "cpu_features": tuple(raw["cpu_features"])})
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"manifest field missing or not understood: {e}") from e
