"""``scripts/tune.py``: arguments in, progress and tables out."""

from __future__ import annotations

import argparse
import ast
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from schedules.builder import records
from schedules.tuning import tables
from schedules.tuning.batch import Options, UnhealthyDeviceError
from schedules.tuning.budget import Budget
from schedules.tuning.cluster import RayCluster, parse_resources, require_ray
from schedules.tuning.folder import Folder, FolderBusyError
from schedules.tuning.measure import Engine, ThisHost
from schedules.tuning.process import describe
from schedules.tuning.progress import Progress
from tvm_flash.errors import TvmFlashError
from tvm_flash.machine import cuda
from tvm_flash.machine.arch import runs_on
from tvm_flash.measure.workloads import Workload, standard_suite
from tvm_flash.packs.manifest import LAYOUT_OF_TEMPLATE

TEMPLATES = tuple(LAYOUT_OF_TEMPLATE)
WORK = records.LOGS / ".work"

_EXAMPLES = """\
examples:
  scripts/tune.py --arch native --problem "b=4 h=16 s=4096 d=128 causal fp16"
  scripts/tune.py --arch cpu --suite standard --dtype float32 --strategy evolutionary --budget 10min
  scripts/tune.py --arch native --problem "b=8 h=8 s=512 d=64 causal ragged backward fp32"
  scripts/tune.py --arch sm_90a --kind backward --suite standard --head-dim 128 --budget 50 --emit DIR
  scripts/tune.py --arch sm_86 --suite standard --budget 200 --emit DIR       on a machine without a GPU, then
  scripts/tune.py --measure DIR                                               on one with it, without TVM; or on many:
  scripts/tune.py --measure DIR --engine ray --address HOST:6379
  scripts/tune.py merge DIR/records/*.jsonl                                   into tuning_logs/<device>.jsonl
  scripts/tune.py report tuning_logs/nvidia_h200.jsonl --output report.png
  scripts/tune.py diff OLD.jsonl NEW.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all went well, 1 if the device failed, 2 for a wrong request, 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"merge": _merge, "report": _report, "diff": _diff}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _tune(arguments)
    except UnhealthyDeviceError as e:
        print(f"error: {e}\neverything measured so far is kept; --resume goes on", file=sys.stderr)
        return 1
    except (ValueError, OSError, FolderBusyError, TvmFlashError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; everything measured so far is kept, --resume goes on", file=sys.stderr)
        return 130


# ---------------------------------------------------------------- searching

#: What the problems of the suite see.
_SUITE_MASKS = ("full", "causal")


def _tune(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    measuring = Options(
        jobs=options.jobs,
        peers=options.peers,
        recompile_for=options.recompile_for,
        log=options.log,
        step_limit=options.step_limit,
        effort=_effort(options.effort),
    )
    if options.measure:
        return _measure(options, measuring)
    # TVM is needed from here on, and only from here on.
    from schedules.builder.plan import parse_targets
    from schedules.tuning.emit import tasks_for
    from schedules.tuning.search import Search

    for template in options.template:
        if template not in TEMPLATES:
            raise ValueError(f"--template {template}: unknown; expected one of {', '.join(TEMPLATES)}")
    budget = Budget(configs=0) if options.variation and not options.budget else Budget.parse(options.budget or "100")
    target = parse_targets([options.arch], options.isa)[-1]  # of "native", the GPU if there is one
    if options.isa and target.arch != "cpu":
        raise ValueError(f"--isa {options.isa}: is of CPU kernels, and --arch is {target.arch}; leave it out")
    workloads = _workloads(options, target)
    tasks = tasks_for(workloads, options.template or TEMPLATES, target, options.kind)
    if not tasks:
        whose = f"{target} has no {' or '.join(options.kind)} kernel".replace("  ", " ")
        raise ValueError(f"{whose} for any of the problems")
    if options.dry_run:
        _print_spaces(tasks, target)
        return 0
    engine = None if options.emit else _engine(options, target.arch)
    log = options.log
    if isinstance(engine, ThisHost):
        log = log or records.log_of(describe(engine.devices[0])["name"])
    search = Search(
        target=target,
        tasks=tasks,
        strategy=options.strategy,
        budget=budget,
        folder=options.emit or options.work / "_".join(filter(None, (target.arch, target.isa))),
        generation=options.generation,
        seed=options.seed,
        jobs=options.jobs,
        resume=options.resume,
        variations=options.variation,
        log=log,
    )
    if options.emit:
        return _emit(search)
    start = time.monotonic()
    with Progress() as progress:
        search.run(replace(measuring, log=log), engine, progress)
    _print_not_made(search)
    found = records.read(log) if log else Folder(search.folder).records()
    print(f"{time.monotonic() - start:.0f} s; records are in {log or search.folder / 'records'}")
    print(tables.gains(found, {str(w) for w in workloads}))
    if not log:
        _print_how_to_merge(search.folder)
    print(f"scripts/build_kernels.py --arch {target.arch} builds with what was found")
    return 0


def _emit(search) -> int:
    if search.budget.configs == math.inf:
        raise ValueError("--emit: needs a --budget in configurations, as nothing is timed here")
    with Progress() as progress:
        count = search.emit(progress)
    _print_not_made(search)
    print(f"{count} configurations are in {search.folder}; measure them with scripts/tune.py --measure {search.folder}")
    return 0


def _measure(options: argparse.Namespace, measuring: Options) -> int:
    folder = Folder(options.measure)
    emission = folder.emission()
    engine = _engine(options, emission.arch)
    if options.budget.endswith(("s", "min")):
        measuring = replace(measuring, deadline=time.monotonic() + Budget.parse(options.budget).seconds)
    with Progress() as progress:
        engine.measure(folder, measuring, progress)
    left = folder.left()
    print(f"{len(left)} batches are left" if left else "all batches are measured")
    print(tables.gains(folder.records()))
    _print_how_to_merge(options.measure)
    return 0


def _print_how_to_merge(folder: Path) -> None:
    print(f"scripts/tune.py merge {folder}/records/*.jsonl puts the records into tuning_logs/")


def _engine(options: argparse.Namespace, arch: str) -> Engine:
    """What measures an arch's kernels.

    Raises
    ------
    ValueError: this host has no device for them, or no Ray.
    """
    if options.engine == "ray":
        if options.device:
            raise ValueError("--device: names devices of this host, and --engine ray finds those of a cluster")
        require_ray()
        return RayCluster(options.address, parse_resources(options.resources))
    if options.address or options.resources:
        raise ValueError("--address, --resources: are for --engine ray")
    devices = _devices(options, arch)
    if not devices:
        raise ValueError(
            f"no device of this host runs kernels for {arch}; --emit DIR writes what another host measures, and "
            f"--engine ray finds hosts of a cluster"
        )
    return ThisHost(devices)


def _devices(options: argparse.Namespace, arch: str) -> list[str]:
    """The devices that run an arch's kernels: those that were named, else all of this machine."""
    if options.device:
        return options.device
    if arch == "cpu":
        return ["cpu"]
    code = options.recompile_for or arch
    gpus = [index for index in range(cuda.device_count()) if runs_on(code, cuda.gpu(index).capability)]
    return [f"cuda:{index}" for index in gpus]


def _workloads(options: argparse.Namespace, target) -> list[Workload]:
    from schedules.families import family_of
    from schedules.tuning import kinds

    for kind in options.kind:
        if kind not in kinds.KINDS:
            raise ValueError(f"--kind {kind}: unknown; expected one of {', '.join(kinds.KINDS)}")
    dtypes = options.dtype or family_of(target).DTYPES
    if bool(options.problem) == bool(options.suite):
        raise ValueError("either --problem or --suite is needed: what is to be fast?")
    for mask in options.mask:
        if mask not in _SUITE_MASKS:
            raise ValueError(f"--mask {mask}: unknown; expected one of {', '.join(_SUITE_MASKS)}")
    for dtype in options.dtype:
        if dtype not in family_of(target).DTYPES:
            raise ValueError(f"--dtype {dtype}: {target} has none; it has {', '.join(family_of(target).DTYPES)}")
    if options.suite:
        device = "cpu" if target.arch == "cpu" else "cuda"
        found = standard_suite(device, dtypes, options.head_dim, options.seqlen, options.mask)
    else:
        named = [_parse_problem(text) for text in options.problem]
        of_suite = {"head-dim": options.head_dim, "seqlen": options.seqlen, "mask": options.mask}
        if given := ", ".join(f"--{name}" for name, values in of_suite.items() if values):
            raise ValueError(f"{given}: keep some of a --suite, and a --problem says all of it; leave them out")
        if options.dtype and (own := [text for text, names_one in named if names_one]):
            raise ValueError(f"--dtype {','.join(options.dtype)}: the problem {own[0]!r} names its own; leave one out")
        found = [w for text in named for w in _in_dtypes(text, options.dtype)]
    return list(dict.fromkeys(one for w in found for one in _of_kinds(w, options.kind)))


def _of_kinds(workload: Workload, asked: Sequence[str]) -> list[Workload]:
    """A problem as those of the kinds that were asked for; one that says itself what it is must be one of theirs."""
    from schedules.tuning import kinds

    if not asked:
        return [workload]
    if not workload.words:
        return [kinds.problem_of(kind, workload) for kind in asked]
    if not kinds.of(workload, asked):
        whose = ", ".join(kinds.of(workload))
        raise ValueError(f"--kind {', '.join(asked)}: the problem {workload} is one of {whose}; leave out one of both")
    return [workload]


def _parse_problem(text: str) -> tuple[str, bool]:
    """A problem, and whether it names a dtype itself."""
    try:
        Workload.parse(text)
    except ValueError as e:
        if "names no dtype" not in str(e):
            raise
        return text, False
    return text, True


def _in_dtypes(problem: tuple[str, bool], dtypes: Sequence[str]) -> list[Workload]:
    text, named = problem
    return [Workload.parse(text)] if named else [Workload.parse(text, dtype) for dtype in dtypes or ("float16",)]


def _effort(text: str) -> dict[str, float]:
    """``"rounds=3 block=0.01"`` as fields of :class:`schedules.tuning.timing.Effort`."""
    words = dict(word.split("=") for word in text.split())
    return {name: int(value) if name in ("rounds", "trial") else float(value) for name, value in words.items()}


def _variation(text: str) -> dict[str, bool | int]:
    """``"block_n=64 pingpong=False"`` as fields of a family's ``Config``."""
    return {name: ast.literal_eval(value) for name, value in (word.split("=") for word in text.split())}


def _print_spaces(tasks, target) -> None:
    from schedules.tuning.emit import space_of

    for spec, workloads in tasks.items():
        space = space_of(spec, target)
        rejections = space.rejections()
        print(f"{spec.symbol}: {len(space.feasible())} configurations, for {', '.join(map(str, workloads))}")
        for name, values in space.axes.items():
            print(f"  {name}: {', '.join(map(str, values))}")
        for reason, count in rejections.most_common():
            print(f"  {count} refused: {reason}")


def _print_not_made(search) -> None:
    for failed in search.not_made:
        print(f"not made: {failed.proposal.spec.symbol} {failed.proposal.config}: {failed.reason}")


def _parser() -> argparse.ArgumentParser:
    def values(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[int]:
        return [int(word) for word in values(text)]

    parser = argparse.ArgumentParser(
        prog="tune.py",
        description="Search for fast configurations of attention kernels on this machine, or for another.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several = {"action": "extend", "default": []}
    parser.add_argument("--arch", default="native", help="native (default: the GPU, else the CPU), cpu, sm_80, …")
    parser.add_argument("--isa", default="", help="of CPU kernels: amx, avx512, avx2, …; else this machine's best")
    parser.add_argument("--template", type=values, **several, help="v1, v2 (default: both)")
    parser.add_argument(
        "--kind", type=values, **several, help="forward, decode, backward, ragged, … (default: what the problem says)"
    )
    parser.add_argument("--problem", action="append", default=[], help='such as "b=4 h=16 s=4096 d=128 causal fp16"')
    parser.add_argument("--suite", choices=("standard",), help="the usual problems; these options keep some of them:")
    parser.add_argument("--dtype", type=values, **several, help="float32, float16, bfloat16")
    parser.add_argument("--head-dim", type=numbers, **several, help="64, 128, 256")
    parser.add_argument("--seqlen", type=numbers, **several, help="512, 1024, …")
    parser.add_argument("--mask", type=values, **several, help="full, causal")
    parser.add_argument(
        "--strategy",
        choices=("exhaustive", "random", "evolutionary"),
        default="evolutionary",
        help="default: evolutionary",
    )
    parser.add_argument(
        "--variation",
        type=_variation,
        action="append",
        default=[],
        metavar="NAME=X …",
        help="these fields of the defaults otherwise; may be repeated, and comes before what the strategy proposes",
    )
    parser.add_argument(
        "--budget", default="", help="configurations, or a time: 200, 10min, 90s (default: 100, or 0 with --variation)"
    )
    parser.add_argument("--generation", type=int, default=8, help="configurations of a kernel at a time (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the strategy's random numbers")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped, or was killed")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="kernels built at a time")
    parser.add_argument("--emit", type=Path, metavar="DIR", help="write what is to be measured, and measure nothing")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="measure what --emit wrote")
    parser.add_argument("--device", action="append", default=[], help="cuda:0, …, cpu (default: every GPU of the arch)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this host (default), or a Ray cluster's hosts"
    )
    parser.add_argument("--address", default="", help="of the Ray cluster; else one is started on this host")
    parser.add_argument(
        "--resources", default="", metavar="NAME=X …", help="that a task needs of the cluster, as Ray names them"
    )
    parser.add_argument("--peers", action="store_true", help="time PyTorch's attention beside ours")
    parser.add_argument("--log", type=Path, help="where records go (default: tuning_logs/<device>.jsonl)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what is built (default: in tuning_logs/)")
    parser.add_argument("--dry-run", action="store_true", help="show the space and what is refused, and why")
    parser.add_argument(
        "--recompile-for", default="", metavar="ARCH", help="make a newer arch's code from the same sources"
    )
    parser.add_argument("--step-limit", type=float, default=20.0, help="seconds until a kernel counts as hung")
    effort = "rounds, block, warm_up, trial, hopeless, patience"
    parser.add_argument("--effort", default="", metavar="NAME=X …", help=effort)
    return parser


# ---------------------------------------------------------------- records


def _merge(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tune.py merge", description="Put records into the logs of their devices.")
    parser.add_argument("logs", type=Path, nargs="+", help="files of records; a log itself is only rid of duplicates")
    parser.add_argument("--into", type=Path, help="one file for all (default: tuning_logs/<device>.jsonl)")
    options = parser.parse_args(arguments)
    devices = {record.device for path in options.logs for record in records.read(path)}
    targets = {options.into} if options.into else {records.log_of(device) for device in devices}
    for target in sorted(targets):
        keep = None if options.into else {d for d in devices if records.log_of(d) == target}
        before, after = records.merge(options.logs, target, keep)
        print(f"{target}: {before} records before, {after} after")
    return 0


def _report(arguments: Sequence[str]) -> int:
    from schedules.tuning import report

    return report.main(arguments)


def _diff(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tune.py diff", description="Compare two logs, problem by problem.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    print(tables.difference(records.read(options.old), records.read(options.new)))
    return 0
