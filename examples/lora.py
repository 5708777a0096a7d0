"""LoRA with and without a rotation of its inner spaces: a network that reads digits learns to read them lying down.

The three lines that matter are marked <-- in `adapt`; they need no change to model or optimizer, and do the same to a
model made by peft, whose LoRA layers have the structure of LoraLinear below. Arms, five seeds each, at rates that were
tuned for each on a like task (beyond-the-papers/rotation.py): "Adam", "LoRA+" (B's rate 16 times A's), and each with a
rotation after every step. Under a minute on one core: `python examples/lora.py [--seeds N] [--steps N]`.
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
from common.statistics import compare, mean_std, percent  # noqa: E402
from teleporter import Teleporter  # noqa: E402

# arm: learning rate (geometric mean of the factors'), B's rate over A's, rotation
ARMS = {
    "Adam": (0.015, 1, False),
    "Adam, rotated": (0.01, 1, True),
    "LoRA+": (0.01, 16, False),
    "LoRA+, rotated": (0.01, 4, True),
}


class LoraLinear(nn.Module):
    """A frozen layer with B A beside it, built as peft builds it."""

    def __init__(self, base, rank=8, scaling=1.0):
        super().__init__()
        self.base_layer, self.scaling = base.requires_grad_(False), {"default": scaling}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]


def pretrain(x, y, steps=1000):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def adapt(pretrained, arm, seed, steps, x, y, x_test, y_test):
    """Train the factors; return the mean log training loss on the way, the test loss, and its drift by a rotation."""
    torch.manual_seed(seed)
    layers = (LoraLinear(layer) if type(layer) is nn.Linear else layer for layer in pretrained)
    model, (rate, ratio, rotates), losses = nn.Sequential(*layers), ARMS[arm], []
    factors = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            factors["A" if "lora_A" in name else "B"].append(parameter)
    rates = {"A": rate / ratio**0.5, "B": rate * ratio**0.5}
    adam = torch.optim.Adam([{"params": factors[k], "lr": rates[k]} for k in "AB"])
    options = dict(symmetries="low_rank", objective="gradient_eigenbasis", optimizer=adam)  # <--
    teleporter = Teleporter(model, **options)  # <--
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = F.cross_entropy(model(x[rows]), y[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        if rotates:
            teleporter.step()  # <--
        losses.append(loss.item())
    with torch.no_grad():
        before = F.cross_entropy(model(x_test), y_test).item()
        teleporter.low_rank.apply([torch.linalg.qr(torch.randn(8, 8))[0] for _ in teleporter.low_rank.names])
        drift = abs(F.cross_entropy(model(x_test), y_test).item() - before)
    return np.log(np.reshape(losses, (-1, 10)).mean(1)).mean(), before, drift


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 10")
    options, start = parser.parse_args(), time.time()
    mnist = data.load("mnist-mini")
    small = [F.avg_pool2d(images.view(-1, 28, 28), 2) for images in (mnist.x, mnist.x_test)]
    pretrained = pretrain(small[0].flatten(1), mnist.y)
    x, x_test = (torch.rot90(images, 1, (1, 2)).flatten(1) for images in small)
    print(f"{'':16}{'mean log training loss':>24}{'test loss':>18}{'drift':>10}   training loss against the line above")
    previous = None
    for arm, (_, _, rotates) in ARMS.items():
        seeds = range(100, 100 + options.seeds)
        results = np.array([adapt(pretrained, arm, s, options.steps, x, mnist.y, x_test, mnist.y_test) for s in seeds])
        line = f"{arm:16}{mean_std(results[:, 0]):>24}{mean_std(results[:, 1]):>18}{results[:, 2].max():10.0e}"
        if rotates:
            c = compare(results[:, 0], previous[:, 0], relative=False)
            line += f"   {percent(c.effect):+.1f} % [{percent(c.low):+.1f}, {percent(c.high):+.1f}], {c.word}"
        print(line, flush=True)
        previous = results
    print(f"{options.seeds} seeds, {options.steps} steps; {time.time() - start:.0f} s")
