"""ICLR 2023, Figure 10: ensembles of one convnet along the data-dependent action, and their controls.

One network is trained; π(g, H) = σ(H) σ(gH)^+ turns it into as many others as there are elements g = exp(εT), and they
vote. The figure shows the accuracy of the vote minus that of the network, over the number of elements and ε, beside
controls in which something else undoes g (see symmetry_ensemble.ARMS).

A second figure holds ours minus the published table, cell by cell. A third says where the moved network is the same
network: on the batch that defined π exactly, for batches no larger than the width h = 16 (asserted); on new samples it
is a different network, and the measured change of its logits is large precisely at the published batch size of h, where
π interpolates.

Batches for π come from the last fifth of the training set, on which no network is trained; new samples are test images.
Differences from the published notebook: one network for each seed (not for each cell), so that cells are paired;
cross-entropy of the logits (not of a softmax of them); double precision (single gives NaN at ε = 20); new samples from
the test set (not 1000 held-out training images).
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import published_notebooks as notebooks
from nonlinear_action import data_dependent_action
from symmetry_ensemble import (
    ARMS,
    CHUNK,
    HIDDEN,
    NAMES,
    SQUARED_LEAKY_RELU,
    batches,
    draw,
    ensemble,
    hidden_input,
    logits,
    losses,
    mean_std,
    original,
    relative_change,
    split,
    train,
    vote,
)

from common import cli, plots
from common.claims import FAILS, UNDECIDED, Claim, Published, Verdict, grade, listed, table
from common.run import Outcome
from common.statistics import compare, family

CLAIM = Claim(
    order=160,
    figure="Ensembles (ICLR 2023, Figure 10)",
    paper="ICLR 2023",
    section="",
    says="A nonlinear, data-dependent symmetry turns a trained network into others that perform similarly on new "
    "samples, so that ensembles need no training.",
    short="moved networks perform alike",
    rule="holds if at every size ε of the moves the vote's accuracy is equivalent to the network's within a point, or "
    "better, and that of the controls (π from random matrices, inverted, shuffled) is worse (paired by network, Holm "
    "over all); in part: at some ε, controls or not; undecided if at none and undecided at one.",
    dated="2026-11-25",
)
PUBLISHED = notebooks.ENSEMBLES
OLD = (
    "By the rule of 2026-11-22 (mean at most a point below the network's, without intervals): held in part, for moves "
    "of ε = 0.1, 0.01, 0.001, 0.0001."
)


@dataclass(frozen=True)
class Settings:
    dataset: str = "CIFAR10"
    images: int | None = None  # of the training set; all if None
    epochs: int = 10
    samples: int = 10000  # new samples: test images
    elements: tuple = (10, 20, 40, 60, 80, 100, 120)
    epsilons: tuple = (20.0, 10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
    sizes: tuple = (1, 2, 4, 8, 12, 16, 20, 32, 64)  # of the batch that defines π, in the third figure
    size_epsilon: float = 0.1
    size_elements: int = 20
    seeds: int = 5


PAPER = Settings()
QUICK = replace(PAPER, dataset="mnist-mini", epochs=5, samples=2000, elements=(10, 20, 40, 60, 80, 100), seeds=3)
PRESETS = {
    "tiny": replace(
        QUICK, images=1000, epochs=1, samples=200, elements=(4, 8), epsilons=(10.0, 0.1), sizes=(8, 16), seeds=2
    ),
    "quick": QUICK,
    "paper": PAPER,
}
CONTROLS = ("inverse", "random", "shuffled")
MARGIN = 1.0  # points
SIGMA = SQUARED_LEAKY_RELU
FORMS = ("paper", "minimal_change")  # of π; they differ for fewer samples than units


def experiment(run):
    s = run.settings
    seeds = list(range(s.seeds))
    parts, seconds = run.parts(lambda seed: measure(run, seed), {f"seed{seed}": seed for seed in seeds})
    arrays = {name: np.stack([part[name] for part in parts.values()]) for name in parts["seed0"]}
    difference = 100 * (arrays["accuracy"][..., -1] - arrays["original"][:, None, None])
    metrics = {
        "original_accuracy": mean_std(arrays["original"]),
        "accuracy_minus_original": over_arms_and_epsilons(difference, s),
        "single_accuracy": over_arms_and_epsilons(arrays["single"], s),
        "change_on_batch": {  # of the logits, relative, on the batch that defined π: group, largest
            f"{epsilon:g}": arrays["change_on_batch"][:, ARMS.index("group"), i].max()
            for i, epsilon in enumerate(s.epsilons)
        },
        "change_on_new": {  # on new samples: median
            arm: {f"{e:g}": float(np.median(arrays["change_on_new"][:, a, i])) for i, e in enumerate(s.epsilons)}
            for a, arm in enumerate(ARMS)
        },
        "change_on_new_by_size": {  # at ε = size_epsilon, by size of the batch: median
            form: {str(n): float(np.median(arrays["size_change_on_new"][:, f, i])) for i, n in enumerate(s.sizes)}
            for f, form in enumerate(FORMS)
        },
    }
    timings = {"seconds": list(seconds.values())}
    return Outcome(metrics, arrays, seeds, timings)


def measure(run, seed):
    """Train one network and measure all of its ensembles."""
    s, data = run.settings, run.data()
    (x, y), (held_out, _) = split(data, s.images)
    net = train(x, y, data.shape, SIGMA, epochs=s.epochs, seed=seed, progress=partial(run.progress, desc="epochs"))
    x, y = data.x_test[: s.samples], data.y_test[: s.samples]
    H, H_held_out = (hidden_input(net, images, data.shape).double() for images in (x, held_out))
    at_rest = logits(net, original(net), H, SIGMA)

    n = s.elements[-1]
    draws, H_pi = draw(n, seed, run.device), batches(H_held_out, n, HIDDEN)
    on_batch_at_rest = logits(net, original(net), H_pi, SIGMA)
    grid = (len(ARMS), len(s.epsilons))
    result = {
        "original": (at_rest[0].argmax(0) == y).double().mean(),
        "original_loss": losses(at_rest, y, [1]).mean(),
        "accuracy": torch.empty(*grid, len(s.elements)),
        "loss": torch.empty(*grid, len(s.elements), dtype=torch.float64),
        "single": torch.empty(grid),
        "change_on_batch": torch.empty(*grid, n, dtype=torch.float64),
        "change_on_new": torch.empty(*grid, n, dtype=torch.float64),
    }
    for cell in run.progress(list(np.ndindex(grid)), desc="ensembles"):
        arm, epsilon = ARMS[cell[0]], s.epsilons[cell[1]]
        members = ensemble(arm, draws, epsilon, H_pi, SIGMA)
        result["change_on_batch"][cell] = relative_change(logits(net, members, H_pi, SIGMA), on_batch_at_rest)
        for name, value in evaluate(net, members, H, y, at_rest, s.elements).items():
            result[name][cell] = value
    moderate = [i for i, epsilon in enumerate(s.epsilons) if epsilon <= 1]
    exact = result["change_on_batch"][ARMS.index("group"), moderate].max()
    assert exact <= 1e-9, f"the group action moved the logits of its own batch by {exact:.1e} (relative)"

    result |= by_size(net, H, H_held_out, at_rest, draws.T, s)
    return result


def evaluate(net, members, H, y, at_rest, counts):
    """Accuracy of the vote and loss for each number of elements; mean accuracy of a member; change of the logits."""
    right, loss, single, change = 0, 0, 0, 0
    for H_, y_, rest in zip(H.split(CHUNK, 1), y.split(CHUNK), at_rest.split(CHUNK, -1)):
        outputs = logits(net, members, H_, SIGMA)
        right += (vote(outputs, counts) == y_).sum(1)
        loss += losses(outputs, y_, counts).sum(1)
        single += (outputs.max(1).indices == y_).double().mean(0).sum()
        change += (outputs - rest).square().sum((1, 2))
    change = change.sqrt() / at_rest.norm()
    return {"accuracy": right / len(y), "loss": loss / len(y), "single": single / len(y), "change_on_new": change}


def by_size(net, H, H_held_out, at_rest, T, s):
    """π of the same elements from batches of several sizes, in both FORMS: change on that batch and on new samples."""
    T = T[: s.size_elements]
    g = torch.linalg.matrix_exp(s.size_epsilon * T)
    on_batch, on_new = torch.empty(2, len(FORMS), len(s.sizes), len(T), dtype=torch.float64)
    for (f, form), (i, size) in ((a, b) for a in enumerate(FORMS) for b in enumerate(s.sizes)):
        H_pi = batches(H_held_out, len(T), size)
        members = g, data_dependent_action(g, H_pi, SIGMA, minimal_change=form == "minimal_change")
        on_batch[f, i] = relative_change(logits(net, members, H_pi, SIGMA), logits(net, original(net), H_pi, SIGMA))
        on_new[f, i] = relative_change(logits(net, members, H[:, :1000], SIGMA), at_rest[..., :1000])
    return {"size_change_on_batch": on_batch, "size_change_on_new": on_new}


def over_arms_and_epsilons(values, s):
    return {
        arm: {f"{epsilon:g}": mean_std(values[:, a, i]) for i, epsilon in enumerate(s.epsilons)}
        for a, arm in enumerate(ARMS)
    }


def differences(outcome, arm):
    """Accuracy of the vote of all elements minus the network's, in points: (seeds, epsilons)."""
    a = outcome.arrays
    return 100 * (a["accuracy"][:, ARMS.index(arm), :, -1].astype(float) - a["original"][:, None])


def compared(outcome):
    """{arm: {ε: Comparison}} of group and controls with the network, one family."""
    cells = [(arm, i) for arm in ("group", *CONTROLS) for i in range(len(outcome.settings.epsilons))]
    values = [differences(outcome, arm)[:, i] for arm, i in cells]
    options = {"margin": MARGIN, "relative": False, "smaller_is_better": False}
    members = family([compare(v, np.zeros(len(v)), **options) for v in values])
    names = [f"{epsilon:g}" for epsilon in outcome.settings.epsilons]
    return {arm: {names[i]: c for (a, i), c in zip(cells, members) if a == arm} for arm in ("group", *CONTROLS)}


def judge(outcome):
    found = compared(outcome)
    similar = {arm: [e for e, c in cells.items() if c.word in ("better", "equivalent")] for arm, cells in found.items()}
    group = found["group"]
    alone = [e for e in similar["group"] if all(found[arm][e].word == "worse" for arm in CONTROLS)]
    word = grade(len(alone) == len(group), similar["group"])
    word = UNDECIDED if word == FAILS and "undecided" in [c.word for c in group.values()] else word
    controls = f"more than every control at {listed(alone)}" if alone else "no more than controls"
    rows = _published(outcome)
    details = [*(_detail(arm, cells) for arm, cells in found.items()), *_agreement(outcome, rows), OLD]
    limits = f"for moves of ε = {listed(similar['group'])}; {controls}"
    return Verdict(word, limits, _sentence(outcome, similar, group), details, published=rows)


def _sentence(outcome, similar, group):
    on_batch = outcome.metrics["change_on_batch"]
    exact = max(change for epsilon, change in on_batch.items() if float(epsilon) <= 1)
    best = max(group.values(), key=lambda c: c.effect)
    return (
        f"Accuracy of the vote equivalent to the network's {100 * outcome.arrays['original'].mean():.1f} % within a "
        f"point or better ({outcome.label}, {best.n} networks): at ε = {listed(similar['group'])}, with random "
        f"matrices at ε = {listed(similar['random'])}; it gains at most {best.effect:+.2f} points. On the batch that "
        f"defined π the logits change by at most {exact:.0e} (ε ≤ 1)."
    )


def _detail(arm, cells):
    texts = []
    for e, c in cells.items():
        found = f", could have shown {c.detectable:.1f}" if c.word == "undecided" else ""
        texts.append(f"{c.effect:+.2f} [{c.low:+.2f}, {c.high:+.2f}] at ε = {e} ({c.word}{found})")
    return f"{arm}, accuracy minus the network's, points: {', '.join(texts)}."


def against_published(outcome, arm):
    """Accuracy minus the network's, in points: ours (networks, ε, elements), the notebook's (ε, elements), the standard
    error of their difference. None for other settings than the published ones, and for one network."""
    s, a = outcome.settings, outcome.arrays
    grid = (tuple(s.epsilons), tuple(s.elements))
    if s.dataset != "CIFAR10" or grid != (notebooks.EPSILONS, notebooks.ELEMENTS) or len(a["original"]) == 1:
        return None
    theirs, base = (np.array(PUBLISHED[name]) / 10 for name in (arm, "original"))
    ours = 100 * (a["accuracy"][:, ARMS.index(arm)].astype(float) - a["original"][:, None, None])
    return ours, theirs - base, notebooks.error(ours, theirs, base)


def _published(outcome):
    """An arm and ε a row; first the networks themselves, which are new ones in each of the notebook's cells."""
    if against_published(outcome, "group") is None:
        return []
    s, own, printed = outcome.settings, 100 * outcome.arrays["original"], np.array(PUBLISHED["original"]) / 10
    setting = f"{s.seeds} networks for all cells, one softmax, {s.samples} test images, {outcome.label}"
    texts = (f"{v.mean():.1f} ({v.min():.1f} to {v.max():.1f})" for v in (printed, own))
    error = (printed.var(ddof=1) / printed.size + own.var(ddof=1) / len(own)) ** 0.5
    agrees = bool(abs(own.mean() - printed.mean()) <= 2 * error)
    what, counts = "accuracy of the network, %: mean over all networks (and range)", listed([*map(str, s.elements)])
    rows = [Published(what, *texts, "the notebook's output", setting, agrees)]
    for arm in ARMS:
        ours, *others = against_published(outcome, arm)
        for i, (epsilon, theirs, errors) in enumerate(zip(s.epsilons, *others)):
            what = f"{arm}, ε = {epsilon:g}: accuracy minus the network's, points, for {counts} elements"
            rows.append(notebooks.row(what, ours[:, i], theirs, errors, setting))
    return rows


def _agreement(outcome, rows):
    """How many rows agree, and what all of them have to do with the networks."""
    if not rows:
        return []
    more = 100 * outcome.arrays["original"].mean() - np.mean(PUBLISHED["original"]) / 10
    return [
        f"{sum(row.agrees for row in rows)} of {len(rows)} rows agree with the notebook's. Our networks are "
        f"{more:+.1f} points from its, which learn through two softmaxes: a vote at chance loses as much more."
    ]


def plot(outcome, s, save):
    a = outcome.arrays
    difference = 100 * (a["accuracy"] - a["original"][:, None, None, None]).mean(0)
    text = f"accuracy of the vote minus that of the network, mean over {s.seeds} network(s)"
    save(plot_cells(s, difference, f"{outcome.label}: {text}"))
    against = [against_published(outcome, arm) for arm in ARMS]
    if None not in against:
        off, errors = (np.stack(part) for part in zip(*((o.mean(0) - theirs, error) for o, theirs, error in against)))
        text = "accuracy minus the network's, ours minus the notebook's (below: its standard error)"
        save(plot_cells(s, off, f"{outcome.label}: {text}", errors), "published")
    save(plot_change(outcome, s), "controls")


def plot_cells(s, values, title, errors=None):
    """Figure 10: a table of numbers for each arm, coloured; values and errors (arms, epsilons, elements), in points."""
    limit = np.abs(values).max()
    figure, axes = plots.panels(1, len(ARMS), width=3.2, height=3.4 if errors is None else 4.2, sharey=True)
    for a, (ax, arm) in enumerate(zip(axes[0], ARMS)):
        image = ax.imshow(values[a], cmap="coolwarm_r", vmin=-limit, vmax=limit, aspect="auto")
        for cell, value in np.ndenumerate(values[a]):
            text = f"{value:.1f}".replace("-0.0", "0.0") + ("" if errors is None else f"\n±{errors[a][cell]:.1f}")
            color = "white" if abs(value) > 0.7 * limit else "black"
            ax.text(*cell[::-1], text, ha="center", va="center", fontsize=7, color=color)
        ax.set(title=NAMES[arm], xlabel="number of elements")
        ax.set_xticks(range(len(s.elements)), s.elements)
        ax.set_yticks(range(len(s.epsilons)), [f"{epsilon:g}" for epsilon in s.epsilons])
        ax.grid(False)
    axes[0, 0].set_ylabel("ε")
    figure.colorbar(image, ax=axes[0], label="percentage points", pad=0.01)
    figure.suptitle(title)
    return figure


def plot_change(outcome, s):
    a = outcome.arrays
    figure, (axes,) = plots.panels(1, 3, width=4.2, height=4.0)
    for i, arm in enumerate(ARMS):
        plots.band(axes[0], s.epsilons, a["accuracy"][:, i, :, -1], NAMES[arm], i + 1, **plots.style(i + 1, True))
    plots.band(axes[0], s.epsilons, np.tile(a["original"][:, None], len(s.epsilons)), "original", 0)
    single = a["single"][:, ARMS.index("group")]
    plots.band(axes[0], s.epsilons, single, "one member of group", 7, **plots.style(7, True))
    axes[0].set(xscale="log", xlabel="ε", ylabel="accuracy", title=f"vote of {s.elements[-1]} elements")

    group = ARMS.index("group")
    own = a["change_on_batch"][:, group].max(-1).max(0)
    axes[1].plot(s.epsilons, own, label="group, own batch (largest)", **plots.style(0, True))
    for arm in ARMS[:3]:
        i = ARMS.index(arm)
        new = np.median(a["change_on_new"][:, i], -1)
        plots.band(axes[1], s.epsilons, new, f"{NAMES[arm]}, new samples", **plots.style(i + 1, True))
    axes[1].set(xscale="log", yscale="log", xlabel="ε", ylabel="relative change of the logits")
    axes[1].set_title(f"π from {HIDDEN} samples, width {HIDDEN}")

    for f, form in enumerate(FORMS):
        name, new, own = (
            form.replace("_", " "),
            *(np.median(a[f"size_change_on_{w}"][:, f], -1) for w in ("new", "batch")),
        )
        plots.band(axes[2], s.sizes, new, f"{name}, new samples", **plots.style(f + 1, True))
        axes[2].plot(s.sizes, np.median(own, 0), label=f"{name}, own batch", **plots.style(f + 3, True))
    axes[2].axvline(HIDDEN, color="grey", linewidth=0.8)
    axes[2].set(xscale="log", yscale="log", xlabel="samples that define π", ylabel="relative change of the logits")
    axes[2].set_title(f"ε = {s.size_epsilon:g}; grey: the width")
    apart = [size for size in s.sizes if size & (size - 1) == 0]  # powers of 2, whose labels do not touch
    axes[2].set_xticks(apart, apart)
    axes[2].minorticks_off()
    for ax in axes:
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.suptitle(outcome.label)
    return figure


def report(outcome, s):
    a, count = outcome.arrays, s.elements[-1]
    rows = []
    for i, epsilon in enumerate(s.epsilons):
        difference = 100 * (a["accuracy"][:, :, i, -1] - a["original"][:, None]).mean(0)
        group = ARMS.index("group")
        own, new = a["change_on_batch"][:, group, i].max(), np.median(a["change_on_new"][:, group, i])
        rows.append([f"{epsilon:g}", *(f"{d:+.1f}" for d in difference), f"{own:.0e}", f"{new:.0e}"])
    return (
        f"{outcome.label}: accuracy {100 * a['original'].mean():.1f} % (mean over {s.seeds} seed(s)); vote of {count} "
        f"elements minus that, in per cent.\nThe group's relative change of the logits on the batch that defined π "
        f"(largest) and on new samples (median):\n\n" + table(["ε", *ARMS, "own batch", "new samples"], rows)
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
