"""Teleportation with standard optimizers: Figures 5 and 13 of paper A (arXiv 2305.13404, Section 5.1).

Each optimizer trains a 784-16-10-10 network; eight times, before the first mini-batches of one epoch, the weights are
teleported: gradient ascent on ‖∂L/∂W‖² over the group, on a fresh batch of 200 (Algorithm 1, Eq. 8). The arms:

  baseline    the optimizer alone
  published   the published teleport, which moves the loss, with the optimizer built anew after each teleport
  restart     no teleport, the optimizer built anew at the same steps: what the restart does by itself
  teleport    pre-activation action on the true hidden layers, optimizer state kept
  rescaling   positive rescaling, exact on every input, optimizer state kept

All arms, seeds and learning rates (× 1, 3, 10: is teleportation more than a learning rate?) are members of one stacked
network and see the same mini-batches. Seconds are per run: the member's share of the stack's training time, plus its
own teleports; evaluation excluded.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from common import cli, plots, published
from common.claims import Claim, Verdict, grade, interval, listed, mean, table
from common.data import published_split
from common.losses import batch_loss
from common.mlp import StackedMLP, initial_weights, published_seeds
from common.run import Outcome
from common.statistics import difference, mean_std, verdict
from teleport import leaky_relu, preactivation_action, rescaling_action, squared_gradient_norm, teleport

CLAIM = Claim(
    order=10,
    figure="Figures 5 and 13",
    paper="ICLR 2024",
    section="Section 5.1",
    says="Teleporting a few times early in training speeds up AdaGrad, momentum, RMSprop and Adam.",
    short="teleporting early speeds up four optimizers",
    rule="holds if the teleport that keeps the optimizer's state lowers the training loss after epoch 8, at the "
    "published learning rate and at each arm's best, for all four; in part: for some.",
    dated="2026-11-22",
    headline=True,
)

ARMS = ("baseline", "published", "restart", "teleport", "rescaling")
TELEPORTING = ("published", "teleport", "rescaling")
# optimizer: learning rate, epoch of the teleports, learning rate of the ascent (lr_t). CIFAR-10 doubles the first.
OPTIMIZERS = {
    "SGD": (1e-2, 2, 1e-4),
    "AdaGrad": (1e-2, 2, 1e-4),
    "momentum": (1e-3, 0, 5e-2),
    "RMSprop": (1e-4, 0, 5e-2),
    "Adam": (1e-4, 0, 5e-2),
}
ACTIVATION = leaky_relu(0.1)
BOUND = 2.0  # rescaling only: ‖∂L/∂W‖² grows without limit along that orbit, so each unit's total scale per teleport
#              stays within [1/2, 2]


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 5
    epochs: int = 10
    optimizers: tuple = tuple(OPTIMIZERS)
    factors: tuple = (1, 3, 10)  # learning rates, as multiples of the published one
    milestones: tuple = (3, 10)  # epochs after which the arms are compared
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports: int = 8
    teleport_batch: int = 200
    ascent_steps: int = 10
    cap: float = 100.0  # ascent stops once ‖∂L/∂W‖² is above it


PRESETS = {
    "tiny": Settings(
        seeds=2,
        epochs=3,
        optimizers=("AdaGrad", "momentum"),
        milestones=(3,),
        samples=400,
        factors=(1, 3),
        teleports=3,
        ascent_steps=3,
    ),
    "quick": Settings(),
    "paper": Settings(dataset="MNIST", epochs=40, milestones=(3, 8, 40)),
}


def experiment(run):
    s, data = run.settings, published_split(run.data())
    seeds = published_seeds(s.seeds)
    x, y = data.x[: s.samples], data.y[: s.samples]
    parts, _ = run.parts(
        lambda optimizer: train(run, optimizer, seeds, x, y, data.x_test, data.y_test), {o: o for o in s.optimizers}
    )
    arrays = {f"{o}/{k}": v for o, part in parts.items() for k, v in part.items() if not k.startswith("seconds")}
    timings = {o: {arm: parts[o]["seconds"][a].tolist() for a, arm in enumerate(ARMS)} for o in parts}
    return Outcome({o: compare(s, parts[o]) for o in parts}, arrays, seeds, timings)


def train(run, optimizer, seeds, x, y, x_test, y_test):
    """All arms (A), learning rates (F) and seeds (S) of one optimizer. Curves are (A, F, S, epochs + 1)."""
    s = run.settings
    A, F, S = len(ARMS), len(s.factors), len(seeds)
    lr, teleport_epoch, ascent_lr = OPTIMIZERS[optimizer]
    deep = (128, 32, 10) if s.dataset == "CIFAR10" else (16, 10, 10)
    W = initial_weights((x.shape[1], *deep), seeds, x.device)
    W = tuple(w.expand(A, F, *w.shape).flatten(0, 2) for w in W)
    rates = lr * (2 if s.dataset == "CIFAR10" else 1) * torch.tensor(s.factors, dtype=x.dtype, device=x.device)
    net = StackedMLP(W, optimizer, rates.view(1, F, 1).expand(A, F, S).flatten())
    members = {arm: slice(a * F * S, (a + 1) * F * S) for a, arm in enumerate(ARMS)}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each run draws its own teleport batches
    teleports = {key: torch.zeros(A, F, S, s.teleports, 2) for key in ("loss", "gradient_norm")}
    teleport_seconds = torch.zeros(A, dtype=torch.float64)

    def move_arms(count):
        """Before mini-batch `count` of the teleport epoch: teleport the arms that do, restart those that do."""
        if count >= s.teleports:
            return
        rows = torch.stack([torch.randperm(len(x), generator=g)[: s.teleport_batch] for g in generators]).to(x.device)
        X, labels = x[rows].mT, y[rows]  # (S, d_0, n), (S, n)
        for a, arm in enumerate(ARMS):
            start = _clock(x.device)
            if arm in TELEPORTING:
                weights = tuple(w[members[arm]].unflatten(0, (F, S)) for w in net.weights)
                moved = move(arm, weights, X, labels, ascent_lr, s)
                net.set(members[arm], tuple(w.flatten(0, 1) for w in moved.weights))
                teleports["loss"][a, :, :, count] = torch.stack([moved.loss_before, moved.loss_after], -1)
                norms = torch.stack([moved.objective_before, moved.objective_after], -1)
                teleports["gradient_norm"][a, :, :, count] = norms.sqrt()
            if arm in ("published", "restart"):
                net.reset(members[arm])
            teleport_seconds[a] += _clock(x.device) - start

    curves = {key: [] for key in ("train_loss", "test_loss", "test_accuracy", "seconds")}
    training_seconds = 0.0
    for epoch in run.progress(range(s.epochs), desc=optimizer, unit="epoch"):
        start, before = _clock(x.device), teleport_seconds.sum().item()
        curves["train_loss"].append(net.train_epoch(x, y, s.batch, move_arms if epoch == teleport_epoch else None))
        training_seconds += _clock(x.device) - start - (teleport_seconds.sum().item() - before)
        test_loss, test_accuracy = net.evaluate(x_test, y_test)
        curves["test_loss"].append(test_loss)
        curves["test_accuracy"].append(test_accuracy)
        curves["seconds"].append(training_seconds / net.members + teleport_seconds / (F * S))
    seconds = torch.stack(curves.pop("seconds"), -1)
    curves = {key: torch.stack(value, -1).unflatten(0, (A, F, S)) for key, value in curves.items()}
    return {**curves, **{f"teleport_{k}": v for k, v in teleports.items()}, "seconds": seconds}


def move(arm, weights, X, labels, lr, s):
    """One teleport of the members of an arm, weights (F, S, d_m, d_{m-1}), each seed on its own batch X (S, d_0, n)."""
    loss_fn = batch_loss(X, labels, ACTIVATION)
    options = dict(activation=ACTIVATION, lr=lr, steps=s.ascent_steps, cap=s.cap)
    if arm == "published":
        return published.teleport_gradient_norm(weights, X, loss_fn, **options)
    if arm == "rescaling":
        options["bound"] = BOUND
    action = {"teleport": preactivation_action, "rescaling": rescaling_action}[arm]
    return teleport(weights, X, loss_fn, objective=squared_gradient_norm, action=action, **options)


def compare(s, part):
    """Numbers of one optimizer: losses at the milestones, drift, and each arm against the baseline, both at their best
    learning rate of the sweep and at the published one; differences are paired by seed, with 95 % intervals."""
    metrics = {}
    for a, arm in enumerate(ARMS):
        loss = part["teleport_loss"][a]
        metrics[arm] = {
            "largest_relative_drift": _max(abs(loss[..., 1] - loss[..., 0]) / abs(loss[..., 0]).clip(1e-30))
        }
        for key in ("train_loss", "test_loss"):
            for epoch in (e for e in s.milestones if e <= s.epochs):
                mine, base = part[key][a, :, :, epoch - 1], part[key][0, :, :, epoch - 1]  # (F, S)
                metrics[arm][f"{key}_{epoch}"] = {
                    "values": mine,
                    "at_published_rate": difference(mine[0], base[0]),
                    "best_factor": s.factors[_best(mine)],
                    "at_best_rate": difference(mine[_best(mine)], base[_best(base)]),
                }
    return metrics


def _best(values):
    """Index of the learning rate with the smallest mean over seeds; diverged ones never win."""
    mean = torch.as_tensor(values).mean(-1)
    return int(torch.where(mean.isfinite(), mean, torch.inf).argmin())


def _max(values):
    return float(values.max()) if values.size else 0.0


def _clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def judge(outcome):
    m, s = outcome.metrics, outcome.settings
    early, last = s.milestones[-2:][0], s.milestones[-1]

    def triple(optimizer, arm, epoch=early, rate="at_published_rate", key="train_loss"):
        return m[optimizer][arm][f"{key}_{epoch}"][rate]

    def helped(*where):
        return [o for o in m if verdict(triple(o, "teleport", *where)) == "better"]

    claimed = [o for o in m if o != "SGD"]
    both = [o for o in claimed if o in helped() and o in helped(early, "at_best_rate")]
    loss = {arm: mean(m["AdaGrad"][arm][f"train_loss_{early}"]["values"][0]) for arm in m["AdaGrad"]}
    restart, kept = (verdict(triple("AdaGrad", arm)) == "better" for arm in ("restart", "teleport"))
    adagrad = "AdaGrad's gain is the restart of its state" if restart and not kept else "AdaGrad"
    sentence = (
        f"With the optimizer's state kept, teleporting lowers the training loss after epoch {early} for "
        f"{listed(both)} (also at each arm's best learning rate), after epoch {last} for "
        f"{listed(helped(last, 'at_best_rate'))}. {adagrad}: {loss['baseline']:.4f} alone, {loss['restart']:.4f} "
        f"restarted without teleporting, {loss['teleport']:.4f} teleported with its state kept."
    )

    def compare(*where):
        return f"{interval(triple(*where))} ({verdict(triple(*where))})"

    details = []
    for o in m:
        details.append(
            f"{o}, training loss minus baseline's after epoch {early}: restart only {compare(o, 'restart')}, "
            f"published teleport {compare(o, 'published')}, teleport with the optimizer's state kept "
            f"{compare(o, 'teleport')}, rescaling {compare(o, 'rescaling')}; teleport, each arm at its best learning "
            f"rate {compare(o, 'teleport', early, 'at_best_rate')}, after epoch {last} "
            f"{compare(o, 'teleport', last, 'at_best_rate')}, test loss "
            f"{compare(o, 'teleport', last, 'at_best_rate', 'test_loss')}."
        )
    arms, arrays = list(m["AdaGrad"]), outcome.arrays
    for a, arm in enumerate(arms):
        if arm in ("published", "teleport", "rescaling"):
            norms = {o: arrays[f"{o}/teleport_gradient_norm"][a] for o in m}  # (…, [before, after])
            grown = ", ".join(f"{o} {np.nanmedian(n[..., 1] / n[..., 0] - 1):+.1%}" for o, n in norms.items())
            details.append(f"What a teleport does to ‖∂L/∂W‖, {arm}, median: {grown}.")
    drift = {a: max(m[o][a]["largest_relative_drift"] for o in m) for a in ("published", "teleport", "rescaling")}
    details.append(
        "Largest relative drift of one teleport: " + ", ".join(f"{a} {d:.1e}" for a, d in drift.items()) + "."
    )
    limits = f"{listed(both)} only" if both else "none of them"
    return Verdict(grade(len(both) == len(claimed), both), limits, sentence, details)


def plot(outcome, settings, save):
    for x_axis in ("epoch", "seconds"):
        save(plot_curves(outcome, settings, x_axis), {"epoch": "", "seconds": "seconds"}[x_axis])
    save(plot_sweep(outcome, settings), "sweep")
    save(plot_drift(outcome, settings), "drift")


def plot_curves(outcome, s, x_axis):
    """Figure 5 (x_axis epoch), with differences from the baseline, or 13 (seconds), at the published learning rate."""
    rows = 2 if x_axis == "epoch" and s.seeds > 1 else 1
    figure, axes = plots.panels(rows, len(s.optimizers), width=3.1, height=2.8)
    for column, optimizer in zip(axes.T, s.optimizers):
        ax = column[0]
        for a, arm in enumerate(ARMS):
            x = range(1, s.epochs + 1) if x_axis == "epoch" else outcome.timings[optimizer][arm]
            look = dict(plots.style(a, marker=True), markevery=(a * s.epochs // 25, max(1, s.epochs // 5)))
            for key, line in (("train_loss", "--"), ("test_loss", "-")):
                values = outcome.arrays[f"{optimizer}/{key}"][a, 0]
                label = arm if key == "test_loss" else None
                plots.band(ax, x, values, label, a, **dict(look, linestyle=line, linewidth=1.1))
        ax.set(title=optimizer, xlabel="epoch" if x_axis == "epoch" else "seconds a run")
        plots.log_loss(ax)
        both = [outcome.arrays[f"{optimizer}/{key}"][:, 0] for key in ("train_loss", "test_loss")]
        ax.set_ylim(top=1.1 * max(values[..., min(1, s.epochs - 1)].mean(1).max() for values in both))  # from epoch 2
        if rows == 2:
            plot_differences(column[1], outcome.arrays[f"{optimizer}/train_loss"][:, 0], s)
    axes[0, 0].set_ylabel(f"loss, {outcome.label}, ± std\n(training dashed, test solid)")
    axes[-1, 0].set_ylabel("training loss −\nbaseline's, 95 %" if rows == 2 else axes[0, 0].get_ylabel())
    axes[0, -1].legend(fontsize=8)
    return figure


def plot_differences(ax, loss, s):
    """loss (A, S, epochs) of every arm minus the baseline's, paired by seed: mean and 95 % interval."""
    epochs, top = np.arange(1, s.epochs + 1), 0
    for a in range(1, len(ARMS)):
        mean, low, high = np.array([difference(loss[a, :, e], loss[0, :, e]) for e in range(s.epochs)]).T
        look = dict(plots.style(a, marker=True), markevery=(a * s.epochs // 25, max(1, s.epochs // 5)), linewidth=1.1)
        ax.plot(epochs, mean, **look)
        ax.fill_between(epochs, low, high, color=plots.COLORS[a], alpha=0.15, linewidth=0)
        top = max(top, np.nanmax(abs(mean[min(2, s.epochs - 1) :])))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="epoch", ylim=(-1.6 * top, 1.6 * top) if top > 0 else None)


def plot_sweep(outcome, s):
    """Loss of every arm at every learning rate: is teleportation more than a learning rate?"""
    epochs = [e for e in s.milestones if e <= s.epochs]
    epochs = epochs[-2:]
    figure, axes = plots.panels(len(epochs), len(s.optimizers), width=3.1, height=2.7)
    for row, epoch in zip(axes, epochs):
        for ax, optimizer in zip(row, s.optimizers):
            for a, arm in enumerate(ARMS):
                values = outcome.arrays[f"{optimizer}/train_loss"][a, :, :, epoch - 1]
                x = [f * 1.08 ** (a - 2) for f in s.factors]  # side by side
                spread = values.std(1, ddof=1) if s.seeds > 1 else None
                look = plots.style(a, marker=True)
                ax.errorbar(x, values.mean(1), spread, label=arm, capsize=2, **dict(look, linewidth=1))
            ax.set(title=f"{optimizer}, epoch {epoch}", xscale="log", xlabel="learning rate / published")
            ax.set_xticks(s.factors, [f"×{f}" for f in s.factors])
            ax.minorticks_off()
            plots.log_loss(ax)
            shown = outcome.arrays[f"{optimizer}/train_loss"][..., epoch - 1].mean(2)  # (A, F); diverged ones leave
            ax.set_ylim(0.8 * np.nanmin(shown), 1.3 * shown[:, 0].max())
        row[0].set_ylabel(f"training loss, {outcome.label}")
    axes[0, -1].legend(fontsize=8)
    return figure


def plot_drift(outcome, s):
    """What each teleport did to the loss of its batch, and to the gradient norm, at the published learning rate."""
    figure, axes = plots.panels(2, len(s.optimizers), width=3.1, height=2.5, sharex=True)
    for column, optimizer in zip(axes.T, s.optimizers):
        loss = outcome.arrays[f"{optimizer}/teleport_loss"]
        norm = outcome.arrays[f"{optimizer}/teleport_gradient_norm"]
        for arm in TELEPORTING:
            a, x = ARMS.index(arm), range(1, s.teleports + 1)
            drift = abs(loss[a, 0, ..., 1] - loss[a, 0, ..., 0]) / loss[a, 0, ..., 0]
            look = plots.style(a, marker=True)
            column[0].plot(x, drift.max(0).clip(1e-9), label=arm, **look)
            plots.band(column[1], x, norm[a, 0, ..., 1] / norm[a, 0, ..., 0], arm, a, **look)
        column[0].set(title=optimizer, yscale="log")
        column[1].set(xlabel="teleport")
    axes[0, 0].set_ylabel("|Δloss| / loss, largest\nof the seeds (≥ 1e-9)")
    axes[1, 0].set_ylabel("‖∂L/∂W‖ after / before")
    axes[0, -1].legend(fontsize=8)
    return figure


def report(outcome, s):
    epoch = max(e for e in s.milestones if e <= s.epochs)
    rows = []
    for optimizer in s.optimizers:
        for arm in ARMS:
            m = outcome.metrics[optimizer][arm]
            train, test = m[f"train_loss_{epoch}"], m[f"test_loss_{epoch}"]
            rows.append(
                [
                    optimizer,
                    arm,
                    mean_std(train["values"][0]),
                    mean_std(test["values"][0]),
                    "" if arm == "baseline" else verdict(train["at_published_rate"]),
                    f"×{train['best_factor']} " + mean_std(train["values"][s.factors.index(train["best_factor"])]),
                    "" if arm == "baseline" else verdict(train["at_best_rate"]),
                    f"{m['largest_relative_drift']:.1e}" if arm in TELEPORTING else "",
                    f"{outcome.timings[optimizer][arm][-1]:.2f}",
                ]
            )
    header = ["optimizer", "arm", "train loss", "test loss", "vs baseline"]
    header += ["best rate, train loss", "vs baseline's best", "drift", "s/run"]
    title = f"{outcome.label}, {s.seeds} seeds, epoch {epoch}, mean ± std; drift: largest |Δloss|/loss of a teleport"
    return f"{title}\n\n{table(header, rows)}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
