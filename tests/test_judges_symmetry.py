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


def moved(effects, n, lost=0, seed=0, interior=True):
    """Figure 4's arrays of n runs: every arm goes where it is sent and changes the test loss by effects (% by arm), but
    for `lost` runs of each, which go the other way and diverge."""
    generator, s = np.random.default_rng(seed), figure4.PRESETS["tiny"]
    A, K = len(ARMS), max(figure4.teleports(way, s) for way in figure4.WAYS)
    level = np.exp(0.1 * generator.normal(size=(1, n)) + 0.001 * generator.normal(size=(A, n)))
    phi, up = np.ones((A, n, K, 2, 2)), np.array([0, *(1 if way.maximize else -1 for way in figure4.WAYS)])
    phi *= np.exp(0.1 * up)[:, None, None, None, None]
    for a, name in enumerate(ARMS[1:], start=1):
        level[a] *= 1 + effects.get(name, 0) / 100
        level[a, n - lost :] = np.nan
        phi[a, n - lost :] = 1 / phi[a, n - lost :]
    losses = np.broadcast_to(level[..., None], (A, n, s.epochs))
    arrays = {"phi": phi, "psi": phi, "loss": phi, "objective": phi[..., 0], "test_loss": losses, "train_loss": losses}
    tuned, one = [ARMS.index(name) for name in figure4.TUNED], np.ones((len(figure4.TUNED), 1, 3))
    inside = np.full(len(tuned), interior)
    going = np.stack([np.ones_like(phi[..., 0, 0]), phi[..., 0, 0] ** 2], -1)[tuned]  # before and after, as sent
    twice = {"tuned/test_loss": losses[tuned], "tuned/phi": going, "tuned/psi": going}
    arrays |= {key: np.stack([values, values], 1) for key, values in twice.items()} | {"tuned/margin": np.float64(0.01)}
    best = Tuned(np.array([0.5, 1, 2]), one.swapaxes(1, 2), one[:, 0] > 0, one[:, 0, 0].astype(int), inside)
    arrays |= best.save("tuning/")
    metrics = figure4.compare(s, arrays)
    return Outcome(metrics, arrays, list(range(n)), label="planted", settings=s)


@pytest.mark.parametrize(
    "psi, phi, n, word",
    [
        (-5, 0, 10, "holds"),
        (0, 0, 10, "holds in part"),
        (-5, 5, 10, "holds in part"),
        (5, -5, 10, "does not hold"),
        (-5, 0, 1, "undecided"),
    ],
)
def test_teleports_to_other_points(psi, phi, n, word):
    effects = {"curvature_up_backtracking": psi, "sharpness_down_rescaling": phi}
    assert figure4.judge(moved(effects, n)).word == word


def test_teleports_no_better_than_random_ones_or_without_a_best_rate_do_not_count():
    effects = {"curvature_up_backtracking": -5, "curvature_up_random": -5}
    verdict = figure4.judge(moved(effects, 10))
    assert verdict.word == "holds in part" and "against random is equivalent" in verdict.limits
    verdict = figure4.judge(moved({"curvature_up_backtracking": -5}, 10, interior=False))
    assert verdict.word == "holds in part" and "smaller φ is undecided on planted, best" in verdict.limits


def test_runs_that_went_the_other_way_are_an_arm_of_their_own():
    outcome = moved({"curvature_up_backtracking": -5}, 10, lost=3)
    verdict = figure4.judge(outcome)
    assert verdict.word == "holds"
    assert all(
        "7 of 10 runs went as sent" in line and "the other 3: diverged in 3" in line for line in verdict.details[:20]
    )
