"""``python -m tvm_flash build``, ``scripts/build_kernels.py``: arguments in, progress and a table out."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from schedules.builder import records
from schedules.builder.build import PackReport, build
from schedules.builder.compile import Built, Failed, Job, Refused
from schedules.builder.emit import emit
from schedules.builder.pack import PackBusyError
from schedules.builder.plan import PACKS, BuildRequest, PackPlan, default_jobs, parse_targets, plan, select
from schedules.builder.suite import SCOPES, HeadDim, Selection
from schedules.definition.attention import Attention
from schedules.definition.check import check
from schedules.definition.definition_file import DefinitionFile
from schedules.families import kinds_of
from schedules.toolchain import nvcc
from schedules.toolchain.process import ToolchainError
from schedules.tuning.best import MODES, Tuning
from tvm_flash.machine.arch import capability_of
from tvm_flash.machine.outputs import fault_of_folder

#: Columns where the output is no terminal: room for a kernel's name and six numbers.
_WIDTH = 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all that can be built is in the packs, 1 if a kernel failed, 2 for a wrong request."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    try:
        request, options = _request(arguments)
        if options.list or options.dry_run:
            for target in request.targets:
                (_print_list if options.list else _print_plan)(console, request, plan(request, target))
            return 0
        if options.emit:
            _emit(console, request, options.emit)
            return 0
        reports = _build(console, request)
    except (ValueError, ToolchainError, PackBusyError, OSError) as e:  # DefinitionError is a ValueError
        console.print(f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1 if isinstance(e, (ToolchainError, OSError)) else 2
    except KeyboardInterrupt:
        console.print("stopped; the packs are as they were, finished kernels are kept for the next build")
        return 130
    for report in reports:
        _print_report(console, report)
        _print_tuning(console, request, report)
    return int(any(report.failed for report in reports))


def _request(arguments: Sequence[str] | None) -> tuple[BuildRequest, argparse.Namespace]:
    def values(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        if not words:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a name or several; leave it out for all")
        return words

    parser = argparse.ArgumentParser(
        prog="python -m tvm_flash build", description="Compile attention kernels for this machine or for others."
    )
    several = {"type": values, "action": "extend", "default": []}
    parser.add_argument("--arch", **several, help="native (default), cpu, sm_80, sm_90a, …; a comma list, or repeated")
    parser.add_argument(
        "--isa",
        default="",
        help="of CPU packs: some of amx,avx512_bf16,avx512,avx2,baseline, or all (default: this machine's best)",
    )
    parser.add_argument(
        "--head-dim",
        **several,
        help="64, 128, …; 192:128 if values have a size of their own (default: all; of your own definition 64,128)",
    )
    parser.add_argument("--dtype", **several, help="float32, float16, bfloat16")
    parser.add_argument(
        "--template",
        **several,
        help="v1, v2 (default: both; of your own definition the arch's last, which takes tensors of both layouts)",
    )
    parser.add_argument("--mask", **several, help="full, causal, window, …")
    parser.add_argument("--score", **several, help="identity, softcap, alibi, …")
    parser.add_argument("--kind", **several, help="forward, decode, …; only kernels of these kinds")
    parser.add_argument(
        "--form",
        **several,
        help="dense, ragged, paged: how sequences lie in memory (default: all; of your own definition dense)",
    )
    parser.add_argument(
        "--module", **several, help="v2_float32_d64, v1_*, …; only kernels of the modules that have one of these names"
    )
    parser.add_argument(
        "--definition", metavar="FILE.py:NAME", help="kernels of your own definition, added to the pack"
    )
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=PACKS, help="folder of the packs (default: in the package)")
    parser.add_argument(
        "--run-on", default="", metavar="ARCH", help="add code that newer GPUs run too, for verification"
    )
    parser.add_argument(
        "--emit", type=Path, metavar="DIR", help="write CUDA sources for scripts/assemble_packs.py, and compile nothing"
    )
    parser.add_argument(
        "--configs",
        choices=MODES,
        default="auto",
        help="auto: what tuning_logs/ found to be the fastest, if it may ship; default: the families' own; measured: "
        "also kernels that weren't verified",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled, and write nothing")
    parser.add_argument("--list", action="store_true", help="name the kernels that are selected, and write nothing")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}: expected at least 1")
    selection = Selection(
        templates=tuple(options.template),
        dtypes=tuple(options.dtype),
        head_dims=tuple(HeadDim.parse(text) for text in options.head_dim),
        masks=tuple(options.mask),
        scores=tuple(options.score),
        kinds=tuple(options.kind),
        forms=tuple(options.form),
    )
    request = BuildRequest(
        targets=parse_targets(options.arch or ["native"], options.isa),
        selection=selection,
        modules=tuple(options.module),
        definition=DefinitionFile.parse(options.definition) if options.definition else None,
        output=options.output.resolve(),
        jobs=options.jobs,
        run_on=options.run_on,
        tuning=None if options.definition else Tuning(options.configs),
    )
    _check_together(request, options)
    return request, options


def _check_together(request: BuildRequest, options: argparse.Namespace) -> None:
    """Check that no option is without meaning beside the others, and that folders are some.

    Raises
    ------
    ValueError: one is; the text names it.
    """
    archs = ", ".join(dict.fromkeys(target.arch for target in request.targets))
    on_cpu = {target.arch == "cpu" for target in request.targets}
    if request.definition:
        for option, chosen in (("mask", options.mask), ("score", options.score)):
            if chosen:
                raise ValueError(
                    f"--{option} {','.join(chosen)}: stands beside --definition, which has a {option} of its own; "
                    f"leave it out, and change the definition"
                )
    if options.isa and True not in on_cpu:
        raise ValueError(f"--isa {options.isa}: is for CPU packs, and --arch is {archs}; leave it out, or add cpu")
    if options.run_on and False not in on_cpu:
        raise ValueError(f"--run-on {options.run_on}: is for CUDA packs, and --arch is {archs}; leave it out")
    if options.run_on and capability_of(options.run_on) is None:
        raise ValueError(f"--run-on {options.run_on}: is no CUDA arch, expected one such as sm_90a")
    for target in request.targets:
        if target.arch != "cpu":
            nvcc.code_for(target.arch, request.run_on)
    known = dict.fromkeys(kind for target in request.targets for kind in kinds_of(target))
    if none := [kind for kind in options.kind if kind in SCOPES and kind not in known]:
        raise ValueError(f"--kind {','.join(none)}: {archs} has none; it has {', '.join(known)}")
    if not any(select(request, target) for target in request.targets):
        given = {"template": options.template, "kind": options.kind, "form": options.form, "module": options.module}
        given["head-dim"] = options.head_dim
        named = " ".join(f"--{option} {','.join(values)}" for option, values in given.items() if values)
        raise ValueError(f"{named}: no kernel of {archs} is all of it; leave one out")
    for option, folder in (("--output", request.output), ("--emit", options.emit)):
        if folder is not None and (fault := fault_of_folder(folder)):
            raise ValueError(f"{option} {folder}: {fault}; name a folder that can be written")


def _check(request: BuildRequest, say: Callable[[str], None]) -> None:
    """Compare a definition of the user's own with its twins."""
    definition = request.definition.load() if request.definition else None
    if isinstance(definition, Attention):
        say(f"checking {definition.name}")
        check(definition)


def _emit(console: Console, request: BuildRequest, folder: Path) -> None:
    with console.status("scheduling") as status:
        _check(request, status.update)
        refused = emit(request, folder, status.update)
    _print_reasons(console, refused, "yellow")
    console.print(f"sources of {', '.join(t.arch for t in request.targets)} are in {folder}", soft_wrap=True)


def _print_list(console: Console, request: BuildRequest, planned: PackPlan) -> None:
    for spec in planned.specs:
        console.print(f"{planned.target.arch} {spec.symbol}", highlight=False, soft_wrap=True)


def _print_plan(console: Console, request: BuildRequest, planned: PackPlan) -> None:
    console.print(
        f"{planned.target}: {len(planned.specs)} kernels selected, {len(planned.cached)} up to date, "
        f"{len(planned.jobs)} to compile, into {request.output / planned.target.folder}",
        soft_wrap=True,
    )
    for job in planned.jobs:
        console.print(f"  {job.spec.symbol}", highlight=False, soft_wrap=True)


def _build(console: Console, request: BuildRequest) -> list[PackReport]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)

        def say(text: str) -> None:
            bar.update(task, description=text)

        def begun(total: int) -> None:
            bar.update(task, total=total)
            if total:  # what is there already was checked when it was built
                _check(request, say)
                say("compiling")

        def progress(job: Job, results) -> None:
            bar.update(task, advance=1, description=f"{job.target.arch} {job.spec.symbol}")

        return build(request, progress, begun)


def _print_report(console: Console, report: PackReport) -> None:
    built = {r.entry.symbol: r for r in report.results if isinstance(r, Built)}
    entries = {e.symbol: e for e in report.manifest.kernels} if report.manifest else {}
    linked = {m.file: m for m in report.linked}
    rows = [(entries[s], b, linked[entries[s].module]) for s, b in built.items() if _module(entries, s) in linked]
    if rows:
        console.print(_table(report, rows))
    for kind, style in ((Refused, "yellow"), (Failed, "red")):
        _print_reasons(console, [r for r in report.results if isinstance(r, kind)], style)
    if report.dropped:
        console.print(f"dropped {len(report.dropped)} kernels of the old pack: made by other compilers, or refused now")
    if report.outdated:
        names = ", ".join(e.symbol for e in report.outdated)
        console.print(
            f"dropped {len(report.outdated)} kernels of {report.outdated[0].definition!r}, which says something else "
            f"now, or was built elsewhere; name their head_dim, dtype, template and kind to have them again: {names}",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if not report.manifest:
        console.print(f"{report.target}: no kernel could be built", style="red")
        return
    if unverified := records.unverified(report.manifest.kernels):
        console.print(
            f"{len(unverified)} of them were never run on a GPU in this form; scripts/verify_kernels.py does that",
            style="yellow",
        )
    files = (*report.manifest.modules, *report.manifest.support_files)
    console.print(
        f"{report.target}: {len(entries)} kernels in {report.folder} ({_kilobytes(sum(f.size for f in files))}); "
        f"{len(report.up_to_date)} up to date, {len(entries) - len(report.up_to_date)} new or kept",
        soft_wrap=True,
    )


def _print_tuning(console: Console, request: BuildRequest, report: PackReport) -> None:
    """What records decided, and the command where there are none."""
    if not report.manifest:
        return
    notes = Counter(r.note for r in report.results if isinstance(r, Built) and r.note)
    for note, count in notes.items():
        console.print(f"{count} kernels: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    tuned = sum(e.config_source != "default" for e in report.manifest.kernels)
    if tuned:
        console.print(f"{tuned} kernels have configurations from tuning_logs/")
    elif not any(e.speeds for e in report.manifest.kernels):
        command = f"scripts/tune.py --arch {report.target.arch} --suite standard"
        console.print(f"nothing measured of these kernels: default configurations; to tune: {command}", soft_wrap=True)


def _print_reasons(console: Console, results: Sequence[Refused | Failed], style: str) -> None:
    """Each reason once, with the kernels that it holds for."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for result in results:
        by_reason.setdefault((type(result).__name__.lower(), result.reason), []).append(result.symbol)
    for (kind, reason), symbols in by_reason.items():
        console.print(f"{kind}: {reason}", style=style, markup=False, highlight=False)
        console.print("  " + ", ".join(symbols), style=style, markup=False, highlight=False)


def _module(entries, symbol: str) -> str | None:
    return entries[symbol].module if symbol in entries else None


def _table(report: PackReport, rows) -> Table:
    gpu = report.target.arch != "cpu"
    table = Table(title=f"built for {report.target}", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for name in ("seconds", "object", *(("registers", "shared", "spills") if gpu else ())):
        table.add_column(name, justify="right")
    module = None
    for entry, built, file in rows:
        if entry.module != module:
            module = entry.module
            table.add_section()
            table.add_row(module, "", _kilobytes(file.size), *([""] * 3 if gpu else []), style="bold")
        resources = (str(entry.registers), _kilobytes(entry.shared_memory), str(entry.spills)) if gpu else ()
        table.add_row("  " + entry.symbol, f"{built.seconds:.1f}", _kilobytes(built.size), *resources)
    return table


def _kilobytes(size: int) -> str:
    return f"{size / 1024:,.0f} KB"
