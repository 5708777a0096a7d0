"""Judges fed with arrays whose truth was planted: an effect, none, or too few runs to say."""

import sys

import numpy as np
import pytest
from conftest import ROOT

import correlation
import teleport_sharpness_curvature as figure4
from common.run import Outcome
from common.tuning import Tuned

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import relations

ACTIVATIONS = ("linear", "tanh")


def quantities(truth, n):
    """Q and values (sets, n) in which the values rise with Q, fall with |Q|, or have nothing to do with it."""
    generator = np.random.default_rng(0)
    Q, noise = generator.normal(size=(2, len(relations.SETS), n))
    return Q, {"Q": Q, "abs_Q": -np.abs(Q), "none": 0}[truth] + (0.2 if truth != "none" else 1) * noise


@pytest.mark.parametrize(
    "truths, n, word",
    [
        (("Q", "abs_Q"), 32, "holds"),
        (("Q", "none"), 32, "holds in part"),
        (("none", "none"), 200, "does not hold"),
        (("none", "none"), 8, "undecided"),
        (("Q", "Q"), 4, "undecided"),
    ],
)
def test_relation_with_q(truths, n, word):
    sets = {}
    for activation, truth in zip(ACTIVATIONS, truths):
        pairs = zip(relations.SETS, *quantities(truth, n))
        sets[activation] = {name: relations.relation(*pair) for name, *pair in pairs}
    verdict = relations.judge(sets, "the steps")
    assert verdict.word == word
    assert f"{n} starts find a correlation of" in verdict.details[-1]


def runs(dataset, n, phi=0.0, psi=0.0, through=0.0, seed=0):
    """n runs whose test loss goes with φ and ψ by themselves, and with φ through the training loss."""
    generator = np.random.default_rng(seed)
    train, a, b, noise = generator.normal(size=(4, n))
    y = phi * a + psi * b + through * train + noise
    arrays = {"phi": (a + train) / 200, "psi": b, "train_loss": train, "loss": train, "test_loss": y}
    return Outcome({}, arrays, list(range(n)), label=dataset, settings=correlation.Settings(dataset=dataset))


@pytest.mark.parametrize(
    "effects, n, word",
    [
        ({"phi": 1.0, "psi": -1.0}, 200, "holds"),
        ({"phi": 1.0, "psi": 1.0}, 200, "holds in part"),
        ({"through": 1.0}, 200, "holds in part"),  # φ goes with the test loss, and not beyond the training loss
        ({"phi": -1.0, "psi": 1.0}, 200, "does not hold"),
        ({}, 4000, "does not hold"),  # negligible, all of them
        ({"phi": 0.3, "psi": -0.3}, 12, "undecided"),
    ],
)
def test_table_1(effects, n, word):
    outcomes = [runs(dataset, n, **effects, seed=seed) for seed, dataset in enumerate(("MNIST", "FashionMNIST"))]
    assert correlation.judge(*outcomes).word == word


def test_table_1_names_what_is_missing():
    verdict = correlation.judge(runs("MNIST", 200, phi=1.0, psi=-1.0), runs("FashionMNIST", 200, phi=1.0))
    assert verdict.limits == "ψ is undecided on FashionMNIST" or "ψ is negligible on FashionMNIST" in verdict.limits


def test_table_1_compares_with_the_published_axes():
    outcome = runs("MNIST", 200, phi=1.0, psi=-1.0)
    outcome.arrays["phi"] = 0.0006 + 1e-6 * outcome.arrays["phi"]
    outcome.arrays["psi"] = 0.01 + 1e-6 * outcome.arrays["psi"]
    agrees = {row.what: row.agrees for row in correlation.judge(outcome).published}
    assert agrees["φ (MNIST)"] and not agrees["ψ (MNIST)"]


ARMS = ("baseline", *(way.key for way in figure4.WAYS))


def moved(effects, n, lost=0, seed=0, best=None, edges=()):
    """Figure 4's arrays of n runs: every arm goes where it is sent and changes the test loss by effects (% by arm, at
    best rates by `best`), but for `lost` runs of each, which go the other way and diverge. ψ of arms of φ, and φ of
    arms of ψ, go the other way, and count for nothing."""
    generator, s = np.random.default_rng(seed), figure4.PRESETS["tiny"]
    A, K = len(ARMS), max(figure4.teleports(way, s) for way in figure4.WAYS)
    level = np.exp(0.1 * generator.normal(size=(1, n)) + 0.001 * generator.normal(size=(A, n)))
    up = np.array([0, *(1 if way.maximize else -1 for way in figure4.WAYS)])
    of_psi = np.array([False, *(way.objective == "curvature" for way in figure4.WAYS)])
    right = 0.1 * np.tile(up[:, None], n)
    for a, name in enumerate(ARMS[1:], start=1):
        level[a] *= 1 + effects.get(name, 0) / 100
        level[a, n - lost :] = np.nan
        right[a, n - lost :] *= -1

    def measured(mine):
        steps = np.where(mine[:, None], right, -right)  # the log of what a teleport does
        return np.exp(steps[..., None, None] * np.arange(2) * np.ones((K, 1)))  # (A, n, K, 2)

    losses = np.broadcast_to(level[..., None], (A, n, s.epochs))
    phi, psi = (np.stack([values] * 2, -1) for values in (measured(~of_psi), measured(of_psi)))
    arrays = {"phi": phi, "psi": psi, "loss": phi, "objective": phi[..., 0], "test_loss": losses, "train_loss": losses}
    tuned = [ARMS.index(name) for name in figure4.TUNED]
    change = np.array([1 + ((effects if best is None else best).get(n, 0) - effects.get(n, 0)) / 100 for n in ARMS])
    arrays |= {f"tuned/{key}": np.stack([arrays[key][tuned, ..., 1]] * 2, 1) for key in ("phi", "psi")}
    arrays["tuned/test_loss"] = np.stack([losses[tuned], losses[tuned] * change[tuned, None, None]], 1)
    arrays["tuned/margin"], ones = np.float64(0.01), np.ones((len(tuned), 1, 3))
    inside = np.array([name not in edges for name in figure4.TUNED])
    factors = np.array([0.5, 1, 2])
    arrays |= Tuned(factors, ones.swapaxes(1, 2), ones[:, 0] > 0, ones[:, 0, 0].astype(int), inside).save("tuning/")
    return Outcome(figure4.compare(s, arrays), arrays, list(range(n)), label="planted", settings=s)


PSI, PHI, RANDOM = "curvature_up_backtracking", "sharpness_down_rescaling", "curvature_up_random"


@pytest.mark.parametrize(
    "effects, best, n, word",
    [
        ({PSI: -5}, None, 10, "holds"),
        ({}, None, 10, "does not hold"),  # negligible everywhere, smaller φ too
        ({PSI: -5}, {}, 10, "holds in part"),
        ({}, {PSI: -5}, 10, "holds in part"),
        ({PSI: -5, PHI: 5}, None, 10, "holds in part"),
        ({PSI: -5}, {PSI: -5, PHI: 5}, 10, "holds in part"),
        ({PSI: -5, RANDOM: -5}, None, 10, "does not hold"),
        ({PSI: 5, PHI: -5}, None, 10, "does not hold"),
        ({PSI: -5}, None, 1, "undecided"),
    ],
)
def test_teleports_to_other_points(effects, best, n, word):
    assert figure4.judge(moved(effects, n, best=best)).word == word


@pytest.mark.parametrize("edge, word", [(PSI, "holds in part"), (RANDOM, "holds in part"), (PHI, "holds in part")])
def test_an_arm_without_a_best_rate_is_undecided_there(edge, word):
    verdict = figure4.judge(moved({PSI: -5}, 10, edges=(edge,)))
    said = "not equivalent: planted, best rate" if edge == PHI else "planted, published rate only"
    assert verdict.word == word and said in verdict.limits
    assert figure4.judge(moved({PSI: -5}, 10, edges=("curvature_up_published",))).word == "holds"


def test_a_run_that_diverged_is_not_left_out():
    """NaN says nothing about where it went: it counts, and nothing is better than what diverged."""
    outcome = moved({PSI: -5}, 10)
    a = figure4.TUNED.index(PSI)
    for key in ("tuned/psi", "tuned/test_loss"):
        outcome.arrays[key][a, :, 6:] = np.nan
    verdict = figure4.judge(outcome)
    assert verdict.word == "undecided" and "diverged in 4 and 0 of 10 (undecided)" in verdict.sentence


def test_nobody_who_went_as_sent_is_said():
    outcome = moved({PSI: -5}, 10)
    outcome.arrays["tuned/psi"] = 1 / outcome.arrays["tuned/psi"]
    verdict = figure4.judge(outcome)
    assert verdict.word == "undecided" and "larger ψ, planted, best rate, none went as sent" in verdict.sentence


def test_runs_that_went_the_other_way_are_an_arm_of_their_own():
    outcome = moved({PSI: -5}, 10, lost=3)
    verdict = figure4.judge(outcome)
    assert verdict.word == "holds"
    for line, way in zip(verdict.details, figure4.WAYS):  # a random one is sent nowhere
        other = "10 of 10 runs went as sent; diverged in 3" if way.action == "random" else "the other 3: diverged in 3"
        assert other in line, line
