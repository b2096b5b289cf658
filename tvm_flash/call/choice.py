"""Which kernel runs: the candidates, why each is refused, and the order of those that are left.

The order: the template that this device's measurements favour or else the policy, then the arch that is closest to the
device, then a kernel that is made for so few query rows, the smallest head_dim that fits, the cheapest mask, the
largest bucket that the sequence reaches, if it has as many heads as that is meant for, the height of work tiles whose
waves take the least time (:mod:`tvm_flash.call.waves`), the first pack on the search path.  Nothing of it but the order
of the templates and the height of work tiles, which changes no bits, depends on the batch or on the number of
processors: a sequence gets the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_flash.call import waves
from tvm_flash.call.measured import compare, nearest, tune_command
from tvm_flash.call.problem import Problem
from tvm_flash.catalogue import INSTEAD, MASKS, SCORES
from tvm_flash.errors import InvalidArgumentError, KernelNotFoundError, NotSupportedError, TvmFlashError
from tvm_flash.machine.device import Device
from tvm_flash.operators import ACCUMULATE, FORWARD, MERGED, OPERATORS, PARTIAL
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE, MOST_BLOCKS, PAGED, KernelEntry
from tvm_flash.packs.registry import Installed, build_command, registry

_TEMPLATE_OF_LAYOUT = {layout: template for template, layout in LAYOUT_OF_TEMPLATE.items()}
_AMPERE = (8, 0)


#: From here on a batch is large and a sequence long, for the rule "large batch with long sequence → V2".  On the CPU
#: the rule decides only which order of the same work is used; both templates give the same numbers.
LARGE_BATCH = 8
LONG_SEQUENCE = 2048


@dataclass(frozen=True)
class Rejection:
    """A kernel that wasn't chosen, and why.  ``stage`` says how far it came, the larger the nearer to being chosen."""

    kernel: KernelEntry
    stage: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What was chosen for a problem, and why each other candidate was not; ``str()`` is a page of text.

    ``others`` is the number of installed kernels of other dtypes and definitions, which were not looked at;
    ``measured`` says how fast the chosen kernel was on this device, or how to find out.
    """

    problem: Problem
    device: Device
    chosen: KernelEntry | None
    reason: str
    rejected: tuple[Rejection, ...]
    others: int
    measured: str = ""

    def __str__(self) -> str:
        lines = [f"{self.problem} ({self.problem.layout}) on {self.device} ({self.device.name})"]
        lines.append(
            f"  ✓ {self.chosen.symbol} [{self.chosen.arch}]: {self.reason}" if self.chosen else f"  ✗ {self.reason}"
        )
        if self.chosen:
            lines += [f"    configuration: {self.chosen.config_source}", f"    measured: {self.measured}"]
        lines += [f"  · {r.kernel.symbol} [{r.kernel.arch}]: {r.reason}" for r in self.rejected]
        if self.others:
            lines.append(f"  · {self.others} kernels of other dtypes, definitions or archs")
        return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    """A chosen kernel, and the reason in words."""

    kernel: Installed
    reason: str


# Stages of a rejection: what a kernel failed at.
_KIND, _ROWS, _SCORE, _HEAD_DIM, _MASK, _INDEX, _GRID, _ALIGNMENT, _ORDER = range(9)


def template_order(problem: Problem, device: Device, variant: str, prefer: str) -> tuple[tuple[str, str], str]:
    """The two templates, the preferred one first, and why."""
    v1, v2 = ("v1", "v2"), ("v2", "v1")
    if problem.is_ragged:
        return v2, "sequences that lie one after the other have one layout"
    if variant != "auto":
        return (v1 if variant == "v1" else v2), f"variant={variant!r} was asked for"
    if prefer == "compatibility":
        return v1, "prefer='compatibility': V1 is there on every arch"
    if device.kind == "cuda":
        if device.capability >= _AMPERE:
            return v2, "V2 is made for Ampere and later"
        return v1, "on Volta and Turing V1 is the tuned one"
    if problem.batch >= LARGE_BATCH and problem.seqlen_kv >= LONG_SEQUENCE:
        return v2, "large batch with long sequences"
    template = _TEMPLATE_OF_LAYOUT[problem.layout]
    return (v1 if template == "v1" else v2), f"the tensors are in {template.upper()}'s layout"


def choose(problem: Problem, device: Device, variant: str, prefer: str = "speed") -> Choice:
    """The kernel that runs a problem.

    Raises
    ------
    PackError: there is no usable pack for the device.
    KernelNotFoundError: the packs have no kernel for the problem.
    InvalidArgumentError: there is one, but it can't take data that is aligned so badly.
    NotSupportedError: there is one, but it can't take sizes or strides this large, or so many heads or batch entries.
    """
    order, why, fitting, rejected = _in_order(problem, device, variant, prefer)
    if not fitting:
        raise _nothing_fits(problem, device, rejected)
    return Choice(fitting[0], _reason(fitting[0].entry, problem, device, order, why, rejected))


def explain(problem: Problem, device: Device, variant: str, prefer: str = "speed") -> Explanation:
    """The same choice with every candidate's fate.

    Raises
    ------
    PackError: there is no usable pack for the device.
    """
    order, why, fitting, rejected = _in_order(problem, device, variant, prefer)
    others = sum(len(p.manifest.kernels) for p in registry().packs) - len(fitting) - len(rejected)
    if not fitting:
        return Explanation(
            problem, device, None, str(_nothing_fits(problem, device, rejected)), tuple(rejected), others
        )
    best = fitting[0].entry
    reason = _reason(best, problem, device, order, why, rejected)
    after = [Rejection(k.entry, _ORDER, _why_after(k.entry, best, problem, device, order)) for k in fitting[1:]]
    rejected.sort(key=lambda r: -r.stage)
    return Explanation(problem, device, best, reason, (*after, *rejected), others, _measured(best, problem, device))


def _in_order(
    problem: Problem, device: Device, variant: str, prefer: str
) -> tuple[tuple[str, str], str, list[Installed], list[Rejection]]:
    """The order of the templates and why, the kernels that fit in order, and those that don't."""
    order, why = template_order(problem, device, variant, prefer)
    fitting, rejected = _sort_out(problem, device, order)
    if variant == "auto" and prefer == "speed":
        first = {t: next((k.entry for k in fitting if k.entry.template == t), None) for t in order}
        if all(first.values()) and (found := compare(*first.values(), problem, device)):
            order, why = (found.faster.template, found.slower.template), str(found)
            fitting.sort(key=lambda k: order.index(k.entry.template))
    return order, why, fitting, rejected


def _measured(entry: KernelEntry, problem: Problem, device: Device) -> str:
    """How fast a kernel was on the nearest problem that was measured, or the command that measures and tunes it."""
    if speed := nearest(entry, problem, device):
        return str(speed)
    return f"never on {device.name}; {tune_command(entry, problem, device)} does that, and finds what is faster"


def _sort_out(problem: Problem, device: Device, order: tuple[str, str]) -> tuple[list[Installed], list[Rejection]]:
    archs = device.archs()
    packs = registry()
    if not any(packs.kernels(arch) for arch in archs):
        raise packs.missing(archs, device.native_arch)
    if problem.definition != BUILTIN_DEFINITION:  # older code for older archs may be of an earlier text
        archs = [arch for arch in archs if packs.of_definition(arch, problem.definition)][:1]
    fitting, rejected = [], []
    for distance, arch in enumerate(archs):
        for kernel in candidates(arch, problem):
            refusal = _refusal(kernel.entry, problem)
            if refusal:
                rejected.append(refusal)
            else:
                fitting.append((_rank(kernel, problem, device, order, distance), kernel))
    fitting.sort(key=lambda x: x[0])
    return [kernel for _, kernel in fitting], rejected


def candidates(arch: str, problem: Problem) -> list[Installed]:
    """The installed kernels of an arch that compute a problem's operator, in its dtype and definition."""
    found = registry().candidates(arch, problem.definition, problem.dtype, OPERATORS[problem.op].computes)
    cache = problem.cache_dtype or problem.dtype
    in_keys = OPERATORS[problem.op].values_in_keys
    return [
        k
        for k in found
        if (k.entry.form, k.entry.cache_dtype, k.entry.values_in_keys) == (problem.form, cache, in_keys)
    ]


def _rank(
    kernel: Installed, problem: Problem, device: Device, order: tuple[str, str], distance: int
) -> tuple[float, ...]:
    entry = kernel.entry
    mask, score = (problem.masks.index(entry.mask), problem.scores.index(entry.score)) if problem.masks else (0, 0)
    features = len(kernel.pack.manifest.cpu_features)
    kind, size = (mask, score), (entry.head_dim, entry.head_dim_v)
    # Where keys are split, reading them is what takes time, and of a larger head_dim no more is read.
    fit = (*size, *kind) if entry.max_rows is None else (*kind, *size)
    first = (order.index(entry.template), distance, -features, entry.max_rows is None)
    height = waves.rank(entry, problem, device)
    length = (not _is_meant_for(entry, problem), -entry.bucket)
    return (*first, *fit, not _is_for_some_pages(entry), *length, *height, kernel.rank)


def _is_meant_for(entry: KernelEntry, problem: Problem) -> bool:
    return entry.meant_for is None or sizes.evaluate(entry.meant_for, problem.sizes) > 0


#: What kinds of kernels do that add to what is there.
_ADDS = {ACCUMULATE: "adds to gradients that are there", MERGED: "puts its result into one that is there"}


def _refusal(entry: KernelEntry, problem: Problem) -> Rejection | None:
    """Why a kernel of the right operator, dtype and definition can't run the problem; None if it can."""
    if (entry.kind in _ADDS) != problem.accumulate:
        what = "results" if problem.op == MERGED else "gradients"
        return Rejection(entry, _KIND, _ADDS.get(entry.kind, f"writes {what}, and doesn't add them"))
    if (entry.kind == PARTIAL) != (problem.op == PARTIAL):
        what = "leaves its result" if entry.kind == PARTIAL else f"rounds its result to {problem.dtype}, not"
        return Rejection(entry, _KIND, f"{what} in float32")
    lacking = [p for p in problem.gradients if p not in {x.name for x in entry.params if x.gradient}]
    if lacking:
        return Rejection(entry, _KIND, f"gives no gradient of {', '.join(lacking)}")
    if entry.max_rows is not None:
        most = sizes.evaluate(entry.max_rows, problem.sizes)
        if problem.rows > most:
            rows = f"{most} query rows a key or fewer, not {problem.rows}" if most else _others(entry)
            return Rejection(entry, _ROWS, f"is for {rows}, at {problem.seqlen_kv} keys")
    if (entry.workspaces or len(entry.launches) > 1) and not problem.workspaces:
        return Rejection(entry, _ROWS, "needs several launches or a workspace, which this framework hasn't there")
    if problem.masks and entry.score not in problem.scores:
        return Rejection(entry, _SCORE, f"computes the score {entry.score}, not {problem.score}")
    for name in ("head_dim", "head_dim_v"):
        wanted, limit = getattr(problem, name), getattr(entry, name)
        if wanted > limit:
            return Rejection(entry, _HEAD_DIM, f"takes {name} up to {limit}, not {wanted}")
    if problem.masks and entry.mask not in problem.masks:
        return Rejection(entry, _MASK, f"computes the mask {entry.mask}, which can't stand in for {problem.mask}")
    if entry.bucket > problem.seqlen_kv:
        return Rejection(entry, _MASK, f"is for {entry.bucket} keys or more, not {problem.seqlen_kv}")
    if entry.index_bits < problem.index_bits:
        return Rejection(entry, _INDEX, f"counts in {entry.index_bits} bits, and a size or stride needs more")
    blocks = max((sizes.evaluate(axis, problem.sizes) for axis in entry.narrow_axes), default=0)
    if blocks > MOST_BLOCKS:
        return Rejection(
            entry, _GRID, f"would launch {blocks} blocks along an axis of the grid that has room for {MOST_BLOCKS}"
        )
    if problem.alignment % entry.alignment:
        return Rejection(
            entry,
            _ALIGNMENT,
            f"needs data and strides at multiples of {entry.alignment} bytes, not {problem.alignment}",
        )
    return None


def _others(entry: KernelEntry) -> str:
    """What a kernel that takes no rows of a problem is for."""
    return "longer sequences, or pages of other sizes" if _is_for_some_pages(entry) else "longer sequences"


def _is_for_some_pages(entry: KernelEntry) -> bool:
    """Whether a kernel is for pages of some sizes only, where it is the fastest."""
    return entry.max_rows is not None and "page_size" in sizes.names(entry.max_rows)


def _reason(
    entry: KernelEntry, problem: Problem, device: Device, order: tuple[str, str], why: str, rejected: list[Rejection]
) -> str:
    """Why a kernel was chosen, in words."""
    reason = why
    if entry.template != order[0]:
        nearest = max(
            (r for r in rejected if r.kernel.template == order[0]),
            key=lambda r: (r.stage, r.kernel.head_dim),
            default=None,
        )
        because = f"the nearest, {nearest.kernel.symbol}, {nearest.reason}" if nearest else "none is installed"
        reason += (
            f", but no {order[0].upper()} kernel fits ({because}): "
            f"{entry.template.upper()}'s kernel runs on the same tensors"
        )
    if device.kind == "cuda" and entry.arch != device.native_arch:
        reason += f"; {entry.arch} code runs on {device.native_arch}, whose own pack has no kernel for this"
    if entry.max_rows is not None:
        reason += f"; it splits the keys among blocks, for {problem.rows} query rows a key"
    if problem.mask and entry.mask != problem.mask:
        reason += f"; the mask {entry.mask} stands in for {problem.mask}"
    return reason


def _why_after(entry: KernelEntry, best: KernelEntry, problem: Problem, device: Device, order: tuple[str, str]) -> str:
    """Why a kernel that fits comes after the best."""
    if entry.template != best.template:
        return f"fits, but {order[0].upper()} is preferred"
    if entry.arch != best.arch:
        return f"fits, but {best.arch} is closer to the device"
    if (entry.max_rows is None) != (best.max_rows is None):
        return "fits, but a kernel that splits the keys is meant for so few query rows"
    if entry.max_rows is not None and entry.mask != best.mask:
        return f"fits, but the mask {best.mask} is cheaper"
    if (entry.head_dim, entry.head_dim_v) != (best.head_dim, best.head_dim_v):
        return f"fits, but its head_dim {entry.head_dim} is larger than needed"
    if entry.mask != best.mask:
        return f"fits, but the mask {best.mask} is cheaper"
    if _is_for_some_pages(best) and not _is_for_some_pages(entry):
        return "fits, but there is a kernel for pages of such sizes"
    if not _is_meant_for(entry, problem):
        return f"fits, but with {problem.heads} heads on {problem.seqlen_kv} keys there is a faster one"
    if entry.bucket != best.bucket:
        return f"fits, but the kernel for {best.bucket} keys or more is meant for this length"
    if entry.block_m != best.block_m:
        return f"fits, but {waves.why(best, entry, problem, device)}"
    return "fits, but another pack's comes first"


def _nothing_fits(problem: Problem, device: Device, rejected: list[Rejection]) -> TvmFlashError:
    """The error that names what the nearest kernel lacked, and the command that builds one."""
    arch = device.native_arch
    custom = problem.definition != BUILTIN_DEFINITION
    options = ["--definition", f"<file.py>:{problem.definition}"] if custom else []
    dims = str(problem.head_dim)
    dims += f":{problem.head_dim_v}" if problem.head_dim_v != problem.head_dim else ""
    nearest = max(rejected, key=lambda r: (r.stage, r.kernel.head_dim), default=None)
    if custom and problem.is_ragged and not problem.cache_dtype:
        options += ["--form", problem.form]
    elif problem.op != FORWARD:
        options += ["--kind", ACCUMULATE if problem.accumulate and problem.op != MERGED else problem.kind]
    whose = arch if problem.op == FORWARD else f"{arch} {problem.kind.replace('_', ' ')}"
    if device.kind == "cuda" and not _on_tensor_cores(problem.dtype, device):
        return KernelNotFoundError(
            f"q, k, v: are {problem.dtype}, and GPU kernels take float16, from sm_80 on also bfloat16; convert them"
        )
    unusual = [] if custom or device.kind != "cuda" else problem.unusual
    if unusual and (nearest is None or nearest.stage in (_SCORE, _MASK, _HEAD_DIM)):
        command = build_command(arch, *options, "--head-dim", dims, "--dtype", problem.dtype, *_kind(problem))
        return KernelNotFoundError(
            f"{unusual[0]}: no {whose} kernel that is installed knows it; run `{command}`, or {INSTEAD[unusual[0]]}"
        )
    if nearest is None and OPERATORS[problem.op].values_in_keys and not custom:
        command = build_command(arch, *options, "--head-dim", dims, "--dtype", problem.dtype)
        return KernelNotFoundError(
            f"no {whose} kernel for {problem.dtype}; run `{command}`, which makes them for CPUs and sm_90a, or attend "
            f"by flash_attention_paged to keys and values whose projections aren't absorbed"
        )
    if nearest is None:
        of = f" of the definition {problem.definition!r}" if custom else ""
        command = build_command(arch, *options, "--dtype", problem.dtype)
        others = ", ".join(str(pack.folder) for pack in registry().passed_over(problem.definition))
        why = f" (those in {others} don't count, since an earlier folder has a definition of that name)"
        return KernelNotFoundError(f"no {whose} kernel{of} for {problem.dtype}{why if others else ''}; run `{command}`")
    if nearest.stage == _ALIGNMENT:
        needed, remedy = nearest.kernel.alignment, "copy the misaligned tensor, as with .clone() or numpy.copy"
        if problem.cache_dtype and any(d % needed for d in (problem.head_dim, problem.head_dim_v)):
            remedy = (
                f"let rows of the cache lie multiples of {needed} elements apart, as in "
                f"cache[..., :{problem.head_dim}] of a cache with room for more"
            )
        return InvalidArgumentError(
            f"{_named(problem)}: an address or a stride is a multiple of {problem.alignment} bytes only, and every "
            f"{whose} kernel for this needs {needed}; {remedy}"
        )
    if nearest.stage == _INDEX:
        return NotSupportedError(
            f"{_named(problem)}: a size or a stride needs more than 32 bits, and the {whose} kernels count in 32; "
            f"split the batch or the heads over several calls"
        )
    if nearest.stage == _GRID:
        return NotSupportedError(
            f"{_named(problem)}: {problem}, and {nearest.kernel.symbol} {nearest.reason}; split the batch or the heads "
            f"over several calls"
        )
    if nearest.stage == _MASK:
        command = build_command(arch, *options, "--head-dim", dims, *_kind(problem))
        return KernelNotFoundError(f"no {whose} kernel for the mask {problem.mask}; run `{command}`")
    if nearest.stage == _HEAD_DIM:
        command = build_command(arch, *options, "--head-dim", dims)
        largest = nearest.kernel.head_dim, nearest.kernel.head_dim_v
        return KernelNotFoundError(
            f"no {whose} kernel for head_dim {dims} (the largest takes {':'.join(map(str, largest))}); run `{command}`"
        )
    if nearest.stage == _ROWS:
        command = build_command(arch, *options)
        return KernelNotFoundError(f"no {whose} kernel: {nearest.kernel.symbol} {nearest.reason}; run `{command}`")
    if nearest.stage == _KIND:
        command = build_command(arch, *options, "--head-dim", dims, "--dtype", problem.dtype)
        return KernelNotFoundError(_wrong_kind(problem, f"{whose} kernel", nearest, command))
    command = build_command(arch, *options, "--head-dim", dims, *_kind(problem))
    return KernelNotFoundError(f"no {whose} kernel for the score {problem.score}; run `{command}`")


def _named(problem: Problem) -> str:
    """The tensors of a problem whose addresses and strides count."""
    operator = OPERATORS[problem.op]
    return ", ".join((*operator.inputs, *operator.all_outputs(problem.gradients)))


def _wrong_kind(problem: Problem, kernel: str, nearest: Rejection, command: str) -> str:
    if problem.op == MERGED:
        return f"no {kernel} puts its result into one that is there; run `{command}`"
    if problem.accumulate:
        return (
            f"accumulate: is True, and no {kernel} adds to gradients that are there; leave it out, and add the results "
            f"to float32 tensors, or run `{command}`"
        )
    if problem.op == PARTIAL:
        return f"no {kernel} leaves its result in float32; run `{command}`"
    return (
        f"{', '.join(problem.gradients)}: a gradient is wanted, and every {kernel} for this {nearest.reason}; "
        f"ask for none, as with .detach()"
    )


def _on_tensor_cores(dtype: str, device: Device) -> bool:
    """Whether a GPU multiplies a dtype in the way of these kernels."""
    return dtype == "float16" or (dtype == "bfloat16" and device.capability >= _AMPERE)


def _kind(problem: Problem) -> tuple[str, ...]:
    """Options of the build command for a kernel that serves a problem, and others of its kind."""
    if any(p.is_placed for p in (*MASKS[problem.mask].params, *SCORES[problem.score].params)):
        return "--mask", problem.mask, "--score", problem.score
    everything = "optional_sinks" if problem.score.endswith("_sinks") else "optional"
    if OPERATORS[problem.op].values_in_keys:
        return "--mask", "window", "--score", "identity"
    if problem.is_ragged:
        return "--mask", "positioned" if problem.form == PAGED else "window", "--score", everything
    padded = problem.mask in ("padded", "positioned")
    if problem.op != FORWARD:
        padded = padded or problem.score != "identity"
    mask, score = ("positioned", everything) if padded else ("window", problem.score)
    return "--mask", mask, "--score", score
