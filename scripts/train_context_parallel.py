"""Train a small Llama on sequences that four processes share, and alone, and draw both curves of losses.

python scripts/train_context_parallel.py                       # a few minutes on two cores
python scripts/train_context_parallel.py --picture losses.png

The model is that of transformers, with attention from this package.  Each process has a quarter of every sequence, in
the order that balances a causal mask; weights are on all, and their gradients are added up after each step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from train_demo import text
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from tvm_flash.distributed import context_parallel_attention, shard_batch

RANKS = 4
LENGTH, BATCH = 1024, 2
NAME = "tvm_context_parallel"


def use(mesh: DeviceMesh) -> None:
    """Let models with ``attn_implementation=NAME`` attend over sequences that the ranks of a mesh share."""

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        out = context_parallel_attention(query, key, value, mesh, causal=True, softmax_scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def small_llama(symbols: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=symbols,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attn_implementation=NAME,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(mesh: DeviceMesh, data: torch.Tensor, symbols: int, steps: int) -> list[float]:
    """The loss of each step."""
    use(mesh)
    model, chance = small_llama(symbols), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        # 1. The same batch on every rank, of which each takes its part.
        starts = torch.randint(0, len(data) - LENGTH, (BATCH,), generator=chance)
        ids = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
        part = shard_batch({"input_ids": ids, "labels": ids}, mesh)
        # 2. The loss of the own rows, over the labels of all ranks.
        loss = model(**part, num_items_in_batch=BATCH * (LENGTH - 1)).loss
        optimizer.zero_grad()
        loss.backward()
        # 3. Sums over the ranks.
        whole = loss.detach()
        dist.all_reduce(whole)
        for x in model.parameters():
            dist.all_reduce(x.grad)
        optimizer.step()
        losses.append(whole.item())
        if dist.get_rank() == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"{dist.get_world_size()} processes, step {step:3}: loss {losses[-1]:.6f}", flush=True)
    return losses


def work(rank: int, ranks: int, folder: str, data: torch.Tensor, symbols: int, steps: int) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    losses = train(init_device_mesh("cpu", (ranks,)), data, symbols, steps)
    if rank == 0:
        torch.save(losses, f"{folder}/{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def draw(losses: dict[int, list[float]], path: str) -> None:
    """Both curves, and by how much they differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(6.4, 4.2), dpi=110, layout="constrained", sharex=True, height_ratios=(2, 1)
    )
    for (ranks, found), style in zip(losses.items(), ("-", "--"), strict=True):
        above.plot(found, style, label=f"{ranks} process{'es' if ranks > 1 else ''}", linewidth=1.4)
    one, several = losses.values()
    below.semilogy([abs(a - b) / a for a, b in zip(one, several, strict=True)], linewidth=1)
    below.axhline(2**-24, color="gray", linewidth=0.8, linestyle=":")
    below.set(xlabel="step", ylabel="relative difference")
    above.set(ylabel="loss (nats a character)", title="A small Llama on sequences shared by four processes, and alone")
    above.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--picture", help="where the curves go; needs matplotlib")
    options = parser.parse_args()
    words = text()
    symbols = sorted(set(words))
    number = {s: i for i, s in enumerate(symbols)}
    data, losses = torch.tensor([number[s] for s in words]), {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, RANKS):
            torch.multiprocessing.spawn(work, (ranks, folder, data, len(symbols), options.steps), nprocs=ranks)
            losses[ranks] = torch.load(Path(folder, f"{ranks}.pt"))
    apart = max(abs(a - b) / a for a, b in zip(losses[1], losses[RANKS], strict=True))
    print(f"the losses differ by at most {apart:.1e} of themselves; a rounding of float32 is {2**-24:.1e}")
    if options.picture:
        draw(losses, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
