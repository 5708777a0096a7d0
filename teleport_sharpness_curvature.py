"""Teleporting to sharper, flatter, more and less curved points: Figure 4 of ICLR 2024 (arXiv 2305.13404, Section 4).

SGD trains a 784-16-10-10 network (CIFAR-10: 3072-32-10-10) without teleportation for 21 epochs. Before the first
mini-batches of the next epoch the weights are teleported, each time on a fresh batch of 2000; then SGD goes on, to 41
epochs: the published code trains epoch 15, from 0, twice. Two objectives, each up and down:

  sharpness φ (Eq. 4)   10 steps of gradient ascent or descent of the mean loss at distances 0.1 to 0.9 from W
  curvature ψ (Eq. 5)   one step t ← ±lr dκ/dt along exp(tM) on the layers 2 and 3, M drawn uniformly from [0, 1]

and the arms:

  baseline       no teleport
  preactivation  on the true hidden layers. With 2000 samples on 10 units it is a least-squares fit: the loss moves, and
                 by how much is part of the result. For ψ, t is halved until ψ moves the right way and the loss by at
                 most 1 %
  published      φ: stale hidden layers, new directions in every step, the mean over 9 radii divided by 10. ψ: the bare
                 step, which mostly goes much too far (on true hidden layers and, at full row rank, the same curve)
  backtracking   like `preactivation`, every step halved until φ or ψ moves the right way and the loss by at most 0.1 %
  rescaling      like `preactivation`, on the orbit of positive rescaling, where the loss cannot move
  random         a random element that moves the weights as far as `backtracking`

A step so long that its element is singular or infinite is not made. All arms of a run start from the same weights and
see the same batches, directions and elements; unlike the published runs, which share one initialization, every run has
its own.

Beside them, in more runs, what the claim needs: each arm's learning rate of SGD is chosen by the test loss of other
runs, i.e. other initializations (four, which is a cost, and with fewer directions for φ), on a grid that grows; then
fresh runs, as many as the tuning asks for, are compared at the published rate and at every arm's best.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from common import cli, plots, protocol, statistics
from common.arms import Stack
from common.claims import Claim, Verdict, change, except_for, graded, listed, settle, table
from common.data import published_split, require
from common.mlp import initial_weights, published_seeds
from common.moves import MEASURED, held_out, teleporter
from common.run import Outcome
from common.statistics import mean_std
from common.tuning import GRID, Tuned
from common.ways import (
    ACTIONS,
    DECIDING,
    LARGER,
    RATES,
    SYMBOLS,
    TUNED,
    WAYS,
    against,
    arms,
    findings,
    place,
    teleports,
    tuned_rates,
    way_of,
    ways_of,
    words,
)

CLAIM = Claim(
    order=30,
    figure="Figure 4",
    paper="ICLR 2024",
    section="Section 4",
    says="Teleporting to minima of larger curvature improves generalization; to flatter ones, the effect is "
    "negligible.",
    short="larger ψ generalizes better, smaller φ not",
    rule="holds if on every dataset, at the published learning rate and at each arm's best, larger ψ (backtracking) is "
    "better than no teleport and than a random move of its size, and smaller φ (rescaling, which is exact) equivalent "
    "to no teleport within 1 %; in part: if larger ψ is so somewhere; else undecided where it is undecided. Only runs "
    "whose teleports together moved held-out φ or ψ as sent count. A run's number: its test loss, mean of the last "
    "quarter of the epochs; rates tuned by it on other runs, interior; paired, relative, Holm over all comparisons.",
    dated="2026-12-01",
    headline=True,
)
BEFORE = (
    "By the rule of 2026-11-22 (larger ψ lowers the final test loss on every dataset, smaller φ does not move it): "
    "does not hold, lower nowhere. By that of 2026-11-25 (preactivation for ψ, the published rate alone): in part, "
    "larger ψ equivalent on all three datasets, smaller φ too. Both in 5 runs of 40 epochs with ten teleports."
)

CHUNK = 5  # epochs in a part


@dataclass(frozen=True)
class Settings:
    dataset: str = "MNIST"
    seeds: int = 5
    epochs: int = 41
    teleport_epoch: int = 21
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports_sharpness: tuple | None = None  # up, down; None: TELEPORTS
    teleports_curvature: tuple | None = None
    teleport_batch: int = 2000
    directions: int = 100  # for each of the 9 radii
    ascent_steps: int = 10
    cap: float = 2.0  # ascent stops once φ is above it
    tolerance: float = 0.01  # relative change of the loss that a teleport of ψ may cost
    measured_directions: int = 10  # for each radius: φ of every arm, on directions that no teleport has seen
    measured_elements: int = 5  # ψ of every arm: mean curvature over as many M
    tuned_seeds: int = 40  # of the arms that the claim needs: compared at most
    least: int = 20  # compared there at least
    tuning_seeds: int = 4
    tuning_directions: int = 10  # for each radius: a tenth of what the compared runs have
    grid: tuple = GRID  # learning rates, as multiples of the published one; it grows


PAPER = Settings()
SHORT = dict(seeds=2, epochs=4, teleport_epoch=2, samples=400, teleports_sharpness=(1, 2), teleports_curvature=(2, 1))
SMALL = dict(teleport_batch=100, directions=2, ascent_steps=2, cap=3.0, measured_directions=1, measured_elements=2)
SMALL |= dict(tuned_seeds=2, least=2, tuning_seeds=2, tuning_directions=1, grid=(1, 3))
QUICK = replace(PAPER, dataset="mnist-mini", seeds=3, teleport_batch=500, directions=10, tuned_seeds=4, least=4)
QUICK = replace(QUICK, epochs=21, teleport_epoch=11, teleports_sharpness=(1, 2), teleports_curvature=(2, 1))
PRESETS = {
    "tiny": replace(PAPER, dataset="mnist-mini", **SHORT, **SMALL),
    "quick": replace(QUICK, tuning_seeds=2, tuning_directions=2, grid=(1, 3, 10)),
    "paper": PAPER,
}


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    require(data, train=s.teleport_batch, test=s.teleport_batch)
    seeds, members = published_seeds(s.seeds), arms(s)
    dims = (data.features, *((32, 10, 10) if s.dataset == "CIFAR10" else (16, 10, 10)))
    K = max(teleports(way, s) for way in WAYS)

    def before(_):  # what all arms of a run share
        return train(run, stacked(run, members[:1], initial_weights(dims, seeds)), data, s.teleport_epoch)

    def teleported(start):  # the epoch of the teleports: all arms of one run
        stack, seed = stacked(run, members, start[0], K), start[1]
        record, move_arms = teleporter(stack, data, dims, seed, s)
        curves = train(run, stack, data, 1, {0: move_arms})
        due = torch.tensor([[a > 0 and k < arm.moves for k in range(K)] for a, arm in enumerate(members)])
        return {**curves, **record, "objective": stack.objective.float().where(due[:, None, :, None], torch.nan)}

    def after(start):  # all arms of all runs, some epochs at a time
        return train(run, stacked(run, members, start[0]), data, start[1])

    def at_the_end(weights):  # all measures of all arms and runs on the batch that is held out, (A, S)
        meters = [held_out(data, dims, seed, s) for seed in seeds]
        values = torch.stack([meter([W[:, i].to(run.device) for W in weights]) for i, meter in enumerate(meters)], 1)
        return {f"{key}_end": values[..., i] for i, key in enumerate(MEASURED)}

    parts, seconds = run.parts(before, {"before": None})
    first = parts["before"]
    starts = {f"run_{i + 1}": (weights_of(first, slice(i, i + 1)), seed) for i, seed in enumerate(seeds)}
    parts, spent = run.parts(teleported, starts)
    middle = {key: np.concatenate([part[key] for part in parts.values()], 1) for key in parts["run_1"]}
    state, done, seconds, curves = middle, s.teleport_epoch + 1, seconds | spent, [middle]
    while done < s.epochs:
        end = min(done + CHUNK, s.epochs)
        parts, spent = run.parts(after, {f"epoch_{end}": (weights_of(state, slice(None)), end - done)})
        state, done, seconds = parts[f"epoch_{end}"], end, seconds | spent
        curves.append(state)

    parts, spent = run.parts(at_the_end, {"end": weights_of(state, slice(None))})
    arrays = {key: middle[key] for key in ("objective", *MEASURED)} | parts["end"]
    for key in ("train_loss", "test_loss"):  # (arms, runs, epochs)
        shared = np.broadcast_to(first[key], (len(members), *first[key].shape[1:]))
        arrays[key] = np.concatenate([shared, *(part[key] for part in curves)], -1)
    tuned, also = tuned_rates(run, data, dims)
    return Outcome(compare(s, arrays), arrays | tuned, seeds, seconds | spent | also)


def stacked(run, members, weights, moves=0):
    return Stack(members, [W.to(run.device) for W in weights], "SGD", RATES[run.settings.dataset][0], moves)


def train(run, stack, data, epochs, at=None):
    """Train for some epochs: the weights, and the loss curves (arms, runs, epochs)."""
    curves = stack.train(run, data, epochs, run.settings.batch, at or {})
    weights = {f"W{m}": stack.by_arm(W) for m, W in enumerate(stack.net.weights, start=1)}
    return {**weights, **{key: curves[key] for key in ("train_loss", "test_loss")}}


def weights_of(part, runs):
    """The weights of some runs, (S, d_m, d_{m-1}) where all arms share them, else (A, S, d_m, d_{m-1})."""
    weights = [torch.from_numpy(part[key]) for key in ("W1", "W2", "W3")]
    return [W[0, runs] if len(W) == 1 else W[:, runs] for W in weights]


# Numbers and figures


def compare(s, arrays):
    """For every arm: did the objective go where it was sent, and what did that cost?"""
    final = arrays["test_loss"][..., -1]
    metrics = {"baseline": {"test_loss": final[0]}}
    for a, way in enumerate(WAYS, start=1):
        k = teleports(way, s)
        before, after = np.moveaxis(arrays["objective"][a, :, :k], -1, 0)  # (runs, k)
        loss = arrays["loss"][a, :, :k]  # (runs, k, [before, after], [batch, held out])
        drift = np.abs(loss[:, :, 1] - loss[:, :, 0]) / loss[:, :, 0]
        measured = arrays[way.measure][:, :, k - 1, 1, 1]  # after all, held out
        metrics[way.key] = {
            "teleports": before.size,
            "moved_as_asked": int(((after > before) if way.maximize else (after < before)).sum()),
            "objective_change": finite_median(after / before - 1),
            "total_change": finite_median(measured[a] / measured[0] - 1),  # against no teleport at the same step
            "drift": [finite_median(drift[..., i]) for i in (0, 1)],
            "largest_drift": np.where(np.isnan(drift), np.inf, drift).max((0, 1)).tolist(),  # infinite: it diverged
            "test_loss": final[a],
        }
    return metrics


def finite_median(values):
    """The median of what has not diverged (NaN if everything has)."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else float("nan")


def judge(*outcomes):
    found = findings(outcomes)
    each, places = words(found), dict.fromkeys(where for where, *_ in found)
    larger = {where: settle(each[where, case] for case in list(DECIDING)[:2]) for where in places}
    smaller = [where for where in places if each[where, "smaller φ"] != "equivalent"]
    limits = f"larger ψ {except_for(larger)}" + (f"; smaller φ not equivalent: {listed(smaller)}" if smaller else "")
    word = graded(list(larger.values()))
    said = [f"{case}, {where}, {text(found[(where, *DECIDING[case])])}" for where, case in each]
    details = [*(of_arm(r, way) for r in outcomes for _, way in ways_of()), *(of_tuned(r, found) for r in outcomes)]
    sentence = f"Test loss against no teleport or a random one: {'; '.join(said)}."
    word = "holds in part" if smaller and word == "holds" else word
    first, answers = said[0].replace(f"{outcomes[0].label}, ", ""), {"direction": direction(outcomes)}
    return Verdict(word, limits, sentence, [*details, BEFORE], first.rsplit(" in ", 1)[0], answers=answers)


def text(found):
    """A comparison and how many runs went as sent."""
    c, n = found
    return f"{change(c)} in {n} runs" if c else "none went as sent"


def of_arm(outcome, way):
    """One arm: the runs that went as sent, and, an arm of their own, those that went the other way."""
    m, n = outcome.metrics[way.key], len(outcome.seeds)
    (c, went), (others, lost) = (against(outcome, way, as_sent) for as_sent in (True, False))
    said = [f"{m['moved_as_asked']} of {m['teleports']} teleports and {went} of {n} runs went as sent"]
    said += [change(c)] if c else []
    said += [f"the other {lost}: {change(others)}"] if others else []
    return f"{outcome.label}, {way}: {'; '.join(said)}."


def of_tuned(outcome, found):
    """The fresh runs: every arm's best rate, and how it compares."""
    tuned, cells = Tuned.load(outcome.arrays, "tuning/"), []
    rates = [f"×{f:.3g}{'' if inside else ' (edge)'}" for f, inside in zip(tuned.best_factors(), tuned.interior)]
    runs = outcome.arrays["tuned/test_loss"].shape[2]
    for arm, rate in zip(TUNED[1:], rates[1:]):
        each = [text(found[place(outcome, at), arm, "baseline"]) for at in protocol.RATES]
        cells.append(f"{way_of(arm)}: published rate {each[0]}, best {rate} {each[1]}")
    return (
        f"{outcome.label}, {runs} fresh runs, which can show equivalence within "
        f"{100 * outcome.arrays['tuned/margin']:.2g} %, the baseline's best rate {rates[0]}. {'; '.join(cells)}."
    )


def direction(outcomes):
    """After teleports to larger and to smaller ψ, against none."""
    ways = [LARGER._replace(maximize=up) for up in (True, False)]
    said = (f"{r.label}, ψ {way.direction} {text(against(r, way))}" for r in outcomes for way in ways)
    return f"Test loss against no teleport, margin 1 %: {'; '.join(said)}."


def plot(outcome, s, save):
    figure, axes = plots.panels(1, 2, width=4, height=3.2)  # as in the paper: the published teleports
    for ax, objective in zip(axes[0], SYMBOLS):
        plot_losses(ax, outcome, s, objective, "published")
    save(figure)
    figure, axes = plots.panels(2, 4, width=3.6, height=3.4)
    for row, objective in zip(axes, SYMBOLS):
        plot_losses(row[0], outcome, s, objective, "preactivation")
        plot_differences(row[1], outcome, objective)
        plot_objective(row[2], outcome, s, objective)
        plot_drift(row[3], outcome, s, objective)
    save(figure, "controls")
    save(plot_tuned(outcome), "tuned")


def plot_losses(ax, outcome, s, objective, action):
    """Training loss dashed, test loss solid, mean ± std, of the baseline and of one action's arms up and down."""
    moved = [(a, f"{SYMBOLS[objective]} {way.direction}") for a, way in ways_of(objective) if way.action == action]
    for i, (a, label) in enumerate([(0, "baseline"), *moved]):
        alive = np.isfinite(outcome.arrays["train_loss"][a]).all(-1)
        label += "" if alive.all() else f" ({alive.sum()} of {len(alive)} runs left)"
        for key, line, name in (("train_loss", "--", None), ("test_loss", "-", label)):
            look = plots.style(i, marker=True) | {"linestyle": line, "markevery": (2 * i, 8)}
            if alive.any():
                plots.band(ax, range(1, s.epochs + 1), outcome.arrays[key][a, alive], name, i, **look)
    usual = np.stack([outcome.arrays[key][0] for key in ("train_loss", "test_loss")])
    low, high = usual.min(), usual.max()
    room = high / low  # below for the legend; a diverged arm leaves the axes
    plots.log_loss(ax)
    ax.set(xlabel="epoch", ylabel=f"loss, {outcome.label}", ylim=(low / room**0.7, high * room**0.15))
    ax.set_title(f"{objective} {SYMBOLS[objective]}, {action}")
    ax.legend(title="training dashed, test solid, ± std", fontsize=7, title_fontsize=7, loc="lower left")


def plot_differences(ax, outcome, objective):
    """Test loss of the runs that went as sent against the baseline's: mean and 95 % interval."""
    for x, (_, way) in enumerate(ways_of(objective)):
        c, _ = against(outcome, way)
        middle, low, high = (statistics.percent(value) for value in (c.effect, c.low, c.high)) if c else [math.nan] * 3
        if math.isnan(middle):
            ax.annotate("diverged" if c else "none went as sent", (x, 0), rotation=90, ha="center", fontsize=8)
        else:
            ax.errorbar(x, middle, np.nan_to_num([[middle - low], [high - middle]]), capsize=3, **look_of(way))
    ax.axhspan(-1, 1, color="black", alpha=0.08, linewidth=0)  # the margin
    ax.set(title="test loss against baseline, 95 %", ylabel="% (linear within ± 1)")
    ax.set_yscale("symlog", linthresh=1)
    ticks = [sign * 10.0**e for sign in (-1, 1) for e in range(5)] + [0]
    low, high = ax.get_ylim()
    ax.set_yticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high])
    name_arms(ax, objective)


def plot_objective(ax, outcome, s, objective):
    """One line per run, from before its first teleport to after its last, on held-out data and fresh draws."""
    for x, (a, way) in enumerate(ways_of(objective)):
        values = outcome.arrays[way.measure][..., 1]  # held out
        ends = values[a][:, [0, teleports(way, s) - 1], [0, 1]].T
        ax.plot([x - 0.25, x + 0.25], ends, linewidth=1, **look_of(way), markevery=[1])
    ax.set(yscale="log", ylim=(max(np.nanmin(values[0]) / 30, ax.get_ylim()[0]), None))
    ax.set_title(f"{SYMBOLS[objective]} before → after all teleports")
    name_arms(ax, objective)


def plot_drift(ax, outcome, s, objective):
    """|Δloss| / loss of every teleport of every run, on its batch and on a held-out one."""
    for x, (a, way) in enumerate(ways_of(objective)):
        loss = outcome.arrays["loss"][a, :, : teleports(way, s)]
        drift = (np.abs(loss[:, :, 1] - loss[:, :, 0]) / loss[:, :, 0]).clip(1e-8).reshape(-1, 2)
        for i, look in enumerate(({"label": "teleport batch"}, {"label": "held-out batch", "markerfacecolor": "none"})):
            look |= {**look_of(way), "linestyle": "", **({"label": None} if x else {})}
            ax.plot(np.full(len(drift), x - 0.15 + 0.3 * i), drift[:, i], **look)
    ax.set(yscale="log", ylabel="less is drawn at 1e-8", title="|Δloss| / loss of each teleport")
    ax.legend(fontsize=8)
    name_arms(ax, objective)


def plot_tuned(outcome):
    """The fresh runs' test loss against the baseline's, and larger ψ's against random; and the tuning."""
    figure, ((ax, tuning),) = plots.panels(1, 2, width=4.6, height=3.2)
    found, ways = findings([outcome]), [way_of(name) for name in TUNED[1:]]
    pairs = {str(way): (way.key, "baseline") for way in ways}
    pairs["ψ up against random"] = DECIDING["larger ψ against random"]
    for k, rate in enumerate(protocol.RATES):
        each = [found[(place(outcome, rate), *pair)][0] for pair in pairs.values()]
        at = [y + 0.2 * k - 0.1 for y, c in enumerate(each) if c]
        plots.intervals(ax, [c for c in each if c], at, k, f"{rate} rate")
    ax.set_yticks(range(len(pairs)), pairs)
    ax.set_xlabel(f"test loss against the baseline's, %, {outcome.label}")
    ax.invert_yaxis()
    ax.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    plots.tuning_curves(tuning, Tuned.load(outcome.arrays, "tuning/"), ["baseline", *map(str, ways)])
    tuning.set_ylabel("above the baseline's best, %")
    tuning.legend(fontsize=7)
    return figure


def look_of(way):
    """Colour and marker by action."""
    look = plots.style(1 + ACTIONS.index(way.action), marker=True)
    return {key: look[key] for key in ("color", "marker", "markersize")}


def name_arms(ax, objective):
    names = [f"{way.action} {way.direction}" for _, way in ways_of(objective)]
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    ax.set_xlim(-0.5, len(names) - 0.5)


def report(outcome, s):
    rows = [["baseline", *[""] * 5, mean_std(outcome.metrics["baseline"]["test_loss"]), ""]]
    for _, way in ways_of():
        m = outcome.metrics[way.key]
        changes = [f"{100 * m[key]:+.3g} %" for key in ("objective_change", "total_change")]
        drifts = [f"{m[key][1]:.1e}" for key in ("drift", "largest_drift")]
        last = [mean_std(m["test_loss"]), text(against(outcome, way))]
        rows.append([way, f"{m['moved_as_asked']}/{m['teleports']}", *changes, *drifts, *last])
    header = ["arm", "as asked", "change", "in all", "drift", "largest", "test loss", "against the baseline"]
    title = (
        f"{outcome.label}, {s.seeds} runs, epoch {s.epochs}. As asked: teleports that moved φ or ψ the right way;"
        "\nchange: of φ or ψ by one, in all: against no teleport, on other data and draws; drift: |Δloss|/loss, other"
        "\ndata (medians, and the largest); against baseline: test loss, last quarter, of runs that went as sent"
    )
    return f"{title}\n\n{table(header, rows)}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
