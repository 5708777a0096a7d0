"""Does a null-space teleport train faster? A small CNN and a tiny transformer on mnist-mini, against its controls.

Every arm trains with SGD and momentum, teleports twice on a small batch, and is compared with "plain" at its own best
learning rate: a larger gradient could be had from a larger rate. Rates are tuned on seeds that are not compared, by the
same rule for every arm: powers of two, until the best is not at an edge. Arms:

    plain               no teleport, the tuned learning rate
    restart             the momentum is dropped where the others teleport
    symmetry            Teleporter.step: exact for every input
    level set           level_set_teleport: the batch's loss does not rise
    null space          null_space_teleport: the batch's outputs stay, other images' do not

One number a run, the mean log training loss over its steps. Words as in common/statistics.py, margin 1 %.
A minute or two on two cores: `python examples/null_space.py [--seeds N] [--samples N]`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data  # noqa: E402
from common.statistics import compare, family, percent  # noqa: E402
from teleporter import Teleporter, level_set_teleport, null_space_teleport  # noqa: E402

ARMS = ("plain", "restart", "symmetry", "level set", "null space")
TUNING_SEEDS, FIRST_SEED = (0, 1), 10
TELEPORT_AT, BATCH, TELEPORT_BATCH = (10, 30), 20, 3


def cnn():
    """28 × 28 images; three of them leave room in every layer after the first two."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 8, 4, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2)),
        *(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


class Transformer(nn.Module):
    """16 patches of 7 × 7 pixels are the tokens: three images have fewer tokens than the width, so there is room."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.patch, self.position = nn.Linear(49, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = x.unflatten(1, (4, 7)).unflatten(3, (4, 7)).transpose(2, 3).reshape(-1, 16, 49)
        x = self.patch(x) + self.position
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x).mean(1))


def teleport(arm, model, optimizer, teleporter, x, y):
    """Move the model by the arm's rule. Returns its Teleportation, None for an arm that has none."""
    if arm == "restart":
        optimizer.state.clear()
    if arm == "symmetry":
        return teleporter.step(x, lambda output: F.cross_entropy(output, y))
    if arm in ("level set", "null space"):
        move = level_set_teleport if arm == "level set" else null_space_teleport
        return move(model, lambda model: F.cross_entropy(model(x), y), steps=5, radius=2e-3)
    return None


def train(make, arm, rate, seed, x, y):
    """An epoch; returns the mean log training loss, and of the teleports the largest drift and growth of ‖∇L‖."""
    torch.manual_seed(seed)
    order, model, losses, drift, growth = torch.randperm(len(x)), make(), [], 0.0, 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    teleporter = Teleporter(model, optimizer=optimizer)
    for step, batch in enumerate(order.split(BATCH)):
        if step in TELEPORT_AT:
            few = batch[:TELEPORT_BATCH]
            if (moved := teleport(arm, model, optimizer, teleporter, x[few], y[few])) is not None:
                drift = max(drift, moved.drift.abs().item())
                growth = max(growth, (moved.objective_after / moved.objective_before).sqrt().item())
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.log(losses).mean(), drift, growth


def tuned(make, arm, x, y):
    """The best rate on the tuning seeds, of 0.0125 times powers of two; NaN if it stays at the edge of 10 of them."""
    values, rates = {}, [0.0125 * 2**k for k in range(6)]
    while True:
        for rate in rates:
            if rate not in values:
                runs = [train(make, arm, rate, seed, x, y)[0] for seed in TUNING_SEEDS]
                values[rate] = np.mean(runs) if np.isfinite(runs).all() else np.inf
        best = min(rates, key=values.get)
        if best not in (rates[0], rates[-1]):
            return best
        if len(rates) == 10:
            return np.nan
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]


def experiment(title, make, seeds, x, y):
    """Print, for each arm, its rate, its loss against plain's, and what its teleports did."""
    print(f"\n{title}\n{'':12}{'rate':>7}{'log loss':>10}{'change % [95 % interval]':>29}  {'word':11}", end="")
    print(f"{'drift':>9}{'‖∇L‖ ×':>9}{'seconds':>9}")
    rows, comparisons = [], []
    for arm in ARMS:
        rate = tuned(make, arm, x, y)
        start = time.perf_counter()
        runs = np.array([train(make, arm, rate, FIRST_SEED + i, x, y) for i in range(seeds)])
        rows.append((arm, rate, runs, (time.perf_counter() - start) / seeds))
        if arm != "plain":
            comparisons.append(compare(runs[:, 0], rows[0][2][:, 0], relative=False))
    for (arm, rate, runs, seconds), c in zip(rows, [None, *family(comparisons)]):
        versus = "" if c is None else f"{percent(c.effect):+.1f} [{percent(c.low):+.1f}, {percent(c.high):+.1f}]"
        print(f"{arm:12}{rate:7.3f}{runs[:, 0].mean():10.3f}{versus:>29}  {c.word if c else '':11}", end="")
        print(f"{runs[:, 1].max():9.1e}{runs[:, 2].max():9.1f}{seconds:9.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--samples", type=int, default=1000)
    options, start = parser.parse_args(), time.time()
    mnist = data.load("mnist-mini")
    x, y = mnist.x[: options.samples].view(-1, 28, 28), mnist.y[: options.samples]
    experiment("CNN", cnn, options.seeds, x, y)
    experiment("Transformer", Transformer, options.seeds, x, y)
    print(f"\n{options.seeds} seeds compared, {len(TUNING_SEEDS)} others to tune on; {time.time() - start:.0f} s")
