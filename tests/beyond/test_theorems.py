"""The checks of theorems.py give their numbers, the numbers are judged, and the parts agree with independent ones."""

import math
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script, normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "beyond-the-papers"))

import theorems  # noqa: E402
import theorems_networks as networks  # noqa: E402
import theorems_plane as plane  # noqa: E402
import theorems_quadratics as quadratics  # noqa: E402
from theorems_numbers import NUMBERS, SHOWN  # noqa: E402

from common.run import Outcome  # noqa: E402

TINY = theorems.PRESETS["tiny"]
CHECKS = {
    "flow": lambda: plane.one_teleport(TINY),
    "newton": lambda: quadratics.newton(TINY) | networks.on_an_orbit(TINY),
    "bound": lambda: quadratics.bound(replace(TINY, draws=100)) | networks.no_maximum(),
    "displacement": lambda: plane.displacement(TINY),
    "conservation": lambda: networks.conservation(TINY),
    "tuned_step": networks.twins,  # what depends on the size of the batch is tested below
    "group_laws": lambda: networks.group_laws(TINY),
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_numbers_come_out(check, monkeypatch):
    monkeypatch.setattr(quadratics, "HORIZONS", (10, 100))
    found, numbers = CHECKS[check](), NUMBERS[check]
    ours = {key: float(found[key]) for key in numbers if key in found}
    assert len(ours) >= (1 if check == "tuned_step" else len(numbers) - 2)  # at tiny some have no number
    assert {key: value for key, value in ours.items() if not numbers[key].agrees(value)} == {}


# ---------------------------------------------------------------------------------------------------------------------
# The plane


@pytest.mark.parametrize("name", ["booth", "rosenbrock"])
def test_derivatives_in_the_plane_are_those_of_the_script_s_function(name):
    f, theirs = getattr(plane, name.upper()), getattr(load_script(f"symmetry-teleportation/{name}.py"), name.upper())
    w = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    loss, gradient = plane.loss_gradient(f, w.detach().numpy())
    assert loss == pytest.approx(theirs.loss(*w).item(), rel=1e-14)
    g = torch.autograd.grad(theirs.loss(*w), w, create_graph=True)[0]
    np.testing.assert_allclose(gradient, g.detach(), rtol=1e-13)
    Hg = torch.autograd.grad(g @ g.detach(), w, create_graph=True)[0]
    np.testing.assert_allclose(plane.hessian(f, w.detach().numpy()) @ gradient, Hg.detach(), rtol=1e-13)
    third = torch.autograd.grad(Hg @ g.detach(), w, allow_unused=True)[0] if Hg.requires_grad else None
    np.testing.assert_allclose(plane.third(f, w.detach().numpy(), gradient), third if third is not None else 0)
    np.testing.assert_allclose(f.xy(*f.uv(0.7, -1.3)), (0.7, -1.3))


def test_no_point_of_a_level_set_is_faster():
    there, speed = plane.fastest(plane.ROSENBROCK, 3.0)
    loss, g = plane.loss_gradient(plane.ROSENBROCK, there)
    assert loss == pytest.approx(3) and g @ g == pytest.approx(speed)
    angles = np.linspace(0, 2 * np.pi, 5001)
    points = plane.ROSENBROCK.xy(math.sqrt(3) * np.cos(angles), math.sqrt(3) * np.sin(angles))
    assert np.square(plane.loss_gradient(plane.ROSENBROCK, points)[1]).sum(0).max() <= speed * (1 + 1e-12)


@pytest.mark.parametrize("name", ["parabola", "circle"])
def test_mean_distance_is_figure_7_s(name):
    figure_7 = load_script("displacement_integration.py")
    a = np.array([0.05, 0.9, 1.7, 5.0])
    theirs = figure_7.mean_distance(figure_7.CURVES[name], a, 1.0, 1 / 32)[0][:, 0]
    np.testing.assert_allclose([plane.mean_distance(name, x) for x in a], theirs, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 3.1


def test_both_recursions_are_the_mean_over_all_paths():
    problem = quadratics.LeastSquares(np.array([[1.0, 0.2], [-0.3, 0.8]]), np.array([0.5, 0.7]))
    T, H, start = 4, problem.H, problem.flattest()
    eta, draws = problem.step_size(T), list(product(range(2), (-1, 1)))
    for teleports in (True, False):
        points, means, speeds = [start], [], []
        for _ in range(T):
            means.append(np.mean([w @ H @ w / 2 for w in points]))
            speeds.append(np.mean([w @ H @ H @ w for w in points]))
            if teleports:
                points = [problem.top * math.sqrt(w @ H @ w / problem.largest) for w in points]
            points = [
                w - eta * problem.A[i] * (problem.A[i] @ w + sign * problem.r[i]) for w in points for i, sign in draws
            ]
        if teleports:
            np.testing.assert_allclose(problem.teleported(T), means, rtol=1e-12)
        else:
            np.testing.assert_allclose(problem.plain(T, start), (means, speeds), rtol=1e-12)


def test_the_bound_fails_without_teleports_from_six_steps_on():
    assert quadratics.counterexample() == 6


# ---------------------------------------------------------------------------------------------------------------------
# The tuned step


def batch(n=12):
    generator = torch.Generator().manual_seed(3)
    return normal(4, 784, n).abs(), torch.randint(10, (n,), generator=generator)


def test_the_corner_has_the_largest_gradient_of_all():
    step = networks.TunedStep(54321, *batch())
    step.W = step.at(2 * normal(5, 26))  # on either side of its minimum, unit by unit
    t = step.corner(2.0)
    assert {-1, 1} == set(t[:16].sign().tolist()) == set(t[16:].sign().tolist())
    assert t.abs().allclose(torch.full_like(t, math.log(2)))
    largest, loss = step.norm(step.at(t)), step.loss(step.W)
    torch.testing.assert_close(step.loss(step.at(t)), loss, rtol=1e-12, atol=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        signs = torch.randint(2, t.shape, generator=generator) * 2.0 - 1
        assert step.norm(step.at(signs.double() * math.log(2))) <= largest
    for i in range(len(t)):  # nor does one unit's other side help
        flipped = t.clone()
        flipped[i] *= -1
        assert step.norm(step.at(flipped)) <= largest


@pytest.mark.parametrize("aim", ["newton", "decrease", "least"])
def test_every_aim_is_raised_within_its_bound(aim):
    step = networks.TunedStep(54321, *batch())
    t = step.best(aim, 2.0, 1)
    assert t.abs().max() <= math.log(2) * (1 + 1e-12)
    scores = {"newton": step.newton, "decrease": step.decrease, "least": lambda W: 1 / step.norm(W)}
    assert scores[aim](step.at(t)) > 1.2 * scores[aim](step.W)


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


def good():
    """Metrics that agree in every number."""
    metrics = {check: {key: n.value for key, n in numbers.items()} for check, numbers in NUMBERS.items()}
    metrics["bound"]["counterexample_T"] = 6.0
    return metrics


def judged(metrics):
    return theorems.judge(Outcome(metrics, {}))


def test_the_verdict_counts_numbers_and_names_what_differs():
    verdict = judged(good())
    shown = [n for numbers in NUMBERS.values() for n in numbers.values() if n.how == SHOWN]
    total = sum(map(len, NUMBERS.values())) - len(shown)
    assert verdict.word == "holds" and f"{total} of {total} numbers agree" in verdict.sentence
    assert len(verdict.published) == total + len(shown) and verdict.again() == "reproduced"

    metrics = good()
    metrics["displacement"]["circle_turn"] = 1.0
    verdict = judged(metrics)
    assert str(verdict) == "holds in part: displacement not in every number"
    assert verdict.details[0] == "circle: κr where it turns: 1, not 1.630849 ± 2e-06."
    assert verdict.again() == "not reproduced"

    for check in ("flow", "newton", "bound", "tuned_step"):
        metrics[check][next(iter(NUMBERS[check]))] = math.nan
    assert judged(metrics).word == "does not hold"


def test_every_false_statement_has_its_counterexample():
    said = theorems.false(good())
    assert len(said) == 5
    for words, text in zip(("(1, 0)", "(−1, −1) takes 273.5", "from T = 6 on", "s² + 1/s²", "1.630849"), said):
        assert words in text
