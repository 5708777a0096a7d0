"""What scripts that compare optimizers share: the two stages on disk, what is compared with what, the pictures of it.

    arrays, plan, seeds = stages(run, cases, ARMS, train, claimed=["preactivation"])
    found = findings(outcome, ARMS, pairs)              # {(arm, other): Comparison}, on the way back from disk
    c = found[against(case, "preactivation", "best")]

A case (an optimizer, a network with one) has its own tuning and its own number of runs. An arm is named by (case, its
name, the published rate or its best, train or test); the first name is the baseline's. One number a run, fixed: the
mean log training loss over the epochs, and the log of the mean test loss over the last quarter of the epochs.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from common import plots
from common.claims import change, except_for, graded, settle
from common.mlp import published_seeds
from common.run import Outcome, Run, to_array
from common.statistics import Comparison
from common.tuning import Tuned, chunks, compared, disjoint_seeds, questions, room, runs

RATES = ("published", "best")
MEASURES = ("train", "test")


def number(loss: np.ndarray | Tensor) -> np.ndarray:
    """One number a run: the mean log of the training loss (…, epochs) over the epochs."""
    return np.log(to_array(loss).astype(float)).mean(-1)


def final(loss: np.ndarray | Tensor) -> np.ndarray:
    """One number a run: the log of the mean test loss (…, epochs) over the last quarter of the epochs."""
    loss = to_array(loss).astype(float)
    return np.log(loss[..., -max(1, loss.shape[-1] // 4) :].mean(-1))


def stages(
    run: Run,
    cases: Sequence[str],
    names: Sequence[str],
    train: Callable,
    claimed: Collection[str],
    draw: Callable = published_seeds,
    member: Sequence[Tensor] | None = None,
) -> tuple[dict, dict, list, list]:
    """Tune every arm of every case, then compare them at the published rate and at each one's best, on fresh runs.

    train(case, which, factors, seeds) -> {key: (A, F, S, …)} of the arms numbered `which` at factors (A, F), among it
    train_loss and test_loss (A, F, S, epochs), or the numbers alone as train and test (A, F, S). claimed: the arms
    whose differences ask for the number of runs. draw(count) -> seeds, of which the first are for the tuning.
    member: one member's weights; then train gets as many seeds at a time as fit the memory, a part each. The run's
    settings have grid, tuning_seeds, least and seeds (at most). Returns arrays (tuning.CASE/…, compared.CASE/…),
    {case: Tuned}, the fresh seeds of each case {case: seeds}, and what to keep in the metrics, {case: {…}}.
    """
    s = run.settings
    tuning, fresh = disjoint_seeds(s.tuning_seeds, s.seeds, draw)

    def trained(stage: str, asked: dict, numbers: bool) -> dict:
        """{case: (which, factors, seeds)} -> {case: {key: (A, F, S, …)}}, or the training's numbers alone."""

        def part(of: tuple) -> dict:
            found = train(*of)
            return {"train": one_number(found, "train")} if numbers else found

        arguments = {}
        for case, (which, factors, seeds) in asked.items():
            some = chunks(seeds, factors.size, member, room(run.device)) if member else [seeds]
            arguments |= {f"{stage}.{case}.{i}": (case, which, factors, each) for i, each in enumerate(some, start=1)}
        parts, joined = run.parts(part, arguments)[0], {}
        for case in asked:
            mine = [parts[key] for key, (owner, *_) in arguments.items() if owner == case]
            joined[case] = {key: np.concatenate([each[key] for each in mine], 2) for key in mine[0]}
        return joined

    tuned, waiting, turn = {}, {case: questions(len(names), s.grid) for case in cases}, 1
    asked = {case: next(asking) for case, asking in waiting.items()}
    while asked:  # all cases at once, so that processes have enough to share
        found = trained(f"tuning{turn}", {case: (*question, tuning) for case, question in asked.items()}, True)
        asked, turn = {}, turn + 1
        for case, scores in found.items():
            try:
                asked[case] = waiting[case].send(scores["train"])
            except StopIteration as end:
                tuned[case] = end.value
    tuned = {case: tuned[case] for case in cases}
    plan = {c: runs(tuned[c], [names.index(name) for name in claimed], (s.least, s.seeds)) for c in cases}
    seeds = {case: fresh[: plan[case].n] for case in cases}
    everyone = {case: (range(len(names)), both_rates(tuned[case]), seeds[case]) for case in cases}
    compared = trained("compared", everyone, False)
    arrays = {f"tuning.{case}/{k}": v for case in cases for k, v in tuned[case].save("").items()}
    arrays |= {f"compared.{case}/{k}": v for case, values in compared.items() for k, v in values.items()}
    metrics = {case: {"runs": plan[case].n, "reachable_margin": plan[case].margin} for case in cases}
    return arrays, tuned, seeds, metrics


def one_number(arrays: dict, measure: str, prefix: str = "") -> np.ndarray | None:
    """One number a run, of the training or of the test, as `train` in `stages` gave it or from its curves."""
    if prefix + measure in arrays:
        return to_array(arrays[prefix + measure])
    loss = arrays.get(f"{prefix}{measure}_loss")
    return None if loss is None else {"train": number, "test": final}[measure](loss)


def both_rates(tuned: Tuned) -> np.ndarray:
    """Factors (A, 2): the published rate and every arm's best."""
    return np.stack([np.ones(len(tuned.best)), tuned.best_factors()], 1)


def findings(outcome: Outcome, names: Sequence[str], pairs: Callable) -> dict[tuple, Comparison]:
    """{(arm, other): Comparison} of all cases. pairs(case) -> what the claim rests on: one family over the cases; the
    other arms against the baseline are another, for each loss."""
    numbers, interior = {}, {}
    for case in outcome.metrics:
        inside = np.asarray(outcome.arrays[f"tuning.{case}/interior"], bool)
        for measure in MEASURES:
            values = one_number(outcome.arrays, measure, f"compared.{case}/")  # (A, rates, S)
            for a, name in enumerate(names if values is not None else ()):
                for r, rate in enumerate(RATES):
                    numbers[case, name, rate, measure] = values[a, r]
                    interior[case, name, rate, measure] = rate == "published" or inside[a]
    found = {}
    families = [[pair for case in outcome.metrics for pair in pairs(case)]]
    for measure in MEASURES:
        each = [against(c, name, rate, measure) for c in outcome.metrics for name in names[1:] for rate in RATES]
        families.append([pair for pair in each if pair[0] in numbers and pair not in families[0]])
    for members in families:  # of one number of runs or of several: each pair has its own
        found |= compared(numbers, members, interior)
    return found


def against(case: str, name: str, rate: str, measure: str = "train", other: str = "baseline") -> tuple:
    """The key of an arm compared with another at the same rate."""
    return (case, name, rate, measure), (case, other, rate, measure)


class Weighed(NamedTuple):
    """A claim that something holds in every case, weighed."""

    word: str
    limits: str
    said: str  # the arm's training loss against the baseline's at best rates, case by case
    number: str  # how many cases are better, worse, …
    found: list  # of each outcome, its findings


def weigh(outcomes: Sequence[Outcome], names: Sequence[str], pairs: Callable, arm: str) -> Weighed:
    """Weigh the claim about an arm over the cases that have pairs: it holds in one in which all of them are better."""
    founds = [findings(r, names, pairs) for r in outcomes]
    settled, best = {}, {}
    for r, found in zip(outcomes, founds):
        for case in (case for case in r.metrics if list(pairs(case))):
            name = case if len(outcomes) == 1 else f"{case} on {r.label}"
            settled[name] = settle(found[pair].word for pair in pairs(case))
            best[name] = found[against(case, arm, "best")]
    said = "; ".join(f"{name} {change(c)}" for name, c in best.items())
    words = [c.word for c in best.values()]
    number = f"at best rates {', '.join(f'{words.count(word)} {word}' for word in dict.fromkeys(words))}"
    return Weighed(graded(list(settled.values())), except_for(settled), said, number, founds)


def described(outcome: Outcome, found: dict, names: Sequence[str]) -> Iterable[str]:
    """Every arm against the baseline, a line for each case and rate."""
    for case, m in outcome.metrics.items():
        for rate, measure in (("published", "train"), ("best", "train"), ("best", "test")):
            if against(case, names[1], rate, measure) not in found:
                continue
            cells = (f"{name} {change(found[against(case, name, rate, measure)])}" for name in names[1:])
            where = f"{case}, {m['runs']} runs, {measure}ing".replace("testing", "test")
            yield f"{where} loss against the baseline's, {rate} rate: {'; '.join(cells)}."


def cells(outcome: Outcome, found: dict, names: Sequence[str], case: str, a: int) -> list[str]:
    """An arm's row of a table: best rate; training loss against the baseline's, published and best; test, best."""
    tuned, each = Tuned.load(outcome.arrays, f"tuning.{case}/"), ["", "", ""]
    if a:
        keys = [against(case, names[a], *where) for where in (("published",), ("best",), ("best", "test"))]
        each = [change(found[key], 1) if key in found else "" for key in keys]
    return [f"×{tuned.best_factors()[a]:.3g}{'' if tuned.interior[a] else ' (edge)'}", *each]


HEADER = ("best rate", "training, published rate", "training, best rates", "test, best rates")


def plot_controls(outcome: Outcome, found: dict, names: Sequence[str], more: int = 0) -> tuple[plt.Figure, np.ndarray]:
    """Every arm against the baseline, and the tuning with each best marked, a column for each case; more empty rows."""
    figure, axes = plots.panels(2 + more, len(outcome.metrics), width=3.2, height=2.6)
    for column, case in zip(axes.T, outcome.metrics):
        for k, rate in enumerate(RATES):
            each = [found[against(case, name, rate)] for name in names[1:]]
            plots.intervals(column[0], each, np.arange(len(each)) + 0.24 * k - 0.12, k, f"{rate} rate")
        column[0].set_title(case)
        column[0].set_xlabel("loss against the baseline's, %", fontsize=9)
        column[0].set_yticks(range(len(names) - 1), names[1:], fontsize=8)
        column[0].invert_yaxis()
        plots.tuning_curves(column[1], Tuned.load(outcome.arrays, f"tuning.{case}/"), names)
    axes[1, 0].set_ylabel(f"above the baseline's best, %,\n{outcome.label}".rstrip(",\n"))
    axes[0, -1].legend(fontsize=7)
    figure.legend(*axes[1, -1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure, axes


def plot_drift(names: Sequence[str], cases: dict) -> plt.Figure:
    """What the moves of the named arms did to the loss of their batch and of the whole training set.

    cases: {case: (batch, whole)}, each (arms, …, 2), before and after.
    """
    figure, axes = plots.panels(1, len(cases), width=3.2, height=2.6, sharey=True)
    for ax, (case, losses) in zip(axes[0], cases.items()):
        for shift, each in zip((0.15, -0.15), losses):
            for row, moved in enumerate(each):
                drift = relative_drift(moved).clip(1e-16).ravel()
                look = plots.style(row + 1, marker=True) | {"linestyle": "none", "alpha": 0.8}
                look["markerfacecolor"] = look["color"] if shift < 0 else "none"
                ax.plot(drift, np.full(drift.size, row + shift), **look)
        ax.set(title=case, xscale="log", xlabel="|relative change of the loss|")
        ax.set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    axes[0, 0].set_ylabel("filled: training set\nopen: the batch")
    return figure


def relative_drift(losses: np.ndarray) -> np.ndarray:
    """|after / before − 1| of losses (…, 2)."""
    return np.abs(losses[..., 1] / losses[..., 0] - 1)
