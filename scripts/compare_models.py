#!/usr/bin/env python3
"""Run every architecture of transformers, small, with our attention and with torch's: writes docs/architectures.md.

python scripts/compare_models.py                     all of them, about 20 minutes on two cores
python scripts/compare_models.py llama bert          these, printed
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "architectures.md"

#: Seconds that one architecture may take, and how many one process takes on.
PATIENCE, AT_ONCE = 150, 20

MEANING = {
    "same": "computed here, the same result; with a reason, what torch computes of it",
    "falls back": "the same result, computed by torch or by the model's own attention, with a `FallbackWarning`",
    "refused": "a typed error",
    "different": "another result",
    "error": "an error where eager attention has none",
    "not tried": "can't be made small, or no inputs are known for it",
}


def run_here(model_types: list[str]) -> None:
    """Print an outcome in JSON for each."""
    import logging

    import transformers

    from tests.architectures import compare

    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    for model_type in model_types:
        print(json.dumps({"begins": model_type}), flush=True)
        print(json.dumps(asdict(compare(model_type))), flush=True)


def run_apart(model_types: list[str]) -> list[dict]:
    """The same in a process that may crash or hang."""
    outcomes, waiting = [], list(model_types)
    while waiting:
        command = [sys.executable, __file__, "--here", *waiting]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        try:
            text, why = process.communicate(timeout=PATIENCE + 20 * len(waiting))[0], "the process died"
        except subprocess.TimeoutExpired:
            process.kill()
            text, why = process.communicate()[0], f"took longer than {PATIENCE} s"
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        done = [x for x in lines if "state" in x]
        begun = [x["begins"] for x in lines if "begins" in x]
        outcomes += done
        lost = begun[len(done) :] or ([] if done else waiting[:1])
        outcomes += [{"model_type": x, "model": "", "state": "not tried", "why": why, "ways": []} for x in lost]
        finished = {x["model_type"] for x in outcomes}
        waiting = [x for x in waiting if x not in finished]
    return outcomes


def page(outcomes: list[dict]) -> str:
    import torch
    import transformers

    counts = collections.Counter(x["state"] for x in outcomes)
    lines = [
        "# Architectures of transformers",
        "",
        f"Every architecture of transformers {transformers.__version__}, made small with random weights, in float32 on",
        'the CPU with `attn_implementation="tvm"`, compared with `"eager"` '
        f"(torch {torch.__version__.partition('+')[0]})",
        "in each way that its inputs allow. Written by",
        f"`python scripts/compare_models.py` on {datetime.date.today().isoformat()}: what torch computes of a model, "
        "and why, is as it was that day.",
        "",
        "| outcome | architectures | means |",
        "|---|---|---|",
        *(f"| {state} | {counts[state]} | {meaning} |" for state, meaning in MEANING.items()),
        "",
    ]
    for state in MEANING:
        some = [x for x in outcomes if x["state"] == state]
        if not some:
            continue
        lines += [f"## {state}", ""]
        if state == "not tried":
            lines += ["| architecture | why |", "|---|---|"]
            lines += [f"| {x['model_type']} | {_cell(x['why'])} |" for x in some]
        else:
            lines += ["| architecture | model | ways | largest difference | by torch |", "|---|---|---|---|---|"]
            lines += [_row(x) for x in some]
        lines.append("")
    return "\n".join(lines)


def _row(x: dict) -> str:
    ways = ", ".join(dict.fromkeys(x["ways"]))
    return f"| {x['model_type']} | {x['model']} | {ways} | {x['worst']:.0e} | {_cell(x['why'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="keep the outcomes here; those that are in it aren't run again")
    args = parser.parse_args()
    if args.here:
        run_here(args.model_types)
        return 0
    from tests.architectures import model_types

    if unknown := sorted(set(args.model_types) - set(model_types())):
        parser.error(f"model_types: {', '.join(unknown)} aren't of this transformers; {PAGE.name} lists those that are")
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    wanted = args.model_types or model_types()
    todo = [x for x in wanted if x not in {y["model_type"] for y in known}]
    pieces = [todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)]
    outcomes = list(known)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(run_apart, pieces):
            outcomes += found
            for x in found:
                print(f"{x['model_type']:32} {x['state']:10} {x['why']}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(outcomes))
    outcomes.sort(key=lambda x: x["model_type"])
    if not args.model_types:
        PAGE.write_text(page(outcomes))
    return any(x["state"] in ("different", "error") for x in outcomes)


if __name__ == "__main__":
    sys.exit(main())
