"""Many threads, streams and graphs at once, for ``TVM_FLASH_STRESS_SECONDS``: results have the bits of a quiet run."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from tvm_flash import flash_attention, flash_attention_v2
from tvm_flash.call import eager
from tvm_flash.machine import cuda
from tvm_flash.packs import registry

torch = pytest.importorskip("torch")

SECONDS = float(os.environ.get("TVM_FLASH_STRESS_SECONDS", "5"))
THREADS = 8

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("ignore::tvm_flash.LayoutWarning")]


def problems(device: str, count: int = 40) -> list:
    """Calls of several shapes, dtypes, masks, scores and templates, and what each gives when nothing else runs."""
    rng, found = random.Random(3), []
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        dtype = rng.choice((torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16, torch.bfloat16))
        heads, length_q, length_kv = 2 * rng.randint(1, 4), rng.randint(1, 200), rng.randint(1, 400)
        if rng.random() < 0.25:
            length_q, length_kv = rng.randint(1, 8), rng.randint(2000, 9000)  # few queries: the keys are split
        dim, dim_v = rng.choice(((64, 64), (64, 64), (128, 128), (96, 96), (192, 128), (256, 256)))
        shapes = ((2, heads, length_q, dim), (2, 2, length_kv, dim), (2, 2, length_kv, dim_v))
        q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        options = {"causal": rng.random() < 0.5, "variant": rng.choice(("v1", "v2", "auto"))}
        if rng.random() < 0.5:
            options["window_size"] = (rng.randint(0, 50), -1)
        if rng.random() < 0.2:
            options["softcap"] = 5.0
        function, order = rng.choice(((flash_attention, (1, 1)), (flash_attention_v2, (1, 2))))
        arguments = [x.transpose(*order) for x in (q, k, v)]
        found.append((function, arguments, options, function(*arguments, **options)))
    return found


def in_threads(work) -> None:
    """Run ``work(number, stop)`` in threads for the time that is asked for; whatever one raises is raised here."""
    stop, failures = threading.Event(), []

    def guarded(number):
        try:
            work(number, stop)
        except BaseException as e:  # told by the test's own thread
            failures.append(e)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


def test_threads_on_the_processor():
    """Among them one that forgets all plans, again and again, and one that has the packs searched anew."""
    given, count = problems("cpu"), [0] * THREADS

    def work(number, stop):
        rng = random.Random(number)
        while not stop.is_set():
            function, arguments, options, want = rng.choice(given)
            assert torch.equal(function(*arguments, **options), want)
            count[number] += 1
            if number == 0:
                eager._plans.clear()
            if number == 1 and rng.random() < 0.05:
                registry.refresh()

    in_threads(work)
    assert min(count) > 0


gpu = pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")


@gpu
@pytest.mark.gpu
def test_threads_streams_and_graphs_on_a_gpu():
    """Half of the threads call on streams of their own, half replay graphs that they make anew now and then."""
    given, count = problems("cuda"), [0] * THREADS
    torch.cuda.synchronize()
    capturing = threading.Lock()

    def calls(number, stop):
        rng, stream = random.Random(number), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                chosen = [rng.choice(given) for _ in range(20)]
                results = [function(*arguments, **options) for function, arguments, options, _ in chosen]
                same = torch.stack([(a == b).all() for a, (_, _, _, b) in zip(results, chosen, strict=True)])
                assert bool(same.all()), [c[2] for c, s in zip(chosen, same.tolist(), strict=True) if not s]
                count[number] += len(chosen)

    def graphs(number, stop):
        rng, stream = random.Random(number), torch.cuda.Stream()
        while not stop.is_set():
            chosen = [rng.choice(given) for _ in range(20)]
            graph = torch.cuda.CUDAGraph()
            # torch captures one graph at a time
            with capturing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = [function(*arguments, **options) for function, arguments, options, _ in chosen]
            with torch.cuda.stream(stream):
                for _ in range(10):
                    for result in results:
                        result.fill_(torch.nan)
                    graph.replay()
                    same = torch.stack([(a == b).all() for a, (_, _, _, b) in zip(results, chosen, strict=True)])
                    assert bool(same.all()), [c[2] for c, s in zip(chosen, same.tolist(), strict=True) if not s]
                    count[number] += len(chosen)

    start = time.monotonic()
    in_threads(lambda number, stop: (calls if number % 2 else graphs)(number, stop))
    print(f"{sum(count)} results in {time.monotonic() - start:.0f} s, {min(count)} of the slowest thread")
    assert min(count) > 0
