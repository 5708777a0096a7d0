"""Teleportation in MNIST classification, SGD and AdaGrad: NeurIPS 2022 (arXiv 2205.10637).

A 784-16-10-10 and a wide 784-128-128-10 network; before the first mini-batch of each of the first epochs the weights
are teleported on a fresh random batch. The code of this experiment was not published: data, initialization, learning
rates and mini-batches of 20 are those of ICLR 2024, the published teleport is the one of this paper's regression. The
arms:

  baseline        the optimizer alone; "lr x3": three times its learning rate
  published       post-activation action with I − T for the inverse and stale hidden layers, on 200 (wide: 100) samples
  postactivation  the true post-activation action (Eq. 8), on as many samples as it is exact for: 16 (wide: 100)
  rescaling       positive rescaling, exact on every input, on the published arm's samples

Ascent is unstable at fixed rates (‖∂L/∂W‖² has no maximum on these orbits), so every teleport climbs in small adaptive
steps until the batch's ‖∂L/∂W‖² is up fourfold. An exact action keeps the loss of its batch; what it does to the whole
training set's is reported beside. Optimizer state is kept. All arms and seeds are members of one stacked network and
see the same mini-batches. Seconds are per run: the member's share of the stack's time, plus its own teleports.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, plots
from common.arms import Arm, Stack, draw_batches
from common.claims import Claim, Verdict, change, except_for, grade, graded, settle, table
from common.data import published_split
from common.losses import batch_loss
from common.mlp import initial_weights, published_seeds
from common.published import teleport_postactivation
from common.run import Outcome
from common.statistics import compare as compared
from common.statistics import family, mean_std
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
    rule="holds if for every network and optimizer exact teleports have a better mean log training loss over the "
    "epochs than the baseline and than a threefold learning rate; in part: than the baseline, for some. Paired by "
    "seed; margin 1 %; Holm over networks, optimizers and both comparisons. The rates are ICLR 2024's, not tuned.",
    dated="2026-11-25",
)
BEFORE = (
    "Under the rule of 2026-11-22 (final training loss): in part, for the wide network only, and less than a threefold "
    "learning rate does."
)

ARMS = ("baseline", "lr x3", "published", "postactivation", "rescaling")
TELEPORTING = ("published", "postactivation", "rescaling")
NETWORKS = {"narrow": (16, 10), "wide": (128, 128)}  # ours: the first is that of ICLR 2024
SAMPLES = {"narrow": 200, "wide": 100}  # in a teleport's batch
OPTIMIZERS = {"SGD": 1e-2, "AdaGrad": 1e-2}  # learning rates of ICLR 2024
ACTIVATION = leaky_relu(0.1)


@dataclass(frozen=True)
class Settings:
    dataset: str = "MNIST"
    seeds: int = 5
    epochs: int = 10
    networks: tuple = tuple(NETWORKS)
    teleport_epochs: tuple = (0, 1, 2)
    growth: float = 4.0  # of ‖∂L/∂W‖² in a teleport
    ascent_steps: int = 60  # at most
    batch: int = 20
    samples: int | None = None  # train on the first samples only


PAPER = Settings()
QUICK = replace(PAPER, dataset="mnist-mini", seeds=3, epochs=6)
SMALL = dict(seeds=2, epochs=2, networks=("narrow",), teleport_epochs=(0, 1), ascent_steps=15, samples=400)
PRESETS = {"tiny": replace(QUICK, **SMALL), "quick": QUICK, "paper": PAPER}


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    seeds = published_seeds(s.seeds)
    keys = [f"{network}_{optimizer}" for network in s.networks for optimizer in OPTIMIZERS]
    parts, _ = run.parts(lambda key: train(run, *key.split("_"), seeds, data), {key: key for key in keys})
    arrays = {f"{key}/{k}": v for key, part in parts.items() for k, v in part.items() if k != "seconds"}
    timings = {key: dict(zip(ARMS, part["seconds"].tolist())) for key, part in parts.items()}
    return Outcome({key: compare(s, part) for key, part in parts.items()}, arrays, seeds, timings)


def arms(s, widths):
    """Who is moved, and how. Up to the width of its input, the post-activation action is exact."""
    return (
        Arm("baseline"),
        Arm("lr x3", rate=3.0),
        Arm("published", partial(climb, s, "published")),
        Arm("postactivation", lambda W, X, y: climb(s, "postactivation", W, *first(X, y, min(widths[:-1])))),
        Arm("rescaling", partial(climb, s, "rescaling")),
    )


def first(X, labels, samples):
    return X[..., :samples], labels[..., :samples]


def train(run, network, optimizer, seeds, data):
    """All arms (A) and seeds (S) of one network and optimizer. Curves are (A, S, epochs), seconds (A, epochs)."""
    s, widths = run.settings, NETWORKS[network]
    W, moves = initial_weights((data.features, *widths, 10), seeds, run.device), len(s.teleport_epochs)
    stack = Stack(arms(s, widths), W, optimizer, OPTIMIZERS[optimizer], moves)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each run draws its own teleport batches
    whole = torch.zeros(*stack.loss.shape, dtype=torch.float64)  # loss on the whole training set

    def before(k, i):
        """Before mini-batch i of the k-th epoch with a teleport."""
        if i == 0:
            X, labels = draw_batches(data.x, data.y, SAMPLES[network], generators)
            whole[..., k, 0] = stack.evaluate(data.x, data.y)[0]
            stack.move(k, X.double(), labels, dtype=torch.float64)
            whole[..., k, 1] = stack.evaluate(data.x, data.y)[0]

    at = {epoch: partial(before, k) for k, epoch in enumerate(s.teleport_epochs)}
    curves = stack.train(run, data, s.epochs, s.batch, at, desc=f"{network} {optimizer}")
    return {**curves, "teleports": torch.stack([stack.loss, stack.objective, whole], -2)}


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
        action = {"postactivation": postactivation_action, "rescaling": rescaling_action}[arm]
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
        }
        if arm in TELEPORTING:
            metrics[arm] |= {
                "largest_relative_drift": np.abs(loss[..., 1] / loss[..., 0] - 1).max(),
                "whole_loss_drift": whole[..., 1] / whole[..., 0] - 1,
                "growth": gradient[..., 1] / gradient[..., 0],
            }
    return metrics


def effects(outcomes):
    """{(label, case, arm, other): Comparison} of the mean log training loss: the exact teleport against the baseline
    and a threefold rate is the claim's family, the other arms against the baseline another."""
    numbers, found = {}, {}
    for r in outcomes:
        for case in r.metrics:
            for a, arm in enumerate(ARMS):
                numbers[r.label, case, arm] = np.log(r.arrays[f"{case}/train_loss"][a].astype(float)).mean(-1)
    cases = list(dict.fromkeys(key[:2] for key in numbers))
    claimed = [(*case, "postactivation", other) for case in cases for other in ("baseline", "lr x3")]
    others = [(*case, arm, "baseline") for case in cases for arm in ("lr x3", "published", "rescaling")]
    for members in (claimed, others):
        each = [compared(numbers[r, case, a], numbers[r, case, b], relative=False) for r, case, a, b in members]
        found |= dict(zip(members, family(each)))
    return found


def judge(*outcomes):
    found = effects(outcomes)
    cases = {key[:2]: key[1].replace("_", " ") for key in found}
    gains = {case: [found[(*case, "postactivation", other)] for other in ("baseline", "lr x3")] for case in cases}
    settled = {cases[case]: settle([gain.word]) for case, (gain, _) in gains.items()}
    beyond = all(settle([c.word for c in both]) for both in gains.values())
    pairs = ((cases[case], change(gain), change(rate)) for case, (gain, rate) in gains.items())
    said = "; ".join(f"{name} {gain}, against a threefold rate {rate}" for name, gain, rate in pairs)
    word = grade(beyond, True) if any(settled.values()) else graded(list(settled.values()))
    limits = except_for(settled) + (", and not beyond a threefold learning rate" if any(settled.values()) else "")
    details = [BEFORE, *(line for r in outcomes for line in detail(r, found))]
    return Verdict(word, limits, f"Training loss with exact teleports against without: {said}.", details)


def detail(r, found):
    for case, m in r.metrics.items():
        others = (
            f"{arm} {change(found[r.label, case, arm, 'baseline'])}" for arm in ("lr x3", "published", "rescaling")
        )
        drift = ", ".join(
            f"{a} {m[a]['largest_relative_drift']:.0e} ({np.abs(m[a]['whole_loss_drift']).max():.0e})"
            for a in TELEPORTING
        )
        yield (
            f"{r.label}, {case.replace('_', ' ')}, {len(r.seeds)} runs, training loss against the baseline's: "
            f"{'; '.join(others)}. Drift on the teleport's batch (the whole training set): {drift}."
        )


def plot(outcome, s, save):
    for x_axis, name in (("epoch", ""), ("seconds", "seconds")):
        save(plot_curves(outcome, s, x_axis, ("baseline", "published")), name)
    save(plot_curves(outcome, s, "epoch", ARMS), "controls")
    save(plot_drift(outcome), "drift")


def plot_curves(outcome, s, x_axis, shown):
    """Training loss against epoch or seconds: the paper's two arms, or all."""
    figure, axes = plots.panels(1, len(outcome.metrics), width=3.5, height=3.3)
    for ax, key in zip(axes[0], outcome.metrics):
        for arm in shown:
            a = ARMS.index(arm)
            x = range(1, s.epochs + 1) if x_axis == "epoch" else outcome.timings[key][arm]
            look = plots.marked(a, s.epochs) | {"linewidth": 1.2}
            plots.band(ax, x, outcome.arrays[f"{key}/train_loss"][a], arm, **look)
        ax.set(title=key.replace("_", ", "), xlabel="epoch" if x_axis == "epoch" else "seconds a run")
        plots.log_loss(ax)
    axes[0, 0].set_ylabel(f"training loss, {outcome.label}")
    axes[0, -1].legend(fontsize=8)
    return figure


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
    axes[0, 0].set_ylim(len(TELEPORTING) - 0.5, -0.5)
    axes[0, 0].set_ylabel("filled: training set\nopen: the batch")
    return figure


def report(outcome, s):
    rows, found = [], effects([outcome])
    for key, metrics in outcome.metrics.items():
        for a, arm in enumerate(ARMS):
            m = metrics[arm]
            teleported, against = ["", "", ""], ""
            if arm in TELEPORTING:
                whole = np.abs(m["whole_loss_drift"]).max()
                teleported = [f"×{np.mean(m['growth']):.1f}", f"{m['largest_relative_drift']:.0e}", f"{whole:.0e}"]
            if a:
                against = change(found[outcome.label, key, arm, "baseline"])
            accuracy = f"{100 * np.mean(m['final_test_accuracy']):.1f} %"
            seconds = f"{outcome.timings[key][arm][-1]:.2f}"
            name = f"{key.replace('_', ', ')}, {arm}"
            rows.append([name, *teleported, mean_std(m["final_train_loss"]), against, accuracy, seconds])
    header = [
        "",
        "‖∂L/∂W‖²",
        "drift, batch",
        "training set",
        f"training loss, epoch {s.epochs}",
        "mean log loss against baseline's [95 %]",
    ]
    return table([*header, "test accuracy", "s a run"], rows)


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
