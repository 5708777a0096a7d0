"""ICLR 2023, Figures 4 and 5: the conserved quantity Q of networks U σ(Vᵀ) with random (Xavier) weights.

Figure 4: four activations at (m, h, n) = (100, 100, 100); Figure 5: the linear network at three shapes. The draws fill
a narrow range of Q, so training from them explores a small part of the minima. The check, in a figure of its own: the
normal density with the mean and variance of Q in closed form.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conserved import conserved_quantity, published_normal

from common import cli, plots
from common.claims import Claim, Verdict, grade, table
from common.run import Outcome

CLAIM = Claim(
    order=120,
    figure="Q distribution (ICLR 2023, Figures 4 and 5)",
    paper="ICLR 2023",
    section="",
    says="Common initializations concentrate Q in a narrow range.",
    short="initializations concentrate Q",
    rule="holds if the draws agree with a closed-form mean (4 standard errors) and deviation (10 %), which say how "
    "narrow.",
    dated="2026-11-22",
)


@dataclass(frozen=True)
class Settings:
    draws: int = 1000  # draw i is seeded i²
    activations: tuple = ("linear", "relu", "tanh", "sigmoid")  # Figure 4
    shapes: tuple = ((100, 100, 100), (100, 200, 100), (200, 100, 100))  # (m, h, n); the first is Figure 4's


CHUNK = 50  # networks in memory at once
PAPER = Settings()
PRESETS = {"tiny": replace(PAPER, draws=100), "quick": PAPER, "paper": PAPER}


def cases(s):
    return [(a, s.shapes[0]) for a in s.activations] + [("linear", shape) for shape in s.shapes[1:]]


def name(activation, shape):
    return "_".join([activation, *map(str, shape)])


def experiment(run):
    s = run.settings

    def draw(shape):
        m, h, n = shape
        activations = [a for a, shape in cases(s) if shape == (m, h, n)]
        Q = {name(activation, (m, h, n)): [] for activation in activations}
        for start in run.progress(range(0, s.draws, CHUNK)):
            seeds = [i**2 for i in range(start, min(start + CHUNK, s.draws))]
            pairs = [xavier_pair(m, h, n, seed) for seed in seeds]
            U, V = (torch.stack(matrices).to(run.device, torch.float64) for matrices in zip(*pairs))
            for activation in activations:
                Q[name(activation, (m, h, n))].append(conserved_quantity(U, V, activation))
        return {key: torch.cat(values) for key, values in Q.items()}

    arrays = {}
    for part in run.parts(draw, {"_".join(map(str, shape)): shape for shape in s.shapes})[0].values():
        arrays |= part
    metrics = {}
    for activation, shape in cases(s):
        Q, (mean, variance) = arrays[name(activation, shape)], moments(activation, *shape)
        metrics[name(activation, shape)] = {
            "mean": Q.mean(),
            "std": Q.std(ddof=1),
            "expected_mean": mean,
            "expected_std": variance**0.5,
            "standard_errors_off": (Q.mean() - mean) / (variance / len(Q)) ** 0.5,
        }
    return Outcome(metrics, arrays, seeds=[i**2 for i in range(s.draws)])


def xavier_pair(m, h, n, seed):
    """U (m, h) with variance 1/h, V (n, h) with variance 1/n, drawn one after the other from one stream."""
    generator = torch.Generator().manual_seed(seed)
    return published_normal(m, h, 0, h**-0.5, generator), published_normal(n, h, 0, n**-0.5, generator)


def moments(activation, m, h, n):
    """Mean and variance of Q (see conserved_quantity) over the Xavier draws, exact.

    With x normal of variance v: E e^{ax} = e^{a²v/2}, E x e^x = v e^{v/2}, cosh² = (1 + cosh 2x) / 2.
    """
    v, e = 1 / n, np.exp
    # Mean and variance of one entry's term: of x² (half of them for relu), cosh² x, x + eˣ.
    mean, variance = {
        "linear": (v, 2 * v**2),
        "relu": (v / 2, 3 * v**2 / 2 - v**2 / 4),
        "tanh": ((1 + e(2 * v)) / 2, (1 + e(8 * v)) / 8 - e(4 * v) / 4),
        "sigmoid": (e(v / 2), v + e(2 * v) - e(v) + 2 * v * e(v / 2)),
    }[activation]
    scale = 0.5 if activation == "sigmoid" else 1.0
    return scale * m - h * n * mean, scale**2 * 2 * m / h + h * n * variance


def judge(outcome):
    m = outcome.metrics.values()
    off = max(abs(v["standard_errors_off"]) for v in m)
    spread = max(abs(v["std"] / v["expected_std"] - 1) for v in m)
    return Verdict(
        grade(off < 4 and spread < 0.1, off < 4),
        "another deviation",
        "Q of Xavier draws concentrates around a value that the shape and the activation fix: closed-form mean (at "
        f"most {off:.1f} standard errors off) and deviation (to {spread:.0%}).",
        number=f"at most {off:.1f} standard errors from the closed form",
    )


def plot(outcome, s, save):
    """Figures 4 and 5; and all of their histograms with the closed form."""
    save(
        histograms(outcome, [(activation, s.shapes[0]) for activation in s.activations], lambda a, _: a), "activations"
    )
    save(histograms(outcome, [("linear", shape) for shape in s.shapes], lambda _, x: f"(m, h, n) = {x}"), "shapes")
    save(histograms(outcome, cases(s), lambda a, x: f"{a} {x}", closed_form=True), "controls")


def histograms(outcome, chosen, title, closed_form=False):
    rows = 1 if len(chosen) < 5 else 2
    figure, axes = plots.panels(rows, -(-len(chosen) // rows), width=3.2)
    for ax, (activation, shape) in zip(axes.flat, chosen):
        Q, (mean, variance) = outcome.arrays[name(activation, shape)], moments(activation, *shape)
        _, edges, _ = ax.hist(Q, bins=10, color="0.8", edgecolor="0.4")
        if closed_form:
            x = np.linspace(edges[0], edges[-1], 200)
            density = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
            ax.plot(x, density * len(Q) * (edges[1] - edges[0]), label="closed form", **plots.style(2))
        ax.set(xlabel="$Q$", title=title(activation, shape))
        ax.title.set_fontsize(10)
        ax.locator_params(axis="x", nbins=4)
        ax.ticklabel_format(axis="x", useOffset=False)
    for ax in axes[:, 0]:
        ax.set_ylabel("Frequency")
    if closed_form:
        axes[0, 0].legend(loc="upper left", fontsize=8, handlelength=2, borderaxespad=0)
    return figure


def report(outcome, s):
    columns = ("mean", "expected_mean", "std", "expected_std")
    rows = [
        [f"{activation} {shape}", *(f"{outcome.metrics[name(activation, shape)][c]:.2f}" for c in columns)]
        for activation, shape in cases(s)
    ]
    return table(["σ, (m, h, n)", "mean Q", "closed form", "std Q", "closed form"], rows)


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
