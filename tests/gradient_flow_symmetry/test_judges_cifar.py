"""The judges of ensembles and attacks, fed with a planted truth: an effect, none, or too few networks."""

import sys

import numpy as np
import pytest
from conftest import ROOT

from common.run import Outcome

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

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
