"""Teleporting to sharper, flatter, more and less curved points: Figure 4 of ICLR 2024 (arXiv 2305.13404, Section 4).

SGD trains a 784-16-10-10 network (CIFAR-10: 3072-32-10-10) without teleportation for 20 epochs. Before the first
mini-batches of the next epoch the weights are teleported, each time on a fresh batch of 2000; then SGD goes on. Two
objectives, each up and down:

  sharpness φ (Eq. 4)   10 steps of gradient ascent or descent of the mean loss at distances 0.1 to 0.9 from W
  curvature ψ (Eq. 5)   one step t ← ±lr dκ/dt along exp(tM) on the layers 2 and 3, M drawn uniformly from [0, 1]

and the arms:

  baseline       no teleport
  preactivation  on the true hidden layers. With 2000 samples on 10 units it is a least-squares fit: the loss moves, and
                 by how much is part of the result. For ψ, t is halved until ψ moves the right way and the loss by at
                 most 1 %
  published      φ: stale hidden layers, new directions in every step, the mean over 9 radii divided by 10. ψ: the bare
                 step, which mostly goes much too far (on true hidden layers and, at full row rank, the same curve)
  rescaling      like `preactivation`, on the orbit of positive rescaling, where the loss cannot move
  random         φ: a random element that moves the weights as far as `preactivation`; ψ: the same |t|, a random sign

A teleport whose step is so long that the group element is singular, or infinite, is not made and counts as not having
moved φ or ψ.

All arms of a run start from the same weights and see the same batches, directions and elements; arms and runs are
members of one stacked network. Unlike the published runs, which share one initialization, every run has its own.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from common import cli, plots, statistics
from common.arms import Arm, Stack, draw_batches
from common.claims import Claim, Verdict, grade, interval, listed, table
from common.data import published_split, require
from common.mlp import initial_weights, published_seeds
from common.moves import Draws, Meter, attempt, move_curvature, move_sharpness
from common.run import Outcome
from common.statistics import difference, mean_std, verdict

CLAIM = Claim(
    order=30,
    figure="Figure 4",
    paper="ICLR 2024",
    section="Section 4",
    says="Teleporting to minima of larger curvature improves generalization; to flatter ones, the effect is "
    "negligible.",
    short="larger ψ generalizes better, smaller φ not",
    rule="holds if larger ψ lowers the final test loss and smaller φ makes no difference, on every dataset; in "
    "part: larger ψ lowers it on some.",
    dated="2026-11-22",
    headline=True,
)


class Way(NamedTuple):
    """Where an arm is sent, and by what."""

    objective: str  # sharpness or curvature
    action: str  # preactivation, published, rescaling or random
    maximize: bool

    @property
    def direction(self):
        return "up" if self.maximize else "down"

    @property
    def key(self):
        return f"{self.objective}_{self.direction}_{self.action}"

    def __str__(self):
        return f"{SYMBOLS[self.objective]} {self.direction}, {self.action}"


SYMBOLS = {"sharpness": "φ", "curvature": "ψ"}
ACTIONS = ("preactivation", "published", "rescaling", "random")
WAYS = [Way(objective, action, up) for objective in SYMBOLS for action in ACTIONS for up in (True, False)]
ARMS = ("baseline", *(way.key for way in WAYS))
# Published, by dataset: learning rate of SGD, and of the teleports (up, down). mnist-mini is treated as MNIST.
RATES = {
    "MNIST": (1e-2, {"sharpness": (5e-2, 5e-2), "curvature": (2e-1, 5e-2)}),
    "FashionMNIST": (1e-2, {"sharpness": (1e-1, 3e-1), "curvature": (5e-3, 3e-3)}),
    "CIFAR10": (2e-2, {"sharpness": (5e-2, 5e-2), "curvature": (2e-1, 5e-2)}),
}
MEASURES = {"sharpness": "phi", "curvature": "psi"}
MEASURED = ("phi", "psi", "loss", "gradient_norm")  # of every arm, before and after each teleport
CHUNK = 5  # epochs in a part


@dataclass(frozen=True)
class Settings:
    dataset: str = "MNIST"
    seeds: int = 5
    epochs: int = 40
    teleport_epoch: int = 20
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports_sharpness: tuple = (2, 10)  # up, down
    teleports_curvature: tuple = (10, 5)
    teleport_batch: int = 2000
    directions: int = 100  # for each of the 9 radii
    ascent_steps: int = 10
    cap: float = 2.0  # ascent stops once φ is above it
    tolerance: float = 0.01  # relative change of the loss that a teleport of ψ may cost
    measured_directions: int = 10  # for each radius: φ of every arm, on directions that no teleport has seen
    measured_elements: int = 5  # ψ of every arm: mean curvature over as many M


PAPER = Settings()
QUICK = replace(
    PAPER,
    dataset="mnist-mini",
    teleports_sharpness=(2, 5),
    teleports_curvature=(5, 5),
    teleport_batch=500,
    directions=10,
)
SMALL = dict(seeds=2, epochs=4, teleport_epoch=2, samples=400, teleports_sharpness=(1, 2), teleports_curvature=(2, 1))
SMALLER = dict(directions=2, ascent_steps=2, cap=3.0, measured_directions=1, measured_elements=2)
PRESETS = {
    "tiny": replace(QUICK, teleport_batch=100, **SMALL, **SMALLER),
    "quick": QUICK,
    "paper": PAPER,
}


# The experiment, in parts that an interrupted run continues from


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    require(data, train=s.teleport_batch, test=s.teleport_batch)
    seeds, members = published_seeds(s.seeds), arms(s)
    lr = RATES.get(s.dataset, RATES["MNIST"])[0]
    dims = (data.features, *((32, 10, 10) if s.dataset == "CIFAR10" else (16, 10, 10)))
    K = max(*s.teleports_sharpness, *s.teleports_curvature)

    def before(_):  # what all arms of a run share
        return train(
            run, Stack(members[:1], initial_weights(dims, seeds, run.device), "SGD", lr, 0), data, s.teleport_epoch
        )

    def teleported(start):  # the epoch of the teleports: all arms of one run
        weights, seed = start
        stack = Stack(members, [W.to(run.device) for W in weights], "SGD", lr, K)
        record, move_arms = teleporter(stack, data, seed, s)
        return {**train(run, stack, data, 1, {0: move_arms}), **record, "objective": objectives(stack, s)}

    def after(start):  # all arms of all runs, some epochs at a time
        weights, epochs = start
        return train(run, Stack(members, weights, "SGD", lr, 0), data, epochs)

    parts, seconds = run.parts(before, {"before": None})
    first = parts["before"]
    starts = {f"run_{i + 1}": (weights_of(first, slice(i, i + 1)), seed) for i, seed in enumerate(seeds)}
    parts, spent = run.parts(teleported, starts)
    middle, seconds = joined(list(parts.values())), seconds | spent
    state, done, curves = middle, s.teleport_epoch + 1, [middle]
    while done < s.epochs:
        end = min(done + CHUNK, s.epochs)
        parts, spent = run.parts(after, {f"epoch_{end}": (weights_of(state, slice(None)), end - done)})
        state, done, seconds = parts[f"epoch_{end}"], end, seconds | spent
        curves.append(state)

    arrays = {key: middle[key] for key in ("objective", *MEASURED)}
    for key in ("train_loss", "test_loss"):  # (arms, runs, epochs)
        shared = np.broadcast_to(first[key], (len(ARMS), *first[key].shape[1:]))
        arrays[key] = np.concatenate([shared, *(part[key] for part in curves)], -1)
    return Outcome(compare(s, arrays), arrays, seeds, seconds)


def train(run, stack, data, epochs, at=None):
    """Train for some epochs: the weights, and the loss curves (arms, runs, epochs)."""
    curves = stack.train(run, data, epochs, run.settings.batch, at or {})
    weights = {f"W{m}": stack.by_arm(W) for m, W in enumerate(stack.net.weights, start=1)}
    return {**weights, **{key: curves[key] for key in ("train_loss", "test_loss")}}


def weights_of(part, runs):
    """The weights of some runs, (S, d_m, d_{m-1}) where all arms share them, else (A, S, d_m, d_{m-1})."""
    weights = [torch.from_numpy(part[key]) for key in ("W1", "W2", "W3")]
    return [W[0, runs] if len(W) == 1 else W[:, runs] for W in weights]


def joined(parts):
    """The parts of single runs, (A, 1, …), as one of all runs, (A, S, …)."""
    return {key: np.concatenate([part[key] for part in parts], 1) for key in parts[0]}


def teleporter(stack, data, seed, s):
    """The record of one run's teleports, to be filled in, and the function that moves the arms before mini-batch k."""
    K, weights = stack.objective.shape[-2], stack.net.weights
    dims = (data.features, *(W.shape[-2] for W in weights))
    record = {key: torch.zeros(len(ARMS), 1, K, 2, 2) for key in MEASURED}  # [before, after], [batch, held out]

    def meter(batch, generator):
        return Meter(*batch, dims, s.measured_directions, s.measured_elements, generator)

    def draw(x, y, generator):
        return [part[0] for part in draw_batches(x, y, s.teleport_batch, [generator])]

    generator = torch.Generator().manual_seed(seed)
    held_out = meter(draw(data.x_test, data.y_test, generator), generator)  # the same for all teleports of the run

    def move_arms(k):
        if k >= K:
            return
        generator = torch.Generator().manual_seed(seed + 1 + k)
        batch = draw(data.x, data.y, generator)
        meters = (meter(batch, generator), held_out)
        before = torch.stack([measure(weights) for measure in meters], 1)
        stack.move(k, Draws.of(*batch, dims, s.directions, generator))
        after = torch.stack([measure(weights) for measure in meters], 1)
        for i, key in enumerate(MEASURED):
            record[key][:, 0, k] = torch.stack([before[..., i], after[..., i]], 1)

    return record, move_arms


def objectives(stack, s):
    """What each arm set out to change, on the batch of each of its teleports; NaN where it has none: (A, 1, K, 2)."""
    due = [[k < teleports(way, s) for k in range(stack.objective.shape[-2])] for way in WAYS]
    due = torch.tensor([[False] * len(due[0]), *due])
    return stack.objective.float().where(due[:, None, :, None], torch.nan)


def teleports(way, s):
    """How many times the arm teleports."""
    return getattr(s, f"teleports_{way.objective}")[0 if way.maximize else 1]


def arms(s):
    """Who is moved, where and by what; random goes as far as preactivation did."""
    rates = RATES.get(s.dataset, RATES["MNIST"])[1]

    def move(way):
        options = dict(lr=rates[way.objective][0 if way.maximize else 1], maximize=way.maximize)
        if way.objective == "sharpness":
            return partial(move_sharpness, way.action, steps=s.ascent_steps, cap=s.cap, **options)
        return partial(move_curvature, way.action, tolerance=s.tolerance, **options)

    def follows(way):
        return way._replace(action="preactivation").key if way.action == "random" else None

    moving = (Arm(w.key, partial(attempt, move(w)), moves=teleports(w, s), follows=follows(w)) for w in WAYS)
    return (Arm("baseline"), *moving)


# Numbers and figures


def compare(s, arrays):
    """For every arm: did the objective go where it was sent, what did that cost, and is the test loss better?"""
    final = arrays["test_loss"][..., -1]
    metrics = {"baseline": {"test_loss": final[0], "train_loss": arrays["train_loss"][0, :, -1]}}
    for a, way in enumerate(WAYS, start=1):
        k = teleports(way, s)
        objective = arrays["objective"][a, :, :k]  # (runs, k, 2)
        moved = (objective[..., 1] > objective[..., 0]) if way.maximize else (objective[..., 1] < objective[..., 0])
        loss = arrays["loss"][a, :, :k]  # (runs, k, [before, after], [batch, held out])
        drift = np.abs(loss[:, :, 1] - loss[:, :, 0]) / loss[:, :, 0]
        measured = arrays[MEASURES[way.objective]][:, :, k - 1, 1, 1]  # after all, held out
        metrics[way.key] = {
            "teleports": moved.size,
            "moved_as_asked": int(moved.sum()),
            "objective_change": finite_median(objective[..., 1] / objective[..., 0] - 1),
            "total_change": finite_median(measured[a] / measured[0] - 1),  # against no teleport at the same step
            "drift": [finite_median(drift[..., i]) for i in (0, 1)],
            "largest_drift": [finite_max(drift[..., i]) for i in (0, 1)],
            "test_loss": final[a],
            "train_loss": arrays["train_loss"][a, :, -1],
            "minus_baseline": difference(final[a], final[0]),
        }
    return metrics


def finite_median(values):
    """The median of what has not diverged (NaN if everything has)."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else float("nan")


def finite_max(values):
    """The maximum; infinite if anything has diverged."""
    return float(np.where(np.isnan(values), np.inf, values).max())


def judge(*outcomes):
    def arms(key):
        return [(r.label, r.metrics[key]) for r in outcomes]

    def text(key):
        return ", ".join(f"{interval(m['minus_baseline'])} on {label}" for label, m in arms(key))

    def labels(key, word):
        return [label for label, m in arms(key) if verdict(m["minus_baseline"]) == word]

    up, down, n = "curvature_up_preactivation", "sharpness_down_preactivation", len(outcomes)
    improves, negligible = labels(up, "better"), labels(down, "no difference")
    words, details = Counter(), []
    for r in outcomes:
        for key, m in r.metrics.items():
            if key == "baseline":
                continue
            word = "diverged" if math.isnan(m["minus_baseline"][0]) else verdict(m["minus_baseline"])
            change = "diverged" if math.isnan(m["total_change"]) else f"{m['total_change']:+.1%}"
            details.append(
                f"{r.label}, {WAYS[ARMS.index(key) - 1]}: {m['moved_as_asked']} of {m['teleports']} teleports went as "
                f"asked, {change} in all; test loss minus no teleport {interval(m['minus_baseline'])} ({word})."
            )
            if key not in (up, down):
                words[word] += 1
    others = "; ".join(f"{count} {word}" for word, count in words.items())
    details.append(f"The other arms, controls included: {others}.")
    limits = []
    if len(improves) < n:
        limits.append(
            f"larger curvature lowers the test loss {'on ' + listed(improves) + ' only' if improves else 'nowhere'}"
        )
    diverged = [label for label, m in arms(down) if math.isnan(m["minus_baseline"][0])]
    matter = [r.label for r in outcomes if r.label not in negligible + diverged]
    if matter:
        limits.append(f"flatter points matter on {listed(matter)}")
    if diverged:
        limits.append(f"some runs sent to flatter points diverge on {listed(diverged)}")
    return Verdict(
        grade(len(improves) == len(negligible) == n, improves),
        "; ".join(limits),
        f"Final test loss after teleporting to larger curvature minus that without: {text(up)}.",
        details,
        f"final test loss {interval(arms(up)[0][1]['minus_baseline'])} on {arms(up)[0][0]}",
        answers={"direction": direction(outcomes)},
    )


def direction(outcomes):
    """Test loss, mean of the last quarter of the epochs, after teleports to larger and to smaller ψ, against none."""
    said = []
    for outcome in outcomes:
        losses = outcome.arrays["test_loss"][..., -(outcome.arrays["test_loss"].shape[-1] // 4) :].mean(-1)  # (M, S)
        for way in ("up", "down"):
            c = statistics.compare(losses[ARMS.index(f"curvature_{way}_preactivation")], losses[0])
            effect, low, high = (f"{statistics.percent(x):+.2f}" for x in (c.effect, c.low, c.high))
            said.append(f"{outcome.label}, ψ {way} {effect} [{low}, {high}] % ({c.word})")
    return f"Test loss of {len(outcomes[0].seeds)} runs against no teleport, margin 1 %: {'; '.join(said)}."


def plot(outcome, s, save):
    save(plot_curves(outcome, s))
    save(plot_controls(outcome, s), "controls")


def plot_curves(outcome, s):
    """Figure 4: the published teleports to sharper and flatter points, to more and less curved ones."""
    figure, axes = plots.panels(1, 2, width=4, height=3.2)
    for ax, objective in zip(axes[0], SYMBOLS):
        plot_losses(ax, outcome, s, objective, "published")
    axes[0, 0].set_ylabel(f"loss, {outcome.label}")
    return figure


def plot_losses(ax, outcome, s, objective, action):
    """Training loss dashed, test loss solid, mean ± std, of the baseline and of one action's arms up and down."""
    moved = [(a, f"{SYMBOLS[objective]} {way.direction}") for a, way in ways_of(objective) if way.action == action]
    for i, (a, label) in enumerate([(0, "baseline"), *moved]):
        look = dict(plots.style(i, marker=True), markevery=(2 * i, 8))
        alive = np.isfinite(outcome.arrays["train_loss"][a]).all(-1)
        label += "" if alive.all() else f" ({alive.sum()} of {len(alive)} runs left)"
        for key, line, name in (("train_loss", "--", None), ("test_loss", "-", label)):
            if alive.any():
                curves = outcome.arrays[key][a, alive]
                plots.band(ax, range(1, s.epochs + 1), curves, name, i, **{**look, "linestyle": line})
    usual = np.stack([outcome.arrays[key][0] for key in ("train_loss", "test_loss")])
    low, high = usual.min(), usual.max()
    room = high / low  # below for the legend; a diverged arm leaves the axes
    plots.log_loss(ax)
    ax.set(
        xlabel="epoch", ylim=(low / room**0.7, high * room**0.15), title=f"{objective} {SYMBOLS[objective]}, {action}"
    )
    ax.legend(title="training dashed, test solid, ± std", fontsize=7, title_fontsize=7, loc="lower left")


def plot_controls(outcome, s):
    """Every arm: loss curves of the pre-activation one, final test loss, φ or ψ before and after, drift."""
    figure, axes = plots.panels(2, 4, width=3.6, height=3.4)
    for row, objective in zip(axes, SYMBOLS):
        plot_losses(row[0], outcome, s, objective, "preactivation")
        plot_differences(row[1], outcome, objective)
        plot_objective(row[2], outcome, s, objective)
        plot_drift(row[3], outcome, s, objective)
        row[0].set_ylabel(f"loss, {outcome.label}")
        row[1].set(title="final test loss − baseline's, 95 %", ylabel="linear within ± 1e-3, log beyond")
        row[2].set(title=f"{SYMBOLS[objective]} before → after all teleports")
        row[3].set(title="|Δloss| / loss of each teleport")
    return figure


def plot_differences(ax, outcome, objective):
    """Mean and 95 % interval over the runs."""
    for x, (_, way) in enumerate(ways_of(objective)):
        mean, low, high = outcome.metrics[way.key]["minus_baseline"]
        if math.isnan(mean):
            ax.annotate("diverged", (x, 0), rotation=90, ha="center", va="bottom", fontsize=8)
        else:
            error = None if math.isnan(low) else [[mean - low], [high - mean]]
            ax.errorbar(x, mean, error, capsize=3, **look_of(way), linestyle="")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1e-3)
    ticks = [sign * 10.0**e for sign in (-1, 1) for e in range(-3, 3)] + [0]
    low, high = ax.get_ylim()
    ax.set_yticks([t for t in ticks if low <= t <= high])
    name_arms(ax, objective)


def plot_objective(ax, outcome, s, objective):
    """One line per run, from before its first teleport to after its last, on held-out data and fresh draws."""
    values = outcome.arrays[MEASURES[objective]][..., 1]  # held out
    for x, (a, way) in enumerate(ways_of(objective)):
        k = teleports(way, s)
        for run in values[a]:
            ax.plot([x - 0.25, x + 0.25], [run[0, 0], run[k - 1, 1]], linewidth=1, **look_of(way), markevery=[1])
    ax.set(yscale="log", ylim=(max(np.nanmin(values[0]) / 30, ax.get_ylim()[0]), None))
    name_arms(ax, objective)


def plot_drift(ax, outcome, s, objective):
    """|Δloss| / loss of every teleport of every run, on its batch and on a held-out one."""
    for x, (a, way) in enumerate(ways_of(objective)):
        loss = outcome.arrays["loss"][a, :, : teleports(way, s)]
        drift = (np.abs(loss[:, :, 1] - loss[:, :, 0]) / loss[:, :, 0]).clip(1e-8).reshape(-1, 2)
        for i, (name, face) in enumerate((("teleport batch", None), ("held-out batch", "none"))):
            look = {**look_of(way), "linestyle": "", "markerfacecolor": face, "label": None if x else name}
            ax.plot(np.full(len(drift), x - 0.15 + 0.3 * i), drift[:, i], **look)
    ax.set(yscale="log", ylabel="less is drawn at 1e-8")
    ax.legend(fontsize=8)
    name_arms(ax, objective)


def ways_of(objective):
    return [(a, way) for a, way in enumerate(WAYS, start=1) if way.objective == objective]


def look_of(way):
    """Colour and marker by action."""
    look = plots.style(1 + ACTIONS.index(way.action), marker=True)
    return {key: look[key] for key in ("color", "marker", "markersize")}


def name_arms(ax, objective):
    names = [f"{way.action} {way.direction}" for _, way in ways_of(objective)]
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    ax.set_xlim(-0.5, len(names) - 0.5)


def report(outcome, s):
    def percent(value):
        return "" if math.isnan(value) else f"{value:+.2%}" if abs(value) < 10 else f"×{1 + value:.1e}"

    def number(value):
        return "diverged" if math.isnan(value) else f"{value:.1e}"

    rows = [["baseline", "", "", "", "", "", mean_std(outcome.metrics["baseline"]["test_loss"]), "", ""]]
    for way in WAYS:
        m = outcome.metrics[way.key]
        changes = [percent(m[key]) for key in ("objective_change", "total_change")]
        drifts = [number(m[key][1]) for key in ("drift", "largest_drift")]
        last = [mean_std(m["test_loss"]), interval(m["minus_baseline"]), verdict(m["minus_baseline"])]
        rows.append([way, f"{m['moved_as_asked']}/{m['teleports']}", *changes, *drifts, *last])
    header = ["arm", "as asked", "change", "in all", "drift", "largest", "test loss", "minus baseline's", ""]
    title = (
        f"{outcome.label}, {s.seeds} runs, epoch {s.epochs}. As asked: teleports that moved φ or ψ the right way;"
        "\nchange: of φ or ψ by a teleport, median; in all: φ or ψ after the last one against no teleport, on held-out"
        "\ndata and fresh draws, median; drift: |Δloss|/loss of a teleport on held-out data, median and largest."
        f"\n95 % intervals; of {len(WAYS)} comparisons one in twenty differs by chance."
    )
    return f"{title}\n\n{table(header, rows)}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
