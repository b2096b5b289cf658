"""docs/benchmarks.md: all tables of the committed results, as one page.

Made by ``python -m tvm_flash bench --from docs/benchmarks/*.json --page docs/benchmarks.md``, which reads what was
measured and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm_flash.bench import tables
from tvm_flash.bench.results import Run
from tvm_flash.display import as_markdown

_HEAD = """# Benchmarks

These pages of figures are made from the files in [docs/benchmarks/](benchmarks/), losses included:

```
{command}
```

A ratio is the speed of ours over that of the fastest peer of its cell, in the same run; `▼` marks a loss, bold is the
fastest of a row. How the times are taken is told under each machine and in `tvm_flash/measure/timing.py`; operations
are those of the two products, half of them under a causal mask.
"""


def markdown(runs: Sequence[Run], command: str) -> str:
    """The page; ``command`` is the line that makes it again."""
    parts = [_HEAD.format(command=command)]
    for run in runs:
        parts += _section(run)
    return "\n".join(parts).rstrip() + "\n"


def _section(run: Run) -> list[str]:
    lines = [f"## {run.device}", "", f"Measured {run.created[:10]} with", "", "```", run.command, "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in run.machine.items()), ""]
    lines += [f"* {line}" for mode in run.modes for line in tables.summaries(run, mode)]
    lines += [f"* {line}" for line in tables.failures(run)]
    for mode in run.modes:
        for dtype in run.dtypes():
            table = tables.speeds(run, dtype, mode)
            lines += ["", f"### {table.title}", "", *as_markdown(table)]
    if (calls := tables.calls(run)) is not None:
        lines += ["", f"### {calls.title}", "", *as_markdown(calls)]
    return [*lines, "", "Columns:", "", *(f"* {line}" for line in tables.legend(run)), ""]
