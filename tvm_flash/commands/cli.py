"""The command line: ``python -m tvm_flash info | check | explain | bench | demo | build``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from tvm_flash.bench import command as bench
from tvm_flash.call.problem import DTYPES, LAYOUTS, VARIANTS
from tvm_flash.display import Progress, Screen, interruptible, progress
from tvm_flash.errors import NotSupportedError, TvmFlashError

#: Exit status of a check that failed, and of a command that couldn't be carried out.
FAILED, REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["build"]:  # its options are the builder's to read
        arguments = ["build", "--", *arguments[1:]]
    options = _parser().parse_args(arguments, argparse.Namespace(words=arguments))
    try:
        return interruptible(lambda: options.run(options))
    except TvmFlashError as e:
        print(f"tvm_flash: {e}", file=sys.stderr)
        return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tvm_flash", description="Attention kernels, compiled ahead of time.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, devices, packs and kernels, and what is missing")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="run one small case for each installed kernel against float64")
    check.add_argument("--arch", help="only the kernels of this arch, such as cpu or sm_90a")
    check.add_argument(
        "--thorough", action="store_true", help="more and longer cases, each twice: minutes, not seconds"
    )
    check.add_argument("--all", action="store_true", help="a line for each kernel, as in a pipe, on a terminal too")
    check.add_argument("--json", action="store_true", help="as JSON, one object a line")
    check.set_defaults(run=_check)

    explain = commands.add_parser("explain", help="which kernel a shape gets, and why no other")
    explain.add_argument("--shape", required=True, type=_shape, metavar="B,H,S,D", help="batch,heads,seq,head_dim")
    explain.add_argument("--kv-heads", type=int, help="heads of k and v (default: H)")
    explain.add_argument("--seq-len-kv", type=int, help="length of k and v (default: S)")
    explain.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on the processor")
    explain.add_argument("--causal", action="store_true")
    explain.add_argument("--backward", action="store_true", help="which kernel computes the gradients")
    explain.add_argument(
        "--ragged", action="store_true", help="for B sequences of different lengths, S on average, one after the other"
    )
    explain.add_argument("--paged", action="store_true", help="for B sequences whose keys lie on pages of a cache")
    explain.add_argument("--layout", choices=LAYOUTS, default="bhsd", help="of the caller's tensors (default: bhsd)")
    explain.add_argument("--variant", choices=VARIANTS, default="auto")
    where = explain.add_mutually_exclusive_group()
    where.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the first GPU, or the processor)")
    where.add_argument("--arch", help="what a GPU of this arch would get, such as sm_90a; it needn't be there")
    explain.add_argument("--json", action="store_true", help="as JSON")
    explain.set_defaults(run=_explain)

    bench.add_arguments(commands.add_parser("bench", help="speed beside PyTorch's backends, on this device"))

    demo = commands.add_parser("demo", help="a real model's attention through both layouts, beside PyTorch")
    demo.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if torch sees one")
    demo.set_defaults(run=_demo)

    build = commands.add_parser("build", help="compile kernels for this machine or for others", add_help=False)
    build.add_argument("options", nargs="*")
    build.set_defaults(run=_build)
    return parser


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        batch, heads, seq_len, head_dim = (int(x) for x in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected four numbers such as 2,8,1024,64") from None
    return batch, heads, seq_len, head_dim


def _info(options: argparse.Namespace) -> int:
    from tvm_flash.commands import info as report

    found = report.collect()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        report.show(found, Screen())
    return 0


def _check(options: argparse.Namespace) -> int:
    from tvm_flash.commands import check as selfcheck
    from tvm_flash.machine import device as devices
    from tvm_flash.packs.registry import build_command, registry

    if options.arch is not None:
        devices.of_arch(options.arch, "--arch")
    screen, results = Screen(), []
    lines = options.all or options.json or not screen.fancy
    bar = contextlib.nullcontext(Progress()) if lines else progress(selfcheck.count(options.arch))
    with bar as steps:
        for result in selfcheck.check_kernels(options.arch, steps.begins, thorough=options.thorough):
            steps.ends()
            results.append(result)
            if options.json:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
            elif lines:
                screen.line(result.line(), "" if result.ok else "bad")
    if not lines:
        for result in results:
            if not result.ok:
                screen.line(result.line(), "bad")
    if not results:
        if options.arch in registry().archs():
            raise NotSupportedError(f"--arch {options.arch}: no device of this machine runs it; see `tvm_flash info`")
        raise registry().missing([options.arch or "cpu"], options.arch or "native")
    failed = sum(not r.ok for r in results)
    if not options.json:
        screen.line()
        screen.table(selfcheck.summary(results))
        if failed:
            screen.line(
                f"{len(results) - failed} kernels ✓, {failed} ✗; run `{build_command('native')}`", "bad", whole=True
            )
        else:
            screen.line(f"{len(results)} kernels ✓", "good")
    return FAILED if failed else 0


def _explain(options: argparse.Namespace) -> int:
    from tvm_flash.commands import explain as explanation_page
    from tvm_flash.machine import device as devices
    from tvm_flash.selector import BackendSelector

    explanation = BackendSelector(
        devices.of_arch(options.arch, "--arch") if options.arch is not None else options.device
    ).explain(
        *options.shape,
        kv_heads=options.kv_heads,
        seq_len_kv=options.seq_len_kv,
        dtype=options.dtype,
        causal=options.causal,
        layout=options.layout,
        variant=options.variant,
        backward=options.backward,
        ragged=options.ragged,
        paged=options.paged,
    )
    if options.json:
        print(json.dumps(explanation_page.as_data(explanation), indent=1))
    else:
        explanation_page.show(explanation, Screen())
    return 0 if explanation.chosen else FAILED


def _build(options: argparse.Namespace) -> int:
    """Run the builder in a process of its own: this package never imports it."""
    from tvm_flash.packs.registry import PACKAGE_PACKS, own_packs

    for module in ("schedules", "tvm", "rich"):
        if importlib.util.find_spec(module) is None:
            raise NotSupportedError(
                f'build: the module {module!r} isn\'t installed; run `pip install "tvm-flash[build]"`'
            )
    words = options.options
    if not os.access(PACKAGE_PACKS, os.W_OK):
        words = ["--output", str(own_packs()), *words]  # first, so that one that is given counts, however it is written
    return subprocess.run([sys.executable, "-m", "schedules.commands", *words]).returncode


def _demo(options: argparse.Namespace) -> int:
    from tvm_flash.commands import demo

    return 0 if demo.run(options.device) else FAILED
