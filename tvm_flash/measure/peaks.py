"""The speed of torch.matmul on large square matrices, which figures of attention are shares of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm_flash.measure.timing import Call, Rounds, cpu_times

#: Rows of the square matrices, of whose products the largest that isn't slow is the peak: of a GPU always 8192; of a
#: CPU 2048, but for dtypes in which torch.matmul does less than a hundredth of what it does in others.
SIZES = {"cuda": (8192,), "cpu": (256, 512, 1024, 2048)}
SLOW_PRODUCT = 0.25  # seconds


def matmul_peak(dtype: str, device: str, time: Callable[[Mapping[str, Call]], Rounds]) -> tuple[int, dict[str, float]]:
    """Rows of the fastest product, the second matrix transposed or not, and operations a second by mode of timing.

    Parameters
    ----------
    dtype, device: of the matrices, as torch names them.
    time: times calls by name, as :func:`tvm_flash.measure.timing.measure` does.
    """
    sizes: dict[str, int] = {}
    calls: dict[str, Call] = {}
    slow: set[str] = set()
    for size in SIZES[device.partition(":")[0]]:
        for name, call in _products(size, dtype, device).items():
            if name not in slow:
                slow |= {name} if cpu_times(call, 1)[0] > SLOW_PRODUCT else set()
                if name not in slow or name not in calls:
                    sizes[name], calls[name] = size, call
    rounds = time(calls)
    flops = {
        mode: {name: 2.0 * sizes[name] ** 3 / min(times) for name, times in by_name.items()}
        for mode, by_name in rounds.items()
    }
    best = {mode: max(speeds, key=speeds.__getitem__) for mode, speeds in flops.items()}
    return sizes[next(iter(best.values()))], {mode: flops[mode][best[mode]] for mode in flops}


def _products(size: int, dtype: str, device: str) -> dict[str, Call]:
    import torch

    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return {"a @ b": lambda: a @ b, "a @ b.T": lambda: a @ b.T}
