"""Random calls of ``flash_attention_paged`` against float64, reproducible from a seed.

``python -m tests.random_paged --calls 10000 [--device cuda]`` runs more of them than the tests do.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from tests import paged_cases, ragged_cases, random_ragged
from tests.paged_cases import PagedCase
from tests.ragged_cases import rows_tensor
from tvm_flash import flash_attention_paged


def case_of(seed: int, device: str = "cpu") -> PagedCase:
    """The case of a seed."""
    rng = random.Random(seed + 1)
    of = replace(random_ragged.case_of(seed, device), after=(rng.choice((0, 0, 7)), 0))
    page_size = rng.choice((1, 2, 3, 8, 16, 16, 32, 48, 64, 100, 128, 256, 1000))
    return PagedCase(of, page_size, rng.choice((0, 0, 1, 5)), rng.choice(("rows", "heads", "pairs")))


def check(case: PagedCase, device: str = "cpu") -> float:
    """Assert that a call gives what it should; the largest error as a share of what is allowed."""
    of, data = case.of, ragged_cases.inputs(case.of)
    made = paged_cases.caches(case, data)
    where = (of.starts[0], made.seqlens_k, made.page_table)
    options = {"causal": of.mask == "causal", "softcap": data.params.get("softcap", 0.0)}
    if of.mask == "window":
        options["window_size"] = (data.params["window_left"], data.params["window_right"])
    if "alibi_slopes" in data.params:
        options["alibi_slopes"] = torch.from_numpy(data.params["alibi_slopes"]).to(device)
    out, lse = flash_attention_paged(
        rows_tensor(data.q, of, device),
        *paged_cases.cache_tensors(case, made, device),
        *(torch.from_numpy(x).to(device) for x in where),
        max(of.queries) if of.batch % 2 else None,
        return_lse=True,
        **options,
    )
    return paged_cases.check(case, data, *(x.double().cpu().numpy() for x in (out, lse)), device)


def failures(seeds: Iterable[int], device: str = "cpu", seconds: float = np.inf) -> tuple[int, float, list[str]]:
    """How many calls were made, the largest error as a share of what is allowed, and a line for each that failed."""
    count, worst, lines, begin = 0, 0.0, [], time.monotonic()
    for seed in seeds:
        if time.monotonic() - begin > seconds:
            break
        case = case_of(seed, device)
        count += 1
        try:
            worst = max(worst, check(case, device))
        except Exception as e:  # whatever a call raises
            lines.append(f"--seed {seed}: {case.id}: {type(e).__name__}: {e}")
    return count, worst, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--device", choices=random_ragged.DTYPES, default="cpu")
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop after so long")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.calls)
    count, worst, lines = failures(seeds, options.device, options.seconds)
    print(*lines, f"{count} calls, {len(lines)} failed; largest error {worst:.2f} of what is allowed", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
