"""Where Figure 4's arms are sent, by what, how often and by which step; whether they went there, and what it was worth.

The numbers are of the runs that went as they were sent: the others are an arm of their own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from common import statistics
from common.arms import Arm, Stack
from common.data import Dataset
from common.mlp import initial_weights
from common.moves import attempt, move_at_random, move_curvature, move_sharpness, teleporter
from common.protocol import RATES as PUBLISHED_OR_BEST
from common.protocol import both_rates, final
from common.run import Outcome, Run
from common.statistics import Comparison
from common.tuning import Tuned, disjoint_seeds, runs, tune


class Way(NamedTuple):
    """Where an arm is sent, and by what."""

    objective: str  # sharpness or curvature
    action: str  # one of ACTIONS
    maximize: bool

    @property
    def direction(self) -> str:
        """Up or down."""
        return "up" if self.maximize else "down"

    @property
    def key(self) -> str:
        """The name of the arm."""
        return f"{self.objective}_{self.direction}_{self.action}"

    @property
    def measure(self) -> str:
        """The name of its objective among what is measured."""
        return {"sharpness": "phi", "curvature": "psi"}[self.objective]

    def __str__(self) -> str:
        """As a reader reads it."""
        return f"{SYMBOLS[self.objective]} {self.direction}, {self.action}"


SYMBOLS = {"sharpness": "φ", "curvature": "ψ"}
ACTIONS = ("preactivation", "published", "rescaling", "backtracking", "random")
WAYS = [Way(objective, action, up) for objective in SYMBOLS for action in ACTIONS for up in (True, False)]
# Trained at tuned rates as well, in more runs: what the claim needs, and what costs little beside it.
TUNED = (
    "baseline",
    "curvature_up_backtracking",
    "curvature_up_random",
    "curvature_up_published",
    "sharpness_down_rescaling",
)
LARGER, SMALLER = Way("curvature", "backtracking", True), Way("sharpness", "rescaling", False)
LARGER_RANDOM = LARGER._replace(action="random")
DECIDING = {  # what the claim says: who is compared, with whom
    "larger ψ": (LARGER.key, "baseline"),
    "larger ψ against random": (LARGER.key, LARGER_RANDOM.key),
    "smaller φ": (SMALLER.key, "baseline"),
}
# Published, by dataset: learning rate of SGD, and of the teleports (up, down).
RATES = {
    "MNIST": (1e-2, {"sharpness": (5e-2, 5e-2), "curvature": (2e-1, 5e-2)}),
    "FashionMNIST": (1e-2, {"sharpness": (1e-1, 3e-1), "curvature": (5e-3, 3e-3)}),
    "CIFAR10": (2e-2, {"sharpness": (5e-2, 5e-2), "curvature": (2e-1, 5e-2)}),
}
RATES["mnist-mini"] = RATES["MNIST"]
# Published, by dataset: numbers of teleports (up, down).
TELEPORTS = dict.fromkeys(RATES, {"sharpness": (2, 5), "curvature": (5, 5)})
TELEPORTS["CIFAR10"] = {"sharpness": (2, 10), "curvature": (10, 5)}


def teleports(way: Way, s: Any) -> int:
    """How many times the arm teleports. s: Figure 4's Settings."""
    counts = getattr(s, f"teleports_{way.objective}") or TELEPORTS[s.dataset][way.objective]
    return counts[0 if way.maximize else 1]


def arms(s: Any) -> tuple[Arm, ...]:
    """Who is moved, where and by what; random goes as far as backtracking did. s: Figure 4's Settings."""

    def move(way: Way) -> partial:
        if way.action == "random":
            return partial(move_at_random, way.objective)
        options = dict(lr=RATES[s.dataset][1][way.objective][0 if way.maximize else 1], maximize=way.maximize)
        if way.objective == "sharpness":
            return partial(move_sharpness, way.action, steps=s.ascent_steps, cap=s.cap, **options)
        return partial(move_curvature, way.action, tolerance=s.tolerance, **options)

    def follows(way: Way) -> str | None:
        return way._replace(action="backtracking").key if way.action == "random" else None

    moving = (Arm(w.key, partial(attempt, move(w)), moves=teleports(w, s), follows=follows(w)) for w in WAYS)
    return (Arm("baseline"), *moving)


def tuned_rates(run: Run, data: Dataset, dims: Sequence[int]) -> tuple[dict, dict]:
    """The arms of TUNED (A): their rates, then fresh runs (S) at the published rate and at every arm's best.

    Returns arrays and seconds. Beside the tuning the arrays are test_loss (A, 2, S, epochs), and phi and psi before and
    after every teleport, held out, (A, 2, S, K, 2).
    """
    s, everyone, seconds, turns = run.settings, range(len(TUNED)), {}, count(1)
    tuning, fresh = disjoint_seeds(s.tuning_seeds, s.tuned_seeds)
    few = replace(s, directions=s.tuning_directions)

    def scores(which: Sequence[int], factors: np.ndarray) -> np.ndarray:
        def tried(seed: int) -> dict:
            return {"test": final(one_run(run, data, dims, which, factors, seed, few, measured=False)["test_loss"])}

        turn = next(turns)
        parts, spent = run.parts(tried, {f"tuning{turn}_{i + 1}": seed for i, seed in enumerate(tuning)})
        seconds.update(spent)
        return np.concatenate([part["test"] for part in parts.values()], 2)

    def compared(seed: int) -> dict:
        found = one_run(run, data, dims, everyone, both_rates(tuned), seed, s)
        measures = {key: found[key][:, :, 0, ..., 1] for key in ("phi", "psi")}
        return {"test_loss": found["test_loss"][:, :, 0], **measures}

    tuned = tune(scores, len(TUNED), s.grid)
    plan = runs(tuned, [TUNED.index(way.key) for way in (LARGER, SMALLER)], (s.least, s.tuned_seeds))
    found, spent = run.parts(compared, {f"tuned_{i + 1}": seed for i, seed in enumerate(fresh[: plan.n])})
    arrays = {f"tuned/{key}": np.stack([part[key] for part in found.values()], 2) for key in found["tuned_1"]}
    arrays |= {"tuned/margin": np.float64(plan.margin), "tuned/seeds": np.array(fresh[: plan.n])}
    return arrays | tuned.save("tuning/"), seconds | spent


def one_run(
    run: Run,
    data: Dataset,
    dims: Sequence[int],
    which: Sequence[int],
    factors: np.ndarray,
    seed: int,
    s: Any,
    measured: bool = True,
) -> dict:
    """Train the arms of TUNED numbered `which`, at factors (A, F) of the published rate, in the run of this seed.

    An arm that follows another has a leader of its own, at its rates: the same move, whoever else is trained. Returns
    test_loss (A, F, 1, epochs) and what `teleporter` measures.
    """
    moving = {arm.name: arm for arm in arms(s)}
    mine = [moving[TUNED[a]] for a in which]
    rows = [i for i, arm in enumerate(mine) if arm.follows]
    leaders = [moving[mine[i].follows]._replace(name=f"leader {i}") for i in rows]
    mine = [arm._replace(follows=f"leader {i}") if arm.follows else arm for i, arm in enumerate(mine)]
    rates = RATES[s.dataset][0] * torch.tensor(factors[[*rows, *range(len(mine))]], dtype=torch.float32)
    W = [V.to(run.device) for V in initial_weights(dims, [seed])]
    stack = Stack([*leaders, *mine], W, "SGD", rates, max(moving[name].moves for name in TUNED[1:]))
    record, move_arms = teleporter(stack, data, dims, seed, s, measured)
    curves = stack.train(run, data, s.epochs, s.batch, {s.teleport_epoch: move_arms}, desc=f"seed {seed}")
    return {key: values[len(leaders) :] for key, values in {"test_loss": curves["test_loss"], **record}.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Whether they went, and what it was worth


def ways_of(objective: str | None = None) -> list[tuple[int, Way]]:
    """(a, way) of the arms that move, or of those with this objective; a counts from the baseline on."""
    return [(a, way) for a, way in enumerate(WAYS, start=1) if objective in (None, way.objective)]


def way_of(name: str) -> Way:
    """The way of the arm of this name."""
    return next(way for way in WAYS if way.key == name)


def went(values: np.ndarray, way: Way, s: Any) -> np.ndarray:
    """Which runs' φ or ψ went as sent, (S,): by all teleports together. values (S, K, [before, after]), held out.

    A random element is sent nowhere, and one that diverged is not known to have gone elsewhere: they count.
    """
    if way.action == "random":
        return np.ones(len(values), bool)
    steps = np.log(values[:, : teleports(way, s)])
    change = (steps[..., 1] - steps[..., 0]).sum(-1)
    return ~(change <= 0) if way.maximize else ~(change >= 0)


def against(outcome: Outcome, way: Way, as_sent: bool = True) -> tuple[Comparison | None, int]:
    """Test loss against the baseline's, all at the published rate, of the runs that went as sent (False: of all
    others), and how many these are; None for none."""
    a = 1 + WAYS.index(way)
    runs = went(outcome.arrays[way.measure][a, ..., 1], way, outcome.settings)
    return _compared(final(outcome.arrays["test_loss"][[a, 0]]), runs == as_sent)


def findings(outcomes: Sequence[Outcome]) -> dict[tuple, tuple[Comparison | None, int]]:
    """The fresh runs of TUNED: {(place, arm, other): (Comparison of the test loss, how many runs went as sent)}.

    What is DECIDING is one family over all outcomes and both rates (Holm), the other arms against the baseline another.
    None where no run went as sent; undecided where one of the two has no best rate.
    """
    other = {name: (name, "baseline") for name in TUNED[1:] if (name, "baseline") not in DECIDING.values()}
    found = {}
    for pairs in (DECIDING, other):
        mine = {
            (place(r, rate), *pair): _tuned_against(r, rate, *pair)
            for r in outcomes
            for rate in PUBLISHED_OR_BEST
            for pair in pairs.values()
        }
        members = {key: c for key, (c, _) in mine.items() if c is not None}
        for key, c in zip(members, statistics.family(list(members.values()))):
            members[key] = c._replace(word="undecided") if members[key].word == "undecided" else c
        found |= {key: (members.get(key), n) for key, (_, n) in mine.items()}
    return found


def words(found: dict[tuple, tuple[Comparison | None, int]]) -> dict[tuple, str]:
    """{(place, what is claimed): word} of `findings`; undecided where no run went as sent."""
    claimed = [(key, case) for case, pair in DECIDING.items() for key in found if key[1:] == pair]
    return {(key[0], case): found[key][0].word if found[key][0] else "undecided" for key, case in claimed}


def place(outcome: Outcome, rate: str) -> str:
    """A dataset and a rate, as `findings` names them and as text."""
    return f"{outcome.label}, {rate} rate"


def _tuned_against(outcome: Outcome, rate: str, arm: str, other: str) -> tuple[Comparison | None, int]:
    (a, b), r, way = map(TUNED.index, (arm, other)), PUBLISHED_OR_BEST.index(rate), way_of(arm)
    runs = went(outcome.arrays[f"tuned/{way.measure}"][a, r], way, outcome.settings)
    c, n = _compared(final(outcome.arrays["tuned/test_loss"][[a, b], r]), runs)
    inside = rate == "published" or Tuned.load(outcome.arrays, "tuning/").interior[[a, b]].all()
    return c if inside or c is None else c._replace(word="undecided"), n


def _compared(numbers: np.ndarray, which: np.ndarray) -> tuple[Comparison | None, int]:
    return statistics.compare(*numbers[:, which], relative=False) if which.any() else None, int(which.sum())
