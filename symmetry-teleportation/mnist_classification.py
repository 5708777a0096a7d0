"""Paper B (arXiv 2205.10637), Section 6.3: teleportation in MNIST classification, SGD and AdaGrad.

A 784-16-10-10 and a wide 784-128-128-10 network; before the first mini-batch of each of the first epochs the weights
are teleported on a fresh random batch. The code of this experiment was not published: data, initialization, learning
rates and mini-batches of 20 are paper A's, the published teleport is the one of paper B's regression. The arms:

  plain       the optimizer alone; "lr x3": three times its learning rate
  published   post-activation action with I − T for the inverse and stale hidden layers, on 200 (wide: 100) samples
  exact       the exact post-activation action, on as many samples as it is exact for: 16 (wide: 100)
  rescaling   positive rescaling, exact on every input, on the published arm's samples

Ascent is unstable at fixed rates (‖∂L/∂W‖² has no maximum on these orbits), so every teleport climbs in small adaptive
steps until the batch's ‖∂L/∂W‖² is up fourfold. An exact action keeps the loss of its batch; what it does to the whole
training set's is reported beside. Optimizer state is kept. All arms and seeds are members of one stacked network and
see the same mini-batches. Seconds are per run: the member's share of the stack's time, plus its own teleports.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, plots
from common.claims import Claim, Verdict, grade, interval, listed, table
from common.data import published_split
from common.losses import batch_loss
from common.mlp import StackedMLP, initial_weights, published_seeds
from common.published import teleport_postactivation
from common.run import Outcome
from common.statistics import difference, mean_std, verdict
from teleport import (
    Teleportation,
    leaky_relu,
    postactivation_action,
    rescaling_action,
    squared_gradient_norm,
    teleport,
)

CLAIM = Claim(
    order=90,
    figure="MNIST classification (NeurIPS 2022)",
    paper="NeurIPS 2022",
    section="",
    says="Teleports in the first epochs accelerate SGD and AdaGrad.",
    short="teleporting accelerates classification",
    rule="holds if exact teleports lower the final training loss of every network and optimizer, and more than a "
    "threefold learning rate does; in part: lower it for some.",
    dated="2026-11-22",
)

ARMS = ("plain", "lr x3", "published", "exact", "rescaling")
TELEPORTING = ("published", "exact", "rescaling")
NETWORKS = {"narrow": (16, 10), "wide": (128, 128)}
SAMPLES = {"narrow": 200, "wide": 100}  # in a teleport's batch; exact: no more than the hidden layers before the last
OPTIMIZERS = {"SGD": 1e-2, "AdaGrad": 1e-2}
ACTIVATION = leaky_relu(0.1)


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 3
    epochs: int = 6
    networks: tuple = tuple(NETWORKS)
    teleport_epochs: tuple = (0, 1, 2)
    growth: float = 4.0  # of ‖∂L/∂W‖² in a teleport
    ascent_steps: int = 60  # at most
    batch: int = 20
    samples: int | None = None  # train on the first samples only


PRESETS = {
    "tiny": Settings(seeds=2, epochs=2, networks=("narrow",), teleport_epochs=(0, 1), ascent_steps=15, samples=400),
    "quick": Settings(),
    "paper": Settings(dataset="MNIST", seeds=5, epochs=10),
}


def experiment(run):
    s, data = run.settings, published_split(run.data())
    seeds = published_seeds(s.seeds)
    keys = [f"{network}_{optimizer}" for network in s.networks for optimizer in OPTIMIZERS]
    parts, _ = run.parts(lambda key: train(run, *key.split("_"), seeds, data), {key: key for key in keys})
    arrays = {f"{key}/{k}": v for key, part in parts.items() for k, v in part.items() if k != "seconds"}
    timings = {key: dict(zip(ARMS, part["seconds"].tolist())) for key, part in parts.items()}
    return Outcome({key: compare(s, part) for key, part in parts.items()}, arrays, seeds, timings)


def train(run, network, optimizer, seeds, data):
    """All arms (A) and seeds (S) of one network and optimizer. Curves are (A, S, epochs), seconds (A, epochs)."""
    s, A, S = run.settings, len(ARMS), len(seeds)
    x, y = data.x[: s.samples], data.y[: s.samples]
    W = initial_weights((x.shape[1], *NETWORKS[network], 10), seeds, run.device)
    rates = OPTIMIZERS[optimizer] * torch.tensor([3.0 if arm == "lr x3" else 1.0 for arm in ARMS])
    net = StackedMLP(tuple(V.repeat(A, 1, 1) for V in W), optimizer, rates.repeat_interleave(S).to(run.device))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each run draws its own teleport batches
    n = SAMPLES[network]
    # Of each teleport, before and after: loss and ‖∂L/∂W‖² on its batch, loss on the whole training set.
    teleports = torch.zeros(A, S, len(s.teleport_epochs), 3, 2, dtype=torch.float64)
    seconds, training = torch.zeros(A, dtype=torch.float64), 0.0

    def teleport_arms(count):
        rows = torch.stack([torch.randperm(len(x), generator=g)[:n] for g in generators]).to(run.device)
        teleports[:, :, count, 2, 0] = net.evaluate(x, y)[0].unflatten(0, (A, S))
        for a, arm in enumerate(ARMS):
            if arm not in TELEPORTING:
                continue
            start, members = time.perf_counter(), slice(a * S, (a + 1) * S)
            # The post-activation action is exact up to the width of each hidden layer that is an input of another.
            mine = rows[:, : min(n, *NETWORKS[network][:-1])] if arm == "exact" else rows
            weights = tuple(V[members].double() for V in net.weights)
            moved = climb(s, arm, weights, x[mine].mT.double(), y[mine])
            net.set(members, tuple(V.float() for V in moved.weights))
            seconds[a] += time.perf_counter() - start
            teleports[a, :, count, 0] = torch.stack([moved.loss_before, moved.loss_after], -1)
            teleports[a, :, count, 1] = torch.stack([moved.objective_before, moved.objective_after], -1)
        teleports[:, :, count, 2, 1] = net.evaluate(x, y)[0].unflatten(0, (A, S))

    curves = {key: [] for key in ("train_loss", "test_loss", "test_accuracy", "seconds")}
    for epoch in run.progress(range(s.epochs), desc=f"{network} {optimizer}", unit="epoch"):
        if epoch in s.teleport_epochs:
            teleport_arms(s.teleport_epochs.index(epoch))
        start = time.perf_counter()
        curves["train_loss"].append(net.train_epoch(x, y, s.batch))
        training += (time.perf_counter() - start) / net.members
        for key, value in zip(("test_loss", "test_accuracy"), net.evaluate(data.x_test, data.y_test)):
            curves[key].append(value)
        curves["seconds"].append(training + seconds / S)
    elapsed = torch.stack(curves.pop("seconds"), -1)
    curves = {key: torch.stack(value, -1).unflatten(0, (A, S)) for key, value in curves.items()}
    return {**curves, "teleports": teleports, "seconds": elapsed}


def climb(s, arm, weights, X, labels):
    """One teleport of S runs, each on its batch X (S, d_0, n), labels (S, n): ascent until ‖∂L/∂W‖² is up fourfold.

    A step that raises it by more than half, or not at all, is taken back and tried again at a quarter of the rate. The
    published teleport may also lower it.
    """
    loss_fn = batch_loss(X, labels, ACTIVATION)

    def step(weights, lr):
        if arm == "published":
            options = dict(activation=ACTIVATION, lr=lr[:, None, None], steps=1, x_inverse=X_inverse)
            return teleport_postactivation(weights, X, loss_fn, **options)
        action = {"exact": postactivation_action, "rescaling": rescaling_action}[arm]
        options = dict(objective=squared_gradient_norm, action=action, activation=ACTIVATION)
        return teleport(weights, X, loss_fn, lr=lr, steps=1, **options)

    X_inverse = torch.linalg.pinv(X) if arm == "published" else None
    lowest = 0.5 if arm == "published" else 1.0  # its first step discards what the batch does not show of the weights
    start = value = squared_gradient_norm(weights, loss_fn)
    loss_before = loss_fn(weights)
    lr = torch.full_like(value, 1e-3)
    for _ in range(s.ascent_steps):
        going = value < s.growth * start
        if not going.any():
            break
        try:
            moved = step(weights, torch.where(going, lr, 0))
        except ValueError:  # much too far: a singular element
            lr = lr / 4
            continue
        ratio = moved.objective_after / value
        accepted = going & (ratio > lowest) & (ratio < 1.5)
        weights = tuple(torch.where(accepted[:, None, None], M, V) for M, V in zip(moved.weights, weights))
        value = torch.where(accepted, moved.objective_after, value)
        lr = torch.where(accepted, lr * 3, lr / 4)
    return Teleportation(weights, loss_before, loss_fn(weights), start, value)


def compare(s, part):
    metrics = {}
    for a, arm in enumerate(ARMS):
        loss, gradient, whole = part["teleports"][a].transpose(2, 0, 1, 3)  # (S, teleports, 2) each
        metrics[arm] = {
            "final_train_loss": part["train_loss"][a, :, -1],
            "final_test_loss": part["test_loss"][a, :, -1],
            "final_test_accuracy": part["test_accuracy"][a, :, -1],
            "train_loss_minus_plain": difference(part["train_loss"][a, :, -1], part["train_loss"][0, :, -1]),
            "train_loss_minus_plain_after_teleports": difference(
                *(part["train_loss"][i, :, max(s.teleport_epochs)] for i in (a, 0))
            ),
        }
        if arm in TELEPORTING:
            metrics[arm] |= {
                "largest_relative_drift": np.abs(loss[..., 1] / loss[..., 0] - 1).max(),
                "whole_loss_drift": whole[..., 1] / whole[..., 0] - 1,
                "growth": gradient[..., 1] / gradient[..., 0],
            }
    return metrics


def judge(*outcomes):
    details, better, beyond, exact = [], [], [], []
    for r in outcomes:
        for network, m in r.metrics.items():
            change = {arm: m[arm]["train_loss_minus_plain"] for arm in m if arm != "plain"}
            name = network.replace("_", " ")
            faster = difference(m["exact"]["final_train_loss"], m["lr x3"]["final_train_loss"])
            better += [name] if verdict(change["exact"]) == "better" else []
            beyond += [name] if verdict(faster) == "better" else []
            exact.append(f"{name} {change['exact'][0]:+.3f} (learning rate ×3: {change['lr x3'][0]:+.3f})")
            cells = ", ".join(f"{arm} {interval(v)} ({verdict(v)})" for arm, v in change.items())
            drift = ", ".join(
                f"{a} {m[a]['largest_relative_drift']:.0e} ({np.abs(m[a]['whole_loss_drift']).max():.0e})"
                for a in ("published", "exact", "rescaling")
            )
            details.append(
                f"{r.label}, {name}, final training loss minus plain: {cells}. Drift on the teleport's batch (the "
                f"whole training set): {drift}."
            )
    return Verdict(
        grade(len(better) == len(beyond) == len(exact), better),
        f"{listed(better)} only, and less than a threefold learning rate does" if better else "nowhere",
        f"Final training loss with exact teleports minus without: {', '.join(exact)}.",
        details,
    )


def plot(outcome, s, save):
    for x_axis in ("epoch", "seconds"):
        figure, axes = plots.panels(1, len(outcome.metrics), width=3.5, height=3.3)
        for ax, key in zip(axes[0], outcome.metrics):
            for a, arm in enumerate(ARMS):
                curve = outcome.arrays[f"{key}/train_loss"][a]
                x = range(1, s.epochs + 1) if x_axis == "epoch" else outcome.timings[key][arm]
                look = dict(plots.style(a, marker=True), markevery=(a * s.epochs // 25, max(1, s.epochs // 5)))
                plots.band(ax, x, curve, arm, **dict(look, linewidth=1.2))
            ax.set(title=key.replace("_", ", "), xlabel="epoch" if x_axis == "epoch" else "seconds a run")
            plots.log_loss(ax)
        axes[0, 0].set_ylabel(f"training loss, {outcome.label}")
        axes[0, -1].legend(fontsize=8)
        save(figure, "" if x_axis == "epoch" else "seconds")
    save(plot_drift(outcome), "drift")


def plot_drift(outcome):
    """What each teleport did to the loss of the whole training set, and of its own batch."""
    figure, axes = plots.panels(1, len(outcome.metrics), width=3.5, height=2.6, sharey=True)
    for ax, key in zip(axes[0], outcome.metrics):
        loss, _, whole = np.moveaxis(outcome.arrays[f"{key}/teleports"], 3, 0)
        for row, arm in enumerate(TELEPORTING):
            a = ARMS.index(arm)
            for values, filled, shift in ((whole[a], True, -0.15), (loss[a], False, 0.15)):
                drift = np.abs(values[..., 1] / values[..., 0] - 1).clip(1e-16)
                look = dict(plots.style(a, marker=True), linestyle="none", alpha=0.8)
                look["markerfacecolor"] = look["color"] if filled else "none"
                ax.plot(drift.ravel(), np.full(drift.size, row + shift), **look)
        ax.set(title=key.replace("_", ", "), xscale="log", xlabel="|relative change of the loss|")
        ax.set_yticks(range(len(TELEPORTING)), TELEPORTING)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_ylabel("filled: training set\nopen: the batch")
    return figure


def report(outcome, s):
    rows = []
    for key, metrics in outcome.metrics.items():
        for a, arm in enumerate(ARMS):
            m = metrics[arm]
            teleported, against = ["", "", ""], ["", ""]
            if arm in TELEPORTING:
                whole = np.abs(m["whole_loss_drift"]).max()
                teleported = [f"×{np.mean(m['growth']):.1f}", f"{m['largest_relative_drift']:.0e}", f"{whole:.0e}"]
            if a:
                against = [interval(m["train_loss_minus_plain"]), verdict(m["train_loss_minus_plain"])]
            accuracy = f"{100 * np.mean(m['final_test_accuracy']):.1f} %"
            seconds = f"{outcome.timings[key][arm][-1]:.2f}"
            name = f"{key.replace('_', ', ')}, {arm}"
            rows.append([name, *teleported, mean_std(m["final_train_loss"]), *against, accuracy, seconds])
    header = ["", "‖∂L/∂W‖²", "drift, batch", "training set", f"training loss, epoch {s.epochs}", "minus plain [95 %]"]
    return table([*header, "", "test accuracy", "s a run"], rows)


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
