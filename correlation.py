"""ICLR 2024, Section 4, Table 1, Figures 9 and 10: do sharpness φ and curvature ψ of a minimum go with its test loss?

Networks that differ in nothing but their initialization are trained by SGD. At the end of each run are measured

    φ (Eq. 4)  the mean loss at W + r d/‖d‖, over batches of the training data and random directions d, one per radius r
    ψ (Eq. 5)  the curvature of t ↦ exp(tM) · W at t = 0, over the same batches and random Lie-algebra elements M
    the test loss (which the paper calls validation loss)

and the table gives Pearson's correlations between them over the runs, with 95 % intervals (Fisher's z) and p-values.
Batches, directions and elements are the same for all runs, so that none of the scatter between runs comes from them
(the published code draws new batches for each). As in the paper's figures, φ is divided by the batch size.

Two quantities are called ψ. Table 1's is the curvature under the post-activation action, all hidden layers, elements of
norm 1 (`teleport.curvature`); Figure 4's is that under the pre-activation action, layers 2 and 3, elements uniform in
[0, 1] (`teleport.curve_curvature`). The latter is measured here too: psi_pair.

Controls. φ is a loss on training data, so it contains the training loss itself: the partial correlations of φ and ψ
with the test loss given the training loss, and the correlation of φ − loss with it; Spearman's beside Pearson's; and,
of the scatter, how much is the measurement's: φ, and ψ, over the even batches against the same over the odd ones.
All runs see the data in one order: intervals speak of initializations.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, cli, plots
from common.claims import Claim, Published, Verdict, table, weigh
from common.data import published_split, require
from common.losses import cross_entropy
from common.mlp import StackedMLP, initial_weights, published_seeds
from common.run import Outcome
from common.sharpness import Sharpness
from common.statistics import correlation, correlation_runs, detectable_correlation, holm
from teleport import curvature, curve_curvature, forward, hidden_layers, leaky_relu

CLAIM = Claim(
    order=20,
    figure="Table 1, Figures 9 and 10",
    paper="ICLR 2024",
    section="Section 4",
    says="Over networks trained alike, the test loss correlates positively with sharpness φ and negatively with "
    "curvature ψ.",
    short="test loss goes with φ, against ψ",
    rule="holds if on every dataset the correlations of the test loss with φ, with φ given the training loss and with "
    "ψ have that sign, p < 0.05 after Holm over all of them; in part: some; else undecided, unless one has the other "
    "sign or its 90 % interval lies within ± 0.1. Intervals: 95 %, Fisher's z.",
    dated="2026-11-25",
    headline=True,
)
OLD = "By the rule of 2026-11-22 (both signs, each p < 0.05, no control): holds in part, not ψ on MNIST and CIFAR-10."
# The axes of the paper's Figures 9 and 10.
AXES = {
    "MNIST": {"phi": (0.0005, 0.0007), "psi": (0.001, 0.003)},
    "FashionMNIST": {"phi": (0.00144, 0.00162), "psi": (0.001, 0.005)},
    "CIFAR10": {"phi": (0.0057, 0.0063), "psi": (0.0003, 0.0009)},
}
# Correlations with the test loss that another run of the published recipe gave; CIFAR-10 (JPEG): 18 runs.
RECIPE = {
    "MNIST": {"phi": 0.729, "psi": -0.072},
    "FashionMNIST": {"phi": 0.788, "psi": -0.256},
    "CIFAR10": {"phi": 0.924},
}


@dataclass(frozen=True)
class Settings:
    dataset: str = "MNIST"
    seeds: int = 100  # runs
    epochs: int = 40
    batch_size: int = 20
    slope: float = 0.1  # of leaky ReLU
    batches: int = 200  # φ and ψ are means over so many batches,
    samples: int = 200  # each of so many training samples


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, dataset="mnist-mini", seeds=12, epochs=2, batches=4, samples=100),
    "quick": replace(PAPER, dataset="mnist-mini", seeds=50, batches=20),
    "paper": PAPER,
}


class Setup(NamedTuple):
    """What depends on the dataset: published, but for `group`, and the last two ticks of CIFAR-10's φ."""

    dims: tuple
    lr: float
    radii: np.ndarray
    group: int  # runs trained as one stack: many small networks, or a few large ones that stay in the cache
    ticks: dict  # of the paper's figures


SETUPS = {
    "MNIST": Setup(
        (784, 16, 10, 10),
        1e-2,
        np.arange(0.001, 0.2, 0.01),
        50,
        {"phi": (0.0005, 0.0006, 0.0007), "psi": (0.001, 0.002, 0.003)},
    ),
    "FashionMNIST": Setup(
        (784, 16, 10, 10),
        1e-2,
        np.arange(0.0001, 0.02, 0.001),
        50,
        {"phi": (0.00144, 0.00153, 0.00162), "psi": (0.001, 0.003, 0.005)},
    ),
    "CIFAR10": Setup(
        (3072, 128, 32, 10),
        2e-2,
        np.arange(0.0001, 0.02, 0.001),
        10,
        {"phi": (0.0057, 0.0060, 0.0063, 0.0066, 0.0069), "psi": (0.0003, 0.0006, 0.0009)},
    ),
}
SETUPS["mnist-mini"] = SETUPS["MNIST"]._replace(ticks={})

PAIRS = (("phi", "test_loss"), ("psi", "test_loss"), ("phi", "psi"))  # (x, y) of the figures' panels
SYMBOLS = {"phi": "φ", "psi": "ψ", "test_loss": "loss"}
SIGNS = {"phi": 1, "phi_given_train_loss": 1, "psi": -1}  # the sign of the correlation with the test loss
TEXT = {
    "phi": "φ",
    "psi": "ψ",
    "psi_pair": "Figure 4's ψ",
    "phi_rank": "φ, Spearman's",
    "psi_rank": "ψ, Spearman's",
    "phi_given_train_loss": "φ given the training loss",
    "psi_given_train_loss": "ψ given the training loss",
    "excess": "φ − training loss",
}
MARGIN = 0.1  # a correlation within it is negligible
COUNTS = (10, 30, 100)  # numbers of runs at which the correlations are shown


# Training and measuring


def train(seeds, data, setup, settings, progress=iter):
    """SGD from one initialization per seed. Returns the weights and, per run, the training loss of the last epoch."""
    stack = StackedMLP(initial_weights(setup.dims, seeds, data.x.device), "SGD", setup.lr, settings.slope)
    for _ in progress(range(settings.epochs)):
        train_loss = stack.train_epoch(data.x, data.y, settings.batch_size)
    return stack, train_loss


def measure(weights, data, setup, settings, progress=iter):
    """Of each run (E of them) on each batch: φ, ψ, Figure 4's ψ and the loss; tensors (E, batches)."""
    activation, device = leaky_relu(settings.slope), data.x.device
    radii = torch.tensor(setup.radii, dtype=torch.float32, device=device)
    P = sum(W[0].numel() for W in weights)
    measures = []
    for b, rows in enumerate(progress(random_batches(len(data.x), settings.batches, settings.samples))):
        x, labels = data.x[rows].T, data.y[rows]
        generator = torch.Generator().manual_seed(12345 * b)  # published, as is the order of the draws
        elements = [torch.rand(d, d, generator=generator).to(device) for d in setup.dims[1:-1]]
        directions = torch.rand(len(radii), P, generator=generator).to(device)
        psi = curvature(weights, x, [M / M.norm() for M in elements], activation)
        phi = Sharpness(x, labels, directions, radii, setup.dims, activation, chunk=len(radii))(weights)
        pair = (W.double() for W in (weights[2], weights[1], hidden_layers(weights, x, activation)[1], elements[1]))
        psi_pair, _ = curve_curvature(*pair, activation)
        measures.append((phi, psi, psi_pair, cross_entropy(forward(weights, x, activation), labels)))
    return tuple(torch.stack(measure, -1) for measure in zip(*measures))


def random_batches(n, count, size):
    """`count` arrays of `size` of the n rows: a shuffled pass over the data, and another when it runs out."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    while len(batches) < count:
        batches += torch.randperm(n, generator=generator)[: n // size * size].split(size)
    return batches[:count]


def experiment(run):
    settings, setup = run.settings, SETUPS[run.settings.dataset]
    if settings.seeds < 5:
        raise UserError("a partial correlation with an interval needs at least 5 runs: use --seeds 5 or more")
    data = published_split(run.data())
    require(data, train=settings.samples)
    seeds = published_seeds(settings.seeds)
    groups = {f"runs_{i + 1}": seeds[i : i + setup.group] for i in range(0, len(seeds), setup.group)}

    def train_and_measure(key):
        def progress(work, iterable):
            return run.progress(iterable, desc=f"{key.replace('_', ' ')} to {i + len(groups[key])}: {work}")

        i = seeds.index(groups[key][0])
        stack, train_loss = train(groups[key], data, setup, settings, lambda epochs: progress("training", epochs))
        test_loss, test_accuracy = stack.evaluate(data.x_test, data.y_test)
        phi, psi, psi_pair, loss = measure(
            stack.weights, data, setup, settings, lambda batches: progress("φ and ψ", batches)
        )
        return {
            "train_loss": train_loss,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "phi_batches": phi / settings.samples,
            "psi_batches": psi,
            "psi_pair": psi_pair.mean(-1),
            "loss": loss.double().mean(-1),
        }

    parts, seconds = run.parts(train_and_measure, {key: key for key in groups})
    arrays = {name: np.concatenate([part[name] for part in parts.values()]) for name in next(iter(parts.values()))}
    arrays |= {name: arrays[f"{name}_batches"].mean(1, dtype=np.float64) for name in ("phi", "psi")}
    metrics = {
        "correlations": {name: c._asdict() for name, c in correlations(arrays, settings.samples).items()},
        "even_with_odd_batches": {name: halves(arrays[f"{name}_batches"]) for name in ("phi", "psi")},
        "ranges": {name: [a.min(), a.max()] for name, a in arrays.items() if a.ndim == 1},
    }
    return Outcome(metrics, arrays, seeds, seconds)


def correlations(arrays, samples, level=0.95):
    """Over the runs, each with the test loss but phi_psi. Where no loss on φ's batches was recorded, excess and the
    partial ones take the training loss of the last epoch, a mean over its mini-batches while they were trained on."""
    phi, psi, y, train = (arrays[name] for name in ("phi", "psi", "test_loss", "train_loss"))
    loss = arrays.get("loss", train)
    pairs = {"phi": (phi, y), "psi": (psi, y), "phi_psi": (phi, psi), "excess": (phi * samples - loss, y)}
    if "psi_pair" in arrays:
        pairs["psi_pair"] = arrays["psi_pair"], y
    found = {name: correlation(*pair, level=level) for name, pair in pairs.items()}
    for name in ("phi", "psi"):
        found[f"{name}_rank"] = correlation(arrays[name], y, rank=True, level=level)
        found[f"{name}_given_train_loss"] = correlation(arrays[name], y, [loss], level=level)
    return found


def halves(batches):
    return correlation(batches[:, ::2].mean(1, dtype=float), batches[:, 1::2].mean(1, dtype=float)).r


def judge(*outcomes):
    found = {r.label: correlations(r.arrays, r.settings.samples) for r in outcomes}
    cases = [(label, name) for label in found for name in SIGNS]
    adjusted = holm([found[label][name].p for label, name in cases])
    narrow = {r.label: correlations(r.arrays, r.settings.samples, 0.9) for r in outcomes}
    words = {(label, name): _word(narrow[label][name], p, SIGNS[name]) for (label, name), p in zip(cases, adjusted)}
    word, limits = weigh(words, dict.fromkeys(SIGNS, "shown"), TEXT)
    sentence = "; ".join(f"r({TEXT[name]}, test loss): {_where(found, name)}" for name in SIGNS) + "."
    details = [_detail(label, c) for label, c in found.items()] + [OLD]
    published = [row for r in outcomes for row in published_rows(r, found[r.label])]
    return Verdict(word, limits, sentence, details, f"r(ψ): {_where(found, 'psi')}", published)


def _word(narrow, p, sign):
    """shown, of the other sign, negligible or undecided: a correlation with its 90 % interval, its p after Holm."""
    if -MARGIN < narrow.low and narrow.high < MARGIN:
        return "negligible"
    if not p < 0.05:
        return "undecided"
    return "shown" if narrow.r * sign > 0 else "of the other sign"


def _where(found, name):
    return ", ".join(f"{label} {c[name].r:+.2f}" for label, c in found.items())


def _detail(label, found):
    cells = (
        f"{TEXT[name]} {c.r:+.2f} [{c.low:+.2f}, {c.high:+.2f}], p = {c.p:.1g}"
        for name, c in found.items()
        if name in TEXT
    )
    n, psi = found["phi"].n, abs(found["psi"].r)
    needed = f"; ψ's own would take {correlation_runs(psi):,}" if 0 < psi < 1 else ""
    power = f"{n} runs find |r| = {detectable_correlation(n):.2f} with 80 % power, {correlation_runs(0.1)} find 0.1"
    return f"{label}, with the test loss: {'; '.join(cells)}. {power}{needed}."


def published_rows(outcome, found):
    """The axes of the paper's figures beside the middle of our runs, and another run's correlations beside ours."""
    dataset, label, rows = outcome.settings.dataset, outcome.label, []
    for name, (low, high) in AXES.get(dataset, {}).items():
        ours = float(np.median(outcome.arrays[name]))
        what, source = f"{TEXT[name]} ({label})", "axis of the paper's figure"
        setting = "median of our runs; the same batches for all"
        rows.append(Published(what, f"{low:g} to {high:g}", f"{ours:.4g}", source, setting, low <= ours <= high))
    for name, r in RECIPE.get(dataset, {}).items():
        c = found[name]
        agrees = bool(c.low <= r <= c.high)
        source = "the published recipe, run by others"
        rows.append(Published(f"r({TEXT[name]}, test loss) ({label})", r, round(c.r, 3), source, "", agrees))
    return rows


# Figures and table


def plot(outcome, settings, save):
    plot_pairs(outcome, SETUPS[settings.dataset].ticks, save)
    plot_controls(outcome, settings, save)


def plot_pairs(outcome, ticks, save):
    """Figures 9 (first two panels) and 10 (third)."""
    names = {"phi": r"$\phi$", "psi": r"$\psi$", "test_loss": "test loss"}
    figure, (axes,) = plots.panels(1, 3)
    for ax, (x, y) in zip(axes, PAIRS):
        _scatter(ax, outcome.arrays[x], outcome.arrays[y])
        ax.set(xlabel=names[x], ylabel=names[y])
        for name, set_ticks in ((x, ax.set_xticks), (y, ax.set_yticks)):
            if name in ticks:
                set_ticks(ticks[name])
    figure.suptitle(outcome.label)
    save(figure)


def _scatter(ax, x, y):
    c = correlation(x, y)
    ax.scatter(x, y, s=14, color=plots.COLORS[1], alpha=0.7, linewidth=0)
    ax.locator_params(nbins=5)
    ax.set_title(f"r = {c.r:.3f} [{c.low:.3f}, {c.high:.3f}]", fontsize=10)


def plot_controls(outcome, settings, save):
    """Top: what fewer runs could say. Bottom: φ, the training loss, and what the one says beyond the other."""
    figure, (top, bottom) = plots.panels(2, 3)
    for ax, pair in zip(top, PAIRS):
        plot_number_of_runs(ax, *pair, outcome)
    top[0].set_ylabel("Pearson's r")
    top[0].legend(fontsize=8, loc="lower right")
    a, phi = outcome.arrays, outcome.arrays["phi"] * settings.samples
    loss = a.get("loss", a["train_loss"])
    given = [residual(values, loss) for values in (phi, a["test_loss"])]
    for ax, x, y, x_name, y_name in (
        (bottom[0], phi, loss, "φ × batch size", "training loss"),
        (bottom[1], *given, "φ given the training loss", "test loss given the same"),
        (bottom[2], phi - loss, a["test_loss"], "φ × batch size − training loss", "test loss"),
    ):
        _scatter(ax, x, y)
        ax.set(xlabel=x_name, ylabel=y_name)
        ax.locator_params(axis="x", nbins=4)  # small numbers have long labels
    figure.suptitle(outcome.label)
    save(figure, "controls")


def residual(values, given):
    """What least squares on `given` leaves of the values."""
    design = np.stack([np.ones(len(given)), given], 1).astype(float)
    return values - design @ np.linalg.lstsq(design, values.astype(float))[0]


def plot_number_of_runs(ax, x, y, outcome):
    """r of the first n runs with its interval, and of disjoint sets of n runs: what a smaller experiment could say."""
    x_, y_, runs = outcome.arrays[x], outcome.arrays[y], len(outcome.seeds)
    first = np.unique(np.geomspace(4, runs, 60).astype(int))
    c = [correlation(x_[:n], y_[:n]) for n in first]
    ax.plot(first, [k.r for k in c], label="first n runs", **plots.style(1))
    band = [k.low for k in c], [k.high for k in c]
    ax.fill_between(first, *band, color=plots.COLORS[1], alpha=0.15, linewidth=0, label="95 % interval")
    for n in COUNTS:
        r = [correlation(x_[i : i + n], y_[i : i + n]).r for i in range(0, runs - n + 1, n)]
        label = "sets of n runs" if n == COUNTS[0] else None
        ax.plot([n] * len(r), r, "o", color=plots.COLORS[2], markersize=4, label=label)
    ax.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    ticks = [n for n in COUNTS if n <= runs] or [4, runs]
    ax.set(xscale="log", xlabel="number of runs n", title=f"r({SYMBOLS[x]}, {SYMBOLS[y]})", ylim=(-1.05, 1.05))
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()


def report(outcome, settings):
    a, metrics = outcome.arrays, outcome.metrics
    found = correlations(a, settings.samples)
    rows = []
    for name, c in found.items():
        text = f"{TEXT[name]}, test loss" if name in TEXT else "φ, ψ"
        rows.append([text, f"{c.r:.3f}", f"[{c.low:.3f}, {c.high:.3f}]", f"{c.p:.1g}"])
    cells = table([f"{outcome.label}, {len(outcome.seeds)} runs", "r", "95 % interval", "p"], rows)
    ranges = {k: f"{low:.3g} to {high:.3g}" for k, (low, high) in metrics["ranges"].items()}
    even = metrics["even_with_odd_batches"]
    where = "" if "loss" in a else "\nThe training loss is that of the last epoch, a mean over its mini-batches."
    return (
        f"{cells}\n\nφ {ranges['phi']}, ψ {ranges['psi']}, test loss {ranges['test_loss']}, training loss "
        f"{ranges['train_loss']}, test accuracy {ranges['test_accuracy']}.\n"
        f"Even with odd batches: φ {even['phi']:.3f}, ψ {even['psi']:.3f}.{where}"
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
