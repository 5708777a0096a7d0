"""Conserved quantities, training loop and Hessians, against recorded numbers, autograd and finite differences."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "gradient-flow-symmetry"))

import relations  # noqa: E402
from conserved import (  # noqa: E402
    ACTIVATIONS,
    conserved_quantity,
    crossing,
    gradient_descent,
    hidden,
    largest_eigenvalue,
    published_normal,
    quantity_scale,
    record_steps,
    scaled_pair,
    squared_loss_hessian,
    two_layer_loss,
)
from nonlinear_action import from_spherical, r_matrix, to_spherical  # noqa: E402

ELEMENTWISE = ACTIVATIONS[:4]


def network(*E, m=3, n=4, h=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (*E, m, h), (*E, n, h), (m, n)
    return (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)


# Recorded numbers


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_recorded_quantity_loss_and_trajectories(golden, activation):
    G = golden("gradient_flow")
    path = gradient_descent(G["U"], G["V"], G["Y"], activation, float(G["lr"]), range(int(G["steps"]) + 1))
    Q, loss = zip(*((conserved_quantity(U, V, activation), two_layer_loss(U, V, G["Y"], activation)) for U, V in path))
    for found, name in ((Q, "Q"), (loss, "loss")):
        expected = torch.cat([G[f"{name}_{activation}"].reshape(1), G[f"{name}traj_{activation}"]])
        torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_recorded_hessian_eigenvalues(golden, activation):
    G = golden("gradient_flow")
    eigenvalues = torch.linalg.eigvalsh(squared_loss_hessian(G["U"], G["V"], G["Y"], activation))
    torch.testing.assert_close(eigenvalues, G[f"hess_eig_{activation}"], rtol=0, atol=1e-9)


def test_recorded_radial_output(golden):
    G = golden("gradient_flow")
    output = G["U"][:, :5] @ hidden(G["V"][:, :5], "radial").T
    torch.testing.assert_close(output, G["radial_out"], rtol=0, atol=1e-12)


# Conservation


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quantity_is_orthogonal_to_the_gradient_of_any_loss(activation):
    """dQ/dt = −⟨∇Q, ∇L⟩ = 0 for losses of U σ(Vᵀ) that have nothing to do with squares."""
    U, V, Y = network(5)
    U.requires_grad_(), V.requires_grad_()
    loss = (U @ hidden(V, activation).mT - Y).sin().pow(3).sum()
    dL = torch.autograd.grad(loss, (U, V))

    def rate(function):
        dF = torch.autograd.grad(function(U, V, activation).sum(), (U, V))
        return sum((a * b).sum((-2, -1)) for a, b in zip(dF, dL))

    scale = sum(d.square().sum((-2, -1)) for d in dL)
    assert (rate(conserved_quantity).abs() < 1e-11 * scale).all()
    assert (rate(quantity_scale).abs() > 1e-4 * scale).all()  # the control is not conserved


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_drift_is_proportional_to_the_step_size(activation):
    U, V, Y = network(m=3, n=4, h=6)
    V = V + 1
    drift = []
    for lr, steps in ((0.02, 100), (0.01, 200), (0.005, 400)):
        ((u, v),) = gradient_descent(U, V, Y, activation, lr, [steps])
        drift.append(float(conserved_quantity(u, v, activation) - conserved_quantity(U, V, activation)))
    assert abs(drift[2]) > 1e-9
    assert drift[0] / drift[1] == pytest.approx(2, rel=0.1) and drift[1] / drift[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batched_equals_one_by_one(activation):
    U, V, Y = network(2, 3)
    for function in (conserved_quantity, quantity_scale):
        one_by_one = torch.stack([function(u, v, activation) for u, v in zip(U.flatten(0, 1), V.flatten(0, 1))])
        torch.testing.assert_close(function(U, V, activation), one_by_one.view(2, 3))
    assert two_layer_loss(U, V, Y, activation).shape == (2, 3)
    hessians = squared_loss_hessian(U, V, Y, activation)
    torch.testing.assert_close(hessians[1, 2], squared_loss_hessian(U[1, 2], V[1, 2], Y, activation))


def test_radial_scaling_is_a_symmetry_and_slows_the_flow_by_its_square():
    U, V, Y = network()
    c = 0.3
    assert two_layer_loss(c * U, c * V, Y, "radial") == pytest.approx(
        float(two_layer_loss(U, V, Y, "radial")), rel=1e-12
    )
    for (u, v), (u_c, v_c) in zip(
        gradient_descent(U, V, Y, "radial", 1e-3, [1, 50]),
        gradient_descent(c * U, c * V, Y, "radial", c**2 * 1e-3, [1, 50]),
    ):
        torch.testing.assert_close(u_c, c * u, rtol=1e-10, atol=0)
        torch.testing.assert_close(v_c, c * v, rtol=1e-10, atol=0)


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_scaled_pair_keeps_the_function_and_moves_the_quantity(activation):
    U, V, Y = network(h=12)
    moved = scaled_pair(U, V, 3.0, activation)
    torch.testing.assert_close(
        moved[0] @ hidden(moved[1], activation).T, U @ hidden(V, activation).T, rtol=0, atol=1e-9
    )
    assert abs(conserved_quantity(*moved, activation) - conserved_quantity(U, V, activation)) > 1


# The training loop and the Hessian


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_steps_are_those_of_autograd(activation):
    U, V, Y = network(3)
    rates = torch.tensor([0.1, 0.03, 0.01], dtype=torch.float64)
    before = U.clone(), V.clone()
    ((u, v),) = gradient_descent(U, V, Y, activation, rates, [3])
    for i, lr in enumerate(rates):
        a, b = U[i].clone().requires_grad_(), V[i].clone().requires_grad_()
        optimizer = torch.optim.SGD([a, b], lr=float(lr))
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(a @ hidden(b, activation).T, Y).backward()
            optimizer.step()
        torch.testing.assert_close(u[i], a.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(v[i], b.detach(), rtol=1e-10, atol=1e-12)
    assert torch.equal(U, before[0]) and torch.equal(V, before[1])  # the caller's weights stay


def test_recorded_states_do_not_change_later():
    U, V, Y = network()
    states = list(gradient_descent(U, V, Y, "tanh", 0.1, [0, 2, 7]))
    assert torch.equal(states[0][0], U) and not torch.equal(states[1][0], states[2][0])
    ((u, v),) = gradient_descent(*states[1], Y, "tanh", 0.1, [5])
    assert torch.equal(u, states[2][0]) and torch.equal(v, states[2][1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hessian_against_finite_differences_of_the_loss(activation):
    U, V, Y = network(m=2, n=3, h=2)
    H = squared_loss_hessian(U, V, Y, activation)
    parameters = torch.cat([U.flatten(), V.flatten()])

    def loss(p):
        return two_layer_loss(p[: U.numel()].view_as(U), p[U.numel() :].view_as(V), Y, activation) ** 2

    e = 1e-4
    steps = e * torch.eye(len(parameters), dtype=torch.float64)
    signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
    for i, j in ((0, 0), (0, 1), (1, 5), (5, 5), (3, 8), (9, 9)):
        second = sum(s * t * loss(parameters + s * steps[i] + t * steps[j]) for s, t in signs) / (4 * e**2)
        assert float(second) == pytest.approx(float(H[i, j]), abs=2e-5 * float(1 + H.abs().max()))


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_largest_eigenvalue_is_the_hessians_where_the_loss_is_zero(activation):
    U, V, _ = network(2, h=8)
    Y = U @ hidden(V, activation).mT
    expected = torch.linalg.eigvalsh(squared_loss_hessian(U, V, Y, activation))[:, -1]
    torch.testing.assert_close(largest_eigenvalue(U, V, activation), expected)


@pytest.mark.parametrize("activation", ELEMENTWISE)
def test_points_of_an_orbit_compute_one_function_at_different_quantities(activation):
    U, V, _ = network(h=12)
    elements = relations.random_elements(5, 12, (0.5, 3.0), 0)
    moved = relations.moved(U, V, elements, activation)
    function = U @ hidden(V, activation).mT
    torch.testing.assert_close(moved[0] @ hidden(moved[1], activation).mT, function.expand(5, -1, -1))
    assert len({round(Q, 3) for Q in conserved_quantity(*moved, activation).tolist()}) == 5


def test_random_starts_have_a_seed_and_a_standard_deviation_each():
    U, V = relations.random_starts(3, 4, 500, [0.1, 0.1, 2.0], 0)
    assert U.shape == (3, 3, 500) and V.shape == (3, 4, 500) and not torch.equal(U[0], U[1])
    assert U[2].std() == pytest.approx(2, rel=0.1) and not torch.equal(U[2][:3], V[2][:3])
    again = relations.random_starts(3, 4, 500, [0.1], 0)
    assert torch.equal(again[0][0], U[0])


def test_crossing_interpolates_and_says_when_it_never_comes():
    assert crossing([0, 10, 20], np.array([3.0, 2.0, 1.0]), 1.5) == pytest.approx(15)
    assert np.isnan(crossing([0, 10], np.array([3.0, 2.0]), 1.5))


def test_record_steps():
    steps = record_steps(400_000, 40)
    assert steps[:2] == [0, 1] and steps[-1] == 400_000 and {4_000, 40_000} <= set(steps) and len(steps) < 240
    assert steps == sorted(set(steps))


def test_published_draw_discards_uniform_numbers():
    torch.manual_seed(12345)
    expected = torch.rand(5, 50).normal_(mean=0, std=0.1)
    assert torch.equal(published_normal(5, 50, 0, 0.1), expected)


# Bad input


def test_bad_input_is_named():
    U, V, Y = network()
    bad = V.clone()
    bad[0, 0] = torch.nan
    hole = V.clone()
    hole[:, 1] = 0
    for call, message in (
        (lambda: conserved_quantity(U, V, "swish"), "activation: 'swish'"),
        (lambda: hidden(V, "swish"), "activation: 'swish'"),
        (lambda: two_layer_loss(U[:, 1:], V, Y, "relu"), "same h"),
        (lambda: two_layer_loss(U, V, Y.T, "relu"), r"Y \(4, 3\)"),
        (lambda: conserved_quantity(U, bad, "relu"), "V: not finite"),
        (lambda: conserved_quantity(U, hole, "radial"), "V: a column is zero"),
        (lambda: list(gradient_descent(U, V, Y, "relu", -0.1, [1])), "lr"),
        (lambda: list(gradient_descent(U, V, Y, "relu", 0.1, [5, 2])), "record"),
        (lambda: r_matrix(bad[0]), "z: not finite"),
        (lambda: to_spherical(torch.ones(1)), "two or more entries"),
        (lambda: from_spherical(torch.tensor(1.0)), "two or more entries"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
