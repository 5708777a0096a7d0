"""Where a teleport helps at the best learning rate, and what tuned per-layer rates get without it. Not in the papers.

One positive rescaling of the hidden units before the first step, exact for every input, and then training: two networks
(leaky ReLU, no biases) × four initializations × SGD, momentum and Adam on mini-batches. Pulled back, such a teleport is
a learning rate for every unit (SGD, momentum: η/s² on incoming rows, η s² on outgoing columns; Adam: η/s, η s, ε → ε s,
ε/s). This twin is the teleported run to rounding (tests/beyond/test_objectives_map.py), so that it is run as an arm in
one case only, as a check. The arms:

  baseline              the optimizer alone
  gradient_norm         ‖∂L/∂W‖² of a batch, scales within [1/2, 2]: it has no maximum
  line_search_decrease  D, what the best step along the optimizer's first direction gains by Gauss-Newton
  true_decrease         what it gains indeed
  look_ahead            the loss of a held-out batch after k steps of the optimizer at the arm's own rate
  balance               ‖incoming‖ = ‖outgoing‖ for every unit, in closed form
  random                a random rescaling as large as line_search_decrease's
  per_layer             no teleport: a rate for every layer, by a pattern search that starts at the baseline's best

Initializations: published (±1/√fan_in), He, and two in which He's function is badly scaled: layer (the first hidden
layer × 16), units (every hidden unit × 4 or ÷ 4 by a coin). Every arm's rate is tuned on four seeds that are not
compared: enough to tell the rungs of a grid a third apart, on which the loss near the best is flat, and what is left of
their noise is in the arms of every cell alike. One number a run, fixed: the mean log training loss over the epochs.
"""

import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rescalings  # noqa: E402
from rescalings import ARMS, BALANCED, NETWORKS, OBJECTIVES, RATES  # noqa: E402

from common import cli, plots  # noqa: E402
from common.claims import (  # noqa: E402
    HOLDS,
    IN_PART,
    Claim,
    Published,
    Verdict,
    change,
    graded,
    listed,
    settle,
    table,
)
from common.protocol import number  # noqa: E402
from common.run import Outcome  # noqa: E402
from common.statistics import compare, percent  # noqa: E402
from common.tuning import Tuned, compared, disjoint_seeds  # noqa: E402

CLAIM = Claim(
    order=195,
    figure="Objectives",
    paper="beyond the papers",
    section="",
    says="At the best learning rate a rescaling teleport helps where an initialization is badly scaled, and where only "
    "whole layers are, it does not beat tuned per-layer rates.",
    short="a teleport repairs a badly scaled initialization",
    rule="holds if, every arm at its own best rate, one balance teleport is better than the baseline in mean log "
    "training loss in every badly scaled cell (layer, units), and in no cell whose units are scaled alike (published, "
    "He, layer) an objective's teleport is better than tuned per-layer rates, and again so on new seeds; in part: "
    "balance is better than the baseline in some badly scaled cells. Rates tuned on other runs, interior; paired by "
    "seed; margin 1 %; Holm over the comparisons of a cell. The same for look_ahead on Fashion-MNIST is said, and "
    "decides nothing.",
    dated="2026-11-30",
    source="Ours",
)
INITS = ("published", "He", "layer", "units")
BAD = ("layer", "units")
MEASURES = ("train", "test")
TICKS = (-30, -10, -5, 0, 5, 10, 30, 100)
FASHION = "FashionMNIST"


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 30  # compared, and as many new ones where a teleport beats per-layer rates
    tuning_seeds: int = 4
    search_seeds: int = 2  # of them, for the search for per-layer rates
    grid: tuple = (1, 1.5, 2, 3, 4, 6, 8)  # learning rates, as multiples of RATES; it grows
    networks: tuple = tuple(NETWORKS)
    inits: tuple = INITS
    optimizers: tuple = tuple(RATES)
    samples: int = 8000  # to train on, the first
    epochs: int = 2
    batch: int = 20
    teleport_batch: int = 200
    ascent_steps: int = 10
    ahead: int = 5  # steps that look_ahead takes
    fashion: bool = True  # look_ahead again on Fashion-MNIST


PAPER = Settings()
FEW = replace(PAPER, networks=("784-16-10-10",), optimizers=("SGD",), fashion=False)
PRESETS = {
    "tiny": replace(
        FEW, seeds=3, tuning_seeds=2, grid=(1, 3), inits=("layer",), samples=200, epochs=1, ascent_steps=2, ahead=1
    ),
    "quick": replace(FEW, seeds=16, tuning_seeds=3, inits=("published", "units"), samples=4000),
    "paper": PAPER,
}


def experiment(run):
    s = run.settings
    tuning, later = disjoint_seeds(s.tuning_seeds, 2 * s.seeds)
    fresh, new = later[: s.seeds], later[s.seeds :]
    cells = {".".join(cell): cell for cell in product(s.networks, s.inits, s.optimizers)}
    parts, seconds = run.parts(lambda cell: rescalings.tune_and_compare(cell, first(run), s, tuning, fresh), cells)
    arrays = {f"{key}/{k}": v for key, part in parts.items() for k, v in part.items()}
    first_look = Outcome({"cells": list(cells)}, arrays, settings=s)
    winners = {key: won for key, found in findings(first_look).items() if (won := beating(found["train"]))}

    def second(job):
        key, dataset = job
        if dataset is None:
            return rescalings.twin(cells[key], first(run), s, tuning)
        known = parts[key] if dataset == s.dataset else None
        names = ["look_ahead"] if known is None else winners[key]
        return rescalings.compare_again(cells[key], first(run, dataset), s, tuning, new, names, known)

    jobs = {f"again.{key}": (key, s.dataset) for key in winners} | {"twin": (next(iter(cells)), None)}
    if s.fashion:
        jobs |= {f"fashion.{key}": (key, FASHION) for key, won in winners.items() if "look_ahead" in won}
    if any(dataset == FASHION for _, dataset in jobs.values()):
        run.data(FASHION)  # in this process: its name stands in the results
    more, also = run.parts(second, jobs)
    arrays |= {f"{key}/{k}": v for key, part in more.items() for k, v in part.items()}
    costs = {network: rescalings.costs((784, *NETWORKS[network], 10), first(run), s) for network in s.networks}
    return Outcome({"cells": list(cells), "winners": winners, "costs": costs}, arrays, tuning + later, seconds | also)


def first(run, name=None):
    """The data of this name, its first samples to train on and 2,000 to test on."""
    data, n = run.data(name), run.settings.samples
    return data._replace(x=data.x[:n], y=data.y[:n], x_test=data.x_test[:2000], y_test=data.y_test[:2000])


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def findings(outcome):
    """{cell: {train/test: {(arm, other): Comparison}}}: every arm against the baseline and every objective against
    per_layer, one family for each cell and loss."""
    pairs = [(arm, "baseline") for arm in ARMS[1:]] + [(o, "per_layer") for o in OBJECTIVES]
    found = {}
    for cell in outcome.metrics["cells"]:
        train, test, inside = (outcome.arrays[f"{cell}/{k}"] for k in ("train", "test", "tuning.interior"))
        interior, numbers = dict(zip(ARMS, inside)), {"train": number(train), "test": np.log(test)}
        found[cell] = {m: compared(dict(zip(ARMS, numbers[m])), pairs, interior) for m in MEASURES}
    return found


def beating(found):
    """The objectives that are better than per_layer."""
    return [o for o in OBJECTIVES if found[o, "per_layer"].word == "better"]


def again(outcome, kind, cell):
    """{objective: Comparison} with per_layer, where one beat it: kind "again" on new seeds, "fashion" on other data."""
    names = {"again": outcome.metrics["winners"].get(cell, []), "fashion": ["look_ahead"]}[kind]
    if f"{kind}.{cell}/train" not in outcome.arrays:
        return {}
    arms = (*names, "per_layer")
    numbers = dict(zip(arms, number(outcome.arrays[f"{kind}.{cell}/train"])))
    interior = dict(zip(arms, outcome.arrays[f"{kind}.{cell}/interior"]))
    found = compared(numbers, [(o, "per_layer") for o in names], interior)
    return {o: c for (o, _), c in found.items()}


def surviving(outcome, found):
    """{cell: objectives that are better than per_layer, and again on new seeds}."""
    both = {c: {o for o, e in again(outcome, "again", c).items() if e.word == "better"} for c in found}
    return {c: [o for o in beating(found[c]["train"]) if o in both[c]] for c in found}


def init_of(cell):
    return cell.split(".")[1]


def judge(outcome):
    found = findings(outcome)
    helped = {c: settle([f["train"][BALANCED, "baseline"].word]) for c, f in found.items() if init_of(c) in BAD}
    won = {c: names for c, names in surviving(outcome, found).items() if names}
    alike = {o: [c for c, names in won.items() if o in names and init_of(c) != "units"] for o in OBJECTIVES}
    beaten = [f"{o} in {listed(cells)}" for o, cells in alike.items() if cells]
    word = graded(list(helped.values()))
    word = IN_PART if word == HOLDS and beaten else word
    without = [c for c, answer in helped.items() if not answer]
    limits = [f"balance does not help in {listed(without)}" if without else ""]
    limits.append(f"better than per-layer rates, twice: {'; '.join(beaten)}" if beaten else "")
    text = sentence(found, won, helped), list(details(outcome, found)), headline(found, helped)
    return Verdict(word, "; ".join(filter(None, limits)), *text, list(prototype(outcome, found)), surprise(found))


def sentence(found, won, helped):
    alike = [f for c, f in found.items() if init_of(c) != "units"]
    counts = words(f["train"][o, "per_layer"].word for f in alike for o in OBJECTIVES)
    units = sum(init_of(c) == "units" for c in won)
    return (
        f"Balance against the baseline, training loss, in {len(helped)} badly scaled cells: {headline(found, helped)}. "
        f"An objective's teleport against tuned per-layer rates where units are scaled alike ({len(alike)} cells): "
        f"{counts}. Where they are not, one is better, twice, in {units} of {len(found) - len(alike)} cells."
    )


def headline(found, helped):
    each = [found[c]["train"][BALANCED, "baseline"] for c in helped]
    return f"better in {sum(map(bool, helped.values()))} of {len(helped)}, {spread(each)}"


def words(each):
    each = list(each)
    return ", ".join(f"{each.count(w)} {w}" for w in ("better", "worse", "equivalent", "undecided") if w in each)


def spread(each):
    """The least and the largest effect of Comparisons, and how many have none: a run diverged."""
    effects = sorted(percent(c.effect) for c in each if np.isfinite(c.effect))
    diverged = f", {len(each) - len(effects)} with diverged runs" if len(effects) < len(each) else ""
    return (f"{effects[0]:+.1f} to {effects[-1]:+.1f} %" if effects else "none") + diverged


def details(outcome, found):
    for other, arms in (("baseline", ARMS[1:]), ("per_layer", OBJECTIVES)):
        for init in dict.fromkeys(map(init_of, found)):
            cells = [f for c, f in found.items() if init_of(c) == init]
            each = {arm: [f["train"][arm, other] for f in cells] for arm in arms}
            said = (f"{arm} {spread(cs)} ({words(c.word for c in cs)})" for arm, cs in each.items())
            yield f"{init}, against {other}, {len(cells)} cells: {'; '.join(said)}."
    for other, arms in (("baseline", ARMS[1:]), ("per_layer", OBJECTIVES)):
        said = (f"{arm} {words(f['test'][arm, other].word for f in found.values())}" for arm in arms)
        yield f"Test loss against {other}, {len(found)} cells: {'; '.join(said)}."
    for kind, where in (("again", "new seeds"), ("fashion", "Fashion-MNIST, new seeds")):
        for c in found:
            if each := again(outcome, kind, c):
                yield f"{c}, {where}, against per_layer: {'; '.join(f'{o} {change(e)}' for o, e in each.items())}."
    yield from paid(outcome, found)


def paid(outcome, found):
    """What the arms take, and how exact the twin is."""
    teleported, other = outcome.arrays["twin/train"]
    yield f"The twin's training loss differs from the teleported run's by {np.abs(other / teleported - 1).max():.0e}."
    runs = np.stack([outcome.arrays[f"{c}/counts"] for c in found])
    one, each = runs[:, :-1].mean(), runs[:, -1].mean()
    yield f"Tuning runs of a cell: {one:.0f} of an arm with one rate, {each:.0f} of per_layer."
    steps = []
    for c in found:
        tuned = Tuned.load(outcome.arrays, f"{c}/tuning.")
        means = np.sort(np.nan_to_num(tuned.scores.mean(-1), nan=np.inf), axis=1)
        steps += list(means[:, 1] - means[:, 0])
    low, middle, high = (percent(x) for x in np.quantile(steps, (0.25, 0.5, 0.75)))
    yield (
        f"On the tuning seeds an arm's second-best rate is {middle:.1f} % above its best (quartiles {low:.1f} and "
        f"{high:.1f}): what is smaller than that may be the choice of a rung."
    )
    for network, cost in outcome.metrics["costs"].items():
        taken = ", ".join(f"{o} {value:.0f}" for o, value in cost.items())
        yield f"{network}, one teleport in gradients of a mini-batch: {taken}."


def surprise(found):
    """By its twin a rescaling of layers is a rate for each: a search finds none as good as the closed form."""
    each = [f["train"][BALANCED, "per_layer"] for c, f in found.items() if init_of(c) == "layer"]
    better = [c for c in each if c.word == "better"]
    if not better:
        return ""
    return (
        f"Rates of layers could undo a layer × 16; a search with twice an arm's runs finds worse ones than balance has "
        f"in closed form in {len(better)} of {len(each)} cells: {spread(each)}."
    )


# Of an independent prototype, mnist-mini and MNIST, SGD: change of the training loss by a teleport after an epoch.
SMALL, DEEP = NETWORKS
PROTOTYPE = {
    (f"{SMALL}.published.SGD", "gradient_norm", 1): ("−6 %", None),
    (f"{DEEP}.published.SGD", "gradient_norm", 1): ("−20.5 ± 2.0 %", (-22.5, -18.5)),
    (f"{DEEP}.published.SGD", BALANCED, 1): ("−32 to −43 % (another that shrinks lower layers)", None),
    (f"{DEEP}.He.SGD", BALANCED, 1): ("−1 to −2.5 % (the same)", None),
}


def prototype(outcome, found):
    """Its numbers beside ours; they agree if the 95 % intervals overlap."""
    source, setting = "a prototype", "its batches, seeds and grid are not recorded"
    for (cell, arm, epoch), (value, interval) in PROTOTYPE.items():
        if cell in found and epoch <= outcome.settings.epochs:
            mine, theirs = (outcome.arrays[f"{cell}/train"][ARMS.index(a), :, epoch - 1] for a in (arm, "baseline"))
            c = compare(mine, theirs)
            agrees = interval and bool(percent(c.low) <= interval[1] and interval[0] <= percent(c.high))
            yield Published(f"{cell}: {arm}, after epoch {epoch}", value, change(c, 1), source, setting, agrees)
    for arm, value in (("baseline", "+15 to +200 %"), (BALANCED, "repaired")):
        pairs = [
            (c, ".".join((c.split(".")[0], "He", "SGD"))) for c in found if c.endswith("SGD") and init_of(c) in BAD
        ]
        each = [level(outcome, c, arm) - level(outcome, he, "baseline") for c, he in pairs if he in found]
        if each:
            ours = f"{percent(min(each)):+.0f} to {percent(max(each)):+.0f} %"
            what = f"SGD, badly scaled: {arm} against the baseline from He, training loss"
            yield Published(what, value, ours, source, "He's function, its own factors")


def level(outcome, cell, arm):
    return number(outcome.arrays[f"{cell}/train"][ARMS.index(arm)]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Figures and table


def plot(outcome, s, save):
    found = findings(outcome)
    save(plot_map(found, s))
    save(plot_against_layers(found, s), "controls")
    save(plot_tuning(outcome, s), "tuning")


def plot_map(found, s):
    """Every arm against the baseline: a panel for each network and optimizer, a row for each initialization."""
    figure, axes = plots.panels(len(s.networks), len(s.optimizers), width=5.2, height=1.3 + 0.45 * len(s.inits))
    for ax, (network, optimizer) in zip(axes.flat, product(s.networks, s.optimizers)):
        rows = [[found[f"{network}.{i}.{optimizer}"]["train"][arm, "baseline"] for arm in ARMS[1:]] for i in s.inits]
        effects = np.array([[percent(c.effect) for c in row] for row in rows])
        ax.imshow(effects, cmap="RdBu_r", vmin=-40, vmax=40, aspect="auto")
        for (i, a), effect in np.ndenumerate(effects):
            dark = {"color": "white" if abs(effect) > 28 else "black", "ha": "center", "va": "center", "fontsize": 7}
            ax.text(a, i, f"{said(rows[i][a])}\n{rows[i][a].word}", **dark)
        ax.set_xticks(range(len(ARMS) - 1), [arm.replace("_", "\n") for arm in ARMS[1:]], fontsize=7)
        ax.set_yticks(range(len(s.inits)), s.inits, fontsize=8)
        ax.grid(False)
        ax.set_title(f"{network}, {optimizer}", fontsize=9)
    figure.suptitle("training loss against the baseline's, every arm at its best rate", fontsize=10)
    return figure


def plot_against_layers(found, s):
    """The objectives against tuned per-layer rates, with 95 % intervals."""
    figure, axes = plots.panels(len(s.networks), len(s.optimizers), width=3.8, height=3.2, sharey=True)
    for ax, (network, optimizer) in zip(axes.flat, product(s.networks, s.optimizers)):
        for k, init in enumerate(s.inits):
            each = [found[f"{network}.{init}.{optimizer}"]["train"][o, "per_layer"] for o in OBJECTIVES]
            plots.intervals(ax, each, np.arange(len(each)) + 0.18 * k - 0.27, k, init)
        ax.set_yticks(range(len(OBJECTIVES)), OBJECTIVES, fontsize=8)
        ax.set_title(f"{network}, {optimizer}", fontsize=9)
        ax.set_xlabel("training loss against per_layer's, %")
        ax.set_xscale("symlog", linthresh=10, linscale=2)
        ax.set_xticks(TICKS, map(str, TICKS), fontsize=8)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure


def plot_tuning(outcome, s):
    columns = list(product(s.networks, s.optimizers))
    figure, axes = plots.panels(len(s.inits), len(columns), width=2.6, height=2.2)
    for (i, init), (j, (network, optimizer)) in product(enumerate(s.inits), enumerate(columns)):
        tuned = Tuned.load(outcome.arrays, f"{network}.{init}.{optimizer}/tuning.")
        plots.tuning_curves(axes[i, j], tuned, ARMS)
        axes[i, j].set_title(f"{network},\n{init}, {optimizer}", fontsize=8)
        axes[i, j].set_xlabel(f"rate (per_layer: the first layer's) / {RATES[optimizer]:g}", fontsize=7)
        axes[i, j].xaxis.set_minor_formatter(NullFormatter())
    figure.supylabel("above the baseline's best, %", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=8)
    return figure


def said(c):
    return f"{percent(c.effect):+.1f} %" if np.isfinite(c.effect) else "diverged,"


def report(outcome, s):
    found, rows = findings(outcome), []
    for cell, f in found.items():
        for m, other, arms in (("train", "baseline", ARMS[1:]), ("train", "per_layer", OBJECTIVES)):
            cells = (f"{said(f[m][a, other])} {f[m][a, other].word}" for a in arms)
            rows.append([f"{cell}, against {other}", *cells, *[""] * (len(ARMS) - 1 - len(arms))])
    drift = max(np.nanmax(np.abs(a[..., 1] / a[..., 0] - 1)) for k, a in outcome.arrays.items() if k.endswith("/drift"))
    return (
        f"{outcome.label}, {s.seeds} runs, training loss, %; every arm at its best rate. Largest |Δloss|/loss of a "
        f"teleport,\non the test set: {drift:.0e}.\n\n{table(['', *ARMS[1:]], rows)}"
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
