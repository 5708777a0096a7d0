"""Paper C, Figure 6: how fast gradient descent converges from starts with different conserved quantities Q.

Top row, as published: two-layer networks U σ(Vᵀ) that start at three standard deviations. These differ in Q, but also
in the function they start from. Control, bottom row: the start of standard deviation 0.1, moved along its symmetry
orbit by g = sI (pre-activation action: V scaled by s, U refitted). All of these start from the same function, hence the
same loss, at different Q.

All starts train as one stack, in float64 from the published float32 numbers.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conserved import (
    conserved_quantity,
    gradient_descent,
    monotone,
    published_normal,
    record_steps,
    scaled_pair,
    two_layer_loss,
)

from common import cli, plots
from common.claims import Claim, Verdict, count, grade, listed, table
from common.run import Outcome

CLAIM = Claim(
    order=130,
    figure="Q and convergence (ICLR 2023, Figure 6)",
    paper="ICLR 2023",
    section="",
    says="The rate of convergence is related to Q.",
    short="Q sets the rate of convergence",
    rule="holds if along one orbit, whose points compute the same function, the steps to a loss differ more than "
    "twofold, in the order of Q or of |Q|, for every activation; in part: they differ. The published starts "
    "differ in function too.",
    dated="2026-11-22",
)


@dataclass(frozen=True)
class Settings:
    steps: int  # sigmoid: twice as many
    activations: tuple = ("linear", "relu", "tanh", "sigmoid")
    stds: tuple = (0.01, 0.1, 1.0)  # of the initial U and V
    base: int = 1  # the member whose orbit is the control
    scales: tuple = (0.1, 3.0, 10.0)  # s of g = sI
    lr: float = 1e-3
    threshold: float = 0.1  # the table counts steps to this loss; all runs start above 7
    outputs: int = 5  # m
    inputs: int = 10  # n
    hidden: int = 50  # h
    per_decade: int = 40  # recorded steps
    seed: int = 12345


PRESETS = {
    "tiny": Settings(steps=2_000, per_decade=20),
    "quick": Settings(steps=50_000),
    "paper": Settings(steps=400_000),
}


def experiment(run):
    s = run.settings

    def train(activation):
        Y = published_normal(s.outputs, s.inputs, 0, 1, s.seed).to(run.device, torch.float64)
        U, V = starts(s, activation, run.device)
        steps = record_steps(s.steps * (2 if activation == "sigmoid" else 1), s.per_decade)
        path = gradient_descent(U, V, Y, activation, s.lr, steps)
        Q, loss = [], []
        for U, V in run.progress(path, total=len(steps), desc=activation):
            Q.append(conserved_quantity(U, V, activation))
            loss.append(two_layer_loss(U, V, Y, activation))
        return {"steps": steps, "Q": torch.stack(Q, -1), "loss": torch.stack(loss, -1)}

    arrays, metrics = {}, {}
    for activation, part in run.parts(train, {name: name for name in s.activations})[0].items():
        arrays |= {f"{activation}_{name}": array for name, array in part.items()}
        steps, Q, loss = part["steps"], part["Q"], part["loss"]
        below = loss <= s.threshold
        metrics[activation] = {
            "Q_start": Q[:, 0],
            "Q_end": Q[:, -1],
            "loss_start": loss[:, 0],
            "loss_end": loss[:, -1],
            "steps_to_threshold": [int(steps[b.argmax()]) if b.any() else math.nan for b in below],
            "control_loss_drift": np.abs(loss[len(s.stds) :, 0] - loss[s.base, 0]).max(),  # of moving along the orbit
        }
    return Outcome(metrics, arrays, seeds=[s.seed])


def starts(s, activation, device):
    """The published starts, then the orbit of the base: a stack of pairs U (·, m, h), V (·, n, h)."""
    draws = [
        [published_normal(rows, s.hidden, 0, std, s.seed).to(device, torch.float64) for rows in (s.outputs, s.inputs)]
        for std in s.stds
    ]
    orbit = [scaled_pair(*draws[s.base], scale, activation) for scale in s.scales]
    return (torch.stack(matrices) for matrices in zip(*draws, *orbit))


def judge(outcome):
    m, s = outcome.metrics, outcome.settings
    details, spread, ordered = [], {}, []
    for name, v in m.items():
        Q, needed = v["Q_start"], v["steps_to_threshold"]
        published, orbit = range(len(s.stds)), [s.base, *range(len(s.stds), len(Q))]
        along = [s.steps if math.isnan(needed[i]) else needed[i] for i in orbit]  # at least, if it was not reached
        spread[name] = max(along) / min(along)
        ordered += [name] if monotone([Q[i] for i in orbit], along) else []
        pairs = [", ".join(f"Q = {Q[i]:.4g}: {count(needed[i])}" for i in chosen) for chosen in (published, orbit)]
        details.append(
            f"{name}, steps to loss {s.threshold:g}: published starts {pairs[0]}. The same start function, moved along "
            f"its orbit: {pairs[1]}."
        )
    depends = [ratio > 2 for ratio in spread.values()]
    cells = ", ".join(f"×{ratio:.1f} ({name})" for name, ratio in spread.items())
    return Verdict(
        grade(all(depends) and len(ordered) == len(m), any(depends)),
        f"in the order of Q or its size for {listed(ordered)} only",
        f"Along one orbit, where all starts compute the same function, the steps to the loss {s.threshold:g} differ "
        f"by up to {cells}.",
        details,
    )


def plot(outcome, s, save):
    figure, axes = plots.panels(2, len(s.activations), height=2.5, sharex="col", sharey=True)
    orbit = [s.base, *range(len(s.stds), len(s.stds) + len(s.scales))]
    for column, activation in enumerate(s.activations):
        steps, Q, loss = (outcome.arrays[f"{activation}_{name}"] for name in ("steps", "Q", "loss"))
        for ax, members in zip(axes[:, column], (range(len(s.stds)), orbit)):
            for i, member in enumerate(sorted(members, key=lambda member: Q[member, 0])):
                ax.plot(steps, loss[member], label=f"Q = {Q[member, 0]:.4g}", **plots.style(i))
            ax.set(yscale="log", ylim=(1e-6, 1e2))
            ax.legend(fontsize=7)
        axes[0, column].set_title(activation)
        axes[1, column].set_xlabel("Training steps")
        axes[1, column].ticklabel_format(axis="x", scilimits=(0, 0))
    axes[0, 0].set_ylabel("Loss")
    axes[1, 0].set_ylabel("Loss, same start function")
    save(figure)


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
