"""The teleport that survives tuned rates: rotating LoRA's inner space under Adam. Not in the papers.

Between a LoRA's factors, BA = (BQᵀ)(QA) for every orthogonal Q: a teleport that changes neither the function nor any
gradient norm, and that gradient descent cannot feel. Adam can: after Q it is the untouched run with the update
QᵀAdam(QG_A), Adam(G_BQᵀ)Q, so that Q chooses the basis in which Adam normalizes. Here Q is the eigenbasis of the inner
space's gradient covariance, and Adam's moments move along (factors.py; the identities are tested to 1e-10).

A network pretrained on one task (in the setting "spelling" a byte-level transformer) adapts to another through LoRA on
every layer. Every arm has its own best learning rate and its own best ratio of B's rate to A's (as in LoRA+), on seeds
that are not compared: the point of a grid (rates at 1, 1.5, 2, 3, 5, 7 × powers of ten, ratios at powers of two) that
none of its four neighbours beats, the grid without edges. In the first setting the rate is tuned at ratio 1 too. One
number a run, fixed beforehand: the mean log loss, over windows of the training mini-batches; held-out, over four looks
in the last quarter. Tuning takes 4 seeds and the comparison 30 in every setting, too few to show equivalence within
1 %: the results name the smallest effect that each comparison would have found.

  none            Adam; with its ratio tuned this is LoRA+
  once            one rotation into the eigenbasis, after step 10
  every_2, _10    a rotation into the eigenbasis every so many steps
  random, _2      random rotations instead, once or every 2 steps: the controls
  reset           no teleport, Adam's moments forgotten after step 10
  balance         one rescaling that balances the factors (after step 10 where B = 0 at the start, else at once)
  singular        the same, by the general element that also makes the product's singular basis the basis
  rslora, scaled, rite, soap, soap_both   peers, each from its paper: see factors.py; rsLoRA scales by α/√r, not α/r
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adaptation  # noqa: E402
import factors  # noqa: E402
import spelling  # noqa: E402

from common import cli, plots  # noqa: E402
from common.claims import UNDECIDED, Claim, Published, Verdict, grade, listed, table  # noqa: E402
from common.data import LABELS  # noqa: E402
from common.run import Outcome  # noqa: E402
from common.statistics import compare, family, percent  # noqa: E402

CLAIM = Claim(
    order=200,
    figure="Rotation",
    paper="beyond the papers",
    section="",
    says="Rotating LoRA's inner space into the eigenbasis of its gradients, exactly and with Adam's moments, makes "
    "Adam learn faster, at the best learning rate and the best rate ratio of every arm.",
    short="rotating LoRA's inner space helps Adam",
    rule="holds if in the first setting every_2 is better than none in training and in held-out loss, random_2 in "
    "neither, and every_2 is better than none in training loss in every other setting; in part: every_2 is better than "
    "none in training loss in the first setting, its interval below that of random_2. Rate and ratio tuned for every "
    "arm, interior, on other seeds; paired by seed; Holm over the arms of a setting, 5 %. Peers are said beside it and "
    "decide nothing.",
    dated="2026-11-25",
    headline=True,
    source="Ours",
)


class Treatment(NamedTuple):
    kind: type = factors.Adam
    options: dict = {}
    element: str = ""
    at: int = 0  # after this step
    every: int = 0  # or after every so many
    scale: float = 1.0  # of BA: α/r with α = r


TRACKS = {"tracks": 0.99}
ARMS = {
    "none": Treatment(),
    "once": Treatment(options=TRACKS, element="eigenbasis", at=10),
    "every_2": Treatment(options=TRACKS, element="eigenbasis", every=2),
    "every_10": Treatment(options=TRACKS, element="eigenbasis", every=10),
    "random": Treatment(element="random", at=10),
    "random_2": Treatment(element="random", every=2),
    "reset": Treatment(element="reset", at=10),
    "balance": Treatment(element="balance", at=10),
    "singular": Treatment(element="singular_basis", at=10),
    "rslora": Treatment(scale=8**0.5),
    "scaled": Treatment(factors.ScaledAdam),
    "rite": Treatment(factors.RITE),
    "soap": Treatment(factors.SOAP, {"every": 2}),
    "soap_both": Treatment(factors.SOAP, {"every": 10, "both_sides": True}),
}
PEERS = ("rslora", "scaled", "rite", "soap", "soap_both")
FEW = ("none", "every_2", "soap")  # in the settings after the first

# Of an independent prototype, to be repeated or killed: (setting, arm, rates, measure) -> effect in per cent with its
# 95 % interval, where one is at hand.
PROTOTYPE = {
    ("rotated", "once", "plain", "train_loss"): (-9.9, -11.1, -8.6),
    ("rotated", "once", "plain", "held_out"): (-5.4, -7.4, -3.3),
    ("rotated", "random", "plain", "train_loss"): (-1.9, -2.8, -0.9),
    ("rotated", "random", "plain", "held_out"): (-0.7, -2.3, 0.8),
    ("rotated", "every_2", "plain", "train_loss"): (-15.3, -16.4, -14.2),
    ("rotated", "every_2", "plain", "held_out"): (-7.8, -9.3, -6.3),
    ("rotated", "once", "tuned", "train_loss"): (-4.5, -5.4, -3.6),
    ("rotated", "once", "tuned", "held_out"): (-3.1, -4.9, -1.2),
    ("rotated", "random", "tuned", "train_loss"): (-0.6, -1.6, 0.3),
    ("rotated", "every_2", "tuned", "train_loss"): (-10.1, -11.1, -9.1),
    ("rotated", "every_2", "tuned", "held_out"): (-5.4, -7.5, -3.2),
    ("rank_2", "every_2", "tuned", "train_loss"): (-2.5, -3.8, -1.3),
    ("rank_2", "every_2", "tuned", "held_out"): (-1.8,),
    ("rank_32", "every_2", "tuned", "train_loss"): (-17.7,),
    ("rank_32", "every_2", "tuned", "held_out"): (-6.5,),
    ("batch_16", "every_2", "tuned", "train_loss"): (-10.0,),
    ("batch_16", "every_2", "tuned", "held_out"): (-5.5,),
    ("steps_2000", "every_2", "tuned", "train_loss"): (-16.6,),
    ("steps_2000", "every_2", "tuned", "held_out"): (-2.0, -5.8, 2.0),
    ("gaussian", "balance", "tuned", "train_loss"): (-5.9, -8.5, -3.2),
    ("gaussian", "every_2", "tuned", "train_loss"): (-2.2, -4.1, -0.3),
}


class Setting(NamedTuple):
    adapts: str = "rotated"  # mnist-mini turned by 90°; "fashion": Fashion-MNIST from MNIST; "spelling": spelling.py
    hidden: tuple = (128, 128)
    rank: int = 8
    init: str = "zero"
    beta2: float = 0.999
    weight_decay: float = 0.0
    batch: int = 64
    steps: int = 600
    more: tuple = ()  # arms beside FEW


MEASURES = ("train_loss", "held_out")
SETTINGS = {
    "rotated": Setting(),
    "fashion": Setting(adapts="fashion"),
    "spelling": Setting(adapts="spelling", batch=8, steps=300),
    "rank_2": Setting(rank=2),
    "gaussian": Setting(init="gaussian", more=("random_2", "balance")),
    "batch_16": Setting(batch=16),
    "steps_200": Setting(steps=200),
    "rank_32": Setting(rank=32),
    "decay": Setting(weight_decay=0.1),
    "beta2_99": Setting(beta2=0.99),
    "deep": Setting(hidden=(64, 64, 64)),
    "batch_256": Setting(batch=256),
    "steps_2000": Setting(steps=2000),
}


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 30  # compared: from 11 on
    tuning_seeds: int = 4  # from 1 on
    arms: tuple = tuple(ARMS)  # in the first setting
    settings: tuple = tuple(SETTINGS)
    steps: int | None = None  # instead of each setting's
    pretraining: int = 1500  # steps


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, seeds=3, tuning_seeds=1, arms=FEW, settings=("rotated", "rank_2"), steps=10, pretraining=20),
    "quick": replace(
        PAPER, seeds=12, tuning_seeds=2, arms=(*FEW, "once", "random_2"), settings=("rotated",), steps=200
    ),
    "paper": PAPER,
}


def experiment(run):
    s, tasks = run.settings, {}

    def part(key):
        setting, arm = key
        if setting not in tasks:
            tasks.clear()
            tasks[setting] = make_task(run, named(setting, s))
        plain = setting == s.settings[0]
        return adaptation.tune_and_compare(tasks[setting], named(setting, s), ARMS[arm], tuning, fresh, plain)

    tuning, fresh = list(range(1, 1 + s.tuning_seeds)), list(range(11, 11 + s.seeds))
    keys = {f"{setting}.{arm}": (setting, arm) for setting in s.settings for arm in arms(setting, s)}
    parts, seconds = run.parts(part, keys)
    timings = {key: {"part": seconds[key], "run_alone": float(p.pop("seconds_alone"))} for key, p in parts.items()}
    memory = {key: float(p.pop("memory")) for key, p in parts.items()}
    arrays = {f"{key}/{k}": v for key, p in parts.items() for k, v in p.items()}
    best = {k: {r: adaptation.point(p[f"{r}_best"]) for r in rates_of(k.split(".")[0], s)} for k, p in parts.items()}
    found = {"best": best, "effects": effects(arrays, s), "peers": against_peers(arrays, s), "memory": memory}
    return Outcome(found, arrays, [*tuning, *fresh], timings)


def arms(setting, s):
    return s.arms if setting == s.settings[0] else (*FEW, *SETTINGS[setting].more)


def rates_of(setting, s):
    """What was tuned: the rate alone ("plain"), in the first setting; rate and ratio ("tuned")."""
    return ("plain", "tuned") if setting == s.settings[0] else ("tuned",)


def named(setting, s):
    """The Setting of this name, with the preset's number of steps."""
    return SETTINGS[setting]._replace(steps=s.steps or SETTINGS[setting].steps)


def make_task(run, setting):
    """The network that was pretrained and the data that it adapts to: small images, or text."""
    if setting.adapts == "spelling":
        return spelling.Spelling().pretrained(run.settings.pretraining)
    old = run.data("MNIST" if setting.adapts == "fashion" else run.settings.dataset)
    new, turns = (run.data("FashionMNIST"), 0) if setting.adapts == "fashion" else (old, 1)
    dims = (196, *setting.hidden, 10)
    weights = adaptation.pretrained(dims, adaptation.small_images(old.x), old.y, run.settings.pretraining)
    images = [adaptation.small_images(x, turns) for x in (new.x, new.x_test[:2000])]
    return adaptation.Images(weights, images[0], new.y, images[1], new.y_test[:2000])


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def effects(arrays, s):
    """{setting: {plain/tuned: {measure: {arm: what it does against none}}}}; measures: train_loss, held_out."""

    def against_none(setting, rates, measure):
        others = [arm for arm in arms(setting, s) if arm != "none"]
        return compared(arrays, [(f"{setting}.{arm}", f"{setting}.none") for arm in others], rates, measure)

    return {n: {r: {m: against_none(n, r, m) for m in MEASURES} for r in rates_of(n, s)} for n in s.settings}


def against_peers(arrays, s):
    """{setting: {measure: {peer: what every_2 does against it}}}, rate and ratio tuned for both."""
    result = {}
    for setting in s.settings:
        peers = [(f"{setting}.every_2", f"{setting}.{peer}") for peer in PEERS if peer in arms(setting, s)]
        result[setting] = {m: compared(arrays, peers, "tuned", m, named_by=1) for m in MEASURES}
    return result


def compared(arrays, pairs, rates, measure, named_by=0):
    """{arm: Comparison as a dictionary} of pairs of keys, one family, in log ratios; undecided where one of the two has
    no best rate."""
    numbers = [[number(arrays[f"{key}/{rates}_{measure}"]) for key in pair] for pair in pairs]
    found = family([compare(mine, theirs, relative=False) for mine, theirs in numbers])
    result = {}
    for pair, comparison in zip(pairs, found):
        if not all(arrays[f"{key}/{rates}_interior"] for key in pair):
            comparison = comparison._replace(word=UNDECIDED)
        result[pair[named_by].split(".", 1)[1]] = comparison._asdict()
    return result


def number(curve):
    """One number a run, fixed beforehand: the mean logarithm of the loss over the curve (S, points)."""
    return np.log(np.asarray(curve, float)).mean(-1)


def say(effect):
    mean, low, high = (percent(effect[key]) for key in ("effect", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] %"


def judge(outcome):
    tuned = {setting: found["tuned"] for setting, found in outcome.metrics["effects"].items()}
    first, *others = tuned
    training, held_out = tuned[first]["train_loss"], tuned[first]["held_out"]
    random = any(m["random_2"]["word"] == "better" for m in (training, held_out) if "random_2" in m)
    main, also = (m["every_2"]["word"] == "better" for m in (training, held_out))
    failing = [n for n in others if tuned[n]["train_loss"]["every_2"]["word"] != "better"]
    above_random = "random_2" not in training or training["random_2"]["low"] > training["every_2"]["high"]
    reasons = [f"not in {listed(failing)}" if failing else "", "" if also else "not in held-out loss"]
    reasons = filter(None, [*reasons, "random rotations help too" if random else ""])
    word = grade(main and also and not random and not failing, main and above_random)
    word = UNDECIDED if training["every_2"]["word"] == UNDECIDED else word
    texts = sentence(training, held_out), details(tuned, outcome.metrics["peers"]), say(training["every_2"])
    return Verdict(word, "; ".join(reasons), *texts, prototype(outcome.metrics["effects"]), surprise(training))


def sentence(training, held_out):
    """The first setting, where rate and ratio are tuned: the rotation, its control and its strongest peer."""
    random = f"; random rotations {say(training['random_2'])}" if "random_2" in training else ""
    soap = f"; SOAP on the factors {say(training['soap'])}, {say(held_out['soap'])}" if "soap" in training else ""
    return (
        f"With rate and ratio tuned, a rotation every 2 steps changes LoRA's training loss by "
        f"{say(training['every_2'])}, its held-out loss by {say(held_out['every_2'])} against Adam's (LoRA+)"
        f"{random}{soap}."
    )


def details(tuned, peers):
    """Every setting, and every peer."""
    return [
        *(f"{n}, every_2 against none: {both(tuned[n], 'every_2')}" for n in tuned),
        *(f"{n}, every_2 against {peer}: {both(peers[n], peer)}" for n in tuned for peer in peers[n]["held_out"]),
    ]


def surprise(training):
    if not {"reset", "once"} <= set(training):
        return ""
    once, reset = (say(training[arm]) for arm in ("once", "reset"))
    return f"Forgetting Adam's moments after step 10 changes LoRA+'s training loss by {reset}, one rotation by {once}."


def both(found, arm):
    training, held_out = (found[m][arm] for m in MEASURES)
    return f"training {say(training)} {training['word']}, held-out {say(held_out)} {held_out['word']}"


def prototype(effects):
    """The prototype's numbers beside ours; they agree if the 95 % intervals overlap."""
    rows = []
    for (setting, arm, rates, measure), (value, *interval) in PROTOTYPE.items():
        found = effects.get(setting, {}).get(rates, {}).get(measure, {}).get(arm)
        if found is None:
            continue
        agrees, text = None, f"{value:+.1f} %"
        if interval:
            low, high = interval
            agrees = bool(low <= percent(found["high"]) and percent(found["low"]) <= high)
            text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}] %"
        tuned = "rate and ratio tuned" if rates == "tuned" else "rate tuned"
        what = f"{setting}, {arm} against none, {tuned}: {measure.replace('_', ' ')}"
        rows.append(Published(what, text, say(found), "a prototype", "other pretraining and seeds", agrees))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Figures and table


def plot(outcome, s, save):
    save(plot_curves(outcome, s))
    found, (first, *others) = outcome.metrics["effects"], s.settings
    rates = {"one rate": "plain", "rate and ratio tuned": "tuned"}
    series = {label: lambda m, arm, r=r: found[first][r][m][arm] for label, r in rates.items()}
    save(plot_intervals([arm for arm in s.arms if arm != "none"], series, "Adam (none)"), "arms")
    series = {arm: lambda m, n, arm=arm: found[n]["tuned"][m][arm] for arm in ("every_2", "soap")}
    if others:
        save(plot_intervals(s.settings, series, "Adam (LoRA+)"), "settings")


def plot_curves(outcome, s):
    """First setting: the training loss relative to Adam's, on the way; ratio 1, and rate and ratio tuned."""
    figure, axes = plots.panels(1, 2, width=4.2, height=3.2, sharey=True)
    steps = named(s.settings[0], s).steps
    shown = [a for a in ("once", "every_2", "every_10", "random_2", "rite", "soap") if a in s.arms]
    for ax, rates, title in zip(axes[0], ("plain", "tuned"), ("one rate (B's = A's)", "rate and ratio tuned (LoRA+)")):
        base = np.log(outcome.arrays[f"{s.settings[0]}.none/{rates}_train_loss"])
        x = (np.arange(base.shape[1]) + 0.5) * steps / base.shape[1]
        for i, arm in enumerate(shown):
            ratio = np.log(outcome.arrays[f"{s.settings[0]}.{arm}/{rates}_train_loss"]) - base
            plots.band(ax, x, 100 * ratio, arm, i + 1)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=title, xlabel="step")
    axes[0, 0].set_ylabel(f"training loss against Adam's, %,\n{LABELS[s.dataset]}, ± std")
    axes[0, 1].legend(fontsize=8, ncols=2)
    return figure


def plot_intervals(names, series, against):
    """Mean and 95 % interval for every name, both measures; series: {label: (measure, name) -> what it does}."""
    figure, axes = plots.panels(1, 2, width=4.2, height=1.2 + 0.28 * len(names), sharey=True)
    for ax, measure, title in zip(axes[0], MEASURES, ("training loss", "held-out loss")):
        for k, (label, effect) in enumerate(series.items()):
            found = [effect(measure, name) for name in names]
            mean, low, high = (np.array([percent(e[key]) for e in found]) for key in ("effect", "low", "high"))
            look = {"color": plots.COLORS[k + 1], "marker": plots.MARKERS[k], "linestyle": "none", "markersize": 4}
            y = np.arange(len(names)) + 0.24 * k - 0.12
            ax.errorbar(mean, y, xerr=[mean - low, high - mean], label=label, capsize=2, **look)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set(title=title, xlabel=f"against {against}, %, 95 % interval", yticks=range(len(names)), yticklabels=names)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", ncols=2)
    return figure


def report(outcome, s):
    rows = []
    for key, best in outcome.metrics["best"].items():
        setting, arm = key.split(".", 1)
        found, cells = outcome.metrics["effects"][setting], ["", "", ""]
        if arm != "none":
            training, held_out = (found["tuned"][m][arm] for m in MEASURES)
            plain = say(found["plain"]["train_loss"][arm]) if "plain" in found else ""
            cells = [plain, *(f"{say(e)} {e['word']}" for e in (training, held_out))]
        rate, ratio = best["tuned"]
        cost = [f"{outcome.timings[key]['run_alone']:.2f}", f"{outcome.metrics['memory'][key]:.1f}"]
        rows.append([setting, arm, f"{rate:g}", f"{ratio:g}", *cells, *cost])
    header = ["setting", "arm", "rate", "ratio", "training, one rate", "training, tuned", "held-out, tuned"]
    note = "(s/run: CPU seconds; state: numbers that the optimizer keeps, over the factors' own)"
    return f"{table([*header, 's/run', 'state'], rows)}\n{note}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
