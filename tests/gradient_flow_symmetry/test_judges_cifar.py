"""The judges of ensembles and attacks, fed with a planted truth: an effect, none, or too few networks."""

import sys

import numpy as np
import pytest
from conftest import ROOT

from common.run import Outcome

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import adversarial_cifar
import ensemble_cifar
import published_notebooks as notebooks
from symmetry_ensemble import ARMS

ALIKE, LOST = 0.0, -40.0  # points


def votes(group, controls, n=8, spread=0.2, seed=0):
    """n networks; accuracy of the vote minus the network's, in points, at every ε: of the group, of the controls."""
    s, generator = ensemble_cifar.PAPER, np.random.default_rng(seed)
    shape = (n, len(ARMS), len(s.epsilons), len(s.elements))
    points = np.broadcast_to(controls, shape) + spread * generator.normal(size=shape)
    points[:, 0] += np.asarray(group)[:, None] - controls
    original = 0.6 + 0.02 * generator.normal(size=n)
    arrays = {"original": original, "accuracy": original[:, None, None, None] + points / 100}
    metrics = {"change_on_batch": {f"{epsilon:g}": 1e-12 for epsilon in s.epsilons}}
    return Outcome(metrics, arrays, list(range(n)), label="planted", settings=s)


@pytest.mark.parametrize(
    "group, controls, options, word",
    [
        ([ALIKE] * 7, LOST, {}, "holds"),
        ([ALIKE] * 7, ALIKE, {}, "holds in part"),  # controls do as well
        ([LOST] * 3 + [ALIKE] * 4, LOST, {}, "holds in part"),
        ([-1.5] * 7, LOST, {}, "does not hold"),  # little, but more than the margin
        ([ALIKE] * 7, LOST, {"n": 3, "spread": 5.0}, "undecided"),
        ([ALIKE] * 7, LOST, {"n": 1}, "undecided"),
    ],
)
def test_ensembles(group, controls, options, word):
    verdict = ensemble_cifar.judge(votes(group, controls, **options))
    assert verdict.word == word
    assert ("could have shown" in verdict.details[0]) == (word == "undecided")


def printed(shift=0.0):
    """Networks whose votes gain what the notebook's did, shift points off in one cell."""
    outcome, base = votes([ALIKE] * 7, ALIKE, n=5), np.array(notebooks.ENSEMBLES["original"]) / 10
    gains = np.stack([np.array(notebooks.ENSEMBLES[arm]) / 10 - base for arm in ARMS])
    gains[ARMS.index("inverse"), 0, 3] += shift
    outcome.arrays["original"] += (base.mean() - 60) / 100
    outcome.arrays["accuracy"] += (base.mean() - 60 + gains) / 100
    return outcome


@pytest.mark.parametrize("shift, again", [(0.0, "reproduced"), (25.0, "not reproduced")])
def test_ensembles_beside_the_printed_table(shift, again):
    verdict = ensemble_cifar.judge(printed(shift))
    assert verdict.again() == again
    (row,) = [row for row in verdict.published if row.what.startswith("inverse, ε = 20:")]
    assert row.published.split(", ")[3] == "-44.5" and row.agrees == (shift == 0)
    assert len(verdict.published) == 1 + len(ARMS) * len(notebooks.EPSILONS)
    assert ensemble_cifar.judge(printed()._replace(settings=ensemble_cifar.QUICK)).published == []


def attacks(strongest, base, clean=0.0, itself=None, n=8, spread=0.3, seed=0):
    """n networks; accuracy of the group in per cent under the strongest attack and through itself, the base model's,
    and what the group gains without attack."""
    s, generator = adversarial_cifar.PAPER, np.random.default_rng(seed)
    arrays = {}
    for attack, mine in strongest.items():
        shape = (n, len(adversarial_cifar.ATTACKED), len(adversarial_cifar.MODELS), len(notebooks.STRENGTHS[attack]))
        points = base + spread * generator.normal(size=shape)
        points[:, :, 1] += mine - base
        points[:, adversarial_cifar.ATTACKED.index("itself"), 1] += (mine if itself is None else itself) - mine
        points[..., 0] = 60 + spread * generator.normal(size=shape[:-1])
        points[:, :, 1, 0] += clean
        arrays[attack] = points.clip(0, 100) / 100
    return Outcome({}, arrays, list(range(n)), label="planted", settings=s)


@pytest.mark.parametrize(
    "strongest, base, options, word",
    [
        ({"FGSM": 30, "PGD": 30}, 20, {}, "holds"),
        ({"FGSM": 30, "PGD": 20}, 20, {}, "holds in part"),
        ({"FGSM": 30, "PGD": 30}, 20, {"clean": -10}, "holds in part"),  # at a cost
        ({"FGSM": 20, "PGD": 20}, 20, {"itself": 50}, "does not hold"),  # it hides its gradient, no more
        ({"FGSM": 10, "PGD": 10}, 0, {}, "does not hold"),  # a coin scores ten per cent
        ({"FGSM": 10, "PGD": 30}, 20, {}, "holds in part"),
        ({"FGSM": 20, "PGD": 20}, 20, {}, "does not hold"),
        ({"FGSM": 25, "PGD": 25}, 20, {"n": 3, "spread": 15}, "undecided"),
        ({"FGSM": 30, "PGD": 30}, 20, {"n": 1}, "undecided"),
    ],
)
def test_attacks(strongest, base, options, word):
    verdict = adversarial_cifar.judge(attacks(strongest, base, **options))
    assert verdict.word == word
    assert ("could have shown" in verdict.sentence) == (word == "undecided")
    assert "1,000 images" not in " ".join(verdict.details[:-1])


@pytest.mark.parametrize("shift, again", [(0.0, "reproduced"), (25.0, "not reproduced")])
def test_attacks_beside_the_printed_accuracies(shift, again):
    outcome = attacks({"FGSM": 20, "PGD": 20}, 20, n=5)
    for attack, printed in notebooks.ATTACKS.items():
        values = np.array([printed[model] for model in adversarial_cifar.MODELS]) / 1000
        outcome.arrays[attack][:, -1] += values - outcome.arrays[attack][:, -1].mean(0)
    outcome.arrays["PGD"][:, -1, 1, 2] += shift / 100
    verdict = adversarial_cifar.judge(outcome)
    assert verdict.again() == again
    assert len(verdict.published) == 2 * len(adversarial_cifar.MODELS)
    (row,) = [row for row in verdict.published if row.what.startswith("PGD") and ", group:" in row.what]
    assert row.published == "46.0, 3.8, 0.2, 2.6" and row.agrees == (shift == 0)
    assert adversarial_cifar.judge(outcome._replace(settings=adversarial_cifar.QUICK)).published == []
