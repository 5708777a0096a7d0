"""The teleport that survives tuned rates: rotating LoRA's inner space under Adam. Not in the papers.

Between a LoRA's factors, BA = (BQᵀ)(QA) for every orthogonal Q: a teleport that changes neither the function nor any
gradient norm, and that gradient descent cannot feel. Adam can: after Q it is the untouched run with the update
QᵀAdam(QG_A), Adam(G_BQᵀ)Q, so that Q chooses the basis in which Adam normalizes. Here Q is the eigenbasis of the inner
space's gradient covariance, and Adam's moments move along (factors.py; the identities are tested to 1e-10).

A network pretrained on one task adapts to another through LoRA on every layer. Every arm has its own best learning rate
and its own best ratio of B's rate to A's (as in LoRA+), searched by the same rule on seeds that are not compared.

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
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adaptation  # noqa: E402
import factors  # noqa: E402
from adaptation import point, search, train  # noqa: E402

from common import cli, plots  # noqa: E402
from common.claims import UNDECIDED, Claim, Verdict, grade, listed, table  # noqa: E402
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


class Arm(NamedTuple):
    kind: type = factors.Adam
    options: dict = {}
    element: str = ""
    at: int = 0  # after this step
    every: int = 0  # or after every so many
    scale: float = 1.0  # of BA: α/r with α = r


TRACKS = {"tracks": 0.99}
ARMS = {
    "none": Arm(),
    "once": Arm(options=TRACKS, element="eigenbasis", at=10),
    "every_2": Arm(options=TRACKS, element="eigenbasis", every=2),
    "every_10": Arm(options=TRACKS, element="eigenbasis", every=10),
    "random": Arm(element="random", at=10),
    "random_2": Arm(element="random", every=2),
    "reset": Arm(element="reset", at=10),
    "balance": Arm(element="balance", at=10),
    "singular": Arm(element="singular_basis", at=10),
    "rslora": Arm(scale=8**0.5),
    "scaled": Arm(factors.ScaledAdam),
    "rite": Arm(factors.RITE),
    "soap": Arm(factors.SOAP, {"every": 2}),
    "soap_both": Arm(factors.SOAP, {"every": 10, "both_sides": True}),
}
PEERS = ("rslora", "scaled", "rite", "soap", "soap_both")
FEW = ("none", "every_2", "soap")


class Setting(NamedTuple):
    adapts: str = "rotated"  # mnist-mini turned by 90°; "fashion": Fashion-MNIST from MNIST
    hidden: tuple = (128, 128)
    rank: int = 8
    init: str = "zero"
    beta2: float = 0.999
    weight_decay: float = 0.0
    batch: int = 64
    steps: int = 600


SETTINGS = {
    "rotated": Setting(),
    "fashion": Setting(adapts="fashion"),
    "deep": Setting(hidden=(64, 64, 64)),
    "rank_2": Setting(rank=2),
    "rank_32": Setting(rank=32),
    "gaussian": Setting(init="gaussian"),
    "beta2_0.99": Setting(beta2=0.99),
    "decay_0.1": Setting(weight_decay=0.1),
    "batch_16": Setting(batch=16),
    "batch_256": Setting(batch=256),
    "steps_200": Setting(steps=200),
    "steps_2000": Setting(steps=2000),
}


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 30  # compared: from 11 on
    tuning_seeds: int = 4  # from 1 on
    arms: tuple = tuple(ARMS)  # in the first setting
    other_arms: tuple = FEW  # in the others
    settings: tuple = tuple(SETTINGS)
    steps: int | None = None  # instead of each setting's
    pretraining: int = 1500  # steps


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, seeds=3, tuning_seeds=1, arms=FEW, settings=("rotated", "rank_2"), steps=20, pretraining=50),
    "quick": replace(
        PAPER,
        seeds=20,
        tuning_seeds=3,
        arms=("none", "once", "every_2", "random_2", "soap"),
        settings=("rotated",),
        steps=300,
    ),
    "paper": PAPER,
}


def experiment(run):
    s = run.settings
    arms = {name: s.other_arms if i else s.arms for i, name in enumerate(s.settings)}
    tasks = {}

    def part(key):
        setting, arm = key
        if setting not in tasks:
            tasks.clear()
            tasks[setting] = make_task(run, named(setting, s))
        return tune_and_compare(tasks[setting], named(setting, s), ARMS[arm], s)

    parts, seconds = run.parts(part, {f"{n}.{arm}": (n, arm) for n in s.settings for arm in arms[n]})
    arrays = {f"{key}/{k}": v for key, p in parts.items() for k, v in p.items() if k != "seconds_alone"}
    timings = {key: {"part": seconds[key], "run_alone": float(p["seconds_alone"])} for key, p in parts.items()}
    best = {key: {"plain": point(p["plain_best"]), "tuned": point(p["tuned_best"])} for key, p in parts.items()}
    seeds = [*range(1, 1 + s.tuning_seeds), *range(11, 11 + s.seeds)]
    found = {"best": best, "effects": effects(arrays, arms), "peers": against_peers(arrays, s)}
    return Outcome(found, arrays, seeds, timings)


def named(setting, s):
    """The Setting of this name, with the preset's number of steps."""
    return SETTINGS[setting]._replace(steps=s.steps or SETTINGS[setting].steps)


def make_task(run, setting):
    """The network that was pretrained and the data that it adapts to, both as small images."""
    old = run.data("MNIST" if setting.adapts == "fashion" else run.settings.dataset)
    new, turns = (run.data("FashionMNIST"), 0) if setting.adapts == "fashion" else (old, 1)
    dims = (196, *setting.hidden, 10)
    weights = adaptation.pretrained(dims, adaptation.small_images(old.x), old.y, run.settings.pretraining)
    images = [adaptation.small_images(x, turns) for x in (new.x, new.x_test[:2000])]
    return adaptation.Images(weights, images[0], new.y, images[1], new.y_test[:2000])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def tune_and_compare(task, setting, arm, s):
    """Tune one arm in one setting, at ratio 1 ("plain") and with the ratio free ("tuned"), then run the fresh seeds."""
    tuning, fresh = list(range(1, 1 + s.tuning_seeds)), list(range(11, 11 + s.seeds))

    def score(points):
        loss = train(task, setting, arm, points, tuning)["train_loss"]
        return torch.from_numpy(loss).log().mean((-1, 0)).nan_to_num(torch.inf).tolist()

    plain, plain_scores = search(score, (6, 0), ((2, 0), (1, 0)))
    tuned, scores = search(score, plain or (6, 0), ((2, 4), (1, 2), (1, 1)))
    scores |= plain_scores
    result = {"points": np.array(list(scores)), "scores": np.array(list(scores.values()))}
    for name, best in (("plain", plain), ("tuned", tuned)):
        result[f"{name}_interior"] = best is not None
        result[f"{name}_best"] = np.array(best or min(scores, key=scores.get))
    curves = train(task, setting, arm, [tuple(result["plain_best"]), tuple(result["tuned_best"])], fresh, held_out=True)
    for k, name in enumerate(("plain", "tuned")):
        result |= {f"{name}_{key}": value[:, k] for key, value in curves.items()}
    start = time.perf_counter()
    train(task, setting, arm, [tuple(result["tuned_best"])], fresh[:1])
    return result | {"seconds_alone": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def effects(arrays, arms):
    """{setting: {plain/tuned: {measure: {arm: what it does against none}}}}; measures: train_loss, held_out."""
    result = {}
    for setting, names in arms.items():
        result[setting] = {}
        for rates in ("plain", "tuned"):
            result[setting][rates] = {}
            for measure in ("train_loss", "held_out"):
                numbers = {a: number(arrays[f"{setting}.{a}/{rates}_{measure}"]) for a in names}
                found = compared({a: (numbers[a], numbers["none"]) for a in names if a != "none"})
                for a in found:
                    if not all(arrays[f"{setting}.{b}/{rates}_interior"] for b in (a, "none")):
                        found[a]["word"] = "undecided"  # an arm without a best rate
                result[setting][rates][measure] = found
    return result


def against_peers(arrays, s):
    """{measure: {peer: what every_2 does against it}} in the first setting, rate and ratio tuned for both."""
    result = {}
    for measure in ("train_loss", "held_out"):
        numbers = {a: number(arrays[f"{s.settings[0]}.{a}/tuned_{measure}"]) for a in s.arms}
        peers = [a for a in PEERS if a in s.arms]
        result[measure] = compared({a: (numbers["every_2"], numbers[a]) for a in peers})
    return result


def number(curve):
    """One number a run, fixed beforehand: the mean logarithm of the loss over the curve (S, points)."""
    return np.log(np.asarray(curve, float)).mean(-1)


def compared(pairs):
    """{name: (numbers, reference numbers)} -> {name: Comparison as a dictionary}, one family; in log ratios."""
    found = family([compare(mine, theirs, relative=False) for mine, theirs in pairs.values()])
    return {name: c._asdict() for name, c in zip(pairs, found)}


def say(effect):
    mean, low, high = (percent(effect[key]) for key in ("effect", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] %"


def judge(outcome):
    tuned = {setting: e["tuned"] for setting, e in outcome.metrics["effects"].items()}
    first, *others = tuned
    training, held_out = tuned[first]["train_loss"], tuned[first]["held_out"]
    random = [m["random_2"]["word"] == "better" for m in (training, held_out) if "random_2" in m]
    main = training["every_2"]["word"] == "better"
    failing = [n for n in others if tuned[n]["train_loss"]["every_2"]["word"] != "better"]
    both = main and held_out["every_2"]["word"] == "better"
    above_random = not random or training["random_2"]["low"] > training["every_2"]["high"]
    peers = outcome.metrics["peers"]
    beside = [
        f"every_2 against {name}: training {say(effect)} {effect['word']}, held-out {say(peers['held_out'][name])} "
        f"{peers['held_out'][name]['word']}"
        for name, effect in peers["train_loss"].items()
    ]
    not_held = [n for n in tuned if tuned[n]["held_out"]["every_2"]["word"] != "better"]
    decided = training["every_2"]["word"] != "undecided"
    return Verdict(
        grade(both and not any(random) and not failing, main and above_random) if decided else UNDECIDED,
        f"not in {listed(failing)}" if failing else "training loss only",
        f"With rate and ratio tuned, a rotation every 2 steps changes the training loss by "
        f"{say(training['every_2'])}, the held-out loss by {say(held_out['every_2'])} against Adam (LoRA+)"
        + (f"; random rotations {say(training['random_2'])}" if random else "")
        + f". Held-out loss is not better in: {listed(not_held)}.",
        details=[*beside, *(f"{n}: training {say(tuned[n]['train_loss']['every_2'])}" for n in others)],
        number=say(training["every_2"]),
        surprise=f"SOAP on the rank side does the same: every_2 against it {say(peers['train_loss']['soap'])}"
        if "soap" in peers["train_loss"] and peers["train_loss"]["soap"]["word"] in ("equivalent", "undecided")
        else "",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures and table


def plot(outcome, s, save):
    save(plot_curves(outcome, s))
    save(plot_effects(outcome.metrics["effects"][s.settings[0]], s), "arms")
    if len(s.settings) > 1:
        save(plot_settings(outcome.metrics["effects"], s), "settings")


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
    axes[0, 0].set_ylabel(f"training loss against Adam's, %,\n{outcome.label}, ± std")
    axes[0, 1].legend(fontsize=8, ncols=2)
    return figure


def plot_effects(found, s):
    """Every arm against none in the first setting: mean and 95 % interval."""
    names = [a for a in s.arms if a != "none"]
    figure, axes = plots.panels(1, 2, width=4.2, height=1.2 + 0.28 * len(names), sharey=True)
    for ax, measure, title in zip(axes[0], ("train_loss", "held_out"), ("training loss", "held-out loss")):
        for shift, (rates, label) in enumerate((("plain", "one rate"), ("tuned", "rate and ratio tuned"))):
            errors(ax, [found[rates][measure][a] for a in names], shift, label)
        ax.set(title=title, xlabel="against none, %, 95 % interval", yticks=range(len(names)), yticklabels=names)
    axes[0, 0].invert_yaxis()
    axes[0, 1].legend(fontsize=8)
    return figure


def plot_settings(found, s):
    """The rotation and its nearest peer in every setting, rate and ratio tuned."""
    figure, axes = plots.panels(1, 2, width=4.2, height=1.2 + 0.28 * len(s.settings), sharey=True)
    for ax, measure, title in zip(axes[0], ("train_loss", "held_out"), ("training loss", "held-out loss")):
        for shift, arm in enumerate(("every_2", "soap")):
            errors(ax, [found[n]["tuned"][measure][arm] for n in s.settings], shift, arm)
        ax.set(title=title, xlabel="against Adam (LoRA+), %, 95 % interval")
        ax.set(yticks=range(len(s.settings)), yticklabels=s.settings)
    axes[0, 0].invert_yaxis()
    axes[0, 1].legend(fontsize=8)
    return figure


def errors(ax, found, shift, label):
    mean, low, high = (np.array([percent(e[k]) for e in found]) for k in ("effect", "low", "high"))
    y = np.arange(len(found)) + 0.24 * shift - 0.12
    look = {"color": plots.COLORS[shift + 1], "marker": plots.MARKERS[shift], "linestyle": "none", "markersize": 4}
    ax.errorbar(mean, y, xerr=[mean - low, high - mean], label=label, capsize=2, **look)
    ax.axvline(0, color="black", linewidth=0.8)


def report(outcome, s):
    rows = []
    for setting, found in outcome.metrics["effects"].items():
        for arm in s.arms if setting == s.settings[0] else s.other_arms:
            key = f"{setting}.{arm}"
            rate, ratio = outcome.metrics["best"][key]["tuned"]
            cells = ["", "", ""]
            if arm != "none":
                training, held_out = (found["tuned"][m][arm] for m in ("train_loss", "held_out"))
                cells = [say(found["plain"]["train_loss"][arm]), f"{say(training)} {training['word']}", say(held_out)]
            rows.append([setting, arm, f"{rate:g}", f"{ratio:g}", *cells, f"{outcome.timings[key]['run_alone']:.2f}"])
    header = [
        "setting",
        "arm",
        "rate",
        "ratio",
        "training, one rate",
        "training, tuned",
        "held-out, tuned",
        "s/run alone",
    ]
    return table(header, rows)


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
