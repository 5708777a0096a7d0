"""Judges of the comparisons of optimizers, fed with arrays whose truth was planted: an effect, none, too few runs."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import load_script

import teleport_optimization
from common.protocol import RATES
from common.run import Outcome

regression = load_script("symmetry-teleportation/multi_layer_regression.py")
learning = load_script("learn-to-teleport/multi_layer_regression.py")
classification = load_script("symmetry-teleportation/mnist_classification.py")
sampling = load_script("symmetry-teleportation/random_search.py")
ALL_FOUR = ("AdaGrad", "momentum", "RMSprop", "Adam")


def planted(names, cases, effects, n, sd, edge=()):
    """Arrays of n runs: log losses that arms share (SD 0.3), each arm's own noise (sd), and effects, log ratios of
    (case, name, rate). edge: (case, name) of arms without a best rate. Metrics, as common/protocol.py writes them."""
    generator, arrays = np.random.default_rng(0), {}
    for case in cases:
        logs = 0.3 * generator.normal(size=n) + sd * generator.normal(size=(2, len(names), len(RATES), n))
        for a, name in enumerate(names):
            for r, rate in enumerate(RATES):
                logs[:, a, r] += effects.get((case, name, rate), 0)
        for measure, values in zip(("train", "test"), logs):
            arrays[f"compared.{case}/{measure}_loss"] = np.exp(values)[..., None].repeat(5, -1)
        tuning = {"factors": np.ones(3), "scores": np.zeros((len(names), 3, 2)), "best": np.ones(len(names), int)}
        tuning |= {"tried": np.ones((len(names), 3), bool), "interior": [(case, name) not in edge for name in names]}
        arrays |= {f"tuning.{case}/{key}": np.asarray(value) for key, value in tuning.items()}
    return arrays, {case: {"runs": n, "reachable_margin": 0.01} for case in cases}


def everywhere(cases, arm, effect=-0.05, rates=RATES):
    return {(case, arm, rate): effect for case in cases for rate in rates}


@pytest.mark.parametrize(
    "effects, n, sd, edge, word",
    [
        (everywhere(ALL_FOUR, "preactivation"), 20, 0.01, (), "holds"),
        (everywhere(("momentum",), "preactivation"), 20, 0.01, (), "holds in part"),
        ({}, 20, 0.005, (), "does not hold"),  # equivalent
        (everywhere(ALL_FOUR, "preactivation", 0.05), 20, 0.01, (), "does not hold"),
        (everywhere(ALL_FOUR, "preactivation", rates=("published",)), 20, 0.005, (), "does not hold"),  # a rate does it
        (everywhere(ALL_FOUR, "preactivation") | everywhere(ALL_FOUR, "random"), 20, 0.005, (), "does not hold"),
        (everywhere(ALL_FOUR, "preactivation") | everywhere(ALL_FOUR, "lr raised"), 20, 0.005, (), "does not hold"),
        ({}, 4, 0.05, (), "undecided"),  # too few runs
        (everywhere(ALL_FOUR, "preactivation"), 20, 0.01, [(o, "baseline") for o in ALL_FOUR], "undecided"),
    ],
)
def test_figure_5(effects, n, sd, edge, word):
    settings = replace(teleport_optimization.PRESETS["quick"], optimizers=ALL_FOUR)
    arrays, metrics = planted(teleport_optimization.ARMS, ALL_FOUR, effects, n, sd, edge)
    generator = np.random.default_rng(1)
    for o in ALL_FOUR:
        k = 1 + len(list(teleport_optimization.schedules(settings, o)))
        arrays[f"shuffled.{o}/numbers"] = generator.normal(size=(2, 2, 4))
        arrays[f"schedule.{o}/numbers"] = generator.normal(size=(k, 2, 4))
        metrics[o]["mini_batches"] = 400
    timings = {o: dict.fromkeys(teleport_optimization.ARMS, 1.0) for o in ALL_FOUR}
    outcome = Outcome(metrics, arrays, list(range(n)), timings, "mnist-mini", settings)
    verdict = teleport_optimization.judge(outcome)
    assert verdict.word == word
    assert set(verdict.answers) == {"cost", "gain", "when"}
    assert word != "undecided" or edge or "would have shown" in verdict.sentence
    if word == "holds in part":
        assert verdict.limits == "momentum only"
    two = teleport_optimization.judge(outcome, outcome._replace(label="MNIST"))  # a dataset more
    assert two.word == word


BOTH = ("GD", "AdaGrad")


@pytest.mark.parametrize(
    "effects, n, sd, word",
    [
        (everywhere(BOTH, "postactivation"), 300, 0.02, "holds"),
        (everywhere(BOTH, "postactivation", rates=("published",)), 300, 0.02, "holds in part"),
        (everywhere(("GD",), "postactivation"), 300, 0.02, "holds in part"),
        ({}, 300, 0.02, "does not hold"),
        (everywhere(BOTH, "postactivation", rates=("best",)) | everywhere(BOTH, "random"), 300, 0.02, "does not hold"),
        ({}, 5, 0.3, "undecided"),
    ],
)
def test_regression(effects, n, sd, word):
    arrays, metrics = planted(regression.ARMS, BOTH, effects, n, sd)
    for o in BOTH:
        arrays[f"compared.{o}/needed"] = np.full((len(regression.ARMS), 2, n), 80.0)
        arm = {"loss_after": np.array([*regression.PUBLISHED.values()]), "largest_relative_drift": 0.0}
        metrics[o] |= dict.fromkeys(regression.ARMS, arm)
    outcome = Outcome(metrics, arrays, settings=regression.PRESETS["paper"])
    verdict = regression.judge(outcome)
    assert verdict.word == word and verdict.again() == "reproduced"
    assert "saves gradient descent +20" in verdict.sentence
    if word == "holds in part":
        assert "GD, published rate" in verdict.limits and verdict.limits.endswith(" only")


def curves(effects, arms, n, sd):
    """Losses (n, 5) of arms whose logarithms share the runs' own part and differ by effects."""
    generator = np.random.default_rng(2)
    shared = 0.3 * generator.normal(size=n)
    noise = sd * generator.normal(size=(len(arms), n))
    return {arm: np.exp(shared + noise[a] + effects.get(arm, 0))[:, None].repeat(5, 1) for a, arm in enumerate(arms)}


WORSE = {"baseline": 0.2, "random": 0.1, "rescaling": 0.1, "lr x10": 0.1}
RANDOM, TENFOLD = "not better than one random element", "not better than a tenfold learning rate"
SGD = "no better than SGD"


@pytest.mark.parametrize(
    "published, best, n, sd, edge, word, limits",
    [
        (WORSE, WORSE, 10, 0.01, (), "holds", ""),
        (WORSE | {"random": 0.0}, WORSE, 10, 0.005, (), "holds in part", f"published rate: {RANDOM}"),
        (WORSE, WORSE | {"lr x10": -0.1}, 10, 0.01, (), "holds in part", f"best rate: {TENFOLD}"),
        (WORSE, {}, 20, 0.005, (), "does not hold", SGD),
        ({}, WORSE, 20, 0.005, (), "does not hold", SGD),
        ({"baseline": -0.1}, WORSE, 20, 0.01, (), "does not hold", SGD),
        (WORSE, WORSE, 10, 0.01, ("baseline",), "undecided", SGD),
        (WORSE, WORSE, 10, 0.01, ("random",), "holds in part", f"best rate: {RANDOM}"),
        ({}, {}, 4, 0.1, (), "undecided", SGD),
    ],
)
def test_sampling(published, best, n, sd, edge, word, limits):
    arrays = {f"{arm}/train_loss": loss for arm, loss in curves(published, sampling.ARMS, n, sd).items()}
    arms = sampling.sampled.ARMS
    losses = np.stack(list(curves(best, arms, n, sd).values())).repeat(3, -1)
    losses[..., :5] = 1  # before the teleport, which is nobody's doing
    tuning = {"factors": np.ones(3), "scores": np.zeros((len(arms), 3, 2)), "best": np.ones(len(arms), int)}
    tuning |= {"tried": np.ones((len(arms), 3), bool), "interior": [arm not in edge for arm in arms]}
    arrays |= {f"tuning/{key}": np.asarray(value) for key, value in tuning.items()}
    accuracy = np.random.default_rng(3).normal(0.51, 0.01, (2, 5, 15))
    arrays["variant/accuracy"] = accuracy + [[[0.0]], [[0.1]]] if n == 20 else accuracy
    arrays |= {"tuned/train_loss": losses, "tuned/margin": np.float64(0.02)}
    metrics = {"gradient_evaluations": {"search": 1000, "ascent": [90, 100]}}
    settings = dict(settings=sampling.PRESETS["paper"], label="Fashion-MNIST")
    verdict = sampling.judge(Outcome(metrics, arrays, list(range(n)), **settings))
    assert verdict.word == word and (verdict.limits == limits or word == "holds")
    agrees = [row.agrees for row in verdict.published]  # of epochs 0 to 10 and 14
    assert len(agrees) == 12 and agrees[:6] == ([False] * 6 if n == 20 else [False] * 5 + [True])


CASES = ("narrow SGD", "wide AdaGrad")


@pytest.mark.parametrize(
    "effects, n, sd, word",
    [
        (everywhere(CASES, "postactivation"), 20, 0.01, "holds"),
        (everywhere(CASES[:1], "postactivation"), 20, 0.005, "holds in part"),
        ({}, 20, 0.005, "does not hold"),
        (everywhere(CASES, "postactivation", rates=("published",)), 20, 0.005, "does not hold"),  # a rate does it
        (everywhere(CASES, "postactivation") | everywhere(CASES, "random"), 20, 0.005, "does not hold"),
        ({}, 4, 0.1, "undecided"),
    ],
)
def test_classification(effects, n, sd, word):
    arrays, metrics = planted(classification.ARMS, CASES, effects, n, sd)
    arrays |= {f"moves.{case}/losses": np.ones((len(classification.ARMS), 2, n, 3, 2, 2)) for case in CASES}
    verdict = classification.judge(Outcome(metrics, arrays, list(range(n)), label="MNIST"))
    assert verdict.word == word
    assert word != "holds in part" or verdict.limits == "narrow SGD only"


@pytest.mark.parametrize(
    "lr, update, meta_seeds, sd, word",
    [
        ((-0.5, -0.5), (-0.5, -0.5), 20, 0.02, "holds"),  # (with the teleport, without), log ratio to GD
        ((-0.5, -0.3), (0.0, 0.0), 20, 0.005, "holds in part"),
        ((0.0, 0.0), (0.3, 0.0), 20, 0.005, "does not hold"),
        ((-0.5, -0.5), (-0.5, -0.5), 20, 0.002, "does not hold"),  # nothing is the teleport's
        ((-0.5, -0.3), (-0.5, -0.3), 1, 0.02, "undecided"),  # one meta-training
    ],
)
def test_figure_6(lr, update, meta_seeds, sd, word):
    generator, arrays = np.random.default_rng(3), {}
    effects = {
        "LSTM(lr, teleport)": lr[0],
        "LSTM(lr)": lr[1],
        "LSTM(update, teleport)": update[0],
        "LSTM(update)": update[1],
    }
    if word == "holds":
        effects |= {"LSTM(lr)": lr[1] + 0.1, "LSTM(update)": update[1] + 0.1}
    names = {key: [name for k, _, name in learning.arms() if k == key] for key, _, _ in learning.arms()}
    for key, arms in names.items():
        count = 1 if key == "gd" else meta_seeds
        logs = np.array([effects.get(arm, 0.0) for arm in arms])[:, None] + (key != "gd") * sd * generator.normal(
            size=(len(arms), count)
        )
        arrays[f"{key}/loss"] = np.exp(logs)[..., None, None].repeat(6, 2).repeat(31, 3)
        arrays |= {f"{key}/chosen": np.zeros(len(arms), int), f"{key}/drift": np.zeros((len(arms), count, 30))}
    arrays["gd/rate"] = np.ones((3, 1, 30))
    settings = learning.PRESETS["paper"]
    outcome = Outcome(learning.compare(settings, arrays), arrays, settings=settings)
    assert learning.judge(outcome).word == word
