"""Paper C, Figure 9: the Hessian's eigenvalues at the minima that starts with different Q lead to.

Top row, as published: two-layer networks U σ(Vᵀ) trained to zero loss from four standard deviations; their eigenvalues
(of the Hessian of ‖Y − U σ(Vᵀ)‖²; mn of them are not zero there) shift and spread with Q. Control, bottom row: one of
these minima, moved along its symmetry orbit by g = sI (pre-activation action). The function, hence the loss, stays the
same, so what shifts the eigenvalues is the place on the orbit.

All starts train as one stack, in float64 from the published float32 numbers.
"""

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
    scaled_pair,
    squared_loss_hessian,
    two_layer_loss,
)

from common import cli, plots
from common.claims import Claim, Verdict, grade, listed, table
from common.run import Outcome

CLAIM = Claim(
    order=150,
    figure="Q and the Hessian (ICLR 2023, Figure 9)",
    paper="ICLR 2023",
    section="",
    says="The sharpness of a minimum is related to Q.",
    short="Q sets the sharpness of minima",
    rule="holds if the largest Hessian eigenvalue is monotone in Q or in |Q|, over the published starts and along "
    "one orbit, for every activation; in part: for some.",
    dated="2026-11-22",
)


@dataclass(frozen=True)
class Settings:
    steps: int  # sigmoid: twice as many
    activations: tuple = ("linear", "relu", "tanh", "sigmoid")
    stds: tuple = (0.001, 0.3, 0.6, 0.9)  # of the initial U and V
    base: int = 1  # the minimum whose orbit is the control
    scales: tuple = (0.5, 2.0, 3.0)  # s of g = sI
    lr: float = 0.1
    outputs: int = 10  # m
    inputs: int = 5  # n
    hidden: int = 50  # h
    seed: int = 12345


PRESETS = {
    "tiny": Settings(steps=1_000, hidden=20),
    "quick": Settings(steps=4_000),
    "paper": Settings(steps=4_000),
}


def experiment(run):
    s = run.settings

    def train(activation):
        Y = published_normal(s.outputs, s.inputs, 0, 1, s.seed).to(run.device, torch.float64)
        U, V = (
            torch.stack([published_normal(rows, s.hidden, 0, std, s.seed) for std in s.stds]).to(
                run.device, torch.float64
            )
            for rows in (s.outputs, s.inputs)
        )
        Q_start = conserved_quantity(U, V, activation)
        steps = s.steps * (2 if activation == "sigmoid" else 1)
        ((U, V),) = gradient_descent(U, V, Y, activation, s.lr, [steps])
        orbit = [scaled_pair(U[s.base], V[s.base], scale, activation) for scale in s.scales]
        U, V = (torch.cat([W, torch.stack(moved)]) for W, moved in zip((U, V), zip(*orbit)))
        eigenvalues = torch.linalg.eigvalsh(squared_loss_hessian(U, V, Y, activation))
        return {
            "Q_start": Q_start,
            "Q": conserved_quantity(U, V, activation),
            "loss": two_layer_loss(U, V, Y, activation),
            "eigenvalues": eigenvalues[:, -Y.numel() :],
            "largest_other": eigenvalues[:, : -Y.numel()].abs().amax(1),
        }

    arrays, metrics = {}, {}
    for activation, part in run.parts(train, {name: name for name in s.activations})[0].items():
        arrays |= {f"{activation}_{name}": part[name] for name in ("Q", "eigenvalues")}
        metrics[activation] = {
            "Q_start": part["Q_start"],
            "Q": part["Q"],
            "loss": part["loss"],
            "largest": part["eigenvalues"][:, -1],
            "median": np.median(part["eigenvalues"], axis=1),
            "trace": part["eigenvalues"].sum(1),
            "largest_other": part["largest_other"],  # beyond the mn: zero at zero loss
            "control_loss_drift": np.abs(part["loss"][len(s.stds) :] - part["loss"][s.base]).max(),
        }
    return Outcome(metrics, arrays, seeds=[s.seed])


def judge(outcome):
    s, details, ranges, ordered, along = outcome.settings, [], [], [], []
    for name, v in outcome.metrics.items():
        starts, orbit = range(len(s.stds)), [s.base, *range(len(s.stds), len(v["Q"]))]
        for chosen, names in ((starts, ordered), (orbit, along)):
            names += [name] if monotone([v["Q"][i] for i in chosen], [v["largest"][i] for i in chosen]) else []
        largest = [v["largest"][i] for i in sorted(starts, key=lambda i: v["Q"][i])]
        ranges.append(f"{name} {', '.join(f'{e:.3g}' for e in largest)}")
        eigenvalues = ", ".join(f"{e:.3g}" for e in v["largest"])
        values = ", ".join(f"{q:.4g}" for q in v["Q"])
        details.append(
            f"{name}: largest eigenvalues {eigenvalues} at minima with Q = {values} (the last {len(orbit) - 1}: moved "
            f"along the orbit of number {s.base + 1})."
        )
    n = len(outcome.metrics)
    return Verdict(
        grade(len(ordered) == len(along) == n, ordered or along),
        f"over the published starts for {listed(ordered)}, along one orbit for {listed(along)}",
        "Largest Hessian eigenvalue from the smallest to the largest Q over the published starts: "
        + "; ".join(ranges)
        + ".",
        details,
    )


def plot(outcome, s, save):
    figure, axes = plots.panels(2, len(s.activations), height=2.5, sharex="col")
    orbit = [s.base, *range(len(s.stds), len(s.stds) + len(s.scales))]
    for column, activation in enumerate(s.activations):
        Q, eigenvalues = outcome.arrays[f"{activation}_Q"], outcome.arrays[f"{activation}_eigenvalues"]
        bins = np.arange(1e-3, eigenvalues.max() + 4, 4)
        for ax, members in zip(axes[:, column], (range(len(s.stds)), orbit)):
            for i, member in enumerate(members):
                line = plots.style(i)
                ax.hist(eigenvalues[member], bins, histtype="stepfilled", color=line["color"], alpha=0.15)
                ax.hist(eigenvalues[member], bins, histtype="step", label=f"Q = {Q[member]:.3g}", **line)
            ax.legend(fontsize=7)
        axes[0, column].set_title(activation)
        axes[1, column].set_xlabel("Eigenvalues of Hessian")
    axes[0, 0].set_ylabel("Frequency")
    axes[1, 0].set_ylabel("Frequency, same function")
    save(figure)


def report(outcome, s):
    rows = []
    names = [f"std {std:g}" for std in s.stds] + [f"std {s.stds[s.base]:g} moved, s = {x:g}" for x in s.scales]
    for activation in s.activations:
        m = outcome.metrics[activation]
        for i, name in enumerate(names):
            columns = (m[key][i] for key in ("Q", "loss", "median", "largest", "trace"))
            rows.append([f"{activation}, {name}", *(f"{x:.4g}" for x in columns)])
    drift = max(outcome.metrics[activation]["control_loss_drift"] for activation in s.activations)
    header = ["σ, minimum", "Q", "loss", "median eigenvalue", "largest", "trace"]
    return table(header, rows) + f"\nmoving along the orbit changed the loss by at most {drift:.1e}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
