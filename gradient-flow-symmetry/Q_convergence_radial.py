"""ICLR 2023, Figure 7: convergence of radial networks U σ(Vᵀ), σ(v) = v / ‖v‖², from starts with different Q.

U and V start diagonal in the singular basis of Y, with entries of mean and standard deviation c. The output does not
depend on c (scaling U and V together is a symmetry of this network), so all runs start from the same loss and differ in
Q = Tr(UᵀU + VᵀV), proportional to c², alone. The check, in a second figure: scaling U and V by c slows gradient flow
down by c² exactly, so that over flow time divided by Q all loss curves are one.

All starts train as one stack, in float64 from the published float32 numbers.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conserved import conserved_quantity, crossing, gradient_descent, published_normal, record_steps, two_layer_loss

from common import cli, plots
from common.claims import Claim, Verdict, grade, table
from common.run import Outcome

CLAIM = Claim(
    order=140,
    figure="Q and convergence, radial (ICLR 2023, Figure 7)",
    paper="ICLR 2023",
    section="",
    says="The rate of convergence is related to Q.",
    short="Q sets the rate of convergence (radial)",
    rule="holds if the time to reduce the loss is proportional to Q, within 10 %.",
    dated="2026-11-22",
)


@dataclass(frozen=True)
class Settings:
    steps: int = 1_000_000
    scales: tuple = (0.01, 0.1, 1.0, 10.0)  # c: mean and standard deviation
    lr: float = 1e-5
    reduction: float = 0.1  # the table counts steps until the loss has fallen by this factor
    outputs: int = 5  # m
    inputs: int = 10  # n
    hidden: int = 5  # h
    per_decade: int = 100  # recorded steps
    seed: int = 12345


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, steps=10_000, per_decade=10),
    "quick": replace(PAPER, steps=100_000),
    "paper": PAPER,
}


def experiment(run):
    s = run.settings

    def train(_):
        Y, U, V = start(s)
        Y, U, V = (W.to(run.device, torch.float64) for W in (Y, U, V))
        steps = record_steps(s.steps, s.per_decade)
        path = gradient_descent(U, V, Y, "radial", s.lr, steps)
        Q, loss = [], []
        for U, V in run.progress(path, total=len(steps)):
            Q.append(conserved_quantity(U, V, "radial"))
            loss.append(two_layer_loss(U, V, Y, "radial").square() / Y.numel() / Y.norm())
        return {"steps": steps, "Q": torch.stack(Q, -1), "loss": torch.stack(loss, -1)}

    arrays = run.parts(train, {"radial": "radial"})[0]["radial"]
    steps, Q, loss = arrays["steps"], arrays["Q"], arrays["loss"]
    reached = [crossing(steps, row, s.reduction * row[0]) for row in loss]
    metrics = {
        "Q_start": Q[:, 0],
        "Q_relative_drift": Q[:, -1] / Q[:, 0] - 1,
        "loss_start": loss[:, 0],
        "loss_end": loss[:, -1],
        "steps_to_reduction": reached,
        "flow_time_over_Q": [t * s.lr / q for t, q in zip(reached, Q[:, 0])],
    }
    return Outcome(metrics, arrays, seeds=[s.seed])


def start(s):
    """Y (m, n) and the stacks U (·, m, h), V (·, n, h) over the scales, float32 as published."""
    Y = published_normal(s.outputs, s.inputs, 0, 1, s.seed)
    phi, _, psi = torch.linalg.svd(Y)  # Y = phi diag psi
    U, V = (
        torch.stack([published_normal(rows, s.hidden, c, c, s.seed) * torch.eye(rows, s.hidden) for c in s.scales])
        for rows in (s.outputs, s.inputs)
    )
    return Y, phi @ U, psi.T @ V


def judge(outcome):
    m = outcome.metrics
    times = [t for t in m["flow_time_over_Q"] if t > 0]  # NaN where it does not converge
    ratio = f"{min(times):.3f} to {max(times):.3f}" if times else "none"
    return Verdict(
        grade(len(times) > 1 and max(times) < 1.1 * min(times), False),
        "not in proportion",
        f"All starts compute the same function, and the time to converge is proportional to Q: flow time / Q = {ratio} "
        f"over Q = {m['Q_start'][0]:.2g} to {m['Q_start'][max(len(times) - 1, 0)]:.2g}; Q = {m['Q_start'][-1]:.4g} "
        f"{'does not converge in time' if math.isnan(m['steps_to_reduction'][-1]) else 'converges'}.",
        number=f"flow time / Q = {ratio}",
    )


def plot(outcome, s, save):
    """Figure 7; and the check, over flow time divided by Q."""
    steps, Q, loss = (outcome.arrays[name] for name in ("steps", "Q", "loss"))
    figure, ((ax,),) = plots.panels(height=3.1)
    check, ((scaled,),) = plots.panels(height=3.1)
    for i in range(len(s.scales)):
        label = f"Q = {Q[i, 0]:.4g}"
        ax.plot(steps, loss[i], label=label, **plots.style(i))
        scaled.plot(steps[1:] * s.lr / Q[i, 0], loss[i, 1:], label=label, **plots.style(i))
    ax.set(xlabel="Training steps")
    ax.ticklabel_format(axis="x", scilimits=(0, 0))
    scaled.set(xlabel="Flow time / Q", xscale="log")
    for axes in (ax, scaled):
        axes.set(ylabel="Loss", yscale="log", ylim=(1e-12, 1))
        axes.legend()
    save(figure)
    save(check, "controls")


def report(outcome, s):
    m = outcome.metrics
    rows = []
    for i, c in enumerate(s.scales):
        steps, ratio = m["steps_to_reduction"][i], m["flow_time_over_Q"][i]
        counted = ["not reached", ""] if math.isnan(steps) else [f"{steps:.4g}", f"{ratio:.4g}"]
        columns = (m[key][i] for key in ("Q_start", "Q_relative_drift", "loss_start", "loss_end"))
        rows.append([f"{c:g}", *(f"{x:.4g}" for x in columns), *counted])
    header = ["c", "Q", "its drift", "loss at start", "at end", f"steps to × {s.reduction:g}", "flow time / Q"]
    return table(header, rows)


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
