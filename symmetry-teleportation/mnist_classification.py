"""Teleportation in MNIST classification, SGD and AdaGrad: NeurIPS 2022 (arXiv 2205.10637).

A 784-16-10-10 and a wide 784-128-128-10 network; before the first mini-batch of each of the first epochs the weights
are teleported on a fresh random batch. The code of this experiment was not published: data, initialization, learning
rates and mini-batches of 20 are those of ICLR 2024, the published teleport is the one of this paper's regression. The
arms:

  baseline        the optimizer alone
  published       post-activation action with I − T for the inverse and stale hidden layers, on 200 (wide: 100) samples
  postactivation  the true post-activation action (Eq. 8), on as many samples as it is exact for: 16 (wide: 100)
  rescaling       positive rescaling, exact on every input, on the published arm's samples
  random          a random element of the exact action that changes the weights as much, on the same samples
  lr raised       no teleport; the learning rate is doubled for good at each, as ‖∂L/∂W‖ would have been

Ascent is unstable at fixed rates (‖∂L/∂W‖² has no maximum on these orbits), so every teleport climbs in small adaptive
steps until the batch's ‖∂L/∂W‖² is up fourfold. An exact action keeps the loss of its batch; what it does to the whole
training set's is reported beside. Optimizer state is kept.

Every arm's learning rate is tuned on other runs, on a grid that grows; then fresh runs are compared at the rates of
ICLR 2024 and at every arm's best (common/protocol.py). All arms, rates and seeds are members of one stacked network and
see the same mini-batches. Drift and the seconds of each arm alone are measured beside.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, plots, protocol
from common.arms import Arm, Stack, as_large, draw_batches
from common.claims import Claim, Verdict, change, table
from common.data import published_split
from common.losses import batch_loss
from common.mlp import initial_weights
from common.protocol import against
from common.published import teleport_postactivation
from common.run import Outcome
from common.tuning import in_chunks, room
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
    rule="holds if for every network and optimizer the exact teleport has a better mean log training loss than the "
    "baseline at the learning rates of ICLR 2024 and at each arm's best, and at best rates better than a random "
    "element of the same size and than a rate raised as much as the gradient norm; in part: for some. Rates tuned on "
    "other runs, interior; paired by seed; margin 1 %; Holm over networks, optimizers and comparisons.",
    dated="2026-11-30",
)
BEFORE = (
    "Under the rule of 2026-11-25 (untuned rates, a threefold one as control, 5 runs on MNIST): in part, for the wide "
    "network only, where exact teleports changed SGD's training loss by -28.03 [-31.30, -24.61] %, AdaGrad's by -11.39 "
    "[-15.46, -7.12] %, and not beyond a threefold learning rate."
)

ARMS = ("baseline", "published", "postactivation", "rescaling", "random", "lr raised")
TELEPORTING = ("published", "postactivation", "rescaling", "random")
NETWORKS = {"narrow": (16, 10), "wide": (128, 128)}  # ours: the first is that of ICLR 2024
SAMPLES = {"narrow": 200, "wide": 100}  # in a teleport's batch
OPTIMIZERS = {"SGD": 1e-2, "AdaGrad": 1e-2}  # learning rates of ICLR 2024
ACTIVATION = leaky_relu(0.1)
DRIFT_RUNS = 5


@dataclass(frozen=True)
class Settings:
    dataset: str = "MNIST"
    seeds: int = 30  # compared at most: the wide network takes seconds a run
    least: int = 20  # compared at least
    tuning_seeds: int = 4
    grid: tuple = (1, 2, 5, 10)  # learning rates, as multiples of ICLR 2024's; it grows
    epochs: int = 10
    networks: tuple = tuple(NETWORKS)
    teleport_epochs: tuple = (0, 1, 2)
    growth: float = 4.0  # of ‖∂L/∂W‖² in a teleport
    ascent_steps: int = 60  # at most
    batch: int = 20
    samples: int | None = None  # train on the first samples only


PAPER = Settings()
QUICK = replace(PAPER, dataset="mnist-mini", seeds=6, least=6, tuning_seeds=2, epochs=4, networks=("narrow",))
QUICK = replace(QUICK, samples=2000, teleport_epochs=(0, 1), ascent_steps=15, grid=(1, 3, 10))
SMALL = dict(seeds=2, least=2, tuning_seeds=2, grid=(1, 3), epochs=2, teleport_epochs=(0,), ascent_steps=2)
PRESETS = {"tiny": replace(QUICK, samples=200, **SMALL), "quick": QUICK, "paper": PAPER}


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])

    def train_arms(case, which, factors, seeds):
        """Curves in chunks of the seeds, without what only `measure` needs."""
        every, one = arms(s, case), initial_weights(dimensions(data, case), seeds[:1])

        def chunk(seeds):
            curves = train(run, case, [every[a] for a in which], factors, seeds, data)[0]
            return {key: curves[key] for key in ("train_loss", "test_loss")}

        return in_chunks(chunk, seeds, factors.size, one, room(run.device))

    cases = [f"{network} {optimizer}" for network in s.networks for optimizer in OPTIMIZERS]
    arrays, tuned, seeds, metrics = protocol.stages(run, cases, ARMS, train_arms, ["postactivation"])
    best = {case: protocol.both_rates(tuned[case]) for case in cases}
    parts, _ = run.parts(
        lambda case: measure(run, case, best[case], seeds[case], data), {f"moves.{case}": case for case in cases}
    )
    timings = {case: dict(zip(ARMS, parts[f"moves.{case}"].pop("seconds").tolist())) for case in cases}
    arrays |= {f"{key}/{k}": v for key, values in parts.items() for k, v in values.items()}
    return Outcome(metrics, arrays, max(seeds.values(), key=len), timings)


def dimensions(data, case):
    return data.features, *NETWORKS[case.split()[0]], 10


def arms(s, case):
    """Who is moved, and how. Up to the width of its input, the post-activation action is exact."""
    narrowest = min(NETWORKS[case.split()[0]][:-1])

    def on_few(move):
        return lambda W, X, labels: move(W, X[..., :narrowest], labels[..., :narrowest])

    exact = partial(climb, s, "postactivation")
    random = as_large(exact, partial(batch_loss, activation=ACTIVATION), postactivation_action, ACTIVATION, seed=0)
    return (
        Arm("baseline"),
        Arm("published", partial(climb, s, "published")),
        Arm("postactivation", on_few(exact)),
        Arm("rescaling", partial(climb, s, "rescaling")),
        Arm("random", on_few(random)),
        Arm("lr raised", on_few(exact), raises=True),
    )


def train(run, case, arms, factors, seeds, data, epochs=None):
    """Train the arms (A) at their learning rates (factors, (A, F)) and seeds (S): curves, and the losses (A, F, S,
    teleports, [batch, training set], 2) around each move with its gradient norms (A, F, S, teleports, 2)."""
    s, (network, optimizer) = run.settings, case.split()
    W, moves = initial_weights(dimensions(data, case), seeds, run.device), len(s.teleport_epochs)
    stack = Stack(arms, W, optimizer, OPTIMIZERS[optimizer] * torch.as_tensor(factors).to(W[0]), moves)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each run draws its own teleport batches
    whole = torch.full_like(stack.loss, torch.nan)  # loss on the whole training set

    def before(k, i):
        """Before mini-batch i of the k-th epoch with a teleport."""
        if i == 0:
            X, labels = draw_batches(data.x, data.y, SAMPLES[network], generators)
            whole[..., k, 0] = stack.evaluate(data.x, data.y)[0]
            stack.move(k, X.double(), labels, dtype=torch.float64)
            whole[..., k, 1] = stack.evaluate(data.x, data.y)[0]

    at = {epoch: partial(before, k) for k, epoch in enumerate(s.teleport_epochs)}
    curves = stack.train(run, data, epochs or s.epochs, s.batch, at, desc=case)
    return curves, torch.stack([stack.loss, whole], -2), stack.objective.sqrt()


def measure(run, case, factors, seeds, data):
    """What the moves do to the losses of the first runs, and the seconds of the epochs with them, each arm alone."""
    every, epochs = arms(run.settings, case), run.settings.teleport_epochs[-1] + 1
    _, losses, norms = train(run, case, every, factors, seeds[:DRIFT_RUNS], data, epochs)
    alone = [train(run, case, [arm], np.ones((1, 1)), seeds[:1], data, epochs)[0]["seconds"][0] for arm in every]
    return {"losses": losses, "norms": norms, "seconds": torch.stack(alone)}


def climb(s, arm, weights, X, labels):
    """One teleport of members (F, S), a run on its batch X (S, d_0, n), labels (S, n): until ‖∂L/∂W‖² is up fourfold.

    A step that raises it by more than half, or not at all, is taken back and tried again at a quarter of the rate. The
    published teleport may also lower it.
    """
    loss_fn = batch_loss(X, labels, ACTIVATION)

    def step(weights, lr):
        if arm == "published":
            options = dict(activation=ACTIVATION, lr=lr[..., None, None], steps=1, x_inverse=X_inverse)
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
        weights = tuple(torch.where(accepted[..., None, None], M, V) for M, V in zip(moved.weights, weights))
        value = torch.where(accepted, moved.objective_after, value)
        lr = torch.where(accepted, lr * 3, lr / 4)
    return Teleportation(weights, loss_before, loss_fn(weights), start, value)


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def pairs(case):
    """What the claim rests on."""
    yield against(case, "postactivation", "published")
    yield from (against(case, "postactivation", "best", other=other) for other in ("baseline", "random", "lr raised"))


def judge(*outcomes):
    weighed = protocol.weigh(outcomes, ARMS, pairs, "postactivation")
    return Verdict(
        weighed.word,
        weighed.limits,
        f"Training loss with exact teleports against the baseline's, each arm at its best rate: {weighed.said}.",
        [BEFORE, *(line for r, found in zip(outcomes, weighed.found) for line in detail(r, found))],
        weighed.number,
    )


def detail(r, found):
    yield from protocol.described(r, found, ARMS)
    for case, m in r.metrics.items():
        beside = zip(("random", "lr raised"), list(pairs(case))[2:])
        controls = ", ".join(f"against {other} {change(found[pair])}" for other, pair in beside)
        drift = ", ".join(f"{arm} {batch:.0e} ({whole:.0e})" for arm, (batch, whole) in drifts(r, case).items())
        yield (
            f"{case}, postactivation, best rates: {controls}; the tuning asked for {m['runs']} runs, which can show "
            f"equivalence within {100 * m['reachable_margin']:.2g} %. Drift at the published rate on the teleport's "
            f"batch (the whole training set): {drift}."
        )


def drifts(r, case, rate=0):
    """{arm: the largest |Δloss|/loss on the teleport's batch and on the training set}; rate: published, best."""
    losses = r.arrays[f"moves.{case}/losses"][:, rate]
    return {
        arm: [protocol.relative_drift(losses[ARMS.index(arm), ..., k, :]).max() for k in (0, 1)] for arm in TELEPORTING
    }


# ---------------------------------------------------------------------------------------------------------------------
# Figures and table


def plot(outcome, s, save):
    save(plot_curves(outcome, s, "epoch"))
    save(plot_curves(outcome, s, "seconds"), "seconds")
    save(protocol.plot_controls(outcome, protocol.findings(outcome, ARMS, pairs), ARMS)[0], "controls")
    moved = [ARMS.index(arm) for arm in TELEPORTING]
    losses = {case: outcome.arrays[f"moves.{case}/losses"][moved, 0] for case in outcome.metrics}
    save(protocol.plot_drift(TELEPORTING, {case: np.moveaxis(each, -2, 0) for case, each in losses.items()}), "drift")


def plot_curves(outcome, s, x_axis):
    """The paper's two arms at the published rate: training loss against epoch, or seconds of an arm run alone."""
    figure, axes = plots.panels(1, len(outcome.metrics), width=3.5, height=3.3)
    for ax, case in zip(axes[0], outcome.metrics):
        for arm in ("baseline", "published"):
            a, x = ARMS.index(arm), np.arange(1.0, s.epochs + 1)
            if x_axis == "seconds":
                x = elapsed(outcome.timings[case], arm, s.epochs)
            look = plots.marked(a, s.epochs) | {"linewidth": 1.2}
            plots.band(ax, x, outcome.arrays[f"compared.{case}/train_loss"][a, 0], arm, **look)
        ax.set(title=case.replace(" ", ", "), xlabel="epoch" if x_axis == "epoch" else "seconds of a run alone")
        plots.log_loss(ax)
    axes[0, 0].set_ylabel(f"training loss, {outcome.label}")
    axes[0, -1].legend(fontsize=8)
    return figure


def elapsed(seconds, arm, epochs):
    """Seconds at the end of each epoch of an arm: as measured while it teleports, then as the baseline."""
    measured = seconds[arm]
    rest = seconds["baseline"][-1] / len(measured) * np.arange(1, epochs - len(measured) + 1)
    return np.concatenate([measured, measured[-1] + rest])


def report(outcome, s):
    found, rows = protocol.findings(outcome, ARMS, pairs), []
    for case in outcome.metrics:
        norms = outcome.arrays[f"moves.{case}/norms"][:, 0]
        published, best = (drifts(outcome, case, rate) for rate in (0, 1))
        for a, arm in enumerate(ARMS):
            moved = [""] * 5
            if arm in TELEPORTING:
                drift = [f"{value:.0e}" for value in (*published[arm], *best[arm])]
                moved = [f"×{np.nanmedian(norms[a, ..., 1] / norms[a, ..., 0]):.2f}", *drift]
            name, seconds = f"{case.replace(' ', ', ')}, {arm}", f"{outcome.timings[case][arm][-1]:.2f}"
            rows.append([name, *protocol.cells(outcome, found, ARMS, case, a), *moved, seconds])
    moves = ["‖∂L/∂W‖", "drift, batch", "training set", "at best: batch", "training set"]
    n = ", ".join(f"{case} {m['runs']}" for case, m in outcome.metrics.items())
    return (
        f"{outcome.label}, losses against the baseline's with 95 % intervals; runs: {n}. ‖∂L/∂W‖: median growth in a\n"
        f"teleport. Drift: largest |Δloss|/loss of {DRIFT_RUNS} runs. Seconds: of the first "
        f"{s.teleport_epochs[-1] + 1} epochs, run alone.\n\n{table(['', *protocol.HEADER, *moves, 'seconds'], rows)}"
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
