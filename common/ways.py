"""Where Figure 4's arms are sent, by what, how often and by which step; whether they went there, and what it was worth.

The numbers are of the runs that went as they were sent: the others are an arm of their own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from common import statistics
from common.arms import Arm, Stack
from common.data import Dataset
from common.mlp import initial_weights
from common.moves import attempt, move_curvature, move_sharpness, teleporter
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
CLAIMED = (1, 4)
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
    s, moving = run.settings, {arm.name: arm for arm in arms(run.settings)}
    tuning, fresh = disjoint_seeds(s.tuning_seeds, s.tuned_seeds)
    K = max(moving[name].moves for name in TUNED[1:])

    def one_run(which: Sequence[int], factors: np.ndarray, seed: int, s: Any, measured: bool = True) -> dict:
        members, rows = [moving[TUNED[a]] for a in which], list(range(len(which)))
        followed = [i for i, arm in enumerate(members) if arm.follows not in (None, *(TUNED[a] for a in which))]
        members = [*(moving[members[i].follows] for i in followed), *members]  # for its moves, at its follower's rates
        rates = RATES[s.dataset][0] * torch.tensor(factors[followed + rows], dtype=torch.float32)
        W = [V.to(run.device) for V in initial_weights(dims, [seed])]
        stack = Stack(members, W, "SGD", rates, K)
        record, move_arms = teleporter(stack, data, dims, seed, s, measured)
        curves = stack.train(run, data, s.epochs, s.batch, {s.teleport_epoch: move_arms}, desc=f"seed {seed}")
        return {key: values[len(followed) :] for key, values in {"test_loss": curves["test_loss"], **record}.items()}

    def scores(which: Sequence[int], factors: np.ndarray) -> np.ndarray:
        few = replace(s, directions=s.tuning_directions)
        found = [one_run(which, factors, seed, few, measured=False)["test_loss"] for seed in tuning]  # (A, F, 1, …)
        return final(np.concatenate(found, 2))

    def compared(seed: int) -> dict:
        found = one_run(range(len(TUNED)), both_rates(tuned), seed, s)
        measures = {key: found[key][:, :, 0, ..., 1] for key in ("phi", "psi")}
        return {"test_loss": found["test_loss"][:, :, 0], **measures}

    parts, seconds = run.parts(lambda _: tune(scores, len(TUNED), s.grid).save(""), {"tuning": None})
    tuned = Tuned.load(parts["tuning"], "")
    plan = runs(tuned, CLAIMED, (s.least, s.tuned_seeds))
    found, spent = run.parts(compared, {f"tuned_{i + 1}": seed for i, seed in enumerate(fresh[: plan.n])})
    arrays = {f"tuned/{key}": np.stack([part[key] for part in found.values()], 2) for key in found["tuned_1"]}
    return arrays | tuned.save("tuning/") | {"tuned/margin": np.float64(plan.margin)}, seconds | spent


# ---------------------------------------------------------------------------------------------------------------------
# Whether they went, and what it was worth


def ways_of(objective: str | None = None) -> list[tuple[int, Way]]:
    """(a, way) of the arms that move, or of those with this objective; a counts from the baseline on."""
    return [(a, way) for a, way in enumerate(WAYS, start=1) if objective in (None, way.objective)]


def way_of(name: str) -> Way:
    """The way of the arm of this name."""
    return next(way for way in WAYS if way.key == name)


def went(outcome: Outcome, way: Way) -> np.ndarray:
    """Which runs' φ or ψ went as sent, (S,): after the last teleport, on held-out data and fresh draws, against no
    teleport at that step."""
    values = outcome.arrays[way.measure][:, :, teleports(way, outcome.settings) - 1, 1, 1]  # (A, S)
    a = 1 + WAYS.index(way)
    return values[a] > values[0] if way.maximize else values[a] < values[0]


def against(outcome: Outcome, way: Way, as_sent: bool = True) -> tuple[Comparison, int]:
    """Test loss against the baseline's, all at the published rate, of the runs that went as sent (False: of all
    others), and how many these are."""
    return _compared(final(outcome.arrays["test_loss"][[1 + WAYS.index(way), 0]]), went(outcome, way) == as_sent)


def tuned_against(outcome: Outcome, way: Way, rate: str, other: str = "baseline") -> tuple[Comparison, int]:
    """The same against an arm of TUNED, at the published rate or each at its best, in the runs that are compared there.

    Sent as asked: by all teleports of the run together, on held-out data and fresh draws. Undecided where one of the
    two has no best rate.
    """
    (a, b), r = map(TUNED.index, (way.key, other)), PUBLISHED_OR_BEST.index(rate)
    k = teleports(way, outcome.settings)
    values = np.log(outcome.arrays[f"tuned/{way.measure}"][a, r, :, :k])  # (S, k, [before, after])
    change = (values[..., 1] - values[..., 0]).sum(-1)
    numbers = final(outcome.arrays["tuned/test_loss"][[a, b], r])
    found, n = _compared(numbers, (change > 0) if way.maximize else change < 0)
    interior = Tuned.load(outcome.arrays, "tuning/").interior
    return found if rate == "published" or interior[[a, b]].all() else found._replace(word="undecided"), n


def _compared(numbers: np.ndarray, which: np.ndarray) -> tuple[Comparison, int]:
    numbers = numbers[:, which] if which.any() else np.array([[np.nan], [0.0]])
    return statistics.compare(*numbers, relative=False), int(which.sum())
