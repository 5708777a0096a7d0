"""displacement_integration.py: distances, their mean over a circle, the published polyline, the --method option."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ellipeinc

import displacement_integration as script
from common import cli
from displacement_integration import CURVES, circle_distance, mean_distance, parabola_distance

STEP = script.Settings().step


def nearest_on_parabola(x, y, kappa):
    """Brute force: every stationary point of the distance to (X, κX²/2), polished by Newton's method."""
    X = np.roots([kappa**2 / 2, 0, 1 - kappa * y, -x] if kappa > 0 else [1 - kappa * y, -x])
    X = np.append(X.real, x)
    for _ in range(3):
        slope = 1.5 * (kappa * X) ** 2 + 1 - kappa * y
        X = X - np.divide((kappa * X) ** 2 * X / 2 + (1 - kappa * y) * X - x, slope, where=slope != 0, out=0 * X)
    return np.hypot(x - X, y - kappa * X**2 / 2).min()


@settings(max_examples=200, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.just(0.0) | st.floats(-6, 6).map(lambda e: 10**e))
def test_parabola_distance_against_brute_force(x, y, kappa):
    assert parabola_distance(x, y, kappa) == pytest.approx(nearest_on_parabola(x, y, kappa), rel=1e-7, abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_parabola_distance_in_the_limits():
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 200))
    np.testing.assert_allclose(parabola_distance(x, y, 0.0), np.abs(y), rtol=1e-15)
    np.testing.assert_allclose(parabola_distance(x, y, 1e-300), np.abs(y), rtol=1e-15)
    for kappa in (1e20, 1e300):  # the upper half of the y-axis
        np.testing.assert_allclose(parabola_distance(x, y, kappa), np.hypot(x, np.minimum(y, 0)), atol=1e-9)
    kappa = np.array([0.1, 1.0, 7.0, 1e6])
    assert np.abs(parabola_distance(x[:, None], kappa * x[:, None] ** 2 / 2, kappa)).max() < 1e-9  # on the curve
    np.testing.assert_allclose(parabola_distance(0.0, 1 / kappa, kappa), 1 / kappa, rtol=1e-15)  # centre of curvature
    for y in (-2.0, 0.5, 3.0):  # on the axis: |y| up to the centre of curvature, sqrt(2y/κ − 1/κ²) beyond
        beyond = np.sqrt(np.maximum(2 * y / kappa - kappa**-2.0, 0))
        np.testing.assert_allclose(parabola_distance(0.0, y, kappa), np.where(kappa * y > 1, beyond, abs(y)), rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2).map(lambda e: 10**e))
def test_circle_distance_is_to_the_circle(x, y, kappa):
    direct = abs(np.hypot(x, y - 1 / kappa) - 1 / kappa)
    assert circle_distance(x, y, kappa) == pytest.approx(direct, rel=1e-9, abs=1e-12)
    assert circle_distance(x, y, 0.0) == abs(y)


def circle_by_elliptic_integrals(a):
    """The mean for the circle of curvature a and r = 1: √(1 + R² − 2R sin θ) integrates to E(·|m), R = 1/a."""
    R = 1 / a
    m = 4 * R / (1 + R) ** 2
    # sin θ = 1 − 2 sin² φ with φ = π/4 − θ/2, so the root is √((1 − R)² + 4R sin² φ); with χ = π/2 − φ it is
    # (1 + R) √(1 − m sin² χ), χ = π/4 + θ/2.
    antiderivative = lambda theta: 2 * (1 + R) * ellipeinc(np.pi / 4 + theta / 2, m) - R * theta  # noqa: E731
    crossing = np.arcsin(min(a / 2, 1))
    below = antiderivative(crossing) - antiderivative(-np.pi / 2)
    above = antiderivative(np.pi / 2) - antiderivative(crossing)
    return (below - above) / np.pi


@pytest.mark.parametrize("a", [0.0005, 0.01, 0.1, 0.5, 0.9, 1.0, 1.7, 2.0, 2.5, 40.0])
def test_circle_mean_against_elliptic_integrals(a):
    value, estimate = mean_distance(CURVES["circle"], a, 1.0, STEP)
    assert value[0, 0] == pytest.approx(circle_by_elliptic_integrals(a), rel=1e-10)
    assert estimate[0, 0] < 1e-9


@pytest.mark.parametrize("a", [0.06, 0.9, 1.0, 1.001, 1.8, 7.98, 159.6])
def test_parabola_mean_against_independent_quadrature(a):
    crossing = np.arcsin((np.sqrt(1 + a**2) - 1) / a)

    def integral(start, end):
        def f(theta):
            return nearest_on_parabola(np.cos(theta), np.sin(theta), a)

        return quad(f, start, end, epsabs=1e-12, epsrel=1e-12, limit=200)[0]

    reference = (integral(-np.pi / 2, crossing) + integral(crossing, np.pi / 2)) / np.pi
    value, estimate = mean_distance(CURVES["parabola"], a, 1.0, STEP)
    assert value[0, 0] == pytest.approx(reference, rel=1e-9)
    assert estimate[0, 0] < 1e-9 * value[0, 0]


@pytest.mark.parametrize("name", CURVES)
def test_error_estimate_bounds_the_error_and_the_rule_converges_geometrically(name):
    kappa, r = script.published_curvatures(name, 3), np.array(getattr(script.Settings(), f"{name}_radii"))
    exact, _ = mean_distance(CURVES[name], kappa, r, 1 / 64)
    errors = []
    for step in (1 / 4, 1 / 8, 1 / 16, 1 / 32):
        value, estimate = mean_distance(CURVES[name], kappa, r, step)
        assert (np.abs(value - exact) <= estimate + 1e-14).all()
        errors.append(np.abs(value - exact).max())
    assert errors[-1] < 1e-13 and errors[2] < 1e-9 and errors[0] > 30 * errors[1]


@pytest.mark.parametrize("name", CURVES)
def test_mean_depends_on_kappa_r_alone(name):
    r = np.array([2.0, 0.3, 1e-3])
    a = np.array([0.0, 1e-9, 0.5, 1.0, 30.0])
    values = np.concatenate([mean_distance(CURVES[name], a / radius, radius, STEP)[0] for radius in r], axis=1)
    np.testing.assert_allclose(values, values[:, :1].repeat(3, 1), rtol=1e-12)
    np.testing.assert_allclose(values[:2], 2 / np.pi, rtol=1e-8)  # a straight line


def test_published_curves(golden):
    recorded = golden("displacement")
    for name, curve in CURVES.items():
        kappa, r = script.published_curvatures(name, 1), np.array(getattr(script.Settings(), f"{name}_radii"))
        exact, _ = mean_distance(curve, kappa, r, STEP)
        curves = np.stack([recorded[f"{name}_r={radius}_value"] for radius in r], axis=1)
        np.testing.assert_array_equal(kappa, recorded[f"{name}_r={r[0]}_kappa"])
        if name == "circle":
            np.testing.assert_allclose(exact, curves, rtol=1e-4)
        else:
            np.testing.assert_allclose(exact[:, :2], curves[:, :2], rtol=1e-2)
            published, estimate = script.published_mean_distance(kappa, r, 1024)
            np.testing.assert_allclose(published, curves, rtol=2e-4)  # the recorded integrals' own tolerance
            np.testing.assert_allclose(published[:, :4], curves[:, :4], rtol=2e-5)
            assert (estimate < 2e-5).all()
            assert 0.12 < (published / exact - 1).max() < 0.14


@pytest.mark.parametrize("name", CURVES)
def test_shapely_converges_to_the_closed_form(name):
    kappa, r = np.array([0.0, 0.7, 9.0]), np.array([0.1, 2.0])
    exact, _ = mean_distance(CURVES[name], kappa, r, STEP)
    errors = []
    for segments in (250, 500, 1000):
        distance = script.shapely_distance(CURVES[name], segments)
        errors.append(np.abs(mean_distance(CURVES[name], kappa, r, STEP, distance)[0] - exact)[1:].max())
    # κr from 0 to 18; the circle of curvature 9 lies wholly inside the larger S_r
    assert errors[-1] < 2e-6 and errors[0] > 10 * errors[-1]


@pytest.mark.parametrize("kappa, r, named", [(-1, 1, "kappa"), (np.nan, 1, "kappa"), (1, 0, "r:"), (1, np.inf, "r:")])
def test_bad_input(kappa, r, named):
    with pytest.raises(ValueError, match=named):
        mean_distance(CURVES["parabola"], kappa, r, STEP)


def test_results_hold_the_curves(tiny):
    run = tiny("displacement_integration.py")[0]
    arrays, metrics = run.arrays["displacement_integration"], run.records["displacement_integration"]["metrics"]
    value, _ = mean_distance(CURVES["parabola"], arrays["parabola_kappa"], arrays["parabola_r"], STEP)
    np.testing.assert_array_equal(arrays["parabola_value"], value)
    for name in CURVES:
        assert max(metrics[name]["relative_error_estimate"]) < 1e-9
        assert metrics[name]["difference_from_radius_1"] < 1e-12
    assert metrics["parabola"]["smallest_at_kappa_r"] == pytest.approx(1.8, abs=0.5)


def test_method_option(tmp_path, capsys):
    """Shapely's results stand beside the closed form's and agree with them; a wrong method is one line."""

    def main(*options):
        argv = ["--preset", "tiny", "--quiet", "--output", str(tmp_path), *options]
        functions = (script.experiment, lambda *_: None, script.report, script.judge)
        cli.main(script.__file__, script.__doc__, script.PRESETS, *functions, {"method": script.METHODS}, argv)

    for method in ((), ("--method", "shapely"), ("--method", "closed-form")):  # the last finds the first's results
        main(*method)
    results = tmp_path / "results" / "tiny"
    names = {path.name for path in results.iterdir()}
    assert names == {f"displacement_integration{m}.{suffix}" for m in ("", "_shapely") for suffix in ("json", "npz")}
    assert '"method": "shapely"' in (results / "displacement_integration_shapely.json").read_text()
    closed, shapely = (np.load(results / f"displacement_integration{m}.npz") for m in ("", "_shapely"))
    for name in CURVES:
        assert 0 < np.abs(shapely[f"{name}_value"] - closed[f"{name}_value"]).max() < 2e-6
    with pytest.raises(SystemExit) as stop:
        main("--method", "polyline")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "shapely" in error and error.count("\n") == 1
