"""Teleporting to sharper, flatter, more and less curved points: Figure 4 of ICLR 2024 (arXiv 2305.13404, Section 4).

SGD trains a 784-16-10-10 network (CIFAR-10: 3072-32-10-10) without teleportation for 20 epochs. Before the first
mini-batches of the next epoch the weights are teleported, each time on a fresh batch of 2000; then SGD goes on. Two
objectives, each up and down:

  sharpness φ (Eq. 4)   10 steps of gradient ascent or descent of the mean loss at distances 0.1 to 0.9 from W
  curvature ψ (Eq. 5)   one step t ← ±lr dκ/dt along exp(tM) on the layers 2 and 3, M drawn uniformly from [0, 1]

and the arms:

  teleport    the pre-activation action, on the true hidden layers. With 2000 samples on 10 units it is a least-squares
              fit: the loss moves, and by how much is part of the result. For ψ, t is halved until ψ moves the right way
              and the loss by at most 1 %
  published   φ: stale hidden layers, new directions in every step, the mean over 9 radii divided by 10. ψ: the bare
              step, which mostly goes much too far (on true hidden layers and, at full row rank, the same curve)
  rescaling   like `teleport`, on the orbit of positive rescaling, where the loss cannot move
  random      φ: a random element that moves the weights as far as `teleport`; ψ: the same |t|, a random sign

A teleport whose step is so long that the group element is singular, or infinite, is not made and counts as not having
moved φ or ψ.

All arms of a run start from the same weights and see the same batches, directions and elements; arms and runs are
members of one stacked network. Unlike the published runs, which share one initialization, every run has its own.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from common import cli, plots, published, statistics
from common.claims import Claim, Verdict, grade, interval, listed, table
from common.data import published_split, require
from common.mlp import StackedMLP, cross_entropy, initial_weights, published_seeds
from common.run import Outcome
from common.sharpness import Sharpness
from common.statistics import difference, mean_std, verdict
from teleport import (
    apply_to_layers,
    curve_curvature,
    forward,
    hidden_layers,
    leaky_relu,
    preactivation_action,
    rescaling_action,
    squared_gradient_norm,
    teleport,
)

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


class Arm(NamedTuple):
    objective: str
    kind: str
    maximize: bool

    @property
    def direction(self):
        return "up" if self.maximize else "down"

    @property
    def key(self):
        return f"{self.objective}_{self.direction}_{self.kind}"


KINDS = {
    "sharpness": ("teleport", "published", "rescaling", "random"),
    "curvature": ("teleport", "published", "rescaling", "random"),
}
ARMS = [Arm(objective, kind, up) for objective in KINDS for kind in KINDS[objective] for up in (True, False)]
MEMBERS = [None, *ARMS]  # of the stack: no teleport, then the arms
SYMBOLS = {"sharpness": "φ", "curvature": "ψ"}
# dataset: learning rate of SGD, and of the teleports (up, down). mnist-mini is treated as MNIST.
RATES = {
    "MNIST": (1e-2, {"sharpness": (5e-2, 5e-2), "curvature": (2e-1, 5e-2)}),
    "FashionMNIST": (1e-2, {"sharpness": (1e-1, 3e-1), "curvature": (5e-3, 3e-3)}),
    "CIFAR10": (2e-2, {"sharpness": (5e-2, 5e-2), "curvature": (2e-1, 5e-2)}),
}
ACTIVATION = leaky_relu(0.1)
RADII = torch.arange(1, 10) / 10
MEASURED = ("phi", "psi", "loss", "gradient_norm")  # of every arm, before and after each teleport


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 5
    epochs: int = 40
    teleport_epoch: int = 20
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports_sharpness: tuple = (2, 5)  # up, down
    teleports_curvature: tuple = (5, 5)
    teleport_batch: int = 500
    directions: int = 10  # for each of the 9 radii
    ascent_steps: int = 10
    cap: float = 2.0  # ascent stops once φ is above it
    tolerance: float = 0.01  # relative change of the loss that a teleport of ψ may cost
    measured_directions: int = 10  # for each radius: φ of every arm, on directions that no teleport has seen
    measured_elements: int = 5  # ψ of every arm: mean curvature over as many M


PRESETS = {
    "tiny": Settings(
        seeds=2, epochs=4, teleport_epoch=2, samples=400, teleports_sharpness=(1, 2), teleports_curvature=(2, 1),
        teleport_batch=100, directions=2, ascent_steps=2, cap=3.0, measured_directions=1, measured_elements=2,
    ),
    "quick": Settings(),
    "paper": Settings(
        dataset="MNIST", teleports_sharpness=(2, 10), teleports_curvature=(10, 5), teleport_batch=2000, directions=100,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The experiment, in parts that an interrupted run continues from


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    require(data, train=s.teleport_batch, test=s.teleport_batch)
    seeds = published_seeds(s.seeds)
    lr = RATES.get(s.dataset, RATES["MNIST"])[0]
    dims = (data.features, *((32, 10, 10) if s.dataset == "CIFAR10" else (16, 10, 10)))

    def before(key):  # what all arms of a run share
        net = StackedMLP(initial_weights(dims, seeds, run.device), lr=lr)
        return train(run, net, data, s.teleport_epoch)

    def teleported(key):  # the epoch of the teleports: all arms of one run
        i = int(key.removeprefix("run_")) - 1
        net = StackedMLP([W[i].expand(len(MEMBERS), *W[i].shape) for W in weights_of(first, run.device)], lr=lr)
        record, move_arms = teleporter(run, net, data, seeds[i])
        return {**train(run, net, data, 1, move_arms), **record}

    def after(key):  # all arms of all runs, five epochs at a time
        net = StackedMLP(weights_of(state, run.device), lr=lr)
        return train(run, net, data, int(key.removeprefix("epoch_")) - done)

    parts, seconds = run.parts(before, {"before": "before"})
    first = parts["before"]
    keys = [f"run_{i + 1}" for i in range(s.seeds)]
    parts, spent = run.parts(teleported, {key: key for key in keys})
    middle, seconds = list(parts.values()), seconds | spent
    state = {key: np.concatenate([part[key] for part in middle]) for key in ("W1", "W2", "W3")}
    done, last = s.teleport_epoch + 1, []
    while done < s.epochs:
        key = f"epoch_{min(done + 5, s.epochs)}"
        parts, spent = run.parts(after, {key: key})
        state, seconds = parts[key], seconds | spent
        last.append(state)
        done = min(done + 5, s.epochs)

    arrays = {key: np.stack([part[key] for part in middle], 1) for key in ("objective", *MEASURED)}
    for key in ("train_loss", "test_loss"):  # (members, runs, epochs)
        shared = np.broadcast_to(first[key], (len(MEMBERS), *first[key].shape))
        rest = [part[key].reshape(s.seeds, len(MEMBERS), -1).swapaxes(0, 1) for part in last]
        arrays[key] = np.concatenate([shared, np.stack([part[key] for part in middle], 1), *rest], -1)
    return Outcome(compare(s, arrays), arrays, seeds, seconds)


def train(run, net, data, epochs, before_step=None):
    """Train for some epochs; return the weights and the loss curves (members, epochs)."""
    train_loss, test_loss = [], []
    for _ in run.progress(range(epochs), desc="SGD", unit="epoch", disable=run.quiet or epochs == 1):
        train_loss.append(net.train_epoch(data.x, data.y, run.settings.batch, before_step))
        test_loss.append(net.evaluate(data.x_test, data.y_test)[0])
    weights = {f"W{m}": W for m, W in enumerate(net.weights, start=1)}
    return {**weights, "train_loss": torch.stack(train_loss, -1), "test_loss": torch.stack(test_loss, -1)}


def weights_of(part, device):
    return tuple(torch.from_numpy(part[f"W{m}"]).to(device) for m in (1, 2, 3))


def teleporter(run, net, data, seed):
    """The record of one run's teleports, to be filled in, and the function that moves the arms before mini-batch k."""
    s = run.settings
    K = max(*s.teleports_sharpness, *s.teleports_curvature)
    record = {key: torch.zeros(len(MEMBERS), K, 2, 2) for key in MEASURED}  # [before, after], [batch, held out]
    record["objective"] = torch.full((len(MEMBERS), K, 2), torch.nan)  # what the arm set out to change, on the batch
    generator = torch.Generator().manual_seed(seed)
    held_out = random_batch(data.x_test, data.y_test, s.teleport_batch, generator)
    held_out_meter = Meter(*held_out, net.weights, generator, s)  # the same for all teleports of the run

    def move_arms(k):
        if k >= K:
            return
        generator = torch.Generator().manual_seed(seed + 1 + k)
        batch = random_batch(data.x, data.y, s.teleport_batch, generator)
        meters = (Meter(*batch, net.weights, generator, s), held_out_meter)
        before = torch.stack([meter(net.weights) for meter in meters], 1)
        mover = Mover(*batch, net.weights, generator, s)
        for a, arm in enumerate(MEMBERS):
            if arm and k < teleports(arm, s) and all(W[a].isfinite().all() for W in net.weights):
                try:
                    moved, objective = mover(arm, tuple(W[a] for W in net.weights))
                except (
                    ValueError,
                    torch.linalg.LinAlgError,
                ):  # a step so long that its element is singular or infinite
                    continue
                net.set(a, moved)
                record["objective"][a, k] = objective
        after = torch.stack([meter(net.weights) for meter in meters], 1)
        for i, key in enumerate(MEASURED):
            record[key][:, k] = torch.stack([before[..., i], after[..., i]], 1)

    return record, move_arms


def teleports(arm, s):
    """How many times the arm teleports."""
    return getattr(s, f"teleports_{arm.objective}")[0 if arm.maximize else 1]


def random_batch(x, y, size, generator):
    rows = torch.randperm(len(x), generator=generator)[:size].to(x.device)
    return x[rows].T, y[rows]


# ---------------------------------------------------------------------------------------------------------------------
# Teleports


class Mover:
    """The moves of one teleport: every arm of a run gets the same batch, directions, M and coin."""

    def __init__(self, x, labels, weights, generator, s):
        self.x, self.generator, self.s = x, generator, s
        self.new_phi = lambda: random_sharpness(x, labels, weights, s.directions, generator)
        self.loss_fn = lambda w: cross_entropy(forward(w, x, ACTIVATION), labels)
        self.phi = self.new_phi()
        self.M = random_elements(weights, 1, generator)[0]
        self.coin = 1 if torch.rand((), generator=generator) < 0.5 else -1
        self.distance, self.t = {}, {}  # how far the arms `teleport` went, up and down: so far goes `random`

    def __call__(self, arm, weights):
        """The arm's new weights, and its objective before and after, (2,)."""
        rates = RATES.get(self.s.dataset, RATES["MNIST"])[1]
        lr = rates[arm.objective][0 if arm.maximize else 1]
        return getattr(self, arm.objective)(arm, weights, lr)

    def sharpness(self, arm, weights, lr):
        s, up = self.s, arm.maximize
        options = dict(activation=ACTIVATION, lr=lr, steps=s.ascent_steps, maximize=up)
        if arm.kind == "random":
            moved = random_move(weights, self.x, self.distance.get(up, 0), self.generator)
            return moved, torch.stack([self.phi(weights), self.phi(moved)])
        if arm.kind == "published":
            result = published.teleport_sharpness(weights, self.x, self.loss_fn, self.new_phi, cap=s.cap, **options)
        else:
            action = rescaling_action if arm.kind == "rescaling" else preactivation_action
            options.update(objective=self.phi, action=action, cap=s.cap if up else None)
            result = teleport(weights, self.x, self.loss_fn, **options)
        if arm.kind == "teleport":
            self.distance[up] = distance(result.weights, weights)
        return result.weights, torch.stack([result.objective_before, result.objective_after])

    def curvature(self, arm, weights, lr):
        lr = lr if arm.maximize else -lr
        M = self.M.diag().diag() if arm.kind == "rescaling" else self.M  # exp(tM) diagonal and positive: rescaling
        before = kappa_along(M, weights, self.x)
        if arm.kind == "published":
            moved = published.teleport_curvature(weights, self.x, M, activation=ACTIVATION, lr=lr)
        elif arm.kind == "random":
            moved = act(weights, self.x, self.coin * abs(self.t.get(arm.maximize, 0)) * M)
        else:
            moved, t = curvature_teleport(weights, self.x, self.loss_fn, M, lr, self.s.tolerance)
            if arm.kind == "teleport":
                self.t[arm.maximize] = t
        return moved, torch.stack([before, kappa_along(M, moved, self.x)])


def curvature_teleport(weights, x, loss_fn, M, lr, tolerance):
    """Move the layers 2 and 3 by exp(tM), t = lr dκ/dt at 0. Returns the new weights and t.

    t is halved until κ has moved the way lr points and the loss is within tolerance (relative); if 30 halvings do not
    help, t = 0. dκ/dt is often so large that exp(tM) at the published lr is orders of magnitude beyond where it holds.
    """
    U, V, h = (a.double() for a in (weights[2], weights[1], hidden_layers(weights, x, ACTIVATION)[1]))
    kappa, slope = curve_curvature(U, V, h, M.double(), ACTIVATION)
    loss = loss_fn(weights)
    t = (lr * slope).item()
    for _ in range(30):
        try:
            moved = act(weights, x, t * M)
            change = kappa_along(M, moved, x) - kappa
            if change * lr > 0 and abs(loss_fn(moved) - loss) <= tolerance * loss:
                return moved, t
        except ValueError:  # a singular element
            pass
        t /= 2
    return weights, 0.0


def act(weights, x, M):
    """exp(M) on the layers 2 and 3, in float64."""
    pair = (a.double() for a in (weights[2], weights[1], hidden_layers(weights, x, ACTIVATION)[1]))
    U, V = preactivation_action(*pair, torch.linalg.matrix_exp(M.double()), ACTIVATION)
    return weights[0], V.to(x), U.to(x)


def kappa_along(M, weights, x):
    """κ of t ↦ exp(tM) at t = 0; M may be an ensemble (k, d_2, d_2). In float64; NaN for weights that diverged."""
    if not all(W.isfinite().all() for W in weights):
        return torch.full(M.shape[:-2], torch.nan, dtype=torch.float64, device=x.device)
    U, V, h = (a.double() for a in (weights[2], weights[1], hidden_layers(weights, x, ACTIVATION)[1]))
    return curve_curvature(U, V, h, M.double(), ACTIVATION)[0]


def random_move(weights, x, length, generator):
    """The pre-activation action of I + sR, R random, with s such that the weights move by `length`."""
    R = [torch.randn(W.shape[0], W.shape[0], generator=generator).to(W) for W in weights[:-1]]
    R = [r / r.norm() for r in R]
    if length == 0:  # the arm that it follows stopped at its cap
        return weights
    s = 1e-3
    for _ in range(12):
        elements = [torch.eye(len(r)).to(r) + s * r for r in R]
        moved = apply_to_layers(weights, x, elements, preactivation_action, ACTIVATION)
        s = s * (length / distance(moved, weights)) ** 0.5  # the distance grows faster than s: half a step of the way
    return moved


def distance(a, b):
    return sum((p - q).square().sum() for p, q in zip(a, b)).sqrt()


def random_sharpness(x, labels, weights, per_radius, generator):
    """φ on a batch, with new directions drawn uniformly from [0, 1]: the mean of such a direction is 87 % of it."""
    radii = RADII.repeat_interleave(per_radius)
    dims = (len(x), *(W.shape[-2] for W in weights))
    P = sum(i * o for i, o in zip(dims, dims[1:]))
    directions = torch.rand(len(radii), P, generator=generator).to(x.device)
    return Sharpness(x, labels, directions, radii.to(x), dims, ACTIVATION)


def random_elements(weights, count, generator):
    d = weights[1].shape[-2]
    return torch.rand(count, d, d, generator=generator).to(weights[1])


class Meter:
    """φ, ψ, loss and gradient norm on a batch, with directions and elements that no teleport has seen."""

    def __init__(self, x, labels, weights, generator, s):
        self.x = x
        self.loss_fn = lambda w: cross_entropy(forward(w, x, ACTIVATION), labels)
        self.phi = random_sharpness(x, labels, weights, s.measured_directions, generator)
        self.M = random_elements(weights, s.measured_elements, generator)

    def __call__(self, weights):
        """weights (E, d_m, d_{m-1}) -> (E, 4); NaN for members that diverged."""
        values = self.x.new_full((len(weights[0]), len(MEASURED)), torch.nan)
        alive = torch.stack([W.isfinite().all(-1).all(-1) for W in weights]).all(0)
        weights = tuple(W[alive] for W in weights)
        psi = torch.stack([kappa_along(self.M, member, self.x).mean() for member in zip(*weights)]).to(self.x)
        gradient_norm = squared_gradient_norm(weights, self.loss_fn).sqrt()
        values[alive] = torch.stack([self.phi(weights), psi, self.loss_fn(weights), gradient_norm], 1)
        return values


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and figures


def compare(s, arrays):
    """For every arm: did the objective go where it was sent, what did that cost, and is the test loss better?"""
    final = arrays["test_loss"][..., -1]
    metrics = {"no_teleport": {"test_loss": final[0], "train_loss": arrays["train_loss"][0, :, -1]}}
    for a, arm in enumerate(ARMS, start=1):
        k = teleports(arm, s)
        objective = arrays["objective"][a, :, :k]  # (runs, k, 2)
        moved = (objective[..., 1] > objective[..., 0]) if arm.maximize else (objective[..., 1] < objective[..., 0])
        loss = arrays["loss"][a, :, :k]  # (runs, k, [before, after], [batch, held out])
        drift = np.abs(loss[:, :, 1] - loss[:, :, 0]) / loss[:, :, 0]
        measured = arrays["phi" if arm.objective == "sharpness" else "psi"][:, :, k - 1, 1, 1]  # after all, held out
        metrics[arm.key] = {
            "teleports": moved.size,
            "moved_as_asked": int(moved.sum()),
            "objective_change": finite_median(objective[..., 1] / objective[..., 0] - 1),
            "total_change": finite_median(measured[a] / measured[0] - 1),  # against no teleport at the same step
            "drift": [finite_median(drift[..., i]) for i in (0, 1)],
            "largest_drift": [finite_max(drift[..., i]) for i in (0, 1)],
            "test_loss": final[a],
            "train_loss": arrays["train_loss"][a, :, -1],
            "minus_no_teleport": difference(final[a], final[0]),
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
        return ", ".join(f"{interval(m['minus_no_teleport'])} on {label}" for label, m in arms(key))

    def labels(key, word):
        return [label for label, m in arms(key) if verdict(m["minus_no_teleport"]) == word]

    up, down, n = "curvature_up_teleport", "sharpness_down_teleport", len(outcomes)
    improves, negligible = labels(up, "better"), labels(down, "no difference")
    words, details = Counter(), []
    for r in outcomes:
        for key, m in r.metrics.items():
            if key == "no_teleport":
                continue
            word = "diverged" if math.isnan(m["minus_no_teleport"][0]) else verdict(m["minus_no_teleport"])
            change = "diverged" if math.isnan(m["total_change"]) else f"{m['total_change']:+.1%}"
            details.append(
                f"{r.label}, {arm_name(key)}: {m['moved_as_asked']} of {m['teleports']} teleports went as asked, "
                f"{change} in all; test loss minus no teleport {interval(m['minus_no_teleport'])} ({word})."
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
    diverged = [label for label, m in arms(down) if math.isnan(m["minus_no_teleport"][0])]
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
        f"final test loss {interval(arms(up)[0][1]['minus_no_teleport'])} on {arms(up)[0][0]}",
        answers={"direction": direction(outcomes)},
    )


def direction(outcomes):
    """Test loss, mean of the last quarter of the epochs, after teleports to larger and to smaller ψ, against none."""
    said = []
    for outcome in outcomes:
        losses = outcome.arrays["test_loss"][..., -(outcome.arrays["test_loss"].shape[-1] // 4) :].mean(-1)  # (M, S)
        for way in ("up", "down"):
            c = statistics.compare(losses[[m and m.key for m in MEMBERS].index(f"curvature_{way}_teleport")], losses[0])
            effect, low, high = (f"{statistics.percent(x):+.2f}" for x in (c.effect, c.low, c.high))
            said.append(f"{outcome.label}, ψ {way} {effect} [{low}, {high}] % ({c.word})")
    return f"Test loss of {len(outcomes[0].seeds)} runs against no teleport, margin 1 %: {'; '.join(said)}."


def arm_name(key):
    objective, direction, kind = key.split("_")
    return f"{'φ' if objective == 'sharpness' else 'ψ'} {direction}, {kind}"


def plot(outcome, s, save):
    figure, axes = plots.panels(2, 5, width=3.4, height=3.2)
    for row, objective in zip(axes, KINDS):
        symbol = SYMBOLS[objective]
        plot_losses(row[0], outcome, s, objective, "published")
        plot_losses(row[1], outcome, s, objective, "teleport")
        plot_differences(row[2], outcome, objective)
        plot_objective(row[3], outcome, s, objective)
        plot_drift(row[4], outcome, s, objective)
        row[0].set(title=f"{objective} {symbol}, published", ylabel=f"loss, {outcome.label}")
        row[1].set(title=f"{objective} {symbol}, teleport")
        row[2].set(title="final test loss − no teleport, 95 %", ylabel="linear within ± 1e-3, log beyond")
        row[3].set(title=f"{symbol} before → after all teleports")
        row[4].set(title="|Δloss| / loss of each teleport")
    save(figure)


def plot_losses(ax, outcome, s, objective, kind):
    """Figure 4: training loss dashed, test loss solid, mean ± std."""
    moved = [(a, f"{SYMBOLS[objective]} {arm.direction}") for a, arm in arms_of(objective) if arm.kind == kind]
    epochs = range(1, s.epochs + 1)
    for i, (a, label) in enumerate([(0, "no teleport"), *moved]):
        look = dict(plots.style(i, marker=True), markevery=(2 * i, 8))
        alive = np.isfinite(outcome.arrays["train_loss"][a]).all(-1)
        label += "" if alive.all() else f" ({alive.sum()} of {len(alive)} runs left)"
        for key, line, name in (("train_loss", "--", None), ("test_loss", "-", label)):
            if alive.any():
                plots.band(ax, epochs, outcome.arrays[key][a, alive], name, i, **{**look, "linestyle": line})
    usual = np.stack([outcome.arrays[key][0] for key in ("train_loss", "test_loss")])
    low, high = usual.min(), usual.max()
    room = high / low  # below for the legend; a diverged arm leaves the axes
    plots.log_loss(ax)
    ax.set(xlabel="epoch", ylim=(low / room**0.7, high * room**0.15))
    ax.legend(title="training dashed, test solid, ± std", fontsize=7, title_fontsize=7, loc="lower left")


def plot_differences(ax, outcome, objective):
    """Mean and 95 % interval over the runs."""
    arms = arms_of(objective)
    for x, (_, arm) in enumerate(arms):
        mean, low, high = outcome.metrics[arm.key]["minus_no_teleport"]
        if mean is None:
            ax.annotate("diverged", (x, 0), rotation=90, ha="center", va="bottom", fontsize=8)
        else:
            error = None if low is None else [[mean - low], [high - mean]]
            look = {**look_of(arm), "linestyle": "", "markevery": None}
            ax.errorbar(x, mean, error, capsize=3, **look)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1e-3)
    ticks = [sign * 10.0**e for sign in (-1, 1) for e in range(-3, 3)] + [0]
    low, high = ax.get_ylim()
    ax.set_yticks([t for t in ticks if low <= t <= high])
    ax.set_xlim(-0.5, len(arms) - 0.5)
    name_arms(ax, arms)


def look_of(arm):
    """Colour and marker by kind; up solid, down dashed."""
    i = 1 + ("teleport", "published", "rescaling", "random").index(arm.kind)
    return {**plots.style(i, marker=True), "linestyle": "-" if arm.maximize else "--", "markevery": (i, 6)}


def plot_objective(ax, outcome, s, objective):
    """One line per run, from before its first teleport to after its last, on held-out data and fresh draws."""
    arms = arms_of(objective)
    values = outcome.arrays["phi" if objective == "sharpness" else "psi"][..., 1]  # held out
    for x, (a, arm) in enumerate(arms):
        k = teleports(arm, s)
        for run in values[a]:
            look = {**look_of(arm), "markevery": [1], "linestyle": "-"}
            ax.plot([x - 0.25, x + 0.25], [run[0, 0], run[k - 1, 1]], linewidth=1, **look)
    ax.set(yscale="log", ylim=(max(np.nanmin(values[0]) / 30, ax.get_ylim()[0]), None))
    name_arms(ax, arms)


def plot_drift(ax, outcome, s, objective):
    arms = arms_of(objective)
    for x, (a, arm) in enumerate(arms):
        loss = outcome.arrays["loss"][a, :, : teleports(arm, s)]
        drift = (np.abs(loss[:, :, 1] - loss[:, :, 0]) / loss[:, :, 0]).clip(1e-8).reshape(-1, 2)
        for i, (name, face) in enumerate((("teleport batch", None), ("held-out batch", "none"))):
            look = {**look_of(arm), "linestyle": "", "markerfacecolor": face, "markevery": None}
            ax.plot(np.full(len(drift), x - 0.15 + 0.3 * i), drift[:, i], label=None if x else name, **look)
    ax.set(yscale="log", ylabel="less is drawn at 1e-8")
    ax.legend(fontsize=8)
    name_arms(ax, arms)


def arms_of(objective):
    return [(a, arm) for a, arm in enumerate(ARMS, start=1) if arm.objective == objective]


def name_arms(ax, arms):
    names = [f"{arm.kind} {arm.direction}" for _, arm in arms]
    ax.set_xticks(range(len(arms)), names, rotation=60, ha="right", fontsize=8)


def report(outcome, s):
    def percent(value):
        return "" if math.isnan(value) else f"{value:+.2%}" if abs(value) < 10 else f"×{1 + value:.1e}"

    def number(value):
        return "diverged" if math.isnan(value) else f"{value:.1e}"

    base = outcome.metrics["no_teleport"]
    rows = [["no teleport", "", "", "", "", "", mean_std(base["test_loss"]), "", ""]]
    for arm in ARMS:
        m = outcome.metrics[arm.key]
        rows.append(
            [
                f"{SYMBOLS[arm.objective]} {arm.direction}, {arm.kind}",
                f"{m['moved_as_asked']}/{m['teleports']}",
                percent(m["objective_change"]),
                percent(m["total_change"]),
                number(m["drift"][1]),
                number(m["largest_drift"][1]),
                mean_std(m["test_loss"]),
                interval(m["minus_no_teleport"]),
                verdict(m["minus_no_teleport"]),
            ]
        )
    header = ["arm", "as asked", "change", "in all", "drift", "largest", "test loss", "minus no teleport", ""]
    title = (
        f"{outcome.label}, {s.seeds} runs, epoch {s.epochs}. As asked: teleports that moved φ or ψ the right way;"
        "\nchange: of φ or ψ by a teleport, median; in all: φ or ψ after the last one against no teleport, on held-out"
        "\ndata and fresh draws, median; drift: |Δloss|/loss of a teleport on held-out data, median and largest."
        f"\n95 % intervals; of {len(ARMS)} comparisons one in twenty differs by chance."
    )
    return f"{title}\n\n{table(header, rows)}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
