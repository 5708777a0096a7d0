"""Does a quantity go with Q? Rank correlations over many starts: along one symmetry orbit, and over random draws.

Five starts in a row say little: five numbers are monotone by chance once in sixty times, and four activations are
tried. So a relation is looked for in two sets of starts, and its control in a third:

    orbit     one start moved by random elements g = s exp(T): all compute the same function, at different Q
    draws     random starts, each with its own seed and its own standard deviation: they differ in Q and in function
    one_std   the control: random starts of one standard deviation, where Q varies by chance alone
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from conserved import moved_pair, published_normal
from torch import Tensor

from common import plots
from common.claims import FAILS, UNDECIDED, Verdict, grade, listed
from common.statistics import correlation, detectable_correlation, holm

SETS = ("orbit", "draws", "one_std")
DECIDE = ("orbit", "draws")
STRONG = 0.5  # a rank correlation of this size is a relation
ENOUGH = 10  # starts; fewer are in one order too often by chance
SPREAD = 0.3  # of the elements' Lie-algebra part


def random_elements(count: int, h: int, scales: tuple[float, float], seed: int) -> Tensor:
    """g = s exp(T) (count, h, h): s log-uniform between the scales, T normal with standard deviation SPREAD / √h."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
    T = torch.randn(count, h, h, generator=generator, dtype=torch.float64)
    low, high = (math.log(scale) for scale in scales)
    return torch.exp(low + (high - low) * s) * torch.linalg.matrix_exp(SPREAD / h**0.5 * T)


def moved(U: Tensor, V: Tensor, elements: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """One pair (m, h), (n, h), moved along its orbit by every element: stacks (count, m, h), (count, n, h)."""
    pairs = [moved_pair(U, V, g.to(U), activation) for g in elements]
    return torch.stack([u for u, _ in pairs]), torch.stack([v for _, v in pairs])


def random_starts(m: int, n: int, h: int, stds: Sequence[float], seed: int) -> tuple[Tensor, Tensor]:
    """Normal starts U (count, m, h), V (count, n, h), one for each standard deviation, each from a seed of its own."""
    pairs = []
    for i, std in enumerate(stds, 1):
        generator = torch.Generator().manual_seed(seed + i)
        pairs.append([published_normal(rows, h, 0, std, generator).double() for rows in (m, n)])
    return tuple(torch.stack(matrices) for matrices in zip(*pairs))


def stds_of(name: str, stds: Sequence[float], base: int, count: int) -> np.ndarray:
    """The standard deviations of the starts of `draws` (evenly spaced over the published range) and of `one_std`."""
    return np.linspace(min(stds), max(stds), count) if name == "draws" else np.full(count, stds[base])


def of_sets(Q: np.ndarray, values: np.ndarray) -> dict:
    """{set: relation} of values with Q, both (sets, count), in the order of SETS."""
    return {name: relation(*pair) for name, *pair in zip(SETS, Q, values)}


def relation(Q: np.ndarray, values: np.ndarray) -> dict:
    """Spearman's correlation of values, (count,), with Q and with |Q|."""
    return {name: correlation(x, values, rank=True)._asdict() for name, x in (("Q", Q), ("abs_Q", np.abs(Q)))}


def scatter(axes: Sequence, values: dict, label: str) -> None:
    """A panel an activation: values {activation: (Q, values)}, each (sets, count), one against the other."""
    names = {"orbit": "one orbit", "draws": "random draws", "one_std": "of one std"}
    for ax, (Q, numbers) in zip(axes, values.values()):
        for i, where in enumerate(SETS):
            line = plots.style(i + 1, marker=True) | {"linestyle": "", "markersize": 3, "alpha": 0.8}
            ax.plot(Q[i], numbers[i], label=names[where], **line)
        ax.set(xlabel="$Q$")
        plots.log_loss(ax)
        ax.locator_params(axis="x", nbins=4)
    axes[0].set_ylabel(label)
    axes[0].legend(fontsize=7, handlelength=1)


def judge(relations: dict, what: str, more: Sequence[str] = ()) -> Verdict:
    """relations: {activation: of_sets(…)}; what: the quantity, for the sentence; more: details to follow."""
    stronger = {(name, where): _stronger(relations[name][where]) for name in relations for where in DECIDE}
    shown = _shown(relations, stronger)
    open_ = [case for case in stronger if case not in shown and not _weak(stronger[case])]
    word = grade(len(shown) == len(stronger), shown)
    word = UNDECIDED if word == FAILS and open_ else word
    named = {where: listed([name for name, place in shown if place == where]) for where in DECIDE}
    limits = f"along one orbit for {named['orbit']}, over random draws for {named['draws']}"
    number = f"weakest ρ {min(abs(c['r']) for c in stronger.values()):.2f} of {len(stronger)}"
    details = [_detail(name, relations[name], what) for name in relations]
    details += [
        f"{_n(stronger)} starts find a correlation of {detectable_correlation(_n(stronger)):.2f} with 80 % power."
    ]
    return Verdict(word, limits, _sentence(stronger, what), [*details, *more], number, surprise=_turned(relations))


def _shown(relations, stronger):
    """The cases of strong relations; Q and |Q| are two tries each: both count in the family."""
    pvalues = [c["p"] for name, where in stronger for c in relations[name][where].values()]
    adjusted = dict(zip(stronger, holm(pvalues).reshape(-1, 2).min(1)))
    enough = _n(stronger) >= ENOUGH
    return [case for case, c in stronger.items() if adjusted[case] < 0.05 and abs(c["r"]) >= STRONG and enough]


def _n(stronger):
    return next(iter(stronger.values()))["n"]


def _sentence(stronger, what):
    return (
        f"Spearman's ρ of {what} with Q or |Q|, the stronger, over {_n(stronger)} points of one orbit: "
        f"{_cells(stronger, 'orbit')}; over {_n(stronger)} random draws: {_cells(stronger, 'draws')}."
    )


def _turned(relations):
    """Where Q itself goes one way along the orbit and the other way over draws."""
    pairs = {name: [sets[where]["Q"]["r"] for where in DECIDE] for name, sets in relations.items()}
    turned = {name: r for name, r in pairs.items() if min(r) <= -STRONG and max(r) >= STRONG}
    cells = listed([f"{name} ({orbit:+.2f}, {draws:+.2f})" for name, (orbit, draws) in turned.items()])
    return f"With Q itself the sign along an orbit is not that over draws: {cells}." if turned else ""


def _stronger(pair):
    return max(pair.values(), key=lambda c: abs(c["r"]) if c["r"] == c["r"] else -1)


def _weak(c):
    """Is the whole interval weaker than STRONG?"""
    return max(abs(c["low"]), abs(c["high"])) < STRONG


def _cells(stronger, where):
    return ", ".join(f"{name} {c['r']:+.2f}" for (name, place), c in stronger.items() if place == where)


def _detail(name, sets, what):
    cells = (
        f"{where} {measure.replace('abs_Q', '|Q|')} {c['r']:+.2f} [{c['low']:+.2f}, {c['high']:+.2f}]"
        for where, pair in sets.items()
        for measure, c in pair.items()
    )
    return f"{name}, ρ of {what}: {', '.join(cells)}."
