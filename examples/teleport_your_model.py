"""Teleport your own model: a small CNN and a tiny transformer on mnist-mini, with and without, five seeds each.

The lines that matter are the three marked <-- in `train`. Arms: "plain"; "plain, 3x rate", because a larger
gradient could be had from a larger learning rate; "random element", a move as long in a random direction; "teleport".
Under a minute on two cores: `python examples/teleport_your_model.py [--seeds N] [--samples N]`.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data  # noqa: E402
from common.claims import change  # noqa: E402
from common.statistics import compare as paired  # noqa: E402
from common.statistics import mean_std  # noqa: E402
from teleporter import Teleporter  # noqa: E402

ARMS = ("plain", "plain, 3x rate", "random element", "teleport")


def cnn():
    """28x28 images; the channels between any two layers can be rescaled, through ReLU, pooling and flattening."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The 28 rows of an image are its tokens. Each head has its GL(d_head), each normalization and MLP its scales."""

    def __init__(self, width=32, heads=4, depth=2):
        super().__init__()
        self.rows, self.position = nn.Linear(28, width), nn.Parameter(0.02 * torch.randn(28, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.rows(x) + self.position)).mean(1))


def train(make, optimizer, teleport_at, arm, seed, dataset):
    """Train one model for an epoch; return its mean loss on the way, its test loss and accuracy, the largest drift."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, tests = dataset.x.view(-1, 28, 28), dataset.x_test.view(-1, 28, 28)
    model, losses, drift = make(), [], 0.0
    optimizer = optimizer(model.parameters())
    if arm == "plain, 3x rate":
        optimizer.param_groups[0]["lr"] *= 3
    teleporter = Teleporter(model, optimizer=optimizer)  # <--
    for step, batch in enumerate(torch.randperm(len(images), generator=generator).split(100)):
        x, y = images[batch], dataset.y[batch]
        if arm == "teleport" and step in teleport_at:
            moved = teleporter.step(x, lambda output, y=y: F.cross_entropy(output, y))  # <--
            drift = max(drift, moved.drift.abs().item())  # <-- zero, or rounding
        elif arm == "random element" and step in teleport_at:
            teleporter.apply(teleporter.random_tangents(generator))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        output = model(tests)
    accuracy = (output.argmax(1) == dataset.y_test).float().mean()
    return sum(losses) / len(losses), F.cross_entropy(output, dataset.y_test).item(), 100 * accuracy.item(), drift


def compare(title, seeds, dataset, make, **settings):
    """Print what moves, then for each arm the mean ± std over the seeds, and its paired difference to "plain"."""
    print(f"\n{title}: {Teleporter(make())}")
    print(f"{'':16}{'training loss':>17}{'test loss':>17}{'accuracy %':>14}{'max drift':>11}  test loss / plain's")
    plain = None
    for arm in ARMS:
        results = np.array([train(make, arm=arm, seed=s, dataset=dataset, **settings) for s in range(seeds)])
        plain = results if plain is None else plain
        cells = [mean_std(results[:, i]) for i in range(3)]
        versus = "" if results is plain else f"  {change(paired(results[:, 1], plain[:, 1]))}"
        print(f"{arm:16}{cells[0]:>17}{cells[1]:>17}{cells[2]:>14}{results[:, 3].max():11.1e}{versus}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8000)
    options, start = parser.parse_args(), time.time()
    mnist = data.load("mnist-mini")
    mnist = mnist._replace(x=mnist.x[: options.samples], y=mnist.y[: options.samples])
    momentum = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    adam = partial(torch.optim.Adam, lr=1e-3)
    compare("CNN, SGD with momentum", options.seeds, mnist, cnn, optimizer=momentum, teleport_at=(10, 30))
    compare("Transformer, Adam", options.seeds, mnist, Transformer, optimizer=adam, teleport_at=(10, 30))
    print(f"\nmean ± std over {options.seeds} seeds, one epoch each; {time.time() - start:.0f} s")
