"""Random calls of ``flash_attention_varlen`` against float64, reproducible from a seed.

``python -m tests.random_ragged --calls 10000 [--device cuda] [--gradients]`` runs more of them than the tests do.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable

import numpy as np
import torch

from tests import ragged_cases
from tests.ragged_cases import RaggedCase, rows_tensor
from tvm_flash import flash_attention_varlen

DTYPES = {"cpu": ("float32", "float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
HEAD_DIMS = (8, 24, 40, 64, 72, 96, 128, 160, 192, 256)


def case_of(seed: int, device: str = "cpu") -> RaggedCase:
    """The case of a seed."""
    rng = random.Random(seed)
    batch = rng.choice((1, 2, 3, 5, 17, 40))
    longest = rng.choice((3, 9, 70, 300, 900)) if batch <= 5 else rng.choice((1, 9, 40))
    kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 4, 5))

    def lengths():
        return tuple(rng.choice((0, 1, rng.randint(1, longest), longest)) for _ in range(batch))

    queries = lengths()
    keys = queries if rng.random() < 0.4 else lengths()
    mask = rng.choice(("full", "causal", "window"))
    score = rng.choice(("identity", "identity", "softcap", "alibi", "softcap_alibi"))
    params = {"window_left": rng.choice((0, 3, 40, 1000)), "window_right": rng.choice((0, 5, 1000))}
    params = params if mask == "window" else {}
    params |= {"softcap": rng.choice((0.7, 5.0))} if "softcap" in score else {}
    head_dim = rng.choice(HEAD_DIMS)
    return RaggedCase(
        *(queries, kv_heads * group, head_dim, keys, kv_heads, rng.choice((head_dim, head_dim, 64))),
        *(
            rng.choice(DTYPES[device]),
            mask,
            score,
            tuple(params.items()),
            rng.choice(("contiguous", "transposed", "gaps")),
        ),
        (rng.choice((0, 0, 7)), rng.choice((0, 0, 7))),
    )


def check(case: RaggedCase, device: str = "cpu", gradients: bool = False) -> float:
    """Assert that a call gives what it should; the largest error as a share of what is allowed."""
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=case.batch % 2 == 1)
    q, k, v = (rows_tensor(x, case, device) for x in (data.q, data.k, data.v))
    starts = [torch.from_numpy(x).to(device) for x in case.starts]
    options = {"causal": case.mask == "causal", "softcap": data.params.get("softcap", 0.0)}
    if case.mask == "window":
        options["window_size"] = (data.params["window_left"], data.params["window_right"])
    leaves = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
    if "alibi_slopes" in data.params:
        options["alibi_slopes"] = torch.from_numpy(data.params["alibi_slopes"]).to(device).requires_grad_(gradients)
        leaves.append(options["alibi_slopes"])
    out, lse = flash_attention_varlen(*leaves[:3], *starts, return_lse=True, **options)
    found = (x.detach().double().cpu().numpy() for x in (out, lse))
    worst = ragged_cases.check(case, data, *found, device)
    if gradients:
        dout = torch.from_numpy(given.dout).to(device, out.dtype)
        dlse = None if given.dlse is None else torch.from_numpy(given.dlse).to(device)
        results, ahead = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        grads = torch.autograd.grad(results, leaves, ahead)
        names = ("dq", "dk", "dv", "d_alibi_slopes")
        got = {n: x.double().cpu().numpy() for n, x in zip(names, grads, strict=False)}
        worst = max(worst, ragged_cases.check_backward(case, data, given, got))
    return worst


def can_compare(case: RaggedCase) -> bool:
    """Whether gradients have a measure, and soon: a few keys, all of one weight, leave nothing but rounding."""
    lengths = list(zip(case.queries, case.keys, strict=True))
    sees = sum(x for name, x in case.params if name.startswith("window")) if case.mask == "window" else 3
    soon = case.heads * sum(q * k for q, k in lengths) <= 200_000
    return soon and sees >= 3 and all(k > 1 for q, k in lengths if q and k)


def failures(
    seeds: Iterable[int], device: str = "cpu", seconds: float = np.inf, gradients: bool = False
) -> tuple[int, float, list[str]]:
    """How many calls were made, the largest error as a share of what is allowed, and a line for each that failed."""
    count, worst, lines, begin = 0, 0.0, [], time.monotonic()
    for seed in seeds:
        case = case_of(seed, device)
        if gradients and not can_compare(case):
            continue
        if time.monotonic() - begin > seconds:
            break
        count += 1
        try:
            worst = max(worst, check(case, device, gradients))
        except Exception as e:  # whatever a call raises
            lines.append(f"--seed {seed}: {case.id}: {type(e).__name__}: {e}")
    return count, worst, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--seconds", type=float, default=np.inf, help="stop after so long")
    parser.add_argument("--gradients", action="store_true")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.calls)
    count, worst, lines = failures(seeds, options.device, options.seconds, options.gradients)
    print(*lines, f"{count} calls, {len(lines)} failed; largest error {worst:.2f} of what is allowed", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
