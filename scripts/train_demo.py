"""Train a small model that writes, with this package's attention and with PyTorch's, and draw both curves of losses.

python scripts/train_demo.py                       # a minute or so on a laptop's processor
python scripts/train_demo.py --picture losses.png  # where the picture goes

The model is a decoder of four layers on the characters of the standard library's own texts (their docstrings), so that
nothing has to be fetched.  Both runs begin with the same weights and see the same characters.
"""

from __future__ import annotations

import argparse
import string
import sys
import textwrap
import time

import torch
import torch.nn.functional as F

from tvm_flash import flash_attention_v2

CONTEXT, BATCH, HEADS, HEAD_DIM, LAYERS = 256, 8, 4, 32, 4
WIDTH = HEADS * HEAD_DIM
#: Modules whose texts are learnt.
MODULES = (argparse, string, textwrap, torch.optim.lr_scheduler, torch.nn.functional, torch.nn.modules.activation)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``(batch, seq, heads, head_dim)``."""
    return flash_attention_v2(q, k, v, causal=True)


def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's function, which wants the heads first."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Layer(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.before_attention, self.before_hidden = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.hidden = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.hidden(self.before_hidden(x))


class Writer(torch.nn.Module):
    def __init__(self, symbols: int, attend):
        super().__init__()
        self.symbol, self.place = torch.nn.Embedding(symbols, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
        self.layers = torch.nn.Sequential(*(Layer(attend) for _ in range(LAYERS)), torch.nn.LayerNorm(WIDTH))
        self.read = torch.nn.Linear(WIDTH, symbols)

    def forward(self, ids):
        return self.read(self.layers(self.symbol(ids) + self.place.weight[: ids.shape[1]]))


def text() -> str:
    """Docstrings, in the order of their names."""
    found = []
    for module in MODULES:
        for name in sorted(vars(module)):
            words = getattr(vars(module)[name], "__doc__", None)
            found += [words] if isinstance(words, str) and len(words) > 200 else []
    return "\n".join(dict.fromkeys(found))


def train(data: torch.Tensor, symbols: int, attend, steps: int, name: str) -> tuple[list[float], float, Writer]:
    """The loss of each step, the seconds that all took, and the model."""
    torch.manual_seed(0)
    model = Writer(symbols, attend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    chance, losses, begin = torch.Generator().manual_seed(1), [], time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,), generator=chance)
        ids = torch.stack([data[s : s + CONTEXT + 1] for s in starts.tolist()])
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"{name:9} step {step:4}: loss {losses[-1]:.3f}, {time.perf_counter() - begin:.1f} s")
    return losses, time.perf_counter() - begin, model


@torch.no_grad()
def write(model: Writer, start: torch.Tensor, length: int) -> list[int]:
    """What the model adds to some characters, the likeliest each time but for a little chance."""
    ids, chance = start[None], torch.Generator().manual_seed(2)
    for _ in range(length):
        likely = torch.softmax(model(ids[:, -CONTEXT:])[:, -1] / 0.7, -1)
        ids = torch.cat((ids, torch.multinomial(likely, 1, generator=chance)), 1)
    return ids[0].tolist()


def draw(curves: dict[str, tuple[list[float], float]], path: str) -> None:
    """Losses by step, and how long each run took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    for (name, (losses, seconds)), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(losses, style, label=f"{name}: {seconds:.0f} s", linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="A small decoder learns to write, on the CPU")
    axes.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", help="where the curves go; needs matplotlib")
    options = parser.parse_args()
    words = text()
    symbols = sorted(set(words))
    number = {s: i for i, s in enumerate(symbols)}
    data = torch.tensor([number[s] for s in words])
    print(f"{len(words)} characters, {len(symbols)} of them different; {torch.get_num_threads()} threads")
    curves = {}
    for name, attend in (("tvm_flash", ours), ("torch", theirs)):
        losses, seconds, model = train(data, len(symbols), attend, options.steps, name)
        curves[name] = losses, seconds
        if attend is ours:
            written = "".join(symbols[i] for i in write(model, data[:40], 160))
            print(textwrap.indent(written, "    | ", lambda line: True))
    apart = max(abs(a - b) for a, b in zip(curves["tvm_flash"][0], curves["torch"][0], strict=True))
    print(f"the losses differ by at most {apart:.1e}; " + ", ".join(f"{n} {s:.1f} s" for n, (_, s) in curves.items()))
    if options.picture:
        draw(curves, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
