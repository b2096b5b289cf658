"""Random calls of the drop-ins of torch and flash_attn, compared with float64.  A call follows from its seed alone:

python -m tests.random_doors sdpa --seed 1234                     # one call again, with what it is
python -m tests.random_doors kvcache --count 5000 --device cuda   # many; a failure is one line

What they have beside the package's own functions, of which :mod:`tests.random_cases`, :mod:`tests.random_ragged` and
:mod:`tests.random_paged` make calls, is what is drawn here: masks and biases of every shape that broadcasts, gradients
of them, head dimensions that no kernel has, and tensors that lie in memory as nobody would choose.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterable

from tests.doors import flash_attn, kvcache, latents, sdpa
from tests.doors.draw import Draw
from tests.random_cases import DTYPES
from tvm_flash import KernelNotFoundError, nn
from tvm_flash.nn import sdpa as sdpa_door

DOORS = {"sdpa": sdpa.call, "flash_attn": flash_attn.call, "kvcache": kvcache.call, "latents": latents.call}


def failures(door: str, seeds: Iterable[int], device: str = "cpu", seconds: float = math.inf):
    """How many calls of a door were computed here, for how many no kernel is installed, the largest error as a share of
    what is allowed, and a line for each that failed."""
    count, others, worst, lines, begin = 0, 0, 0.0, [], time.monotonic()
    for seed in seeds:
        if time.monotonic() - begin > seconds:
            break
        draw = Draw(seed, device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", nn.FallbackWarning)
                sdpa_door._warned.clear()
                worst = max(worst, DOORS[door](draw))
            count += 1
        except (nn.FallbackWarning, KernelNotFoundError):
            others += 1
        except Exception as e:  # whatever a call raises is told with the call
            lines.append(f"{type(e).__name__}: {e}  [{door} --seed {seed} --device {device}: {draw.said}]")
    return count, others, worst, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.count)
    count, others, worst, lines = failures(options.door, seeds, options.device, options.seconds)
    print(*lines, sep="\n", end="\n" if lines else "")
    print(
        f"{count} calls, {others} without a kernel, {len(lines)} failed; largest error {worst:.2f} of what is allowed"
    )
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
