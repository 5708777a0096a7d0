"""A linear teleport is a preconditioner, for good; what is left of the others beside tuned rates. Not in the papers.

Identity: 784-16-10-10 is moved by a positive rescaling of all its hidden units and trained by torch's optimizers, with
weight decay and without; its untouched twin, with per-unit rates, ε and decays by the table of twins.py, draws the same
curve, in float64 down to rounding, which is largest where a gradient seen for the first time is normalized and its
terms have cancelled to a millionth. It grows with the rate: at AdaGrad's published 1e-2 one of twelve runs, tried
beforehand, made 2e-12 in a step, more than the rule allows; its rate here, 1e-3, was chosen after that.

Comparison, at the settings of Figure 5 (ICLR 2024): eight teleports before the first mini-batches of the first epoch,
each ten ascent steps on ‖∂L/∂W‖² on a fresh batch of 200, the optimizer's memory kept. The ascent's rate lr_t is the
published one at every learning rate (SGD, which the paper leaves out, has the others'). The arms:

  baseline       the optimizer alone
  preactivation  the pre-activation action: nonlinear, fitted to its batch
  linear part    the positive rescaling nearest to what that action does (least squares): by the identity, rates per
                 unit and nothing else
  rescaling      ascent along positive rescalings, exact
  layer rates    no teleport; one learning rate for each layer, found in as many tuning runs as the pre-activation
                 teleport takes (layer_rates.py)

Rates are tuned on other runs, the arms compared on fresh ones, as common/protocol.py has it, in one number a run. On
the first teleport's batch: how much longer the gradient becomes, and how much further the optimizer's next step on that
batch goes down, by the whole action and by its linear part.
"""

import sys
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import layer_rates
import teleported
import twins

from common import cli, plots, protocol
from common.claims import FAILS, HOLDS, IN_PART, UNDECIDED, Claim, Published, Verdict, change, listed, table
from common.data import published_split, require
from common.mlp import initial_weights, published_seeds
from common.protocol import against, number
from common.run import Outcome
from common.statistics import compare, percent
from common.tuning import GRID, Tuned, disjoint_seeds, runs, tune

CLAIM = Claim(
    order=190,
    figure="Preconditioner",
    paper="beyond the papers",
    section="",
    says="A run after a positive rescaling is the untouched run with rates of its own for every unit; and the paper's "
    "nonlinear teleport is no better than rates tuned layer by layer.",
    short="a teleport is a preconditioner",
    rule="holds if over 200 steps of six optimizers, with weight decay and without, the rescaled run's weights, pulled "
    "back, differ from its untouched twin's by 1e-10 at most and by 1e-12 in a single step, relatively, in float64, "
    "and for SGD and Adam the pre-activation teleport is equivalent to layer rates or worse in mean log training loss, "
    "each at its best rates; in part: the identity, but for one optimizer or both it is better; undecided: better for "
    "none and undecided for some; does not hold: no identity. Layer rates have as many tuning runs as the teleport; "
    "tuned on other runs, interior; paired by seed; margin 1 %; Holm over the optimizers. How much of the teleport its "
    "linear part is, is said beside and decides nothing.",
    dated="2026-11-30",
    source="Ours",
)

ARMS = (*teleported.ARMS, "layer rates")
COST = 3  # gradient evaluations of an ascent step: one for ∂L/∂W, about two for a Hessian-vector product
# Of the races: learning rates at which 200 steps go somewhere, the scales' bound, λ.
RACE_RATES = {"SGD": 1e-2, "momentum": 1e-3, "Nesterov": 1e-3, "Adam": 1e-3, "RMSprop": 1e-3, "AdaGrad": 1e-3}
SCALE, DECAY = 4.0, 1e-2
TOLERANCES = {"run": 1e-10, "step": 1e-12}
# An independent prototype's largest differences, and of which optimizers, without decay.
ALIKE = ("SGD, momentum, Nesterov", "Adam", "RMSprop, AdaGrad")
PROTOTYPE = {"run": (4e-15, ALIKE[:2]), "step": (1e-15, ALIKE)}


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 120  # compared at most
    least: int = 20  # compared at least
    tuning_seeds: int = 10
    batch_seeds: int = 20  # of the first teleport's batch
    race_seeds: int = 5
    grid: tuple = GRID  # learning rates, as multiples of the published one; it grows
    race_steps: int = 200
    epochs: int = 4
    optimizers: tuple = tuple(teleported.RATES)
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports: int = 8
    teleport_batch: int = 200
    ascent_steps: int = 10


PAPER = Settings()
QUICK = replace(PAPER, seeds=12, least=8, tuning_seeds=3, batch_seeds=5, race_seeds=1, epochs=3)
QUICK = replace(QUICK, grid=(1, 3, 10, 30), samples=2000, teleports=2, ascent_steps=5)
SMALL = dict(seeds=2, least=2, tuning_seeds=2, batch_seeds=2, grid=(1, 3), epochs=2, samples=400, ascent_steps=2)
PRESETS = {"tiny": replace(QUICK, race_steps=5, optimizers=("SGD",), **SMALL), "quick": QUICK, "paper": PAPER}


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    require(data, train=max(s.teleport_batch, s.teleports * s.batch))
    tuning, fresh = disjoint_seeds(s.tuning_seeds, s.seeds)
    races, _ = run.parts(lambda case: race(run, data, *case), {f"race.{o}.{d}": (o, d) for o, d in cases()})
    tuned, _ = run.parts(lambda o: tune_all(run, data, o, tuning), {f"tuning.{o}": o for o in s.optimizers})
    best = {o: Tuned.load(tuned[f"tuning.{o}"], "") for o in s.optimizers}
    plan = {o: runs(best[o], [ARMS.index("preactivation")], (s.least, s.seeds)) for o in s.optimizers}
    rates = {o: both_rates(best[o], tuned[f"tuning.{o}"]["layers"]) for o in s.optimizers}

    def compare_all(o):
        return train_all(run, data, o, rates[o], fresh[: plan[o].n])

    def on_the_batch(o):
        return teleported.measure(run, data, o, rates[o][0], fresh[: s.batch_seeds])

    compared, seconds = run.parts(compare_all, {f"compared.{o}": o for o in s.optimizers})
    batch, _ = run.parts(on_the_batch, {f"batch.{o}": o for o in s.optimizers})
    found = races | tuned | compared | batch
    arrays = {f"{key}/{k}": v for key, part in found.items() for k, v in part.items()}
    metrics = {o: {"runs": plan[o].n, "reachable_margin": plan[o].margin} for o in s.optimizers}
    return Outcome(metrics, arrays, [*tuning, *fresh], seconds)


# ---------------------------------------------------------------------------------------------------------------------
# The identity


def cases():
    return [(o, d) for o in twins.OPTIMIZERS for d in twins.DECAYS if d != "beside" or o == "Adam"]


def race(run, data, optimizer, decay):
    """200 steps in float64, on mini-batches in the dataset's order, from the published initialization."""
    s = run.settings
    weights = [
        W.double() for W in initial_weights(teleported.dimensions(data), published_seeds(s.race_seeds), run.device)
    ]
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(W.shape[:-1], generator=generator, dtype=W.dtype).to(W) for W in weights[:-1]]
    order = torch.arange(s.race_steps * s.batch).to(data.y.device) % len(data.x)
    batches = [(data.x[rows].double().T, data.y[rows]) for rows in order.split(s.batch)]
    scales = [SCALE ** (2 * draw - 1) for draw in draws]
    return twins.race(weights, scales, optimizer, RACE_RATES[optimizer], batches, decay, DECAY)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def train_all(run, data, optimizer, factors, seeds):
    """All arms (A) at F factors of the published rate (A, F, L), and seeds (S): train_loss, test_loss, (A, F, S,
    epochs). What has one rate has the same factor for all layers."""
    one = teleported.train(run, data, optimizer, range(len(teleported.ARMS)), factors[:-1, :, 0], seeds)
    own = teleported.train_layers(run, data, optimizer, factors[-1], seeds)
    return {key: torch.cat([one[key], own[key][None]]) for key in own}


def tune_all(run, data, optimizer, seeds):
    """Tuned, with a row for layer rates, which has only whether it has best ones; these ("layers", factors of the
    published rate), their search ("trials") and how many runs it could take ("budget")."""

    def scores(which, factors):
        return number(teleported.train(run, data, optimizer, which, factors, seeds)["train_loss"])

    tuned = tune(scores, len(teleported.ARMS), run.settings.grid)
    budget = len(seeds) * tuned.tried[ARMS.index("preactivation")].sum()
    best, found, trials = teleported.tune_layers(run, data, optimizer, seeds, budget)
    blank = np.full((1, *tuned.scores.shape[1:]), np.nan)
    rows = (np.concatenate(pair) for pair in ((tuned.scores, blank), (tuned.tried, blank[..., 0] == 0)))
    tuned = Tuned(tuned.factors, *rows, np.append(tuned.best, 0), np.append(tuned.interior, found))
    layers = np.array(layer_rates.factors(best))
    return tuned.save("") | {"layers": layers, "trials": np.array(trials), "budget": budget}


def both_rates(tuned, layers):
    """Factors (A, 2, L): the published rate, and every arm's best."""
    factors = np.tile(protocol.both_rates(tuned)[..., None], len(layers))
    factors[-1, 1] = layers
    return factors


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def pairs(o):
    yield against(o, "preactivation", "best", other="layer rates")


def linear_pairs(o):
    yield from (against(o, "preactivation", rate, other="linear part") for rate in protocol.RATES)


def worst(outcome, key):
    """{(optimizer, decay): the largest relative difference of the weights, over the run or in a step}."""
    return {case: float(outcome.arrays["race.{}.{}/{}".format(*case, key)].max()) for case in cases()}


def judge(outcome):
    largest = {key: np.max([*worst(outcome, key).values()]) for key in TOLERANCES}  # NaN stays
    found = protocol.findings(outcome, ARMS, pairs)
    decided = {o: found[pair] for o in outcome.metrics for pair in pairs(o)}
    better, open_ = ([o for o, c in decided.items() if c.word == word] for word in ("better", UNDECIDED))
    exact = all(largest[key] <= tolerance for key, tolerance in TOLERANCES.items())
    word = FAILS if not exact else IN_PART if better else UNDECIDED if open_ else HOLDS
    limits = f"the teleport is better for {listed(better)}" if better else f"for {listed(open_)}"
    said = "; ".join(f"{o} {change(c)}" for o, c in decided.items())
    details, words = list(described(outcome, found)), ", ".join(f"{o} {c.word}" for o, c in decided.items())
    texts = [limits if exact else "the twin is another run", sentence(outcome, largest, said), details]
    number = f"twins differ by {largest['run']:.0e}; against layer rates {words}"
    return Verdict(word, *texts, number, list(beside_the_prototype(outcome)), surprise(outcome, found))


def sentence(outcome, largest, said):
    steps = outcome.settings.race_steps
    return (
        f"Over {steps} steps of six optimizers the rescaled run's weights, pulled back, differ from its untouched "
        f"twin's by at most {largest['run']:.0e}, by {largest['step']:.0e} in a step. Training loss with the "
        f"pre-activation teleport against layer rates, each at its best: {said}."
    )


def described(outcome, found):
    why = "in a step, which is where a first gradient is normalized"
    for key, what in (("run", f"over {outcome.settings.race_steps} steps"), ("step", why)):
        each = (f"{o}{'' if d == 'none' else f', decay {d}'} {x:.0e}" for (o, d), x in worst(outcome, key).items())
        yield f"Largest relative difference of the twin's weights {what}: {'; '.join(each)}."
    yield (
        "A decay λw that torch adds to the gradient is λa²w in the twin, a being what the weight was multiplied by: "
        "its share of a step stays ηλw for gradient descent and momentum, but not where the sum is normalized."
    )
    yield from protocol.described(outcome, found, ARMS)
    yield from (finite_only(outcome, o) for o in outcome.metrics if sum(found[next(pairs(o))].diverged))
    linear = protocol.findings(outcome, ARMS, linear_pairs)
    for o in outcome.metrics:
        each = (f"{rate} rate {change(linear[pair])}" for rate, pair in zip(protocol.RATES, linear_pairs(o)))
        yield f"{o}, training loss with the whole teleport against its linear part: {'; '.join(each)}."
        yield on_the_batch(outcome, o)
        a = {key: outcome.arrays[f"tuning.{o}/{key}"] for key in ("layers", "trials", "budget")}
        rates = listed([f"{x:.2g}" for x in teleported.RATES[o] * a["layers"]])
        spent = f"{a['trials'][:, -2].sum():.0f} of {a['budget']} runs"
        yield f"{o}, layer rates, first layer first: {rates}; found in {spent}."
    yield cost(outcome.settings)


def finite_only(outcome, o):
    pair = protocol.one_number(outcome.arrays, "train", f"compared.{o}/")[[ARMS.index("preactivation"), -1], 1]
    kept = pair[:, np.isfinite(pair).all(0)]
    if not kept.size:
        return f"{o}: one of the two diverged in every run."
    c = compare(*kept, relative=False)
    return (
        f"{o}, beside the rule: of the {c.n} runs in which neither diverged, which favours the arm that diverges, the "
        f"teleport against layer rates at best rates: {percent(c.effect):+.2f} [{percent(c.low):+.2f}, "
        f"{percent(c.high):+.2f}] %."
    )


def on_the_batch(outcome, o):
    a = {key: outcome.arrays[f"batch.{o}/{key}"] for key in ("growth", "share", "decrease", "drift")}
    growth, gain = 100 * (a["growth"].mean(1) - 1), 100 * gains(a["decrease"]).mean(-1)
    return (
        f"{o}, the first teleport on its batch, {len(a['share'])} runs, whole and linear part: ‖∂L/∂W‖ "
        f"{growth[1]:+.1f} and {growth[0]:+.1f} %; the next step's decrease {gain[0, 1]:+.1f} and {gain[0, 0]:+.1f} % "
        f"at the published rate, {gain[1, 1]:+.1f} and {gain[1, 0]:+.1f} % at the baseline's best. The linear part "
        f"goes {a['share'].mean():.0%} of the squared way; the whole changes the batch's loss by "
        f"{abs(a['drift']).max():.0e}."
    )


def gains(decrease):
    """How much further the next step goes down after the linear part and after the whole: (2, 2, S), relative."""
    return decrease[:, 1:] / decrease[:, :1] - 1


def cost(s):
    gradients = s.teleports * s.ascent_steps * COST * s.teleport_batch / s.batch
    return f"A run's {s.teleports} teleports take as many gradients as {gradients:.0f} of its mini-batches."


def beside_the_prototype(outcome):
    setting = "three layers rescaled; agreement: within a factor of ten"
    for key, names in ((key, names) for key, (_, alike) in PROTOTYPE.items() for names in alike):
        ours, theirs = np.max([worst(outcome, key)[o, "none"] for o in names.split(", ")]), PROTOTYPE[key][0]
        what = f"{names}: largest relative difference {'of the run' if key == 'run' else 'in a step'}"
        yield Published(what, f"≤ {theirs:.0e}", f"{ours:.0e}", "a prototype", setting, bool(ours <= 10 * theirs))


def surprise(outcome, found):
    if "SGD" not in outcome.metrics:
        return ""
    said = [change(found[against("SGD", arm, "published")]) for arm in ("preactivation", "linear part")]
    said += [change(found[against("SGD", arm, "best")]) for arm in ("preactivation", "layer rates")]
    return "SGD at the published rate: teleports {}, their linear part {}; at best rates: {}, layer rates {}.".format(
        *said
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures and table


def plot(outcome, s, save):
    save(plot_races(outcome, s))
    save(plot_controls(outcome, s), "controls")


def plot_races(outcome, s):
    """The first run's curves, which lie on each other, and the largest differences of all runs."""
    figure, axes = plots.panels(2, len(twins.OPTIMIZERS), width=2.5, height=2.5)
    window = gcd(10, s.race_steps)  # mini-batches that a point of the curves is the mean of
    looks = {"moved": ("rescaled", 6, "-", 5), "twin": ("its twin, untouched", 2, "--", 1.5)}
    looks["untouched"] = ("untouched, one rate", 0, "-", 0.7)
    steps, labels = np.arange(1, s.race_steps + 1), ("no decay", "decay added to the gradient", "decay beside it")
    for (top, bottom), o in zip(axes.T, twins.OPTIMIZERS):
        for key, (label, i, line, width) in looks.items():
            look = {"color": plots.COLORS[i], "linestyle": line, "linewidth": width}
            loss = outcome.arrays[f"race.{o}.none/{key}"][:, 0].reshape(-1, window).mean(1)
            top.plot(steps.reshape(-1, window).mean(1), loss, label=label, **look)
        for i, (decay, label) in enumerate(zip(twins.DECAYS, labels)):
            for key, width in (("run", 1.5), ("step", 0.5)) if (o, decay) in cases() else ():
                values = outcome.arrays[f"race.{o}.{decay}/{key}"].max(1)
                look = plots.style(i) | {"linewidth": width}
                bottom.plot(steps, values, label=label if key == "run" else None, **look)
        top.set(title=o)
        bottom.set(xlabel="step", yscale="log", ylim=(1e-17, 1e-9))
        bottom.axhline(TOLERANCES["run"], color="black", linewidth=0.8, label="the rule's bound")
    axes[0, 0].set_ylabel(f"mini-batch loss, {outcome.label},\nmean of {window}")
    axes[1, 0].set_ylabel("relative difference of weights\n(thin: made in this step)")
    axes[0, 3].legend(fontsize=6)
    axes[1, 3].legend(fontsize=6, loc="center")
    return figure


def plot_controls(outcome, s):
    """Arms against the baseline; the tuning, with every trial of layer rates; the first teleport's next step."""
    figure, axes = plots.panels(3, len(s.optimizers), width=4.4, height=2.7)
    found = protocol.findings(outcome, ARMS, pairs)
    for (top, middle, bottom), o in zip(axes.T, s.optimizers):
        for k, rate in enumerate(protocol.RATES):
            each = [found[against(o, name, rate)] for name in ARMS[1:]]
            plots.intervals(top, each, np.arange(len(each)) + 0.24 * k - 0.12, k, f"{rate} rate")
        top.set(title=o, xlabel="training loss against the baseline's, %", yticks=range(len(ARMS) - 1))
        top.set_yticklabels(ARMS[1:])
        top.invert_yaxis()
        plot_tuning(middle, outcome, o)
        steps = 100 * gains(outcome.arrays[f"batch.{o}/decrease"])
        for k, (rate, gain) in enumerate(zip(("published rate", "baseline's best"), steps)):
            look = plots.style(k, marker=True) | {"linestyle": "none", "markerfacecolor": "none"}
            bottom.plot(gain[1], gain[0], label=rate, **look)
        bottom.axline((0, 0), slope=1, color="black", linewidth=0.8)
        bottom.set(xlabel="next step on the batch, gain by the whole, %", ylabel="by its linear part, %")
    axes[1, 0].set_ylabel(f"above the baseline's best, %,\n{outcome.label}")
    for ax in axes[:, -1]:
        ax.legend(fontsize=7)
    return figure


def plot_tuning(ax, outcome, o):
    """One rate: curves. Layer rates: every trial at the geometric mean of its rates, against the same runs."""
    tuned, trials = Tuned.load(outcome.arrays, f"tuning.{o}/"), outcome.arrays[f"tuning.{o}/trials"]
    plots.tuning_curves(ax, tuned, teleported.ARMS)
    reference = [tuned.at_best()[0, : int(n)].mean() for n in trials[:, -2]]
    above = 100 * np.expm1(trials[:, -1] - reference)
    ax.plot(2 ** (trials[:, :-3].mean(1) / 2), above, "+", color=plots.COLORS[5], label="layer rates, trials")
    ax.set_xlim(1, None)
    ax.set_ylim(np.nanmin(above[np.isfinite(above)]) - 5, 40)


def report(outcome, s):
    found, rows = protocol.findings(outcome, ARMS, pairs), []
    for o in outcome.metrics:
        layers = outcome.arrays[f"tuning.{o}/layers"]
        for a, arm in enumerate(ARMS):
            cells = protocol.cells(outcome, found, ARMS, o, a)
            if arm == "layer rates":
                edge = "" if outcome.arrays[f"tuning.{o}/interior"][a] else " (not found)"
                cells[0] = " ".join(f"×{x:.2g}" for x in layers) + edge
            rows.append([f"{o}, {arm}", *cells])
    races = [[f"{o}, decay {d}", *(f"{worst(outcome, key)[o, d]:.0e}" for key in TOLERANCES)] for o, d in cases()]
    n = ", ".join(f"{o} {m['runs']}" for o, m in outcome.metrics.items())
    return (
        f"{outcome.label}. Rescaled run and untouched twin, float64, {s.race_seeds} runs: largest relative difference\n"
        f"of the weights.\n\n{table(['', f'{s.race_steps} steps', 'a step'], races)}\n\n"
        f"Losses against the baseline's with 95 % intervals; runs: {n}.\n\n{table(['', *protocol.HEADER], rows)}"
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
