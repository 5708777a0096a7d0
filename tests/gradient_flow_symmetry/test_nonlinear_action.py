"""Spherical coordinates, R_z and the data-dependent action π(g, H)."""

import sys

import pytest
import torch
from conftest import ROOT, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport import TANH, leaky_relu, preactivation_action

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import symmetry_ensemble as se
from nonlinear_action import data_dependent_action, from_spherical, r_matrix, to_spherical

SIGMAS = [se.LEAKY_RELU, se.SQUARED_LEAKY_RELU]
ids = [sigma.name for sigma in SIGMAS]


def test_recorded_spherical_coordinates_and_r_matrix(golden):
    G = golden("gradient_flow")
    torch.testing.assert_close(to_spherical(G["nl_z"]), G["nl_spherical"], rtol=0, atol=1e-9)
    torch.testing.assert_close(from_spherical(G["nl_spherical"]), G["nl_z"], rtol=0, atol=1e-9)
    torch.testing.assert_close(r_matrix(G["nl_z"]), G["nl_R"], rtol=0, atol=1e-9)


vectors = st.lists(st.sampled_from([0.0, 0.0, -0.0, 1.0, -2.5, 0.3, 1e-200, -1e150]), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(vectors)
def test_spherical_coordinates_and_r_matrix_for_any_vector(entries):
    z = torch.tensor(entries, dtype=torch.float64)
    scale = z.abs().max() if z.abs().max() > 0 else 1.0
    torch.testing.assert_close(from_spherical(to_spherical(z)) / scale, z / scale, rtol=0, atol=1e-14)
    R = r_matrix(z)
    assert torch.equal(R[:, 0], z)
    r = R / scale
    expected = (z / scale).square().sum() * torch.eye(len(z), dtype=torch.float64)
    torch.testing.assert_close(r @ r.T, expected, rtol=0, atol=1e-13)
    assert (R.triu(2) == 0).all()


def test_r_matrix_is_batched_and_keeps_the_sign_of_the_last_entry():
    z = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(r_matrix(z)[1, 2], r_matrix(z[1, 2]))
    assert torch.equal(r_matrix(z)[..., 0], z) and (z[..., -1] < 0).any()
    torch.testing.assert_close(from_spherical(to_spherical(z)), z)


# π(g, H)


@pytest.mark.parametrize("sigma", [*SIGMAS, TANH], ids=lambda sigma: sigma.name)
@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize("minimal_change", [False, True])
def test_pi_is_exact_on_its_batch_up_to_the_width(sigma, n, minimal_change):
    g, H, U = torch.linalg.matrix_exp(normal(0, 4, 16, 16) / 4), normal(1, 4, 16, n), normal(2, 10, 16)
    pi = data_dependent_action(g, H, sigma, minimal_change)
    before, after = U @ sigma.f(H), U @ pi @ sigma.f(g @ H)
    assert ((after - before).norm() / before.norm()) <= 1e-9
    new = normal(3, 4, 16, 50)
    assert ((U @ pi @ sigma.f(g @ new) - U @ sigma.f(new)).norm() / (U @ sigma.f(new)).norm()) > 1e-2


@pytest.mark.parametrize("sigma", SIGMAS, ids=ids)
@pytest.mark.parametrize("n", [16, 40])
def test_pi_is_what_the_preactivation_action_does_to_U_at_full_row_rank(sigma, n):
    U, V, x = normal(0, 10, 16), normal(1, 16, 30), normal(2, 30, n)
    g = torch.linalg.matrix_exp(normal(3, 16, 16) / 4)
    expected, _ = preactivation_action(U, V, x, g, sigma)
    for minimal_change in (False, True):
        moved = U @ data_dependent_action(g, V @ x, sigma, minimal_change)
        torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-8)


def test_pi_for_few_samples_is_the_formula_or_keeps_what_it_does_not_see():
    g, H, sigma = torch.linalg.matrix_exp(normal(0, 8, 8) / 3), normal(1, 8, 3), leaky_relu(0.1)
    formula = sigma.f(H) @ torch.linalg.pinv(sigma.f(g @ H))
    torch.testing.assert_close(data_dependent_action(g, H, sigma), formula)
    assert torch.linalg.matrix_rank(data_dependent_action(g, H, sigma)) == 3
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(data_dependent_action(eye, H, sigma, minimal_change=True), eye)


def test_pi_rejects_bad_input():
    H = normal(0, 4, 3)
    with pytest.raises(ValueError, match="expected 4×4"):
        data_dependent_action(normal(0, 3, 3), H, TANH)
    with pytest.raises(ValueError, match="g: not finite"):
        data_dependent_action(normal(0, 4, 4) / 0, H, TANH)
    with pytest.raises(ValueError, match="H: not finite"):
        data_dependent_action(normal(0, 4, 4), H * torch.nan, TANH)
    with pytest.raises(ValueError, match="g is singular"):
        data_dependent_action(torch.zeros(4, 4, dtype=torch.float64), H, TANH, minimal_change=True)
