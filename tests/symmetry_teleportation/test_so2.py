"""symmetry-teleportation/: so2.py, booth.py and rosenbrock.py."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "symmetry-teleportation"))

import booth
import orbits
import rosenbrock
import so2

FUNCTIONS = {"booth": (booth.BOOTH, booth.PAPER), "rosenbrock": (rosenbrock.ROSENBROCK, rosenbrock.PAPER)}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
near = st.floats(-2, 2)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def finite_differences(f, x, h=1e-5):
    """Derivative of f with respect to each entry of x, stacked first."""
    return torch.stack([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in torch.eye(len(x), dtype=x.dtype)])


def check_trajectory(recorded, prefix, function, iterates, departures, steps):
    x_and_y = torch.stack([recorded[f"{prefix}_x"], recorded[f"{prefix}_y"]], dim=1)
    loss = function.loss(*departures.T)
    speed = orbits.gradient(function, departures.T).square().sum(0)
    torch.testing.assert_close(iterates[: steps + 1], x_and_y[: steps + 1], rtol=0, atol=1e-9)
    torch.testing.assert_close(loss[:steps], recorded[f"{prefix}_loss"][:steps], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(speed[:steps], recorded[f"{prefix}_grad_sq"][:steps], rtol=1e-9, atol=1e-12)


@each_function
def test_recorded_trajectories(golden, name):
    """Rosenbrock's ascent is chaotic (a change of 1e-15 in w ends elsewhere), so this pins the rounding as well."""
    recorded, (function, s) = golden("test_functions"), FUNCTIONS[name]
    descent = (function, vector(*s.start), s.steps, orbits.gradient_descent(s.lr))
    check_trajectory(recorded, f"{name}_gd", function, *orbits.descend(*descent), s.steps)
    theta = iter(recorded[f"{name}_theta0"])

    def teleport(w):
        return orbits.published_teleport(function, w, next(theta), s.lr_theta, s.ascent_steps)

    check_trajectory(recorded, f"{name}_teleport", function, *orbits.descend(*descent, teleport, s.teleports), s.steps)


@each_function
def test_script_holds_the_recorded_trajectories(tiny, golden, name):
    """Its first starting angles are the recorded ones, and ten seeds at once change no bit of the first."""
    recorded, (function, s) = golden("test_functions"), FUNCTIONS[name]
    torch.testing.assert_close(so2.starting_angles(1, len(s.teleports)), recorded[f"{name}_theta0"], rtol=0, atol=0)
    arrays = tiny(f"symmetry-teleportation/{name}.py")[0].arrays[name]
    for arm, prefix in (("gd", "gd"), ("gd_published", "teleport")):
        iterates = torch.from_numpy(arrays[f"{arm}_path"])
        departures = iterates.clone()
        if arm == "gd_published":
            departures[arrays["gd_published_when"]] = torch.from_numpy(arrays["gd_published_arrivals"])
        check_trajectory(recorded, f"{name}_{prefix}", function, iterates, departures, len(iterates) - 1)


@each_function
@settings(max_examples=50, deadline=None)
@given(x=near, y=near, theta=st.floats(-10, 10))
def test_rotations_keep_the_level_set_and_compose(name, x, y, theta):
    function, w, theta = FUNCTIONS[name][0], vector(x, y), vector(theta)[0]
    loss = function.loss(*w)
    assume(loss > 1e-4)
    point = orbits.act(function, theta, w)
    assert abs(function.loss(*point) - loss) <= 1e-12 * loss
    torch.testing.assert_close(orbits.act(function, -theta, point), w, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        orbits.act(function, theta, point), orbits.act(function, 2 * theta, w), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(orbits.act(function, vector(0)[0], w), w, rtol=0, atol=1e-14)
    u, v = function.to_uv(*w)
    assert u**2 + v**2 == pytest.approx(loss.item(), rel=1e-12)


@each_function
def test_derivatives_against_finite_differences(name):
    function, w = FUNCTIONS[name][0], vector(0.7, -0.4)
    gradient = finite_differences(lambda w: function.loss(*w), w)
    torch.testing.assert_close(orbits.gradient(function, w), gradient, rtol=1e-8, atol=1e-8)
    hessian = finite_differences(lambda w: orbits.gradient(function, w), w)
    torch.testing.assert_close(orbits.hessian(function, w), hessian, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(hessian @ orbits.newton_direction(function, w), gradient, rtol=1e-6, atol=1e-6)
    theta = vector(0.3)

    def speed(theta):  # from the definition, not through along_orbit
        return orbits.gradient(function, orbits.act(function, theta, w[:, None])).square().sum(0)

    _, value, first, second = orbits.along_orbit(function, theta, w[:, None])
    torch.testing.assert_close(value, speed(theta))
    torch.testing.assert_close(first, finite_differences(speed, theta)[0], rtol=1e-7, atol=1e-6)
    slope = finite_differences(lambda theta: orbits.along_orbit(function, theta, w[:, None])[2], theta)[0]
    torch.testing.assert_close(second, slope, rtol=1e-7, atol=1e-6)


def booth_maximum(x, y):
    """All angles of the maximum: there (u, v) is along (1, 1), the eigenvector of J Jᵀ, J = [[1, 2], [2, 1]]."""
    u, v = x + 2 * y - 7, 2 * x + y - 5
    angle = np.pi / 4 - np.arctan2(v, u)
    return [angle, angle + np.pi]


def rosenbrock_maximum(x, y):
    """‖∂L/∂w‖² in (u, v) is (40u(v + 1) + 2v)² + 400u²: the critical points from its Fourier series."""
    u, v = 10 * (x**2 - y), x - 1
    t = 2 * np.pi * np.arange(16) / 16

    def speed(t):
        a, b = np.cos(t) * u - np.sin(t) * v, np.sin(t) * u + np.cos(t) * v
        return (40 * a * (b + 1) + 2 * b) ** 2 + 400 * a**2

    harmonics = np.fft.fft(speed(t))[np.r_[4:-1:-1, -1:-5:-1]]  # of e^{i4t} … e^{−i4t}
    roots = np.roots(harmonics * np.arange(4, -5, -1))
    angles = np.angle(roots[np.abs(np.abs(roots) - 1) < 1e-6])
    return [angles[speed(angles).argmax()]]


@each_function
@settings(max_examples=60, deadline=None)
@given(x=near, y=near)
def test_orbit_maximum_against_closed_form(name, x, y):
    function, w = FUNCTIONS[name][0], vector(x, y)
    assume(function.loss(*w) > 1e-4)
    theta = orbits.orbit_maximum(function, w)
    expected = {"booth": booth_maximum, "rosenbrock": rosenbrock_maximum}[name](x, y)
    difference = [abs((theta.item() - t + np.pi) % (2 * np.pi) - np.pi) for t in expected]
    assert min(difference) < 1e-10
    # What the theory says of it: the gradient has Newton's direction, up to its sign.
    point = orbits.act(function, theta, w)
    g, n = orbits.gradient(function, point), orbits.newton_direction(function, point)
    assert abs(g[0] * n[1] - g[1] * n[0]) < 1e-6 * g.norm() * n.norm()


@each_function
def test_orbit_maximum_of_an_ensemble_and_at_the_minimum(name):
    function = FUNCTIONS[name][0]
    w = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 - 2
    theta = orbits.orbit_maximum(function, w)
    for i, j in np.ndindex(3, 2):
        torch.testing.assert_close(theta[i, j], orbits.orbit_maximum(function, w[:, i, j]), rtol=0, atol=1e-12)
    speed = orbits.along_orbit(function, theta, w)[1]
    for other in np.linspace(-np.pi, np.pi, 101):
        assert (orbits.along_orbit(function, torch.full_like(theta, other), w)[1] <= speed * (1 + 1e-12)).all()
    minimum = vector(*function.minimum)
    assert orbits.orbit_maximum(function, minimum) == 0  # a single point: nothing to gain, and no NaN


def test_booth_in_one_step():
    """Newton's method needs one step from anywhere; from the orbit's maximum so does gradient descent, at rate 1/18."""
    function, start, minimum = booth.BOOTH, vector(5.0, -5.0), vector(1.0, 3.0)
    iterates, _ = orbits.descend(function, start, 1, orbits.newton(function))
    torch.testing.assert_close(iterates[1], minimum, rtol=0, atol=1e-12)

    def teleport(w):
        return orbits.act(function, orbits.orbit_maximum(function, w), w)

    iterates, _ = orbits.descend(function, start, 1, orbits.gradient_descent(1 / 18), teleport, [0])
    torch.testing.assert_close(iterates[1], minimum, rtol=0, atol=1e-12)
    iterates, _ = orbits.descend(function, start, 1, orbits.gradient_descent(1 / 18))
    assert (iterates[1] - minimum).norm() > 1


@each_function
def test_adagrad_is_torchs(name):
    function, s = FUNCTIONS[name]
    iterates, _ = orbits.descend(function, vector(*s.start), 20, orbits.adagrad(s.adagrad_lr))
    w = vector(*s.start).requires_grad_()
    optimizer = torch.optim.Adagrad([w], lr=s.adagrad_lr)
    for expected in iterates:
        torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-12)
        w.grad = orbits.gradient(function, w)
        optimizer.step()


def test_bad_start():
    with pytest.raises(ValueError, match="start"):
        orbits.descend(booth.BOOTH, vector(float("nan"), 0), 1, orbits.gradient_descent(0.1))


@each_function
def test_results(tiny, name):
    """Every teleport stays on its level set; those to the orbit's maximum reach it and win."""
    run = tiny(f"symmetry-teleportation/{name}.py")[0]
    arrays, metrics = run.arrays[name], run.records[name]["metrics"]
    assert set(metrics) == set(so2.ARMS)
    teleported = {arm for arm in metrics if "largest_drift" in metrics[arm]}
    assert teleported == {"gd_random", "gd_published", "gd_maximum", "adagrad_maximum"}
    for arm in teleported:
        loss = arrays[f"{arm}_loss"][arrays[f"{arm}_when"]]
        assert (np.abs(arrays[f"{arm}_drift"]) <= 1e-12 * np.maximum(1, loss)).all()
        assert metrics[arm]["largest_relative_drift"] <= 1e-12
        assert (arrays[f"{arm}_speed_of_orbit"] >= arrays[f"{arm}_speed"][arrays[f"{arm}_when"]] * (1 - 1e-9)).all()
    for arm in ("gd_maximum", "adagrad_maximum"):
        assert metrics[arm]["speed_share"] == pytest.approx(1, rel=1e-9)
        assert metrics[arm]["degrees_from_newton"] < 1e-3
        assert metrics[arm]["final_loss"][0] < metrics[arm.removesuffix("_maximum")]["final_loss"][0] / 10
    assert metrics["newton"]["final_loss"][0] < 1e-20
    assert run.records[name]["seeds"] == [1, 2]
    assert "largest drift" in run.stdout


@each_function
def test_random_starts_descend_each_by_itself(tiny, name):
    """The final losses against a loop over starts, in the window; a start that diverges is NaN and stops nobody."""
    function, s = FUNCTIONS[name]
    arrays = tiny(f"symmetry-teleportation/{name}.py")[0].arrays[name]
    starts, loss = torch.from_numpy(arrays["starts"]), arrays["gd_starts_loss"]
    (left, right), (bottom, top) = function.window
    assert starts.shape == (2, 20) and loss.shape == (20,)
    assert (
        (starts[0] > left).all()
        and (starts[0] < right).all()
        and (starts[1] > bottom).all()
        and (starts[1] < top).all()
    )
    steps = 250 if name == "rosenbrock" else s.steps
    for i in range(3):
        last = orbits.descend(function, starts[:, i], steps, orbits.gradient_descent(s.lr))[0][-1]
        expected = float(function.loss(*last))
        assert loss[i] == pytest.approx(expected, rel=1e-9) or not np.isfinite(expected) and np.isnan(loss[i])
    assert np.nanmedian(arrays["gd_maximum_starts_loss"]) < np.nanmedian(loss)


def test_how_often_a_teleport_ends_lower():
    """Planted: lower in 3 of 4 comparable starts; a start from which both diverge is no gain."""
    lower = {"gd_published": [1.0, 1.0, 1.0, np.nan], "gd_random": [3.0, 3.0, 3.0, 3.0], "gd_maximum": [np.nan] * 4}
    arrays = {f"{arm}_starts_loss": np.array(losses) for arm, losses in lower.items()}
    said = so2.from_everywhere(arrays | {"gd_starts_loss": np.array([2.0, 2.0, 2.0, np.nan])})
    assert "alone diverges from 1," in said and "published 75.0% [19.4%, 99.4%], 1 diverged" in said
    assert "random angle 25.0% [0.6%, 80.6%], 0 diverged" in said and "maximum 0.0%" in said and "4 diverged" in said
