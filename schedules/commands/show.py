"""``scripts/show.py``: the same attention at each stage on its way from mathematics to machine code."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm

from schedules.builder.compile import Lowered, cpu_target, export_cuda, lower_for_each
from schedules.builder.plan import BuildRequest, parse_targets, select
from schedules.builder.suite import SCOPES, HeadDim, KernelSpec, Selection
from schedules.commands.show_definition import DEFINITION, STAGES, before_templates, parse_lengths
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.derive import OPERATORS
from schedules.definition.errors import DefinitionError
from schedules.families import family_of
from schedules.families.interface import FORWARD, Rejected, Target
from schedules.toolchain import cuda
from schedules.toolchain.host import split
from schedules.toolchain.nvcc import find_toolkit
from schedules.toolchain.process import ToolchainError, run
from schedules.tuning.best import Tuning
from tvm_flash.display import Screen, interruptible
from tvm_flash.machine.outputs import fault_of_file

#: Columns that two listings need beside one another.
_SIDE_BY_SIDE = 140


@dataclass(frozen=True)
class Stage:
    """A stage: what its text is, in words; its language for highlighting; and how it is made of a lowered kernel.

    ``make`` takes the lowered kernel and its target.
    """

    about: str
    language: str
    make: Callable[[Lowered, Target], str]


def _tir(lowered: Lowered, _: Target) -> str:
    return "\n".join(func.script() for func in lowered.program.functions.values())


def _cuda(lowered: Lowered, _: Target) -> str:
    """The kernel itself, or its several launches, without the helpers before and the host code after them."""
    launches = lowered.program.launches
    device, _ = split(lowered.text, launches[0].symbol)
    begins = [found.start() for found in re.finditer(r'extern "C" __global__[^;{]*{', device)]
    return device[begins[-len(launches)] :]


def _ptx(lowered: Lowered, target: Target) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        return cuda.device_compiler(target.arch).ptx(_device_file(lowered, Path(scratch)), target.arch)


def _sass(lowered: Lowered, target: Target) -> str:
    disassembler = find_disassembler()
    with tempfile.TemporaryDirectory() as scratch:
        image, _ = cuda.device_compiler(target.arch).image(_device_file(lowered, Path(scratch)), target.arch)
        return run([disassembler, "-c", image], "disassembling")


def _device_file(lowered: Lowered, folder: Path) -> Path:
    file = folder / "kernel.cu"
    file.write_text(split(lowered.text, file.name)[0])
    return file


def find_disassembler() -> str:
    """nvdisasm: beside nvcc, else on ``PATH``.

    Raises
    ------
    ToolchainError: there is none.
    """
    beside = find_toolkit().compiler.parent / "nvdisasm"
    found = str(beside) if beside.exists() else shutil.which("nvdisasm")
    if not found:
        raise ToolchainError("--stage sass: needs nvdisasm; pip install nvidia-cuda-nvdisasm")
    return found


def _cpu_text(kind: str) -> Callable[[Lowered, Target], str]:
    def make(lowered: Lowered, target: Target) -> str:
        module = tvm.IRModule(lowered.program.functions)
        compiled = tvm.compile(module, target=cpu_target(target), tir_pipeline=lowered.program.pipeline)
        return compiled.mod.inspect_source(kind)

    return make


GPU_STAGES = {
    "tir": Stage("TensorIR after scheduling", "python", _tir),
    "cuda": Stage("CUDA C++", "cuda", _cuda),
    "ptx": Stage("PTX", "ptx", _ptx),
    "sass": Stage("machine code", "sass", _sass),
}
CPU_STAGES = {
    "tir": Stage("TensorIR after scheduling", "python", _tir),
    "llvm": Stage("LLVM IR", "llvm", _cpu_text("ll")),
    "asm": Stage("machine code", "gas", _cpu_text("asm")),
}

#: What a backward computes, each by some of its launches.
GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Listing:
    """One kernel at one stage: a title, the text, and its language."""

    title: str
    text: str
    language: str


def _of_result(lowered: Lowered, result: str, target: Target) -> Lowered:
    """Of a kernel's launches only those that write or complete a result."""
    program = lowered.program
    launches = tuple(launch for launch in program.launches if result in launch.roles)
    roles = {role for launch in launches for role in launch.roles}
    workspaces = tuple(w for w in program.workspaces if w.name in roles)
    program = dataclasses.replace(program, launches=launches, workspaces=workspaces)
    text = lowered.text if target.arch == "cpu" else export_cuda(program, target)
    return dataclasses.replace(lowered, program=program, text=text)


def listing(
    spec: KernelSpec,
    request: BuildRequest,
    stage: str,
    op: str = "forward",
    result: str = "",
    lengths: tuple[int, int] = (512, 512),
    picture: Path | None = None,
) -> Listing:
    """A kernel, as a build of the request would make it for its first target, at a stage.

    ``lengths``, of queries and keys, are those of the picture of a mask, which goes to a file too if there is a name
    for it.  An operator other than ``forward`` that no kind of kernels is called after has the stage ``definition``
    only.  If a ``result`` is named, only launches of it are shown.

    Raises
    ------
    ValueError, DefinitionError: the target has no such stage, or the definition can't be scheduled.
    ToolchainError: a compiler or the disassembler is missing or fails.
    """
    target = request.targets[0]
    stages = CPU_STAGES if target.arch == "cpu" else GPU_STAGES
    if stage in STAGES:
        return Listing(*before_templates(spec, request, stage, op, lengths, picture))
    if op not in ("forward", spec.kind):
        raise ValueError(f"--stage {stage}: {op} has {DEFINITION}; kernels are made of {', '.join(SCOPES)}")
    if stage not in stages:
        raise ValueError(f"--stage {stage}: {target.arch} has {', '.join((*STAGES, *stages))}")
    buckets = {}
    kernels = lower_for_each(spec.with_bucket(0), (target,), request.configs, request.definition, request.tuned)
    for one, _, _, lowered, _ in kernels:
        buckets[one.bucket] = lowered
        if one.bucket == spec.bucket:
            break
    else:
        raise ValueError(f"--bucket {spec.bucket}: there are {', '.join(map(str, buckets))}")
    if isinstance(lowered, Rejected):
        raise ValueError(f"{spec.symbol}: {lowered.reason}")
    lowered = _of_result(lowered, result, target) if result else lowered
    config = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(lowered.config).items())
    title = f"{f'{result} of ' if result else ''}{spec.symbol} for {target}, {stages[stage].about} ({config})"
    return Listing(title, stages[stage].make(lowered, target), stages[stage].language)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 2 for a request that can't be carried out."""
    options = _parser().parse_args(arguments)
    result = options.op if options.op in GRADIENTS else ""
    options.op = "backward" if result else options.op
    try:
        target = parse_targets([options.arch or "native"], options.isa)[-1]
        _check_together(options, target)
        request = _request(options, target)
        spec = select(request, target)[0].with_bucket(options.bucket)
        templates = options.templates or (["v2"] if "v2" in family_of(target).TEMPLATES else ["v1"])
        templates = templates[:1] if options.stage in STAGES else templates
        specs = [dataclasses.replace(spec, template=t) for t in templates]
        more = parse_lengths(options.lengths or "512"), options.picture
        listings = [listing(one, request, options.stage, options.op, result, *more) for one in specs]
    except (ValueError, ToolchainError, DefinitionError) as e:
        print(f"show: {e}", file=sys.stderr)
        return 2
    return interruptible(lambda: show(listings, Screen()) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="show.py", description="A kernel at a stage of its making: as mathematics, scheduled, as code."
    )
    parser.add_argument(
        "templates", nargs="*", type=str.lower, metavar="V1|V2", help="one, or both beside one another (default: V2)"
    )
    stages = (*STAGES, *dict.fromkeys((*GPU_STAGES, *CPU_STAGES)))
    parser.add_argument("--stage", choices=stages, default="tir", help="default: tir; llvm and asm are the CPU's")
    choices = (*OPERATORS, *GRADIENTS)
    parser.add_argument(
        "--op", choices=choices, default="forward", help="an operator, or of a backward one result; default: forward"
    )
    parser.add_argument("--arch", help="cpu, sm_80, sm_90a, …; default: this machine's GPU, or its processor")
    parser.add_argument("--isa", default="", help="of a processor: avx2, baseline, …; default: this machine's best")
    parser.add_argument("--head-dim", default="128", help="128, or 192:128 if values have a size of their own")
    parser.add_argument("--dtype", help="default: float16, on a processor float32")
    parser.add_argument("--mask", help="full (default), causal, window, …")
    parser.add_argument("--score", help="identity (default), softcap, alibi, …")
    parser.add_argument("--kind", choices=tuple(SCOPES), help="default: that of the operator")
    parser.add_argument("--bucket", type=int, default=0, help="the kernel for sequences of so many keys or more")
    parser.add_argument("--lengths", help="of a mask's picture: 512 (default), or 256x512 for queries and keys")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="where a mask's picture goes")
    parser.add_argument("--definition", metavar="FILE.py:NAME", help="a definition of your own")
    return parser


def _check_together(options: argparse.Namespace, target: Target) -> None:
    """Check that no option is without meaning beside the others, and that a picture can be written.

    Raises
    ------
    ValueError: one is; the text names it.
    """
    for name in ("mask", "score"):
        value = getattr(options, name)
        if options.definition and value:
            raise ValueError(
                f"--{name} {value}: stands beside --definition, which has a {name} of its own; leave it out"
            )
    if options.isa and target.arch != "cpu":
        raise ValueError(f"--isa {options.isa}: is of processors, and --arch is {target.arch}; leave it out")
    for name in ("lengths", "picture"):
        value = getattr(options, name)
        if value and options.stage != "mask":
            raise ValueError(f"--{name} {value}: is for --stage mask, and --stage is {options.stage}; leave it out")
    if options.picture and (fault := fault_of_file(options.picture)):
        raise ValueError(f"--picture {options.picture}: {fault}; name a file that can be written")


def _request(options: argparse.Namespace, target: Target) -> BuildRequest:
    for template in options.templates:
        if template not in ("v1", "v2"):
            raise ValueError(f"{template}: unknown; expected V1 or V2")
    dtype = options.dtype or ("float32" if target.arch == "cpu" else "float16")
    head_dims = (HeadDim.parse(options.head_dim),)
    scheduled = options.stage not in STAGES
    kind = options.kind or (options.op if scheduled and options.op in SCOPES else FORWARD)
    chosen = Selection(("v2",), (dtype,), head_dims, (options.mask or "full",), (options.score or "identity",), (kind,))
    definition = DefinitionFile.parse(options.definition) if options.definition else None
    return BuildRequest((target,), chosen, definition=definition, tuning=Tuning("auto"))


def show(listings: Sequence[Listing], screen: Screen) -> None:
    """Listings with highlighting on a terminal, two beside one another if it is wide; else plain, one after another."""
    if not screen.fancy:
        for one in listings:
            screen.line(f"# {one.title}\n{one.text.rstrip()}\n")
        return
    from rich.syntax import Syntax
    from rich.table import Table

    drawn = [Syntax(one.text.strip(), _lexer(one.language), theme="ansi_dark", word_wrap=True) for one in listings]
    if len(listings) > 1 and screen.width >= _SIDE_BY_SIDE:
        grid = Table.grid(*(one.title for one in listings), padding=(0, 2), expand=True)
        grid.show_header = True
        for column in grid.columns:
            column.ratio = 1
        grid.add_row(*drawn)
        screen.console.print(grid)
        return
    for one, code in zip(listings, drawn, strict=True):
        screen.line(one.title, "best")
        screen.console.print(code)


def _lexer(language: str) -> str:
    """The nearest lexer that Pygments has: it knows CUDA and LLVM, but no PTX or SASS."""
    return {"ptx": "gas", "sass": "gas"}.get(language, language)
