"""Paper A, Table 1 and Figures 9 and 10: do the sharpness φ and the curvature ψ of a minimum go with its test loss?

Networks that differ in nothing but their initialization are trained by SGD. At the end of each run are measured

    φ (Eq. 4)  the mean loss at W + r d/‖d‖, over batches of the training data and random directions d, one per radius r
    ψ (Eq. 5)  the curvature of t ↦ exp(tM) · W at t = 0, over the same batches and random Lie-algebra elements M
    the test loss (which the paper calls validation loss)

and the table gives Pearson's correlations between them over the runs, with 95 % intervals (Fisher's z) and p-values.
Batches, directions and elements are the same for all runs, so that none of the scatter between runs comes from them
(the published code draws new batches for each). As in the paper's figures, φ is divided by the batch size. A control
says how much of the scatter is the measurement's: the correlation of φ, and of ψ, over the even batches with the same
over the odd ones.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import pearsonr

from common import UserError, cli, plots
from common.claims import Claim, Verdict, grade, listed, table
from common.data import published_split, require
from common.mlp import StackedMLP, initial_weights, published_seeds
from common.run import Outcome
from common.sharpness import Sharpness
from teleport import curvature, leaky_relu

CLAIM = Claim(
    order=20,
    figure="Table 1, Figures 9 and 10",
    paper="ICLR 2024",
    section="Section 4",
    says="Over networks trained alike, the test loss correlates positively with sharpness φ and negatively with "
    "curvature ψ.",
    short="test loss goes with φ, against ψ",
    rule="holds if both correlations have that sign on every dataset, p < 0.05; in part: some. Intervals: 95 %, "
    "Fisher's z.",
    dated="2026-11-22",
    headline=True,
)


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    seeds: int = 100  # runs
    epochs: int = 40
    batch_size: int = 20
    slope: float = 0.1  # of leaky ReLU
    batches: int = 40  # φ and ψ are means over so many batches,
    samples: int = 200  # each of so many training samples


PRESETS = {
    "tiny": Settings(seeds=12, epochs=2, batches=4, samples=100),
    "quick": Settings(),
    "paper": Settings(dataset="MNIST", batches=200),
}


class Setup(NamedTuple):
    """What depends on the dataset."""

    dims: tuple
    lr: float
    radii: np.ndarray
    group: int  # runs trained as one stack: many small networks, or a few large ones that stay in the cache
    ticks: dict  # of the paper's figures (CIFAR-10: and beyond)


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
COUNTS = (10, 30, 100)  # numbers of runs at which the correlations are shown


# Training and measuring


def train(seeds, data, setup, settings, progress=iter):
    """SGD from one initialization per seed. Returns the weights and, per run, the training loss of the last epoch."""
    stack = StackedMLP(initial_weights(setup.dims, seeds, data.x.device), "SGD", setup.lr, settings.slope)
    for _ in progress(range(settings.epochs)):
        train_loss = stack.train_epoch(data.x, data.y, settings.batch_size)
    return stack, train_loss


def measure(weights, data, setup, settings, progress=iter):
    """φ and ψ of each run (E of them) on each batch: two tensors (E, batches)."""
    activation, device = leaky_relu(settings.slope), data.x.device
    radii = torch.tensor(setup.radii, dtype=torch.float32, device=device)
    P = sum(W[0].numel() for W in weights)
    phi, psi = [], []
    for b, rows in enumerate(progress(random_batches(len(data.x), settings.batches, settings.samples))):
        x, labels = data.x[rows].T, data.y[rows]
        generator = torch.Generator().manual_seed(12345 * b)  # published, as is the order of the draws
        elements = [torch.rand(d, d, generator=generator) for d in setup.dims[1:-1]]
        directions = torch.rand(len(radii), P, generator=generator).to(device)
        psi.append(curvature(weights, x, [(M / M.norm()).to(device) for M in elements], activation))
        phi.append(Sharpness(x, labels, directions, radii, setup.dims, activation, chunk=len(radii))(weights))
    return torch.stack(phi, -1), torch.stack(psi, -1)


def random_batches(n, count, size):
    """`count` arrays of `size` of the n rows: a shuffled pass over the data, and another when it runs out."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    while len(batches) < count:
        batches += torch.randperm(n, generator=generator)[: n // size * size].split(size)
    return batches[:count]


def experiment(run):
    settings, setup = run.settings, SETUPS[run.settings.dataset]
    if settings.seeds < 4:
        raise UserError("a correlation with an interval needs at least 4 runs: use --seeds 4 or more")
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
        phi, psi = measure(stack.weights, data, setup, settings, lambda batches: progress("φ and ψ", batches))
        return {
            "train_loss": train_loss,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "phi_batches": phi / settings.samples,
            "psi_batches": psi,
        }

    parts, seconds = run.parts(train_and_measure, {key: key for key in groups})
    arrays = {name: np.concatenate([part[name] for part in parts.values()]) for name in next(iter(parts.values()))}
    arrays |= {name: arrays[f"{name}_batches"].mean(1, dtype=np.float64) for name in ("phi", "psi")}
    metrics = {
        "correlations": {f"{x}, {y}": correlation(arrays[x], arrays[y]) for x, y in PAIRS},
        "correlations_of_the_first_runs": {
            f"{x}, {y}": {n: correlation(arrays[x][:n], arrays[y][:n]) for n in COUNTS if n <= len(seeds)}
            for x, y in PAIRS
        },
        "even_with_odd_batches": {name: halves(arrays[f"{name}_batches"]) for name in ("phi", "psi")},
        "ranges": {name: [a.min(), a.max()] for name, a in arrays.items() if a.ndim == 1},
    }
    return Outcome(metrics, arrays, seeds, seconds)


def correlation(x, y):
    """Pearson's r, the ends of its 95 % interval (Fisher's z) and its p-value."""
    result = pearsonr(x.astype(float), y.astype(float))
    low, high = result.confidence_interval(0.95)
    return {"r": result.statistic, "low": low, "high": high, "p": result.pvalue}


def halves(batches):
    return pearsonr(batches[:, ::2].mean(1, dtype=float), batches[:, 1::2].mean(1, dtype=float)).statistic


def judge(*outcomes):
    def c(r, name):
        return r.metrics["correlations"][f"{name}, test_loss"]

    def where(name):
        return ", ".join(f"{c(r, name)['r']:.2f} on {r.label}" for r in outcomes)

    signs = {"phi": 1, "psi": -1}
    right = {n: [r.label for r in outcomes if c(r, n)["p"] < 0.05 and c(r, n)["r"] * signs[n] > 0] for n in signs}
    details = []
    for r in outcomes:
        parts = (
            f"r({pair.replace('test_loss', 'test loss').replace('phi', 'φ').replace('psi', 'ψ')}) = {v['r']:.2f} "
            f"[{v['low']:.2f}, {v['high']:.2f}], p = {v['p']:.1g}"
            for pair, v in r.metrics["correlations"].items()
        )
        details.append(f"{r.label}: " + "; ".join(parts) + ".")
    full = all(len(labels) == len(outcomes) for labels in right.values())
    sentence = f"r(φ, test loss) = {where('phi')}; r(ψ, test loss) = {where('psi')}."
    missing = {n: [r.label for r in outcomes if r.label not in right[n]] for n in signs}
    limits = "; ".join(
        f"not {'φ' if n == 'phi' else 'ψ'} on {listed(labels)}" for n, labels in missing.items() if labels
    )
    return Verdict(grade(full, any(right.values())), limits, sentence, details)


# Figures and table


def plot(outcome, settings, save):
    plot_pairs(outcome, SETUPS[settings.dataset].ticks, save)
    plot_number_of_runs(outcome, save)


def plot_pairs(outcome, ticks, save):
    """Figures 9 (first two panels) and 10 (third)."""
    names = {"phi": r"$\phi$", "psi": r"$\psi$", "test_loss": "test loss"}
    figure, (axes,) = plots.panels(1, 3)
    for ax, (x, y) in zip(axes, PAIRS):
        ax.scatter(outcome.arrays[x], outcome.arrays[y], s=14, color=plots.COLORS[1], alpha=0.7, linewidth=0)
        ax.set(xlabel=names[x], ylabel=names[y])
        ax.locator_params(nbins=5)
        for name, set_ticks in ((x, ax.set_xticks), (y, ax.set_yticks)):
            if name in ticks:
                set_ticks(ticks[name])
        ax.set_title(r_text(outcome.metrics["correlations"][f"{x}, {y}"]), fontsize=10)
    figure.suptitle(outcome.label)
    save(figure)


def plot_number_of_runs(outcome, save):
    """r of the first n runs with its interval, and of disjoint sets of n runs: what a smaller experiment could say."""
    runs = len(outcome.seeds)
    figure, (axes,) = plots.panels(1, 3, sharey=True)
    first = np.unique(np.geomspace(4, runs, 60).astype(int))
    for ax, (x, y) in zip(axes, PAIRS):
        x_, y_ = outcome.arrays[x], outcome.arrays[y]
        c = [correlation(x_[:n], y_[:n]) for n in first]
        ax.plot(first, [k["r"] for k in c], label="first n runs", **plots.style(1))
        band = [[k[end] for k in c] for end in ("low", "high")]
        ax.fill_between(first, *band, color=plots.COLORS[1], alpha=0.15, linewidth=0, label="95 % interval")
        for n in COUNTS:
            sets = [slice(i, i + n) for i in range(0, runs - n + 1, n)]
            r = [correlation(x_[k], y_[k])["r"] for k in sets]
            label = "sets of n runs" if n == COUNTS[0] else None
            ax.plot([n] * len(r), r, "o", color=plots.COLORS[2], markersize=4, label=label)
        ax.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        ticks = [n for n in COUNTS if n <= runs] or [4, runs]
        ax.set(xscale="log", xlabel="number of runs n", title=f"r({SYMBOLS[x]}, {SYMBOLS[y]})", ylim=(-1.05, 1.05))
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel("Pearson's r")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(outcome.label)
    save(figure, "runs")


def r_text(c):
    return f"r = {c['r']:.3f} [{c['low']:.3f}, {c['high']:.3f}]"


def report(outcome, settings):
    metrics = outcome.metrics
    header = [f"{outcome.label}, {len(outcome.seeds)} runs", "r", "95 % interval", "p"]
    counts = [n for n in COUNTS if n < len(outcome.seeds)]
    rows, yes, no = [], [], []
    for x, y in PAIRS:
        name, c = f"{SYMBOLS[x]}, {SYMBOLS[y]}", metrics["correlations"][f"{x}, {y}"]
        fewer = [metrics["correlations_of_the_first_runs"][f"{x}, {y}"][str(n)]["r"] for n in counts]
        cells = [f"{c['r']:.3f}", f"[{c['low']:.3f}, {c['high']:.3f}]", f"{c['p']:.1g}"]
        rows.append([name, *cells, *(f"{r:.3f}" for r in fewer)])
        (yes if c["p"] < 0.05 else no).append(f"r({name})")
    cells = table([*header, *(f"r of first {n}" for n in counts)], rows)
    verdict = f"different from zero: {', '.join(yes) or 'none'}; not: {', '.join(no) or 'none'}."
    ranges = {k: f"{low:.3g} to {high:.3g}" for k, (low, high) in metrics["ranges"].items()}
    even = metrics["even_with_odd_batches"]
    return (
        f"{cells}\n\n{outcome.label}, 5 % level, {verdict}\n"
        f"φ {ranges['phi']}, ψ {ranges['psi']}, test loss {ranges['test_loss']}, training loss {ranges['train_loss']}, "
        f"test accuracy {ranges['test_accuracy']}.\n"
        f"Even with odd batches: φ {even['phi']:.3f}, ψ {even['psi']:.3f}."
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
