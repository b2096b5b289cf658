"""What the tests of the benchmark share: its command, and runs with times that were made up."""

from __future__ import annotations

from tvm_flash.bench.results import Cell, Implementation, Measurement, Peak, Run
from tvm_flash.commands.cli import main
from tvm_flash.measure import workloads


def bench(capsys, *arguments):
    """The command's status, and what it printed on both streams."""
    status = main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def implementation(key, ours=False):
    return Implementation(key, key.upper(), f"about {key}", ours)


def run_of(cells, modes=("steady",), arch="sm_90a"):
    """A run with these times: ``[(workload, {implementation: seconds})]``."""
    return Run(
        created="2026-01-02T03:04:05+00:00",
        command="python -m tvm_flash bench",
        machine={"device": "A device", "arch": arch, "torch": "2.0"},
        method={mode: f"how {mode} is taken" for mode in modes},
        implementations=(implementation("v2", ours=True), implementation("cudnn"), implementation("flash")),
        peaks=(Peak("float16", 8192, dict.fromkeys(modes, 800e12)),),
        cells=tuple(
            Cell(w, tuple(Measurement(k, dict.fromkeys(modes, t), {}, 1e-4) for k, t in times.items()))
            for w, times in cells
        ),
    )


def grid_run(**options):
    """Every cell of the GPU grid: twice as fast as its peers, but for the shortest, where cuDNN takes 0.8 as long."""
    return run_of(
        [
            (w, {"v2": 1e-3, "cudnn": 0.8e-3 if w.seqlen_q == 512 else 2e-3, "flash": 2e-3})
            for w in workloads.gpu_grid(dtypes=["float16"])
        ],
        **options,
    )
