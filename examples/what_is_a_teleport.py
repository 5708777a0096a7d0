"""What a teleport is, on a network of two weights: u σ(v x) fitted to y = 1 at x = 1, L = (1 − uσ(v))² / 2.

The level sets of L are hyperbolas uv = const., and so is the set of minima, uv = 1. A teleport scales v by s and u by
1/s: it stays on its level set, and descent from there takes another path, here a shorter one, to another minimum. The
third run does not teleport: its learning rates are η/s² for v and η s² for u, and its losses are the teleported run's.

    python examples/what_is_a_teleport.py       # a few seconds; the picture goes to figures/quick/
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import plots  # noqa: E402
from teleport import forward, leaky_relu, rescaling_action, squared_gradient_norm, teleport  # noqa: E402

SIGMA, X, RATE, STEPS, BOUND = leaky_relu(0.1), torch.ones(1, 1, dtype=torch.float64), 0.1, 40, 3.0
START = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)  # V, U


def loss(W):
    return (1 - forward(W, X, SIGMA)).square().sum((-2, -1)) / 2


def descend(W, rates):
    """The path (STEPS + 1, 2) of (v, u) under gradient descent, and its losses."""
    path = [W]
    for _ in range(STEPS):
        gradients = torch.func.grad(loss)(W)
        W = tuple(w - rate * g for w, rate, g in zip(W, rates, gradients))
        path.append(W)
    return np.array([[w.item() for w in W] for W in path]), np.array([loss(W).item() for W in path])


def runs():
    """The teleport, its scale s, and (path, losses) of the runs without, with, and with the twin's learning rates."""
    moved = teleport(START, X, loss, objective=squared_gradient_norm, action=rescaling_action, activation=SIGMA,
                     lr=1.0, steps=20, bound=BOUND)  # fmt: skip
    s = (moved.weights[0] / START[0]).item()
    return moved, s, (descend(START, (RATE, RATE)), descend(moved.weights, (RATE, RATE)),
                      descend(START, (RATE / s**2, RATE * s**2)))  # fmt: skip


def draw(moved, s, plain, jumped, twin):
    figure, ((plane, curves),) = plots.panels(1, 2, width=4.4, height=3.6)
    v, u = np.linspace(0.02, 2.6, 300), np.linspace(0.02, 1.6, 300)
    plane.contour(v, u, (1 - np.outer(u, v)) ** 2 / 2, levels=[0.02, 0.08, 0.32], colors="#bbbbbb", linewidths=0.7)
    (minima,) = plane.plot(v, 1 / v, color=plots.COLORS[3], linewidth=2.5)
    (level,) = plane.plot(v, (START[0] * START[1]).item() / v, color=plots.COLORS[7], linewidth=1.2)
    scales = np.geomspace(1, s, 50)[:-3]  # the jump, drawn along the level set that it does not leave
    (jump,) = plane.plot(START[0].item() * scales, START[1].item() / scales, color=plots.COLORS[2], linestyle="--")
    arrow = {"arrowstyle": "-|>", "color": plots.COLORS[2], "shrinkA": 0, "shrinkB": 0}
    plane.annotate("", jumped[0][0], (START[0].item() * scales[-1], START[1].item() / scales[-1]), arrowprops=arrow)
    (untouched,) = plane.plot(*plain[0].T, "o-", color=plots.COLORS[0], markersize=3, linewidth=1)
    (after,) = plane.plot(*jumped[0].T, "s-", color=plots.COLORS[1], markersize=3, linewidth=1)
    plane.set(xlabel="$v$", ylabel="$u$", xlim=(0, 2.6), ylim=(0, 1.6))
    plane.legend(
        [level, jump, untouched, after, minima],
        ["a level set of the loss", "teleport along it", "descent without", "descent after it", "minima"],
        loc="upper right",
        fontsize=8,
    )
    floor = 1e-12
    curves.semilogy(np.maximum(plain[1], floor), "o-", color=plots.COLORS[0], markersize=3, label="without")
    curves.semilogy(np.maximum(jumped[1], floor), "s-", color=plots.COLORS[1], markersize=3, label="teleported")
    label = r"not moved: rates $\eta/s^2$ for $v$, $\eta s^2$ for $u$"
    curves.semilogy(np.maximum(twin[1], floor), "x", color=plots.COLORS[2], markersize=7, label=label)
    curves.set(xlabel="step", ylabel="loss", ylim=(floor * 2, 1))
    curves.legend(fontsize=8)
    return figure


def main(folder):
    moved, s, (plain, jumped, twin) = runs()
    print(f"v × {s:.3g}, u ÷ {s:.3g}: the loss moves by {moved.drift.item():.0e}, ‖∂L/∂w‖² grows "
          f"{(moved.objective_after / moved.objective_before).item():.3g}-fold.")  # fmt: skip
    for name, (path, losses) in (("without", plain), ("teleported", jumped), ("rates η/s², η s²", twin)):
        print(f"{name:18} loss after 10 steps {losses[10]:.1e}, ends at v = {path[-1, 0]:.3f}, u = {path[-1, 1]:.3f}")
    print(f"Largest difference between the last two runs' losses: {abs(twin[1] - jumped[1]).max():.0e}.")
    print(*plots.save(draw(moved, s, plain, jumped, twin), folder, "what_is_a_teleport"), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "figures" / "quick")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    main(options.output)
