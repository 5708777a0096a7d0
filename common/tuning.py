"""The protocol of a comparison of arms: learning rates tuned by one rule, then fresh runs, as many as decide.

    tuned = tune(scores, len(ARMS))                    # scores(arms, factors) -> one number a run on the tuning seeds
    n = runs(tuned, claimed=(3, 4), limits=(20, 200))  # how many fresh runs the spread of the differences asks for
    curves = in_chunks(train, seeds, members, weights) # every arm at factors[tuned.best], all seeds, as stacks
    found = compared(numbers, pairs, tuned)            # {pair: Comparison}, one family

A factor multiplies the learning rate that an arm was given. The grid grows by itself, up and down, until every arm's
best is interior; an arm whose best is still at an edge at the bound has no best rate, and what is compared with it is
undecided. Tuning seeds are never compared, and nothing is chosen by the runs that are.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from math import inf, isfinite, nan
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.mlp import published_seeds
from common.statistics import Comparison, Runs, compare, family, runs_needed

GRID = (1, 1.1, 1.2, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50)
STRIDE = 3  # rungs by which the grid grows at once
# Bytes that the weights, gradients and optimizer states of one stack may take. A CPU trains a stack that fits its cache
# up to twice as fast; a GPU wants a large one.
MEMORY, CACHE, GPU = 2**27, 2**24, 2**30


class Tuned(NamedTuple):
    """A arms' scores at K factors, smaller is better; S tuning seeds."""

    factors: np.ndarray  # (K,), ascending: all that any arm tried
    scores: np.ndarray  # (A, K, S); NaN: diverged, or not tried
    tried: np.ndarray  # (A, K)
    best: np.ndarray  # (A,): index of the factor with the smallest mean score; a run that diverged rules a factor out
    interior: np.ndarray  # (A,): False: at an edge of what was tried, which had grown to the bound

    def best_factors(self) -> np.ndarray:
        """Every arm's best factor, (A,)."""
        return self.factors[self.best]

    def at_best(self) -> np.ndarray:
        """Every arm's scores at its best factor, (A, S)."""
        return self.scores[np.arange(len(self.best)), self.best]

    @classmethod
    def load(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> "Tuned":
        """What was saved as {prefix + field: array}."""
        return cls(*(np.asarray(arrays[prefix + field]) for field in cls._fields))

    def save(self, prefix: str) -> dict:
        """As arrays for `load`."""
        return {prefix + field: value for field, value in self._asdict().items()}


def rung(i: int, grid: Sequence[float] = GRID) -> float:
    """The grid without ends: past the last rung its ratios come again, rung −i is one over rung i, rung 0 is × 1."""
    if i < 0:
        return 1 / rung(-i, grid)
    turns, rest = divmod(i, len(grid) - 1)
    return float(grid[-1] ** turns * grid[rest])


def tune(scores: Callable, arms: int, grid: Sequence[float] = GRID, bound: int | None = None) -> Tuned:
    """Find every arm's best factor.

    scores(which, factors) -> (len(which), F, S): what `questions` asks for. ValueError as there.
    """
    asking, answer = questions(arms, grid, bound), None
    while True:
        try:
            answer = scores(*asking.send(answer))
        except StopIteration as end:
            return end.value


def questions(arms: int, grid: Sequence[float] = GRID, bound: int | None = None) -> Generator:
    """The rounds of a tuning: yields (which, factors), is sent their scores (len(which), F, S), returns Tuned.

    Scores are one number a run, smaller is better, of the arms numbered `which` at factors (len(which), F). The first
    round has all arms and the whole grid, the others the arms whose best is at an edge, and STRIDE more factors beyond
    it. bound: rungs on either side of × 1 after which it gives up (default: twice the grid). Raises ValueError for a
    grid that does not ascend from 1.
    """
    if len(grid) < 2 or grid[0] != 1 or not (np.diff(grid) > 0).all():
        raise ValueError(f"grid must ascend from 1, got {grid}")
    bound = 2 * (len(grid) - 1) if bound is None else bound
    known = [{} for _ in range(arms)]  # rung -> its scores
    todo = {a: range(len(grid)) for a in range(arms)}
    while todo:
        which = list(todo)
        scores = yield which, np.array([[rung(i, grid) for i in todo[a]] for a in which])
        for a, rows in zip(which, np.asarray(scores, float)):
            known[a].update(zip(todo[a], rows))
        todo = {a: more for a in range(arms) if (more := _beyond(known[a], bound))}
    rungs = sorted(set().union(*known))
    missing = np.full(len(next(iter(known[0].values()))), nan)
    return Tuned(
        np.array([rung(i, grid) for i in rungs]),
        np.array([[row.get(i, missing) for i in rungs] for row in known]),
        np.array([[i in row for i in rungs] for row in known]),
        np.array([rungs.index(_best(row)) for row in known]),
        np.array([min(row) < _best(row) < max(row) and isfinite(_mean(row[_best(row)])) for row in known]),
    )


def _mean(values: np.ndarray) -> float:
    mean = values.mean()
    return mean if isfinite(mean) else inf


def _best(row: Mapping[int, np.ndarray]) -> int:
    """The rung with the smallest mean; the lowest if none is finite."""
    return min(sorted(row), key=lambda i: _mean(row[i]))


def _beyond(row: Mapping[int, np.ndarray], bound: int) -> Sequence[int]:
    """The rungs to try next: past the edge at which the best lies, until that is at the bound."""
    best = _best(row)
    if best == max(row):
        return range(best + 1, best + 1 + STRIDE) if best < bound else ()
    return range(best - STRIDE, best) if best == min(row) and best > -bound else ()


def runs(
    tuned: Tuned, claimed: Sequence[int], limits: tuple[int, int], margin: float = 0.01, baseline: int = 0
) -> Runs:
    """How many fresh runs to make: the most that a claimed arm's difference from the baseline asks for, both at best.

    See statistics.runs_needed; limits: at least, and at most. One tuning seed has no spread: then at most.
    """
    scores = tuned.at_best()
    differences = [scores[a] - scores[baseline] for a in claimed]
    spreads = [d.std(ddof=1) if len(d) > 1 else nan for d in differences]
    needs = [runs_needed(sd, margin, limits) for sd in spreads]
    return max(needs, key=lambda r: r.needed if isfinite(r.needed) else inf)


def disjoint_seeds(tuning: int, compared: int, draw: Callable = published_seeds) -> tuple[list[int], list[int]]:
    """Seeds of the tuning, the published ones from the first run on, and those of the comparison, which follow."""
    seeds = draw(tuning + compared)
    return seeds[:tuning], seeds[tuning:]


def in_chunks(
    train: Callable, seeds: Sequence[int], members: int, weights: Sequence[Tensor], memory: int = MEMORY
) -> dict:
    """train(seeds) -> {key: (A, F, S, …)} on `chunks` of the seeds, joined along S."""
    results = [train(chunk) for chunk in chunks(seeds, members, weights, memory)]
    return {key: torch.cat([r[key] for r in results], 2) for key in results[0]}


def chunks(seeds: Sequence[int], members: int, weights: Sequence[Tensor], memory: int = MEMORY) -> list[Sequence[int]]:
    """The seeds, as many at a time as fit the memory, in bytes, at least one.

    members: of the stack for each seed; weights: of one member or more, (…, d_m, d_{m-1}) each.
    """
    size = 4 * sum(W.shape[-1] * W.shape[-2] * W.element_size() for W in weights)  # weights, gradients, two states
    count = max(1, memory // (size * members))
    return [seeds[i : i + count] for i in range(0, len(seeds), count)]


def room(device: torch.device) -> int:
    """How much memory a stack that trains on this device should take, in bytes."""
    return CACHE if device.type == "cpu" else GPU


def compared(
    numbers: Mapping, pairs: Sequence[tuple], interior: Mapping | None = None, margin: float = 0.01
) -> dict[tuple, Comparison]:
    """{(key, other): Comparison} of one family (Holm), for numbers that are logarithms: {key: (S,)}, paired by seed.

    interior: {key: whether it has a best rate}; undecided where one of the two has none.
    """
    found = family([compare(numbers[a], numbers[b], margin, relative=False) for a, b in pairs])
    settled = [interior is None or (interior[a] and interior[b]) for a, b in pairs]
    return {pair: c if ok else c._replace(word="undecided") for pair, c, ok in zip(pairs, found, settled)}
