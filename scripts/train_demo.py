"""Train a small model that writes, with this package's attention and with PyTorch's, and draw both curves of losses.

python scripts/train_demo.py                       # a minute or so on a laptop's processor
python scripts/train_demo.py --picture losses.png  # where the picture goes

The model is a decoder of four layers, on the characters of docstrings that are installed, so that nothing has to be
fetched.  Both models begin with the same weights, see the same characters, and take their steps in turn.
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


class Run:
    """A model that learns: its losses so far, and the seconds that its steps took."""

    def __init__(self, symbols: int, attend):
        torch.manual_seed(0)
        self.model = Writer(symbols, attend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, ids: torch.Tensor) -> None:
        begin = time.perf_counter()
        loss = F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - begin
        self.losses.append(loss.item())


def train(data: torch.Tensor, symbols: int, steps: int) -> dict[str, Run]:
    """Both models, which take their steps in turn, so that whatever else the machine does slows both."""
    runs, chance = {"tvm_flash": Run(symbols, ours), "torch": Run(symbols, theirs)}, torch.Generator().manual_seed(1)
    for step in range(steps):
        starts = torch.randint(0, len(data) - CONTEXT - 1, (BATCH,), generator=chance)
        ids = torch.stack([data[s : s + CONTEXT + 1] for s in starts.tolist()])
        for run in runs.values():
            run.step(ids)
        if step % 25 == 0 or step == steps - 1:
            figures = ", ".join(f"{name} {r.losses[-1]:.3f} ({r.seconds:.1f} s)" for name, r in runs.items())
            print(f"step {step:4}: loss {figures}", flush=True)
    return runs


@torch.no_grad()
def write(model: Writer, start: torch.Tensor, length: int) -> list[int]:
    """What the model adds to some characters, the likeliest each time but for a little chance."""
    ids, chance = start[None], torch.Generator().manual_seed(2)
    for _ in range(length):
        likely = torch.softmax(model(ids[:, -CONTEXT:])[:, -1] / 0.7, -1)
        ids = torch.cat((ids, torch.multinomial(likely, 1, generator=chance)), 1)
    return ids[0].tolist()


def draw(runs: dict[str, Run], path: str) -> None:
    """Losses by step, and how long each run took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        axes.plot(run.losses, style, label=f"{name}: {run.seconds:.0f} s", linewidth=1.4)
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="A small decoder learns to write, on the CPU")
    axes.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--picture", help="where the curves go; needs matplotlib")
    options = parser.parse_args()
    words = text()
    symbols = sorted(set(words))
    number = {s: i for i, s in enumerate(symbols)}
    data = torch.tensor([number[s] for s in words])
    print(f"{len(words)} characters, {len(symbols)} of them different; {torch.get_num_threads()} threads")
    runs = train(data, len(symbols), options.steps)
    mine, other = runs["tvm_flash"], runs["torch"]
    written = "".join(symbols[i] for i in write(mine.model, data[:40], 200))
    print("what the first writes now:")
    print(textwrap.indent(written, "    | ", lambda line: True))
    apart = max(abs(a - b) for a, b in zip(mine.losses, other.losses, strict=True))
    print(f"the losses differ by at most {apart:.1e}; {mine.seconds:.1f} s, torch {other.seconds:.1f} s")
    if options.picture:
        draw(runs, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
