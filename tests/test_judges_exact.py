"""Judges of what has no spread over runs, fed with committed metrics in which another truth was planted."""

import copy
import math

import pytest

import report

SECTIONS = {section.script.rpartition("/")[2]: section for section in report.sections()}


def verdict(script, plant):
    section = SECTIONS[script]
    (result,) = report.load(section)
    outcome = result.outcome._replace(metrics=copy.deepcopy(result.outcome.metrics))
    plant(outcome.metrics)
    return section.judge([result._replace(outcome=outcome)])


def straight(*curves):
    """The least mean distance is a straight line's: 2/π of r."""

    def plant(m):
        for curve in curves:
            m[curve]["smallest_value"] = 2 / math.pi * 1.005

    return plant


def every(key, value):
    """The metric of every activation or shape; value: of how many-th it is, and what it was."""

    def plant(m):
        for i, each in enumerate(m.values()):
            each[key] = value(i, each[key])

    return plant


def final(**losses):
    def plant(m):
        for arm, loss in losses.items():
            m[arm]["final_loss"] = [loss] * 5

    return plant


def flow_times(*times):
    def plant(m):
        m["flow_time_over_Q"] = list(times)

    return plant


def keep(m):
    pass


@pytest.mark.parametrize(
    "script, plant, word",
    [
        ("displacement_integration.py", keep, "holds"),
        ("displacement_integration.py", straight("circle"), "holds in part"),
        ("displacement_integration.py", straight("circle", "parabola"), "does not hold"),
        ("booth.py", final(gd_published=1e-12, gd=1e-3, gd_random=1e-3), "holds"),
        ("booth.py", final(gd_published=1e-12, gd=1e-3, gd_random=1e-12), "holds in part"),
        ("booth.py", final(gd_published=1e-3, gd=1e-3, gd_random=1e-3), "does not hold"),
        ("booth.py", final(gd_published=math.nan, gd=1e-3, gd_random=1e-3), "does not hold"),  # diverged
        ("Q_dynamics_elementwise.py", keep, "holds"),
        ("Q_dynamics_elementwise.py", every("order_in_step_size", lambda i, _: 1 + i), "holds in part"),
        ("Q_dynamics_elementwise.py", every("order_in_step_size", lambda i, _: 0.0), "does not hold"),  # not conserved
        ("Q_dynamics_elementwise.py", every("order_in_step_size", lambda i, _: math.nan), "does not hold"),
        ("Q_distribution.py", keep, "holds"),
        ("Q_distribution.py", every("std", lambda i, std: 2 * std), "holds in part"),
        ("Q_distribution.py", every("standard_errors_off", lambda i, _: -9.0), "does not hold"),
        ("Q_convergence_radial.py", keep, "holds"),
        ("Q_convergence_radial.py", flow_times(1.0, 1.05, 1.09, math.nan), "holds"),
        ("Q_convergence_radial.py", flow_times(1.0, 1.05, 1.2, math.nan), "does not hold"),
        ("Q_convergence_radial.py", flow_times(1.0, math.nan, math.nan, math.nan), "does not hold"),
    ],
)
def test_a_planted_truth_gets_its_word(script, plant, word):
    assert verdict(script, plant).word == word
