"""ICLR 2023, Figure 3: the conserved quantity Q during gradient descent on two-layer networks U σ(Vᵀ).

Gradient flow conserves Q exactly; gradient descent lets it drift, by an amount that falls with the step size. Drawn
over training steps as in the paper: the drift of |Q|, in units of the same terms added instead of subtracted, and the
loss. Control, in a second figure: at equal flow time (step size × steps) the drift is proportional to the step size,
while the added terms, which nothing conserves, change by as much whatever the step size is.

The step sizes train as one stack, in float64 from the published float32 numbers.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conserved import (
    conserved_quantity,
    gradient_descent,
    published_normal,
    quantity_scale,
    record_steps,
    two_layer_loss,
)

from common import cli, plots
from common.claims import Claim, Verdict, grade, table
from common.run import Outcome

CLAIM = Claim(
    order=110,
    figure="Q dynamics (ICLR 2023, Figure 3)",
    paper="ICLR 2023",
    section="",
    says="Gradient flow conserves Q, and gradient descent nearly does.",
    short="gradient flow conserves Q",
    rule="holds if at equal training time Q drifts as the step size to a power within 0.1 of 1, for every activation.",
    dated="2026-11-22",
    headline=True,
)


@dataclass(frozen=True)
class Settings:
    steps: int = 400_000  # sigmoid: twice as many
    activations: tuple = ("linear", "relu", "tanh", "sigmoid")
    rates: tuple = (0.1, 0.01, 0.001)  # step sizes; factors of ten, so that equal flow times are recorded
    std: float = 0.1  # of the initial U and V
    outputs: int = 5  # m
    inputs: int = 10  # n
    hidden: int = 50  # h
    per_decade: int = 40  # recorded steps
    seed: int = 12345


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, steps=1_500, per_decade=10),
    "quick": replace(PAPER, steps=40_000),
    "paper": PAPER,
}


def experiment(run):
    s = run.settings

    def train(activation):
        Y = published_normal(s.outputs, s.inputs, 0, 1, s.seed).to(run.device, torch.float64)
        U = published_normal(s.outputs, s.hidden, 0, s.std, s.seed).to(run.device, torch.float64)
        V = published_normal(s.inputs, s.hidden, 0, s.std, s.seed).to(run.device, torch.float64)
        rates = torch.tensor(s.rates, dtype=torch.float64, device=run.device)
        steps = record_steps(s.steps * (2 if activation == "sigmoid" else 1), s.per_decade)
        stack = U.expand(len(rates), -1, -1)  # one member per step size
        path = gradient_descent(stack, V, Y, activation, rates, steps)
        Q, scale, loss = [], [], []
        for U, V in run.progress(path, total=len(steps), desc=activation):
            Q.append(conserved_quantity(U, V, activation))
            scale.append(quantity_scale(U, V, activation))
            loss.append(two_layer_loss(U, V, Y, activation))
        return {"steps": steps, **{k: torch.stack(v, -1) for k, v in {"Q": Q, "scale": scale, "loss": loss}.items()}}

    arrays, metrics = {}, {}
    for activation, part in run.parts(train, {name: name for name in s.activations})[0].items():
        arrays |= {f"{activation}_{name}": array for name, array in part.items()}
        drift, control = drifts(part["Q"], part["scale"])
        at = equal_time(part["steps"], s.rates)
        drift_at, control_at = (np.abs(x[np.arange(len(at)), at]) for x in (drift, control))
        metrics[activation] = {
            "Q_start": part["Q"][0, 0],
            "drift_end": drift[:, -1],
            "final_loss": part["loss"][:, -1],
            "drift_at_equal_time": drift_at,
            "control_at_equal_time": control_at,
            # 1: the drift is proportional to the step size; 0: it does not depend on it
            "order_in_step_size": np.polyfit(np.log(s.rates), np.log(drift_at), 1)[0],
            "control_order": np.polyfit(np.log(s.rates), np.log(control_at), 1)[0],
        }
    return Outcome(metrics, arrays, seeds=[s.seed])


def drifts(Q, scale):
    """Figure 3's ΔQ̃ (rates, records), and the same for the added terms."""
    unit = scale[:, :1]
    return (np.abs(Q) - np.abs(Q[:, :1])) / unit, (scale - unit) / unit


def equal_time(steps, rates):
    """For each step size the record at the flow time that the smallest one reaches at the end."""
    times = steps[-1] * min(rates) / np.array(rates)
    return np.abs(steps - times[:, None]).argmin(1)


def judge(outcome):
    m = outcome.metrics
    orders = [v["order_in_step_size"] for v in m.values()]
    conserved = [abs(order - 1) < 0.1 for order in orders]
    details = [
        f"{name}: Q drifts by {abs(v['drift_at_equal_time'][0]):.1e} at the largest step size, as its power "
        f"{v['order_in_step_size']:.2f}; the control (terms added, not subtracted) moves by "
        f"{abs(v['control_at_equal_time'][0]):.2g}, as its power {v['control_order']:.2f}."
        for name, v in m.items()
    ]
    powers = f"{min(orders):.2f} to {max(orders):.2f}"
    sentence = f"Under gradient descent Q drifts in proportion to the step size to the power {powers}, which is what a "
    sentence += "first-order method leaves of a quantity that its flow conserves."
    word = grade(all(conserved), any(conserved))
    return Verdict(word, "not for every activation", sentence, details, f"drift ∝ step size to the power {powers}")


def plot(outcome, s, save):
    save(plot_dynamics(outcome, s))
    save(plot_controls(outcome, s), "controls")


def plot_dynamics(outcome, s):
    """Figure 3: the drift of Q and the loss against training steps."""
    figure, axes = plots.panels(2, len(s.activations), height=2.4, sharex="col")
    for (top, bottom), activation in zip(axes.T, s.activations):
        steps, Q, scale, loss = (outcome.arrays[f"{activation}_{name}"] for name in ("steps", "Q", "scale", "loss"))
        for i, (rate, drift) in enumerate(zip(s.rates, drifts(Q, scale)[0])):
            top.plot(steps, drift, label=f"lr = {rate:g}", **plots.style(i))
            bottom.plot(steps, loss[i], **plots.style(i))
        top.set_title(activation)
        top.ticklabel_format(axis="y", scilimits=(0, 0))
        bottom.set(xlabel="Training steps", yscale="log")
        bottom.ticklabel_format(axis="x", scilimits=(0, 0))
    axes[0, 0].set_ylabel(r"$\Delta\tilde Q$")
    axes[1, 0].set_ylabel("Loss")
    axes[0, 0].legend()
    return figure


def plot_controls(outcome, s):
    """The drift at equal flow time, and that of the terms added, which nothing conserves."""
    figure, (axes,) = plots.panels(1, len(s.activations), sharey=True)
    for ax, activation in zip(axes, s.activations):
        steps, Q, scale = (outcome.arrays[f"{activation}_{name}"] for name in ("steps", "Q", "scale"))
        drift, control = drifts(Q, scale)
        for i, rate in enumerate(s.rates):
            label = rf"$|\Delta\tilde Q|$, lr = {rate:g}"
            ax.plot(rate * steps[1:], np.abs(drift[i, 1:]), label=label, **plots.style(i))
        for i, rate in enumerate(s.rates):
            label = "control: terms added" if i == 0 else None
            ax.plot(rate * steps[1:], np.abs(control[i, 1:]), label=label, color="0.6", linewidth=1)
        ax.set(xlabel="Flow time: step size × steps", xscale="log", yscale="log", title=activation)
    axes[0].set_ylabel("Relative change since the start")
    axes[-1].legend(fontsize=7)
    return figure


def report(outcome, s):
    rows = []
    for activation in s.activations:
        m = outcome.metrics[activation]
        for i, rate in enumerate(s.rates):
            columns = ("final_loss", "drift_end", "drift_at_equal_time", "control_at_equal_time")
            rows.append([activation, f"{rate:g}", *(f"{m[c][i]:.3g}" for c in columns)])
        rows[-1].append(f"{m['order_in_step_size']:.2f}")
    header = ["σ", "lr", "final loss", "ΔQ̃ at end", "ΔQ̃ at equal time", "control at equal time", "order in lr"]
    return table(header, [row + [""] * (len(header) - len(row)) for row in rows])


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
