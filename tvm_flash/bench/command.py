"""``python -m tvm_flash bench``: options in; progress, tables, files and pictures out."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tvm_flash.bench import require
from tvm_flash.call.problem import DTYPES
from tvm_flash.display import Screen, progress
from tvm_flash.errors import InvalidArgumentError, NotSupportedError
from tvm_flash.machine.outputs import fault_of_file
from tvm_flash.measure import workloads

#: Columns that a full table takes.
_WIDTH = 118

#: Rounds of a cell, and seconds of an implementation in each: a GPU has to reach its steady clock, a CPU is disturbed.
_EFFORT = {"cuda": (3, 0.12), "cpu": (9, 0.12)}

#: head_dims, lengths and dtypes of ``--quick``.
_QUICK_GPU = ((64, 128), (1024, 4096), ("float16",))
_QUICK_CPU = ((32, 64), (384, 512), ("float32",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, without importing what the command needs."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the first GPU, or the processor)")
    parser.add_argument("--dims", type=_numbers, default=[], metavar="64,128", help="head_dims of the grid")
    parser.add_argument("--seqs", type=_numbers, default=[], metavar="512,4096", help="lengths of the grid")
    parser.add_argument("--dtype", type=_dtypes, default=[], metavar="float16,…", help="float32, float16, bfloat16")
    parser.add_argument("--causal", choices=("yes", "no", "both"), default="both", help="default: both")
    parser.add_argument(
        "--shape", type=_shape, action="append", default=[], metavar="B,H,S,D[,KEYS]", help="in place of the grid"
    )
    parser.add_argument("--backward", action="store_true", help="the gradients, by autograd, without the forward")
    parser.add_argument(
        "--ragged", action="store_true", help="sequences of different lengths, beside torch a sequence at a time"
    )
    parser.add_argument(
        "--processor", action="store_true", help="a CPU's table: each template beside torch on the template's memory"
    )
    parser.add_argument("--peers", type=_words, metavar="cudnn,flash,…", help="only these; default: all there are")
    parser.add_argument("--quick", action="store_true", help="a few cells, two short rounds")
    parser.add_argument("--rounds", type=int, help="rounds of each cell (default: 3; CPU: 9)")
    parser.add_argument("--seconds", type=float, help="of one implementation in a round (default: 0.12)")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="add a peer's recorded figures, bridged")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results, after each cell; with --from: joined"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture, and FILE_dark.png")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write a page with all tables")
    parser.add_argument("--from", dest="files", type=Path, nargs="+", metavar="FILE", help="show results, run nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; 0, or 1 if none of our kernels ran."""
    from tvm_flash.bench import recorded, results

    _check_together(options)
    screen = Screen()
    if options.ragged:
        return _ragged(options, screen)
    if options.processor:
        return _processor(options, screen)
    reference = recorded.read(options.reference) if options.reference else None
    runs = _read(options) if options.files else [_measure(options)]
    if options.json and options.files:
        if len(runs) != 1:
            raise InvalidArgumentError(f"--json: takes one run, and --from has {len(runs)}, of several machines")
        results.write(runs[0], options.json)
    if reference:
        runs = reference.beside_all(runs)
    for one in runs:
        _show(screen, one)
    if options.plot:
        from tvm_flash.bench import plots

        for path in plots.write(runs, options.plot):
            screen.line(f"picture: {path}", whole=True)
    if options.page:
        from tvm_flash.bench import page

        options.page.write_text(page.markdown(runs, command_line(options.words)), encoding="utf-8")
        screen.line(f"page: {options.page}", whole=True)
    ours = {i.key for one in runs for i in one.implementations if i.ours}
    return 0 if any(cell.of(key) for one in runs for cell in one.cells for key in ours) else 1


def _check_together(options: argparse.Namespace) -> None:
    """Check that no option is without meaning beside the others, and that files can be written, before it takes time.

    Raises
    ------
    InvalidArgumentError: one is; the text names it.
    """

    def given(*names: str) -> str:
        return ", ".join(f"--{name}" for name in names if getattr(options, name) not in (None, False, []))

    if options.ragged and options.processor:
        raise InvalidArgumentError("--ragged: stands beside --processor, a table of its own; leave one of them out")
    if options.shape and (names := given("dims", "seqs")):
        raise InvalidArgumentError(f"{names}: stand beside --shape, which is in place of the grid; leave them out")
    names = given("device", "dims", "seqs", "shape", "backward", "quick", "rounds", "seconds")
    names += ", --causal" * (options.causal != "both")
    if options.files and names:
        raise InvalidArgumentError(f"{names.removeprefix(', ')}: --from shows what was measured; leave it out")
    for name in ("json", "plot", "page"):
        path = getattr(options, name)
        if path is not None and (fault := fault_of_file(path)):
            raise InvalidArgumentError(f"--{name} {path}: {fault}; name a file that can be written")


def _read(options: argparse.Namespace):
    """The runs of ``--from``, with the dtypes and peers that are asked for."""
    from tvm_flash.bench import results

    runs = results.join([results.read(file) for file in options.files])
    if options.dtype:
        runs = [one.of_dtypes(options.dtype) for one in runs]
    if options.peers is None:
        return runs
    _check_peers(options, {i.key for one in runs for i in one.implementations if not i.ours})
    return [one.only(options.peers) for one in runs]


def _check_peers(options: argparse.Namespace, known) -> None:
    if unknown := set(options.peers) - set(known):
        raise InvalidArgumentError(f"--peers: has {', '.join(sorted(unknown))}, expected {', '.join(sorted(known))}")


def _measure(options: argparse.Namespace):
    """A new run, written to ``--json`` as it grows."""
    require("bench", "torch")
    import torch

    from tvm_flash.bench import results
    from tvm_flash.bench.run import Bench
    from tvm_flash.machine import device as devices
    from tvm_flash.measure import peers

    device = devices.parse(options.device)
    if device.kind == "cuda":
        if not torch.cuda.is_available():
            raise NotSupportedError(f"--device {device}: this torch ({torch.__version__}) is built without CUDA")
        torch.cuda.set_device(device.index)
    contestants = peers.contestants(device.kind)
    if options.peers is not None:
        _check_peers(options, {c.about.key for c in contestants if not c.about.ours})
        contestants = [c for c in contestants if c.about.ours or c.about.key in options.peers]
    bench = Bench(
        device, contestants, _grid(options, device.kind), _effort(options, device.kind), _again(options.words)
    )
    found = None
    with progress(bench.steps()) as bar:
        try:
            for found in bench.run(bar.begins):
                bar.ends()
                if options.json:
                    results.write(found, options.json)
        except KeyboardInterrupt:
            if found is None or not found.cells:
                raise
            print("stopped; this is what was measured until then", file=sys.stderr)
    return found


def _ragged(options: argparse.Namespace, screen: Screen) -> int:
    require("bench", "torch")
    from tvm_flash.bench import ragged
    from tvm_flash.machine import device as devices

    _refuse_grid(options, "--ragged", ("--page",))
    device = devices.parse(options.device)
    default = ("float32", "bfloat16") if device.kind == "cpu" else ("bfloat16",)
    work = ragged.batches(device.kind, options.dtype or default, options.causal, options.backward)
    with progress(len(work)) as bar:
        return ragged.run(device, work, _effort(options, device.kind), screen, bar.begins, options.json)


def _processor(options: argparse.Namespace, screen: Screen) -> int:
    require("bench", "torch")
    from tvm_flash.bench import processor
    from tvm_flash.machine import device as devices

    _refuse_grid(options, "--processor", ("--backward",))
    device = devices.parse(options.device or "cpu")
    if device.kind != "cpu":
        raise InvalidArgumentError(f"--device {device}: --processor is of CPUs; expected cpu")
    masks = {"yes": ["causal"], "no": ["full"], "both": []}[options.causal]
    work, files, again = processor.cells(options.dtype, masks), (options.json, options.page), _again(options.words)
    with progress(processor.steps(work)) as bar:
        return processor.run(device, work, _effort(options, device.kind), screen, bar.begins, files, again)


def _refuse_grid(options: argparse.Namespace, name: str, others: Sequence[str]) -> None:
    """Options that say nothing of what has cells and a table of its own, and ``others``."""
    of_grid = ("--dims", "--seqs", "--shape", "--from", "--peers", "--reference", "--plot")
    given = [x for x in (*of_grid, *others) if getattr(options, "files" if x == "--from" else x[2:])]
    if given:
        raise InvalidArgumentError(f"{', '.join(given)}: {name} has batches of its own, and a table; leave it out")


def command_line(words: Sequence[str]) -> str:
    return f"python -m tvm_flash {shlex.join(words)}"


def _again(words: Sequence[str]) -> str:
    """The line that measures the same again: without the files that were written."""
    kept, words = [], iter(words)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in ("--json", "--plot", "--page"):
            kept.append(word)
        elif not has_value:
            next(words)
    return command_line(kept)


def _grid(options: argparse.Namespace, kind: str) -> list[workloads.Workload]:
    found = _forward_grid(options, kind)
    return [dataclasses.replace(w, backward=True) for w in found] if options.backward else found


def _forward_grid(options: argparse.Namespace, kind: str) -> list[workloads.Workload]:
    masks = {"yes": ["causal"], "no": ["full"], "both": []}[options.causal]
    if options.shape:
        default = workloads.CPU_DTYPES if kind == "cpu" else workloads.GPU_DTYPES
        return workloads.of_shapes(options.shape, options.dtype or default, masks)
    dims, seqs, dtypes = options.dims, options.seqs, options.dtype
    if options.quick:
        quick = _QUICK_CPU if kind == "cpu" else _QUICK_GPU
        dims, seqs, dtypes = dims or quick[0], seqs or quick[1], dtypes or quick[2]
    grid = (workloads.cpu_grid if kind == "cpu" else workloads.gpu_grid)(dims, seqs, dtypes, masks)
    if not grid:
        shapes = "; ".join(",".join(map(str, s)) for s in workloads.CPU_SHAPES)
        raise InvalidArgumentError(f"--dims, --seqs: leave nothing of the grid {shapes}; name shapes with --shape")
    return grid


def _effort(options: argparse.Namespace, kind: str):
    from tvm_flash.measure.timing import Effort

    usual = _EFFORT[kind]
    rounds = usual[0] if options.rounds is None else options.rounds
    seconds = usual[1] if options.seconds is None else options.seconds
    effort = Effort(min(2, rounds), seconds / 4) if options.quick else Effort(rounds, seconds)
    if effort.rounds < 1 or effort.seconds <= 0:
        raise InvalidArgumentError("--rounds, --seconds: expected more than 0")
    return effort


def _show(screen: Screen, one) -> None:
    """All tables and sentences of a run."""
    from tvm_flash.bench import tables

    screen.line("; ".join(f"{name}: {value}" for name, value in one.machine.items()))
    screen.line()
    mode, compact = one.modes[0], screen.width is not None and screen.width < _WIDTH
    for dtype in one.dtypes():
        screen.table(tables.speeds(one, dtype, mode, compact))
    if (calls := tables.calls(one)) is not None:
        screen.table(calls)
    for line in (line for m in one.modes for line in tables.summaries(one, m)):
        screen.line(line)
    for line in tables.failures(one):
        screen.line(line, "warning", whole=True)
    screen.line()
    for line in tables.legend(one):
        screen.line(line, "quiet")
    screen.line(f"measured {one.created}; again: {one.command}", "quiet", whole=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected numbers such as 64,128") from None


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _dtypes(text: str) -> list[str]:
    words = _words(text)
    if unknown := [w for w in words if w not in DTYPES]:
        raise argparse.ArgumentTypeError(f"is {', '.join(unknown)}, expected {', '.join(DTYPES)}")
    return words


def _shape(text: str) -> Sequence[int]:
    shape = _numbers(text)
    if len(shape) not in (4, 5) or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected batch,heads,length,head_dim and perhaps the keys")
    return shape
