"""Teleportation by sampling: an unofficial variant of NeurIPS 2022 (arXiv 2205.10637) on Fashion-MNIST, against ascent.

A 784-64-64-10 network with biases trains with SGD. Once, at the start of epoch 5, it is teleported through the
pre-activation action on the first mini-batch of 32: 1000 random group elements are drawn, the best one is kept. The
variant draws diagonally dominant elements, each row's sum on its diagonal, divided by the Frobenius norm; that is close
to g = I/8, which alone multiplies gradients by 8. So the arms are:

  baseline       no teleport; "lr x3" and "lr x10": the learning rate is raised at epoch 5 instead
  random         one element, on one random hidden layer
  published      the best of 1000 by the variant's score ‖g^-T ∂L/∂W_m‖, which is exact for linear networks only
  search         the best of 1000 by the true gradient norm after the move
  search all     the same, with an element for every hidden layer
  ascent         gradient ascent over the group, all layers, until it has the norm that search found
  rescaling      one positive number for the whole layer, chosen to give the norm that search found; "rescaling all":
                 the same number for every hidden layer, to give the norm that search all found

The variant is a notebook in TensorFlow, repository baubels/gradient_teleportation. Its network has a leaky ReLU on the
output too, and a softmax before a cross-entropy that takes another; the arms above have neither, and variant.py trains
some runs as it does, to be compared with what it printed. One number a run: the mean log training loss over the epochs
from the teleport on. The arms that the claim rests on are compared at the published rate, and on fresh runs of as many
epochs as the notebook has, each at its best rate, which is tuned on other runs (sampled.py).

Biases are an extra column of the weights (biases.py). An element is exact on the batch it was computed for; the loss
on the whole training set is reported beside it.
"""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import special

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sampled
import variant
from biases import COST, ascend, gradient_norm, parameters, rescale
from sampled import ACTIVATION, elements, hidden_layer, new_net, search, stages, start_weights, train_epoch

from common import cli, plots, protocol
from common.arms import Arm
from common.claims import UNDECIDED, Claim, Published, Verdict, change, grade, interval, listed, settle, table
from common.losses import batch_loss
from common.mlp import published_seeds
from common.run import Outcome
from common.statistics import compare as compare_runs
from common.statistics import mean_std, percent
from common.tuning import GRID, Tuned, compared

CLAIM = Claim(
    order=100,
    figure="Sampling (Fashion-MNIST variant)",
    paper="NeurIPS 2022",
    section="",
    says="Keeping the best of 1000 random group elements accelerates SGD.",
    short="the best of 1000 random elements helps",
    rule="holds if from the teleport on the mean log training loss is better than SGD's and than that of three "
    "controls, one random element, a rescaling by one number to the same gradient norm and a tenfold learning rate, at "
    "the published rate and, over as many epochs as the variant trains, at every arm's best; in part: than SGD's, at "
    "both. Best rates tuned on other runs, interior. Paired by seed; margin 1 %; Holm over all eight.",
    dated="2026-11-30",
    headline=True,
    source="An unofficial variant of the paper's",
)

BEFORE = (
    "Under the rule of 2026-11-22 (final training loss): in part, all three controls did as well or better. Under that "
    "of 2026-11-25 (the published rate alone, 10 runs): in part, better than SGD and than none of the controls."
)
# Printed by the notebook: accuracy on held-out images after an epoch; the teleport comes before epoch 5.
PUBLISHED = {0: 0.3473, 1: 0.3554, 2: 0.3775, 3: 0.3937, 4: 0.4025, 5: 0.5109, 6: 0.5162, 7: 0.5211, 8: 0.5254}
PUBLISHED |= {9: 0.5291, 10: 0.5323, 14: 0.5403}

RATES = (Arm("baseline"), Arm("lr x3", rate=3.0), Arm("lr x10", rate=10.0))  # from the teleport epoch on
MOVES = ("random", "published", "search", "search all", "ascent", "rescaling", "rescaling all")
ARMS = (*(arm.name for arm in RATES), *MOVES)
PAPERS = ("baseline", "published")
PANELS = {
    "teleports": ("baseline", "random", "published", "search", "search all", "ascent"),
    "the same norm from one number": ("baseline", "search", "search all", "rescaling", "rescaling all"),
    "a larger learning rate": ("baseline", "lr x3", "lr x10", "search", "search all"),
}
LOOK = dict(zip(("baseline", "lr x3", "lr x10", "random", "published", "search", "search all", "ascent"), range(8)))
LOOK |= {"rescaling": 1, "rescaling all": 2}


@dataclass(frozen=True)
class Settings:
    dataset: str = "FashionMNIST"
    seeds: int = 5
    epochs: int = 40
    teleport_epoch: int = 5
    lr: float = 1e-3
    batch: int = 32
    widths: tuple = (64, 64)
    candidates: int = 1000
    norm: float = 1.0  # Frobenius norm of the elements
    budgets: tuple = (1, 3, 10, 30, 100, 300)  # numbers of candidates that are compared with the ascent
    ascent_rate: float = 1e-3
    ascent_cap: float = 1e4  # the ascent that is compared with the budgets stops here
    ascent_steps: int = 333  # at most: as many gradient evaluations as candidates
    probe: int = 5000  # training samples whose gradient tells whether the gain holds beyond the batch
    variant_runs: int = 5  # of the variant's own network and loss
    variant_epochs: int = 15
    tuned_epochs: int = 15  # of the runs at tuned rates
    tuned_seeds: int = 40  # compared there at most
    least: int = 20  # compared there at least
    tuning_seeds: int = 4
    grid: tuple = GRID  # learning rates, as multiples of lr; it grows


PAPER = Settings()
# mnist-mini is 7.5 times smaller than the published training set, and 10 times the learning rate makes up for it.
QUICK = replace(
    PAPER, dataset="mnist-mini", seeds=3, epochs=10, lr=1e-2, candidates=300, variant_runs=2, variant_epochs=7
)
QUICK = replace(QUICK, tuned_epochs=7, tuned_seeds=6, least=6, tuning_seeds=2, grid=(1, 3, 10))
SMALL = dict(seeds=2, epochs=3, teleport_epoch=1, lr=1e-3, candidates=20, budgets=(1, 5), ascent_steps=6, probe=200)
SMALL |= dict(variant_runs=2, variant_epochs=2, tuned_epochs=2, tuned_seeds=2, least=2, grid=(1, 3))
PRESETS = {"tiny": replace(QUICK, widths=(32, 33), **SMALL), "quick": QUICK, "paper": PAPER}


def experiment(run):
    s, data = run.settings, run.data()
    seeds = published_seeds(s.seeds)
    x, x_test = (torch.cat([t, t.new_ones(len(t), 1)], 1) for t in (data.x, data.x_test))
    initial = start_weights(s, x, seeds, run.device)

    def start(_):
        net = new_net(initial, s.lr)
        losses = [train_epoch(net, x, data.y, s.batch) for _ in range(s.teleport_epoch)]
        return {"loss": torch.stack(losses, -1), **pack(net.weights)}

    before = run.parts(start, {"start": None})[0]["start"]
    weights = unpack(before, run.device)
    moves = run.parts(lambda _: move_all(s, weights, seeds, x, data.y), {"teleports": None})[0]["teleports"]
    rates = {arm.name: arm.rate for arm in RATES}

    def train(arm):
        if arm == "variant":
            some = tuple(V[: s.variant_runs] for V in initial), seeds[: s.variant_runs]
            return variant.train(s, *some, x, data, x_test, ACTIVATION, run.progress)
        W = unpack(moves, run.device, f"{arm}/") if arm in MOVES else weights
        net = new_net(W, s.lr * rates.get(arm, 1))
        curves = {"train_loss": [], "test_loss": [], "test_accuracy": []}
        whole_loss, _ = net.evaluate(x, data.y)
        probe = probe_gradient(net, x[: s.probe], data.y[: s.probe])
        for _ in run.progress(range(s.epochs - s.teleport_epoch), desc=arm, unit="epoch"):
            values = (train_epoch(net, x, data.y, s.batch), *net.evaluate(x_test, data.y_test))
            for key, value in zip(curves, values):
                curves[key].append(value)
        return {"whole_loss": whole_loss, "probe": probe, **{k: torch.stack(v, -1) for k, v in curves.items()}}

    parts, _ = run.parts(train, {arm: arm for arm in (*ARMS, "variant")})
    arrays = {f"{arm}/{k}": v for arm, part in parts.items() for k, v in part.items()}
    arrays |= {f"teleports/{k}": v for k, v in moves.items() if "W" not in k and "seconds" not in k}
    arrays["start/train_loss"] = before["loss"]
    arrays |= stages(run, x, data)
    timings = {k: v for k, v in moves.items() if "seconds" in k}
    return Outcome(compare(s, arrays), arrays, seeds, timings)


def probe_gradient(net, x, y):
    gradients, _ = net.gradients(x, y)
    return sum(G.square().sum((-2, -1)) for G in parameters(gradients))


def pack(weights, prefix=""):
    return {f"{prefix}W_{m}": W for m, W in enumerate(weights, 1)}


def unpack(arrays, device, prefix=""):
    return tuple(torch.as_tensor(v, device=device) for k, v in arrays.items() if k.startswith(f"{prefix}W_"))


def move_all(s, weights, seeds, x, y):
    """Every arm's teleport, one run at a time, in float64: the weights, loss and ‖∂L/∂W‖² before and after, (S, 2)."""
    X, labels = x[: s.batch].T.double(), y[: s.batch]
    results = [move(s, tuple(W[i].double() for W in weights), X, labels, seed) for i, seed in enumerate(seeds)]
    return {key: torch.stack([torch.as_tensor(r[key]) for r in results]) for key in results[0]}


def move(s, W, X, labels, seed):
    """One run's teleports, on the batch X (d_0, n), labels (n,): see the arms in the docstring above."""
    loss_fn = batch_loss(X, labels, ACTIVATION)

    def clocked(key, function):
        start = time.perf_counter()
        result = function()
        out[f"{key}_seconds"] = time.perf_counter() - start
        return result

    out, m = {}, hidden_layer(s, seed)
    best = partial(search, s, W, X, loss_fn, seed)
    start = gradient_norm(W, loss_fn)
    moved = {"search": clocked("search", lambda: best(s.candidates, [m])).weights}
    moved["search all"] = clocked("search all", lambda: best(s.candidates, None)).weights
    found = gradient_norm(moved["search"], loss_fn)
    out["search_curve"] = torch.stack([best(k, [m]).objective_after for k in s.budgets] + [found])

    candidates = elements(s, m, seed)
    moved["random"] = variant.moved_by(W, X, m, candidates[0], ACTIVATION)
    moved["published"] = variant.selected(W, X, loss_fn, m, candidates, ACTIVATION)

    limits = dict(rate=s.ascent_rate, steps=s.ascent_steps, cap=s.ascent_cap)
    ascent = clocked("ascent", lambda: ascend(W, X, loss_fn, found, ACTIVATION, **limits))
    moved["ascent"], out["ascent_evaluations"], out["ascent_curve"] = ascent
    moved["rescaling"] = rescale(W, [m], found, loss_fn, ACTIVATION)
    found_all = gradient_norm(moved["search all"], loss_fn)
    moved["rescaling all"] = rescale(W, range(len(s.widths)), found_all, loss_fn, ACTIVATION)
    for arm, weights in moved.items():
        out |= pack(weights, f"{arm}/")
        out[f"{arm}/loss"] = torch.stack([loss_fn(W), loss_fn(weights)])
        out[f"{arm}/gradient"] = torch.stack([start, gradient_norm(weights, loss_fn)])
    return {**out, "layer": m}


def compare(s, arrays):
    metrics = {}
    for arm in ARMS:
        whole, probe = (arrays[f"{arm}/{k}"] / arrays[f"baseline/{k}"] for k in ("whole_loss", "probe"))
        metrics[arm] = {
            "final_train_loss": arrays[f"{arm}/train_loss"][:, -1],
            "final_test_loss": arrays[f"{arm}/test_loss"][:, -1],
            "final_test_accuracy": arrays[f"{arm}/test_accuracy"][:, -1],
            "whole_loss_drift": whole - 1,
            "whole_gradient_growth": probe,
        }
        if arm in MOVES:
            loss, gradient = (arrays[f"teleports/{arm}/{k}"] for k in ("loss", "gradient"))
            metrics[arm] |= {
                "largest_relative_drift": np.abs(loss[:, 1] / loss[:, 0] - 1).max(),
                "squared_gradient_norm": gradient,
                "growth": gradient[:, 1] / gradient[:, 0],
            }
    metrics["gradient_evaluations"] = {"search": s.candidates, "ascent": arrays["teleports/ascent_evaluations"]}
    # Where the ascent is after as many gradient evaluations as the search made, or at its cap if that came before.
    metrics["ascent_at_equal_cost"] = np.nanmax(arrays["teleports/ascent_curve"][:, : s.candidates // COST + 1], axis=1)
    return metrics


CONTROLS = {
    "random": "one random element",
    "rescaling": "one rescaling number of the same gradient norm",
    "lr x10": "a tenfold learning rate",
}


def against(rate, other="baseline", arm="search"):
    """The key of an arm compared with another at one rate."""
    return (rate, arm), (rate, other)


def effects(outcome):
    """{(arm, other): Comparison} of the mean log training loss: the claim's family, then all others to the baseline."""
    a, s = outcome.arrays, outcome.settings
    numbers = {("published", arm): np.log(a[f"{arm}/train_loss"].astype(float)).mean(-1) for arm in ARMS}
    numbers |= {("best", arm): sampled.numbers(s, loss) for arm, loss in zip(sampled.ARMS, a["tuned/train_loss"])}
    interior = dict.fromkeys(numbers, True) | {("best", arm): ok for arm, ok in zip(sampled.ARMS, a["tuning/interior"])}
    claimed = [against(rate, other) for rate in protocol.RATES for other in ("baseline", *CONTROLS)]
    others = [against(rate, arm=arm) for rate, arm in numbers if arm not in ("baseline", "search")]
    return compared(numbers, claimed, interior) | compared(numbers, others, interior)


def judge(outcome):
    found, s = effects(outcome), outcome.settings
    gain = settle(found[against(rate)].word for rate in protocol.RATES)
    missed = [phrase for rate in protocol.RATES for phrase in unlike(found, rate)]
    word = UNDECIDED if gain is None else grade(gain and not missed, gain)
    limits = "; ".join(missed) if gain else "no better than SGD"
    sentence = f"Training loss after keeping the best of {s.candidates}: {'; '.join(said(found))}."
    one = found[against("best")]
    number = f"{percent(one.effect):+.1f} % against SGD, each at its best rate ({one.word})"
    return Verdict(word, limits, sentence, [BEFORE, *details(outcome, found)], number, list(printed(outcome)))


def unlike(found, rate):
    """A phrase about the controls that it is not better than, if there are any."""
    if names := [name for other, name in CONTROLS.items() if found[against(rate, other)].word != "better"]:
        yield f"{rate} rate: not better than {listed(names, ' and ')}"


def said(found):
    for rate in protocol.RATES:
        controls = ", ".join(f"{name} {change(found[against(rate, other)])}" for other, name in CONTROLS.items())
        yield f"{rate} rate, against SGD {change(found[against(rate)])}, {controls}"


def details(outcome, found):
    (_, n, epochs), s = outcome.arrays["tuned/train_loss"].shape, outcome.settings
    for rate, arms, runs in (("published", ARMS, len(outcome.seeds)), ("best", sampled.ARMS, n)):
        others = (f"{arm} {change(found[against(rate, arm=arm)])}" for arm in arms[1:] if arm != "search")
        yield f"Training loss against SGD's, {rate} rate, {runs} runs: {'; '.join(others)}."
    tuned = Tuned.load(outcome.arrays, "tuning/")
    best = (f"{arm} ×{factor:.3g}" for arm, factor in zip(sampled.ARMS, tuned.best_factors()))
    yield (
        f"Best rates, of {epochs} epochs, by {s.tuning_seeds} other runs each: {', '.join(best)}; the tuning's spread "
        f"lets {n} runs show equivalence within {100 * outcome.arrays['tuned/margin']:.2g} %."
    )
    none, moved = outcome.arrays["variant/accuracy"][..., -1]
    gain = interval(compare_runs(100 * moved, 100 * none, margin=1.0, relative=False)[:3], 1)
    yield f"The variant's own network, {len(none)} runs: the teleport changes its accuracy by {gain} points in the end."
    n, cost = outcome.metrics["gradient_evaluations"].values()
    yield f"Gradient ascent finds the norm that sampling finds in {min(cost)} to {max(cost)} evaluations, not {n}."


def printed(outcome):
    """The notebook's accuracies beside ours: they agree within the 95 % prediction interval of one more run."""
    setting, accuracy = "our initialization, order and draws; the test set", outcome.arrays["variant/accuracy"][1]
    n = len(accuracy)
    for epoch, value in PUBLISHED.items():
        if epoch < accuracy.shape[1]:
            ours, spread = accuracy[:, epoch].mean(), accuracy[:, epoch].std(ddof=1) if n > 1 else np.nan
            agrees = bool(abs(ours - value) <= special.stdtrit(n - 1, 0.975) * spread * (1 + 1 / n) ** 0.5)
            agrees = agrees if outcome.label == "Fashion-MNIST" else None
            yield Published(f"accuracy after epoch {epoch}", value, float(ours), "the notebook", setting, agrees)


def plot(outcome, s, save):
    save(plot_training(outcome, s, {"": PAPERS}))
    save(plot_training(outcome, s, PANELS), "controls")
    save(plot_cost(outcome, s), "cost")
    save(sampled.plot(outcome, effects(outcome), against), "tuned")


def plot_training(outcome, s, panels):
    """Training loss against epoch: the variant's two arms, or all with their controls."""
    figure, axes = plots.panels(1, len(panels), width=3.9, height=3.6, sharey=True)
    before, epochs = outcome.arrays["start/train_loss"], np.arange(1, s.epochs + 1)
    for ax, (title, arms) in zip(axes[0], panels.items()):
        for k, arm in enumerate(arms):
            curve = np.concatenate([before, outcome.arrays[f"{arm}/train_loss"]], 1)
            look = dict(plots.style(LOOK[arm], marker=True), markevery=(k * s.epochs // 30, max(1, s.epochs // 5)))
            plots.band(ax, epochs, curve, arm, **dict(look, linewidth=1.2))
        ax.axvline(s.teleport_epoch, color="0.7", linewidth=0.8, zorder=0)
        ax.set(xlabel="epoch", title=title)
        plots.log_loss(ax)
        ax.legend(fontsize=8)
    axes[0, 0].set_ylabel(f"training loss, {outcome.label}")
    return figure


def plot_cost(outcome, s):
    """The norm found against the number of gradient evaluations, and how much of it holds for other samples."""
    figure, ((ax, growth, drift),) = plots.panels(1, 3, width=3.7, height=3.2)
    budgets, found = [*s.budgets, s.candidates], outcome.arrays["teleports/search_curve"]
    plots.band(ax, budgets, found, "search", LOOK["search"], marker="^", markersize=4)
    for i, curve in enumerate(outcome.arrays["teleports/ascent_curve"]):
        name = None if i else "ascent (each run)"
        ax.plot(COST * np.arange(len(curve)), curve, label=name, **plots.style(LOOK["ascent"]))
    ax.set(xscale="log", yscale="log", xlabel="gradient evaluations", xlim=(1, None), ylim=(None, s.ascent_cap))
    ax.set_ylabel(r"$\|\partial L/\partial W\|^2$ on the batch")
    ax.legend(fontsize=8)
    for ax, key in ((growth, "whole_gradient_growth"), (drift, "whole_loss_drift")):
        for row, arm in enumerate(MOVES):
            values = np.array(outcome.metrics[arm][key])
            ax.plot(values, np.full(len(values), row), **{**plots.style(LOOK[arm], marker=True), "linestyle": "none"})
        ax.set_yticks(range(len(MOVES)), MOVES)
        ax.invert_yaxis()
        ax.axvline(key == "whole_gradient_growth", color="0.5", linewidth=0.8)
    growth.set(xscale="log", xlabel=f"growth of ‖∂L/∂W‖²,\n{s.probe} training samples")
    drift.set_xlabel("relative change of the loss,\nwhole training set")
    return figure


def report(outcome, s):
    rows, found = [], effects(outcome)
    for arm in ARMS:
        m = outcome.metrics[arm]
        teleported = [""] * 4
        if arm in MOVES:
            growth, whole, drift = (np.array(m[k]) for k in ("growth", "whole_gradient_growth", "whole_loss_drift"))
            drift = f"{np.abs(drift).max():.1e}"
            teleported = [f"×{growth.mean():.1f}", f"×{whole.mean():.1f}", f"{m['largest_relative_drift']:.0e}", drift]
        each = [change(found[key]) if (key := against(rate, arm=arm)) in found else "" for rate in protocol.RATES]
        accuracy = f"{100 * np.mean(m['final_test_accuracy']):.1f} %"
        rows.append([arm, *teleported, mean_std(m["final_train_loss"]), *each, accuracy])
    header = ["", "‖∂L/∂W‖², batch", "other samples", "drift, batch", "training set", "final training loss"]
    header += ["mean log loss against baseline's [95 %]", "the same, best rates", "test accuracy"]
    m, cost = outcome.metrics, ", ".join(str(int(n)) for n in outcome.metrics["gradient_evaluations"]["ascent"])
    seconds = {k: np.mean(outcome.timings[f"{k}_seconds"]) for k in ("search", "ascent")}
    at_equal_cost = np.divide(m["ascent_at_equal_cost"], np.array(m["ascent"]["squared_gradient_norm"])[:, 0])
    return (
        table(header, rows)
        + f"\n\nGradient evaluations to the norm that search finds with {s.candidates}: ascent {cost}"
        + f"\nGrowth of ‖∂L/∂W‖² within as many: ascent ×{at_equal_cost.min():.0f} or more"
        + f"\nSeconds a run: search {seconds['search']:.2f}, the whole ascent {seconds['ascent']:.2f}"
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
