"""ICLR 2023, Figure 6: how fast gradient descent converges from starts with different conserved quantities Q.

The figure: two-layer networks U σ(Vᵀ) that start at three standard deviations. These differ in Q, but also in the
function they start from. Controls, in a second figure: the start of standard deviation 0.1 moved along its symmetry
orbit by g = sI (pre-activation action: V scaled by s, U refitted), so that all start from the same function, hence the
same loss, at different Q; and the steps that many starts need, of one orbit and of random draws, against their Q
(relations.py). The many starts train with ten times the step size, which changes their time, not its order.

All starts train as one stack, in float64 from the published float32 numbers.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import relations
from conserved import (
    conserved_quantity,
    crossing,
    gradient_descent,
    published_normal,
    record_steps,
    scaled_pair,
    two_layer_loss,
)

from common import cli, plots
from common.claims import Claim, count, table
from common.run import Outcome

CLAIM = Claim(
    order=130,
    figure="Q and convergence (ICLR 2023, Figure 6)",
    paper="ICLR 2023",
    section="",
    says="The rate of convergence is related to Q.",
    short="Q sets the rate of convergence",
    rule="holds if for every activation, over at least 30 points of one orbit and over as many random draws, the steps "
    "to a loss have a rank correlation of at least 0.5 with Q or |Q|, p < 0.05 after Holm; in part: for some; "
    "undecided if none, and some interval reaches 0.5.",
    dated="2026-11-25",
)
OLD = (
    "By the rule of 2026-11-22 (a twofold difference, in the order of Q or |Q|, over four points of one orbit): holds "
    "in part, for linear and relu."
)


@dataclass(frozen=True)
class Settings:
    steps: int = 400_000  # sigmoid: twice as many
    activations: tuple = ("linear", "relu", "tanh", "sigmoid")
    stds: tuple = (0.01, 0.1, 1.0)  # of the initial U and V
    base: int = 1  # the member whose orbit is the control
    scales: tuple = (0.1, 3.0, 10.0)  # s of g = sI
    lr: float = 1e-3
    threshold: float = 0.1  # the table counts steps to this loss; all runs start above 7
    starts: int = 32  # points of the orbit, random draws, and random draws of one standard deviation
    starts_steps: int = 20_000  # of these, at
    starts_lr: float = 1e-2
    outputs: int = 5  # m
    inputs: int = 10  # n
    hidden: int = 50  # h
    per_decade: int = 40  # recorded steps
    seed: int = 12345


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, steps=1_500, per_decade=10, starts=4, starts_steps=300),
    "quick": replace(PAPER, steps=15_000, starts_steps=10_000),
    "paper": PAPER,
}


def experiment(run):
    s = run.settings

    def train(activation):
        Y = published_normal(s.outputs, s.inputs, 0, 1, s.seed).to(run.device, torch.float64)
        U, V = starts(s, activation, run.device)
        steps, Q, loss = descend(run, U, V, Y, activation, s.lr, s.steps)
        many = many_starts(s, U[s.base], V[s.base], activation)
        stack = (torch.cat(matrices) for matrices in zip(*many.values()))
        many_steps, many_Q, many_loss = descend(run, *stack, Y, activation, s.starts_lr, s.starts_steps)
        needed = [crossing(many_steps, row, s.threshold) for row in many_loss.cpu().numpy()]
        needed = np.nan_to_num(needed, nan=many_steps[-1])  # at least
        shape = (len(many), s.starts)
        return {
            "steps": steps,
            "Q": Q,
            "loss": loss,
            "starts_Q": many_Q[:, 0].reshape(shape),
            "starts_steps": needed.reshape(shape),
        }

    arrays, metrics = {}, {}
    for activation, part in run.parts(train, {name: name for name in s.activations})[0].items():
        arrays |= {f"{activation}_{name}": array for name, array in part.items()}
        Q, loss = part["Q"], part["loss"]
        metrics[activation] = {
            "Q_start": Q[:, 0],
            "Q_end": Q[:, -1],
            "loss_start": loss[:, 0],
            "loss_end": loss[:, -1],
            "steps_to_threshold": [crossing(part["steps"], row, s.threshold) for row in loss],
            "control_loss_drift": np.abs(loss[len(s.stds) :, 0] - loss[s.base, 0]).max(),  # of moving along the orbit
            "relations": relations.of_sets(part["starts_Q"], part["starts_steps"]),
        }
    return Outcome(metrics, arrays, seeds=[s.seed])


def descend(run, U, V, Y, activation, lr, steps):
    """The recorded steps, and Q and the loss of every member there, (members, records)."""
    steps = record_steps(steps * (2 if activation == "sigmoid" else 1), run.settings.per_decade)
    Q, loss = [], []
    path = gradient_descent(U, V, Y, activation, lr, steps)
    for U, V in run.progress(path, total=len(steps), desc=activation):
        Q.append(conserved_quantity(U, V, activation))
        loss.append(two_layer_loss(U, V, Y, activation))
    return steps, torch.stack(Q, -1), torch.stack(loss, -1)


def starts(s, activation, device):
    """The published starts, then the orbit of the base: a stack of pairs U (·, m, h), V (·, n, h)."""
    draws = [
        [published_normal(rows, s.hidden, 0, std, s.seed).to(device, torch.float64) for rows in (s.outputs, s.inputs)]
        for std in s.stds
    ]
    orbit = [scaled_pair(*draws[s.base], scale, activation) for scale in s.scales]
    return (torch.stack(matrices) for matrices in zip(*draws, *orbit))


def many_starts(s, U, V, activation):
    """{set: stacks U (starts, m, h), V (starts, n, h)} for the rank correlations; the orbit is that of (U, V)."""
    elements = relations.random_elements(s.starts, s.hidden, (min(s.scales), max(s.scales)), s.seed)
    stacks = {"orbit": relations.moved(U, V, elements, activation)}
    for name in ("draws", "one_std"):
        stds = relations.stds_of(name, s.stds, s.base, s.starts)
        drawn = relations.random_starts(s.outputs, s.inputs, s.hidden, stds, s.seed)
        stacks[name] = tuple(W.to(U) for W in drawn)
    return stacks


def judge(outcome):
    m, s = outcome.metrics, outcome.settings
    details = [
        f"{name}, steps to loss {s.threshold:g} from the published starts: "
        + ", ".join(f"Q = {Q:.4g}: {count(n)}" for Q, n in zip(v["Q_start"][: len(s.stds)], v["steps_to_threshold"]))
        + "."
        for name, v in m.items()
    ]
    return relations.judge({name: v["relations"] for name, v in m.items()}, "the steps", [*details, OLD])


def plot(outcome, s, save):
    save(plot_losses(outcome, s, range(len(s.stds)), "Loss"))
    save(plot_controls(outcome, s), "controls")


def plot_losses(outcome, s, members, label, axes=None):
    """Figure 6 for some members: the loss against training steps, in the order of Q."""
    figure = None
    if axes is None:
        figure, (axes,) = plots.panels(1, len(s.activations), height=2.7, sharey=True)
    for ax, activation in zip(axes, s.activations):
        steps, Q, loss = (outcome.arrays[f"{activation}_{name}"] for name in ("steps", "Q", "loss"))
        for i, member in enumerate(sorted(members, key=lambda member: Q[member, 0])):
            ax.plot(steps, loss[member], label=f"Q = {Q[member, 0]:.4g}", **plots.style(i))
        ax.set(yscale="log", ylim=(1e-6, 1e2), title=activation, xlabel="Training steps")
        ax.ticklabel_format(axis="x", scilimits=(0, 0))
        ax.legend(fontsize=7)
    axes[0].set_ylabel(label)
    return figure


def plot_controls(outcome, s):
    """The same for one orbit's members, which start from the same function; and the many starts against Q."""
    figure, axes = plots.panels(2, len(s.activations), height=2.7, sharey="row")
    orbit = [s.base, *range(len(s.stds), len(s.stds) + len(s.scales))]
    plot_losses(outcome, s, orbit, "Loss, same start function", axes[0])
    values = {a: (outcome.arrays[f"{a}_starts_Q"], outcome.arrays[f"{a}_starts_steps"]) for a in s.activations}
    relations.scatter(axes[1], values, f"Steps to loss {s.threshold:g}")
    return figure


def report(outcome, s):
    rows = []
    for activation in s.activations:
        m = outcome.metrics[activation]
        names = [f"std {std:g}" for std in s.stds] + [f"std {s.stds[s.base]:g} moved, s = {x:g}" for x in s.scales]
        for i, name in enumerate(names):
            columns = (m[key][i] for key in ("Q_start", "loss_start", "loss_end"))
            steps = m["steps_to_threshold"][i]
            rows.append([f"{activation}, {name}", *(f"{x:.4g}" for x in columns), count(steps)])
    drift = max(outcome.metrics[activation]["control_loss_drift"] for activation in s.activations)
    header = ["σ, start", "Q", "loss at start", "at end", f"steps to loss {s.threshold:g}"]
    return table(header, rows) + f"\nmoving along the orbit changed the loss by at most {drift:.1e}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
