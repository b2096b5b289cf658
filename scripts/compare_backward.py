"""Time the installed backward kernels of this GPU beside PyTorch's (cuDNN and FlashAttention-2), in one process.

16k tokens and a hidden size of 2048 for each problem, or grouped heads; rounds in random order, medians.  TFLOP/s count
five products, half of them under a causal mask.  Gradients of two runs must have the same bits.

    python scripts/build_kernels.py --arch sm_90a --kind backward --mask full --mask causal --score identity
    python scripts/verify_kernels.py --symbol _backward
    python scripts/compare_backward.py --dtype bfloat16
"""

import argparse
import random
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.installed import functions_of
from tvm_flash.machine.arch import runs_on
from tvm_flash.packs import by_role, sizes
from tvm_flash.packs.registry import registry

TOKENS, HIDDEN, ROUNDS, SECONDS = 16384, 2048, 4, 0.06
LENGTHS = (512, 2048, 8192, 16384)
#: Batch, heads, heads of keys, positions of grouped problems at head_dim 128.
GROUPED = ((4, 32, 8, 4096), (2, 64, 8, 4096), (1, 16, 2, 8192))
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def problems(head_dim):
    """Batch, heads, heads of keys, positions."""
    yield from ((TOKENS // n, HIDDEN // head_dim, HIDDEN // head_dim, n) for n in LENGTHS)
    if head_dim == 128:
        yield from GROUPED


def kernel_for(dtype, head_dim, mask):
    """An installed kernel that this GPU runs, None if there is none."""
    capability = torch.cuda.get_device_capability()
    found = [
        k
        for arch in registry().archs()
        if arch != "cpu" and runs_on(arch, capability)
        for k in registry().kernels(arch)
        if (k.entry.op, k.entry.template, k.entry.dtype, k.entry.head_dim, k.entry.mask, k.entry.score)
        == ("backward", "v1", dtype, head_dim, mask, "identity")
    ]
    return found[0] if found else None


def candidates(kernel, mask, batch, heads, kv_heads, seqlen, head_dim, dtype):
    """Functions that compute the gradients of one problem, by name, and a function that says whether ours repeat."""

    def tensor(heads):
        return torch.randn(batch, heads, seqlen, head_dim, device="cuda", dtype=getattr(torch, dtype))

    q, k, v, do = (tensor(h).requires_grad_() for h in (heads, kv_heads, kv_heads, heads))
    found = {}
    for name, backend in PEERS.items():
        try:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=mask == "causal", enable_gqa=heads != kv_heads
                )
            found[name] = lambda out=out: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
            found[name]()
        except RuntimeError as e:
            print(f"# {name} can't: {str(e).splitlines()[0]}", flush=True)
            found.pop(name, None)
    with torch.no_grad():
        wide_k, wide_v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        s, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, wide_k, wide_v, 0.0, mask == "causal")[:2]
    values = {"q": q.detach(), "k": k.detach(), "v": v.detach(), "o": s, "do": do.detach(), "lse": lse.reshape(-1)}
    values |= {"dlse": torch.empty(1, device="cuda"), "softmax_scale": head_dim**-0.5}
    values |= {f"d{x}": torch.empty_like(values[x]) for x in "qkv"}
    problem = sizes.of(batch, heads, seqlen, kv_heads, seqlen, head_dim, head_dim)

    def make(shape, dtype, zeroed):
        return (torch.zeros if zeroed else torch.empty)(shape, dtype=getattr(torch, dtype), device="cuda")

    found["ours"] = by_role.bind(kernel.entry, functions_of(kernel), values, problem, make)

    def repeats():
        found["ours"]()
        before = [values[f"d{x}"].clone() for x in "qkv"]
        found["ours"]()
        return all(torch.equal(a, values[f"d{x}"]) for a, x in zip(before, "qkv", strict=True))

    return found, repeats


def microseconds(run):
    """Of one call, over about ``SECONDS`` of calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = 3
    for _ in range(2):
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        each = begin.elapsed_time(end) * 1e3 / calls
        calls = max(3, int(SECONDS * 1e6 / each))
    return each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    parser.add_argument("--problem", default="", metavar="REGEX", help="only problems whose label matches")
    options = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, TFLOP/s")
    wrong = 0
    for head_dim in (64, 128, 256):
        for mask in ("full", "causal"):
            kernel = kernel_for(options.dtype, head_dim, mask)
            if kernel is None:
                print(f"# d={head_dim} {mask}: no kernel is installed")
                continue
            for batch, heads, kv_heads, seqlen in problems(head_dim):
                label = f"d={head_dim} {mask} b={batch} h={heads} hk={kv_heads} s={seqlen}"
                if not re.search(options.problem, label):
                    continue
                functions, repeats = candidates(kernel, mask, batch, heads, kv_heads, seqlen, head_dim, options.dtype)
                same = repeats()
                wrong += not same
                times = {name: [] for name in functions}
                for _ in range(ROUNDS):
                    for name in random.sample(sorted(functions), len(functions)):
                        times[name].append(microseconds(functions[name]))
                flops = 10.0 * batch * heads * seqlen**2 * head_dim / (2 if mask == "causal" else 1)
                rates = {name: flops / statistics.median(t) / 1e6 for name, t in times.items()}
                best = max((r for n, r in rates.items() if n != "ours"), default=0)
                text = "  ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
                ratio = f"{rates['ours'] / best:.2f}" if best else "-"
                bits = "" if same else "  TWO RUNS DIFFER"
                print(f"{label}: {text}  {ratio}{bits}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
