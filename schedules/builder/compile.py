"""One kernel: spec → definition → pattern → program → source → object file.  Runs in the builder's worker processes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import tvm
import tvm.support.nvcc  # registers the callback that is replaced below
import tvm_ffi
from tvm.backend.cuda import export_cuda_host
from tvm.tirx import PrimFunc

from schedules.builder import sources
from schedules.builder.configs import NO_RECORDS, ChosenConfig, Slot, Tuned, with_proposals
from schedules.builder.suite import KernelSpec
from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import DefinitionError, Pattern, match
from schedules.families import family_of, maker_of
from schedules.families.interface import Program, Rejected, Target
from schedules.templates import v1, v2
from schedules.toolchain import cuda
from schedules.toolchain.host import HOST_HEADER
from schedules.toolchain.process import ToolchainError
from tvm_flash.packs.manifest import KernelEntry, Launch

_TEMPLATES = {"v1": v1, "v2": v2}

#: Headers by what a source that needs them says.
_LARGE_HEADERS = {"cuda/barrier": r"\bcuda::(?!std)", "cooperative_groups.h": r"\bcooperative_groups\b(?!\.h)"}

#: Folder beside object files for the device images of a build.
IMAGES = "images"


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to compile all kernels of a spec.

    ``configs`` has the configurations, by symbol, that replace the family's defaults, and ``tuned`` what records say;
    ``objects`` is the folder where object files are kept from build to build; ``run_on`` is as in
    :func:`schedules.toolchain.cuda.compile_object`.
    """

    spec: KernelSpec
    target: Target
    objects: Path
    definition: DefinitionFile | None = None
    configs: Mapping[str, ChosenConfig] = field(default_factory=dict)
    run_on: str = ""
    tuned: Tuned = NO_RECORDS


@dataclass(frozen=True)
class Built:
    """A kernel that compiled: its manifest entry (without a module yet); the object file's name and bytes; seconds.

    ``note`` says why records weren't followed, if they weren't.
    """

    entry: KernelEntry
    object_file: str
    size: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """A kernel that a template or a family can't make, and why.  No failure."""

    symbol: str
    reason: str


@dataclass(frozen=True)
class Failed:
    """A kernel that should have compiled and did not."""

    symbol: str
    reason: str


@dataclass(frozen=True)
class Lowered:
    """A scheduled kernel as text: CUDA C++, or TensorIR for the CPU.

    ``source_hash`` is its identity, and ``kernel_hash`` that of the same text without the kernel's name: kernels of two
    buckets with the same configuration differ in nothing else.
    """

    program: Program
    text: str
    source_hash: str
    kernel_hash: str
    config: object


def versions_for(target: Target) -> dict[str, str]:
    """The compilers that make code for a target, as the manifest names them."""
    versions = {"tvm": _version("apache-tvm"), "tvm_ffi": _version("apache-tvm-ffi")}
    if target.arch != "cpu":
        versions["cuda"] = cuda.compiler_version(target.arch)
    return versions


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def definition_of(spec: KernelSpec, target: Target, definition: DefinitionFile | None = None) -> PrimFunc:
    """The definition of a spec, with the index type that the target's family wants."""
    source = definition.load() if definition else Attention(SCORES[spec.score], MASKS[spec.mask])
    return source(spec.head_dim, spec.dtype, head_dim_v=spec.head_dim_v, index_dtype=family_of(target).INDEX_DTYPE)


def pattern_of(spec: KernelSpec, target: Target, definition: DefinitionFile | None = None) -> Pattern:
    """The matched definition of a spec.

    Raises
    ------
    DefinitionError: the definition isn't attention in a form that the templates know.
    """
    return match(definition_of(spec, target, definition))


def configs_of(
    spec: KernelSpec, pattern: Pattern, target: Target, chosen: Mapping[str, ChosenConfig], tuned: Tuned = NO_RECORDS
) -> tuple[dict[Slot, tuple[object, str]], str]:
    """The configurations of a spec's kernels, ``{slot: (Config or None, where it comes from)}``, and a note.

    None stands for a kernel that the family doesn't make; the template says why.  The note says why records weren't
    followed, if they weren't.
    """
    family = family_of(target)
    if spec.template not in family.TEMPLATES or spec.dtype not in family.DTYPES:
        return {Slot(0): (None, "default")}, ""
    maker = maker_of(target, spec.kind)
    defaults = maker.default_configs(spec.template, pattern, target)
    config_type = type(next(iter(defaults.values())))  # a kind may have kernels of two forms, a pattern has one
    by_length, note = {bucket: (config, "default") for bucket, config in defaults.items()}, ""
    if tuned.proposals:
        note = _objection(spec, pattern, target, tuned, config_type)
        if not note:
            by_length = with_proposals(defaults, tuned.proposals, config_type, tuned.longest)
    configs = {Slot(bucket): config for bucket, config in by_length.items()}
    if hasattr(maker, "further_tiles"):
        for slot, (config, origin) in tuple(configs.items()):
            if origin == "default":
                further = maker.further_tiles(pattern, config)
                configs |= {slot._replace(block_m=block_m): (c, origin) for block_m, c in further.items()}
    for slot in configs:
        record = chosen.get(spec.with_bucket(*slot).symbol)
        if record:
            configs[slot] = (config_type(**record.config), record.source)
    return configs, note


def _objection(spec: KernelSpec, pattern: Pattern, target: Target, tuned: Tuned, config_type: type) -> str:
    """Why what records propose for a spec can't be built as it is; empty if it can."""
    for proposal in tuned.proposals:
        if proposal.config is None:
            continue
        log = proposal.source.partition("#")[0]
        try:
            config = config_type(**proposal.config)
        except TypeError:
            return f"{log} isn't followed: the family's configurations have other fields now"
        lowered = lower(spec.with_bucket(proposal.bucket), pattern, target, config)
        if isinstance(lowered, Rejected):
            return f"{log} isn't followed: {lowered.reason}"
        if proposal.kernel_hash not in ("", lowered.kernel_hash):
            return f"{log} isn't followed: the kernel has changed since it was measured"
        if tuned.verified is not None and lowered.source_hash not in tuned.verified:
            return (
                f"{log} isn't followed: not verified on a GPU in this form; --configs measured builds it nevertheless"
            )
    return ""


def lower(spec: KernelSpec, pattern: Pattern, target: Target, config=None) -> Lowered | Rejected:
    """Schedule one kernel and turn it into the text that its machine code is made from."""
    program = _TEMPLATES[spec.template].apply(pattern, target, spec.symbol, config, spec.kind)
    if isinstance(program, Rejected):
        return program
    if target.arch == "cpu":
        text = "\n".join(func.script(show_meta=True) for func in program.functions.values())
    else:
        text = export_cuda(program, target)
    return _identified(program, text, spec, target, config)


def _identified(program: Program, text: str, spec: KernelSpec, target: Target, config) -> Lowered:
    anonymous = text.replace(spec.symbol, "kernel")
    return Lowered(program, text, _hash_of(text, target), _hash_of(anonymous, target), config)


def lower_for_each(
    spec: KernelSpec,
    targets: Iterable[Target],
    chosen: Mapping[str, ChosenConfig],
    definition=None,
    tuned: Callable[[KernelSpec, Target], Tuned] = lambda *_: NO_RECORDS,
) -> Iterator[tuple[KernelSpec, Target, Pattern, Lowered | Rejected, str]]:
    """All kernels of a spec for archs of one family: spec, target, pattern, kernel, origin of the configuration.

    A source depends on the family, not on the arch, so that what has been scheduled for one serves the others.
    """
    known: dict[tuple, Lowered] = {}
    for target in targets:
        pattern = pattern_of(spec, target, definition)
        configs, _ = configs_of(spec, pattern, target, chosen, tuned(spec, target))
        for slot, (config, origin) in configs.items():
            one, maker = spec.with_bucket(*slot), maker_of(target, spec.kind)
            if same := known.get((slot, config)):
                refusal = maker.feasible(pattern, config, target)
                lowered = refusal or _identified(same.program, same.text, one, target, config)
            else:
                lowered = lower(one, pattern, target, config)
            if isinstance(lowered, Lowered):
                known[slot, config] = lowered
            yield one, target, pattern, lowered, origin


def _hash_of(text: str, target: Target) -> str:
    """sha256 of all that decides a kernel's machine code."""
    if target.arch != "cpu":
        return cuda.source_hash(text, target.arch)
    return hashlib.sha256("\0".join((text, str(cpu_target(target)), _version("apache-tvm"))).encode()).hexdigest()


def compile_spec(job: Job) -> list[Built | Refused | Failed]:
    """All kernels of a spec; a fault of one of them is a value, so that the others go on."""
    spec, target = job.spec, job.target
    try:
        pattern = pattern_of(spec, target, job.definition)
        configs, note = configs_of(spec, pattern, target, job.configs, job.tuned)
    except DefinitionError:
        raise
    except Exception:  # whatever a family does wrong is reported with the kernel's name, and the build goes on
        return [Failed(spec.symbol, traceback.format_exc(limit=-4))]
    results = []
    for slot, (config, config_source) in configs.items():
        one = spec.with_bucket(*slot)
        try:
            results.append(_compile_one(job, one, pattern, config, config_source, note))
        except ToolchainError as e:
            results.append(Failed(one.symbol, str(e)))
        except Exception:  # as above
            results.append(Failed(one.symbol, traceback.format_exc(limit=-4)))
    return results


def _compile_one(
    job: Job, spec: KernelSpec, pattern: Pattern, config, config_source: str, note: str
) -> Built | Refused:
    begin = time.perf_counter()
    lowered = lower(spec, pattern, job.target, config)
    if isinstance(lowered, Rejected):
        return Refused(spec.symbol, lowered.reason)
    object_file = job.objects / f"{spec.symbol}-{_object_key(job, lowered)}.o"
    resources = _resources_of(object_file)
    if resources is None:
        resources = _make_object(job, lowered, spec.symbol, object_file)
    if resources.get("spills"):
        note = (
            f"{spec.symbol} spills {resources['spills']} bytes of registers: it is right, and slower than it could be"
        )
    entry = entry_of(spec, job.target, pattern, lowered, config_source, resources, job.tuned)
    return Built(entry, object_file.name, object_file.stat().st_size, time.perf_counter() - begin, note)


def _object_key(job: Job, lowered: Lowered) -> str:
    """Names all that an object file is made from."""
    parts = [lowered.source_hash[:16]]
    if job.target.arch != "cpu":
        parts += [_toolchain_digest()[:8], *filter(None, [job.run_on])]
    return "-".join(parts)


@lru_cache(maxsize=1)
def _toolchain_digest() -> str:
    """Hash of what turns an exported source into an object."""
    return sources.digest(sources.closure("schedules.toolchain.cuda") | {HOST_HEADER})


def entry_of(
    spec: KernelSpec,
    target: Target,
    pattern: Pattern,
    lowered: Lowered,
    config_source: str,
    resources: Mapping[str, int],
    tuned: Tuned = NO_RECORDS,
) -> KernelEntry:
    """The manifest's entry of a kernel, without a module yet; ``resources`` are registers and so on, if any."""
    program = lowered.program
    return KernelEntry(
        symbol=spec.symbol,
        module="",
        op=program.op,
        kind=spec.kind,
        template=spec.template,
        arch=target.arch,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        definition=spec.definition,
        mask=spec.mask,
        score=spec.score,
        params=pattern.params,
        launches=tuple(Launch(x.symbol, x.arguments, x.when) for x in program.launches),
        workspaces=program.workspaces,
        scalars=program.scalars,
        bucket=spec.bucket,
        max_rows=program.max_rows,
        meant_for=program.meant_for,
        narrow_axes=program.narrow_axes,
        alignment=program.alignment,
        index_bits=program.index_bits,
        config=dataclasses.asdict(lowered.config),
        config_source=config_source,
        source_hash=lowered.source_hash,
        speeds=tuned.speeds.get(lowered.kernel_hash, ()),
        block_m=spec.block_m,
        waves=tuned.waves.get(lowered.source_hash),
        has_sink=pattern.has_sink,
        **resources,
    )


def _resources_of(object_file: Path) -> dict | None:
    """Registers and so on of an object that an earlier build left, or None if there is none."""
    note = object_file.with_suffix(".json")
    return json.loads(note.read_text()) if object_file.exists() and note.exists() else None


def _make_object(job: Job, lowered: Lowered, symbol: str, object_file: Path) -> dict:
    """Compile to ``object_file``, which appears when it is complete, after the note with its resources."""
    with tempfile.TemporaryDirectory(dir=job.objects) as scratch:
        draft = Path(scratch) / object_file.name
        if job.target.arch == "cpu":
            make_cpu_object(lowered, job.target, draft)
            resources = {}
        else:
            resources = _make_cuda_object(job, lowered, symbol, draft)
        object_file.with_suffix(".json").write_text(json.dumps(resources))
        os.replace(draft, object_file)
    return resources


def cpu_target(target: Target) -> tvm.target.Target:
    """What TVM calls a CPU target."""
    return family_of(target).ISAS[target.isa].tvm_target()


def make_cpu_object(lowered: Lowered, target: Target, path: Path) -> None:
    """Compile a kernel for the CPU to an object file."""
    module = tvm.IRModule(lowered.program.functions)
    executable = tvm.compile(module, target=cpu_target(target), tir_pipeline=lowered.program.pipeline)
    executable.mod.write_to_file(str(path), "o")


@tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
def _only_the_source_is_wanted(code: str) -> bytes:
    """Stand for TVM's compilation, which takes place where the CUDA libraries are found, for the GPU at hand."""
    return code.encode()


def export_cuda(program: Program, target: Target) -> str:
    """The source of all launches of a program: device half and host half."""
    options = tvm.target.Target({"kind": "cuda", "arch": target.arch}, host={"kind": "cuda_host"})
    executable = tvm.compile(tvm.IRModule(program.functions), target=options, tir_pipeline=program.pipeline)
    return without_unused_headers(export_cuda_host(executable.mod))


def without_unused_headers(text: str) -> str:
    """A source without the large headers that TVM always includes; they take two thirds of a kernel's compile time."""
    for header, use in _LARGE_HEADERS.items():
        if not re.search(use, text):
            text = text.replace(f"#include <{header}>\n", "")
    return text


def _make_cuda_object(job: Job, lowered: Lowered, symbol: str, draft: Path) -> dict:
    source = draft.with_name(f"{symbol}.cu")
    source.write_text(lowered.text)
    images = job.objects / IMAGES
    own = job.definition is not None
    report = cuda.compile_object(source, draft, job.target.arch, run_on=job.run_on, images=images, of_user=own)
    return report.resources(cuda.dynamic_shared_memory(lowered.text))
