"""What the figures of the five Q scripts claim, at --preset tiny (their files are checked in test_scripts.py)."""

import importlib
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

from conserved import ACTIVATIONS  # noqa: E402

ELEMENTWISE = ACTIVATIONS[:4]


def metrics(tiny, name):
    return tiny(f"gradient-flow-symmetry/{name}.py")[0].records[name]["metrics"]


def test_dynamics_drift_is_first_order_and_its_control_is_not(tiny):
    for m in metrics(tiny, "Q_dynamics_elementwise").values():
        assert m["order_in_step_size"] == pytest.approx(1, abs=0.1) and abs(m["control_order"]) < 0.1
        assert max(m["drift_at_equal_time"]) < 1e-3


def test_convergence_control_starts_at_one_loss_and_several_quantities(tiny):
    for m in metrics(tiny, "Q_convergence_elementwise").values():
        assert m["control_loss_drift"] < 1e-9 and len({round(Q, 3) for Q in m["Q_start"]}) == 6
        assert np.abs(np.subtract(m["Q_end"], m["Q_start"])).max() < 1e-2 * np.abs(m["Q_start"]).max()
        assert m["loss_end"][2] < m["loss_end"][1] < m["loss_end"][0]  # the widest start converges first


def test_radial_convergence_time_is_proportional_to_the_quantity(tiny):
    m = metrics(tiny, "Q_convergence_radial")
    assert np.ptp(m["loss_start"]) < 1e-6 * m["loss_start"][0]
    assert m["loss_end"] == sorted(m["loss_end"])
    first, second = m["flow_time_over_Q"][:2]
    assert first == pytest.approx(second, rel=0.1)


def test_hessian_control_keeps_the_loss_and_shifts_the_spectrum(tiny):
    for m in metrics(tiny, "Q_hessian_eigenvalues").values():
        assert m["control_loss_drift"] < 1e-9
        assert m["trace"][:4] == sorted(m["trace"][:4]) and m["trace"][-1] > m["trace"][1]
    linear = metrics(tiny, "Q_hessian_eigenvalues")["linear"]
    assert max(linear["loss"][1:]) < 1e-3 and max(linear["largest_other"][2:4]) < 1e-4


def test_distribution_follows_its_closed_form(tiny):
    for m in metrics(tiny, "Q_distribution").values():
        assert abs(m["standard_errors_off"]) < 4 and m["std"] == pytest.approx(m["expected_std"], rel=0.3)


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_moments_of_the_distribution_by_quadrature(activation):
    m, h, n = 3, 5, 2
    x, weights = np.polynomial.hermite_e.hermegauss(150)
    weights = weights / weights.sum()
    v = x / np.sqrt(n)
    term = {"linear": v**2, "relu": np.maximum(v, 0) ** 2, "tanh": np.cosh(v) ** 2, "sigmoid": v + np.exp(v)}[
        activation
    ]
    mean = weights @ term
    scale = 0.5 if activation == "sigmoid" else 1
    expected = scale * m - h * n * mean, scale**2 * 2 * m / h + h * n * (weights @ (term - mean) ** 2)
    found = importlib.import_module("Q_distribution").moments(activation, m, h, n)
    np.testing.assert_allclose(found, expected, rtol=1e-3 if activation == "relu" else 1e-9)
