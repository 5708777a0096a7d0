"""Teleportation with standard optimizers: Figures 5 and 13 of the ICLR 2024 paper (arXiv 2305.13404), Section 5.1.

Each optimizer trains a 784-16-10-10 network; eight times, before the first mini-batches of one epoch, the weights are
teleported: gradient ascent on ‖∂L/∂W‖² over the group, on a fresh batch of 200. The arms:

  baseline       the optimizer alone
  published      the published teleport, which moves the loss, with the optimizer built anew after each teleport
  restart        no teleport, the optimizer built anew at the same steps: what the restart does by itself
  preactivation  pre-activation action on the true hidden layers, optimizer state kept; with 200 samples on 16 and 10
                 units it is a least-squares fit, and moves the loss a little
  rescaling      positive rescaling, exact on every input, optimizer state kept

All arms, seeds and learning rates (× 1, 3, 10: is teleportation more than a learning rate?) are members of one stacked
network and see the same mini-batches. Seconds are per run: the member's share of the stack's training time, plus its
own teleports; evaluation excluded.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from common import cli, plots, published, statistics
from common.arms import Arm, Stack, draw_batches
from common.claims import Claim, Verdict, grade, interval, listed, mean, table
from common.data import published_split, require
from common.losses import batch_loss
from common.mlp import initial_weights, published_seeds
from common.run import Outcome
from common.statistics import difference, mean_std, percent, verdict
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

ARMS = ("baseline", "published", "restart", "preactivation", "rescaling")
TELEPORTING = ("published", "preactivation", "rescaling")
# Published, by optimizer: learning rate (CIFAR-10: doubled), epoch of the teleports, learning rate of the ascent
# (lr_t). SGD was not published: it has AdaGrad's.
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
    dataset: str = "MNIST"
    seeds: int = 5
    epochs: int = 40
    optimizers: tuple = tuple(OPTIMIZERS)
    factors: tuple = (1, 3, 10)  # learning rates, as multiples of the published one
    milestones: tuple = (3, 8, 40)  # epochs after which the arms are compared
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports: int = 8
    teleport_batch: int = 200
    ascent_steps: int = 10
    cap: float = 100.0  # ascent stops once ‖∂L/∂W‖² is above it


PAPER = Settings()
QUICK = replace(PAPER, dataset="mnist-mini", epochs=10, milestones=(3, 10))
SMALL = dict(seeds=2, epochs=3, milestones=(3,), samples=400, factors=(1, 3), teleports=3, ascent_steps=3)
PRESETS = {
    "tiny": replace(QUICK, optimizers=("AdaGrad", "momentum"), **SMALL),
    "quick": QUICK,
    "paper": PAPER,
}


def arms(s, lr):
    """Who is moved, and how; lr is the ascent's."""
    ascent = dict(activation=ACTIVATION, lr=lr, steps=s.ascent_steps, cap=s.cap)

    def stale(weights, X, labels):
        return published.teleport_gradient_norm(weights, X, batch_loss(X, labels, ACTIVATION), **ascent)

    def along(action, **bound):
        def move(weights, X, labels):
            loss_fn, options = batch_loss(X, labels, ACTIVATION), {**ascent, **bound}
            return teleport(weights, X, loss_fn, objective=squared_gradient_norm, action=action, **options)

        return move

    return (
        Arm("baseline"),
        Arm("published", stale, restart=True),
        Arm("restart", restart=True),
        Arm("preactivation", along(preactivation_action)),
        Arm("rescaling", along(rescaling_action, bound=BOUND)),
    )


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    require(data, train=max(s.teleport_batch, s.teleports * s.batch))
    seeds = published_seeds(s.seeds)
    parts, _ = run.parts(lambda optimizer: train(run, optimizer, seeds, data), {o: o for o in s.optimizers})
    arrays = {f"{o}/{k}": v for o, part in parts.items() for k, v in part.items() if not k.startswith("seconds")}
    timings = {o: {arm: parts[o]["seconds"][a].tolist() for a, arm in enumerate(ARMS)} for o in parts}
    return Outcome({o: compare(s, parts[o]) for o in parts}, arrays, seeds, timings)


def train(run, optimizer, seeds, data):
    """All arms (A), learning rates (F) and seeds (S) of one optimizer. Curves are (A, F, S, epochs)."""
    s = run.settings
    lr, epoch, ascent_lr = OPTIMIZERS[optimizer]
    deep = (128, 32, 10) if s.dataset == "CIFAR10" else (16, 10, 10)
    W = initial_weights((data.features, *deep), seeds, run.device)
    rates = lr * (2 if s.dataset == "CIFAR10" else 1) * torch.tensor(s.factors, dtype=data.x.dtype)
    stack = Stack(arms(s, ascent_lr), W, optimizer, rates, s.teleports)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each run draws its own teleport batches

    def before(i):
        if i < s.teleports:
            stack.move(i, *draw_batches(data.x, data.y, s.teleport_batch, generators))

    curves = stack.train(run, data, s.epochs, s.batch, {epoch: before}, desc=optimizer)
    moves = {"teleport_loss": stack.loss.float(), "teleport_gradient_norm": stack.objective.float().sqrt()}
    return {**curves, **moves}


def compare(s, part):
    """Numbers of one optimizer: losses at the milestones, drift, and each arm against the baseline, both at their best
    learning rate of the sweep and at the published one; differences are paired by seed, with 95 % intervals."""
    metrics = {}
    for a, arm in enumerate(ARMS):
        loss = part["teleport_loss"][a]
        metrics[arm] = {
            "largest_relative_drift": (abs(loss[..., 1] - loss[..., 0]) / abs(loss[..., 0]).clip(1e-30)).max(initial=0)
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


def judge(outcome):
    m, milestones = outcome.metrics, outcome.settings.milestones
    early, last = milestones[-2:][0], milestones[-1]
    claimed = [o for o in m if o != "SGD"]
    both = [o for o in claimed if o in helped(m, early, "at_published_rate") and o in helped(m, early, "at_best_rate")]
    taken_apart = restarts(m["AdaGrad"], early)
    sentence = (
        f"With the optimizer's state kept, teleporting lowers the training loss after epoch {early} for "
        f"{listed(both)} (also at each arm's best learning rate), after epoch {last} for "
        f"{listed(helped(m, last, 'at_best_rate'))}. {taken_apart}"
    )
    details = [*(against_baseline(o, m[o], early, last) for o in m), *grown(outcome.arrays, m), largest_drift(m)]
    limits = f"{listed(both)} only" if both else "none of them"
    word = grade(len(both) == len(claimed), both)
    number = f"{len(both)} of {len(claimed)} gain, best rates too"
    answers = {"cost": cost(outcome), "gain": gain(outcome)}
    return Verdict(word, limits, sentence, details, number, surprise=taken_apart, answers=answers)


def cost(outcome):
    """What a teleport takes, against an epoch of the same run."""
    s, share = outcome.settings, []
    for timings in outcome.timings.values():
        epoch = timings["baseline"][-1] / s.epochs
        share.append((timings["preactivation"][-1] - timings["baseline"][-1]) / s.teleports / epoch)
    return (
        f"{s.ascent_steps} derivatives of ‖∂L/∂W‖² on {s.teleport_batch} samples, which took "
        f"{min(share):.0%} to {max(share):.0%} of the time of an epoch, both as shares of a stack."
    )


def gain(outcome):
    """Optimizers but AdaGrad, their state kept: the mean log training loss at the published rate."""
    logs = {o: np.log(outcome.arrays[f"{o}/train_loss"][:, 0]).mean(-1) for o in outcome.metrics}  # (A, S)
    names = [o for o in logs if o not in ("SGD", "AdaGrad")]
    one, other = ARMS.index("preactivation"), ARMS.index("baseline")
    found = statistics.family([statistics.compare(logs[o][one], logs[o][other], relative=False) for o in names])
    said = (
        f"{o} {percent(c.effect):+.1f} [{percent(c.low):+.1f}, {percent(c.high):+.1f}] % ({c.word}"
        + (f", {percent(c.detectable):.0f} % would have shown)" if c.word == "undecided" else ")")
        for o, c in zip(names, found)
    )
    return f"Mean log training loss, {len(outcome.seeds)} runs, published rate: {', '.join(said)}."


def helped(m, epoch, rate):
    """The optimizers for which the teleport that keeps the state lowers the training loss."""
    return [o for o in m if verdict(m[o]["preactivation"][f"train_loss_{epoch}"][rate]) == "better"]


def restarts(m, epoch):
    """AdaGrad's gain, taken apart."""
    key = f"train_loss_{epoch}"
    loss = {arm: mean(m[arm][key]["values"][0]) for arm in m}
    restart, kept = (verdict(m[arm][key]["at_published_rate"]) == "better" for arm in ("restart", "preactivation"))
    whose = "AdaGrad's gain is the restart of its state" if restart and not kept else "AdaGrad"
    return (
        f"{whose}: {loss['baseline']:.4f} alone, {loss['restart']:.4f} restarted without teleporting, "
        f"{loss['preactivation']:.4f} teleported with its state kept."
    )


def against_baseline(optimizer, m, early, last):
    def cell(arm, epoch=early, rate="at_published_rate", key="train_loss"):
        triple = m[arm][f"{key}_{epoch}"][rate]
        return f"{interval(triple)} ({verdict(triple)})"

    return (
        f"{optimizer}, training loss minus baseline's after epoch {early}: restart only {cell('restart')}, published "
        f"teleport {cell('published')}, teleport with the optimizer's state kept {cell('preactivation')}, rescaling "
        f"{cell('rescaling')}; teleport, each arm at its best learning rate "
        f"{cell('preactivation', early, 'at_best_rate')}, after epoch {last} "
        f"{cell('preactivation', last, 'at_best_rate')}, test loss "
        f"{cell('preactivation', last, 'at_best_rate', 'test_loss')}."
    )


def grown(arrays, m):
    for arm in TELEPORTING:
        norms = {o: arrays[f"{o}/teleport_gradient_norm"][ARMS.index(arm)] for o in m}  # (…, [before, after])
        growth = ", ".join(f"{o} {np.nanmedian(n[..., 1] / n[..., 0] - 1):+.1%}" for o, n in norms.items())
        yield f"What a teleport does to ‖∂L/∂W‖, {arm}, median: {growth}."


def largest_drift(m):
    drift = {arm: max(m[o][arm]["largest_relative_drift"] for o in m) for arm in TELEPORTING}
    return "Largest relative drift of one teleport: " + ", ".join(f"{a} {d:.1e}" for a, d in drift.items()) + "."


def plot(outcome, settings, save):
    save(plot_curves(outcome, settings, "epoch", ("baseline", "published")))
    save(plot_curves(outcome, settings, "seconds", ("baseline", "published")), "seconds")
    save(plot_curves(outcome, settings, "epoch", ARMS), "controls")
    save(plot_sweep(outcome, settings), "sweep")
    save(plot_drift(outcome, settings), "drift")


def plot_curves(outcome, s, x_axis, shown):
    """Figure 5 (x_axis epoch) or 13 (seconds): the paper's two arms, or all with what sets them apart."""
    controls = len(shown) > 2 and s.seeds > 1
    figure, axes = plots.panels(1 + controls, len(s.optimizers), width=3.1, height=2.8)
    for column, optimizer in zip(axes.T, s.optimizers):
        for a in map(ARMS.index, shown):
            x = range(1, s.epochs + 1) if x_axis == "epoch" else outcome.timings[optimizer][ARMS[a]]
            for key, line in (("train_loss", "--"), ("test_loss", "-")):
                values, label = outcome.arrays[f"{optimizer}/{key}"][a, 0], ARMS[a] if key == "test_loss" else None
                look = plots.marked(a, s.epochs) | {"linestyle": line, "linewidth": 1.1}
                plots.band(column[0], x, values, label, a, **look)
        column[0].set(title=optimizer, xlabel="epoch" if x_axis == "epoch" else "seconds a run")
        plots.log_loss(column[0])
        both = [outcome.arrays[f"{optimizer}/{key}"][:, 0] for key in ("train_loss", "test_loss")]
        top = max(values[..., min(1, s.epochs - 1)].mean(1).max() for values in both)  # from epoch 2
        column[0].set_ylim(top=1.1 * top)
        if controls:
            plot_differences(column[1], outcome.arrays[f"{optimizer}/train_loss"][:, 0], s)
    axes[0, 0].set_ylabel(f"loss, {outcome.label}, ± std\n(training dashed, test solid)")
    if controls:
        axes[1, 0].set_ylabel("training loss −\nbaseline's, 95 %")
    axes[0, -1].legend(fontsize=8)
    return figure


def plot_differences(ax, loss, s):
    """loss (A, S, epochs) of every arm minus the baseline's, paired by seed: mean and 95 % interval."""
    epochs, top = np.arange(1, s.epochs + 1), 0
    for a in range(1, len(ARMS)):
        mean, low, high = np.array([difference(loss[a, :, e], loss[0, :, e]) for e in range(s.epochs)]).T
        ax.plot(epochs, mean, **plots.marked(a, s.epochs) | {"linewidth": 1.1})
        ax.fill_between(epochs, low, high, color=plots.COLORS[a], alpha=0.15, linewidth=0)
        top = max(top, np.nanmax(abs(mean[min(2, s.epochs - 1) :])))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="epoch", ylim=(-1.6 * top, 1.6 * top) if top > 0 else None)


def plot_sweep(outcome, s):
    """Loss of every arm at every learning rate: is teleportation more than a learning rate?"""
    epochs = [e for e in s.milestones if e <= s.epochs][-2:]
    figure, axes = plots.panels(len(epochs), len(s.optimizers), width=3.1, height=2.7)
    for row, epoch in zip(axes, epochs):
        for ax, optimizer in zip(row, s.optimizers):
            for a, arm in enumerate(ARMS):
                values = outcome.arrays[f"{optimizer}/train_loss"][a, :, :, epoch - 1]
                x = [f * 1.08 ** (a - 2) for f in s.factors]  # side by side
                spread = values.std(1, ddof=1) if s.seeds > 1 else None
                line = dict(plots.style(a, marker=True), linewidth=1)
                ax.errorbar(x, values.mean(1), spread, label=arm, capsize=2, **line)
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
            line = plots.style(a, marker=True)
            column[0].plot(x, drift.max(0).clip(1e-9), label=arm, **line)
            plots.band(column[1], x, norm[a, 0, ..., 1] / norm[a, 0, ..., 0], arm, a, **line)
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
