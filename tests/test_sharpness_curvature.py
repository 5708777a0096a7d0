"""Figure 4's parts: the curvature of the pre-activation curve, the fast sharpness objective, and the script's moves."""

import pytest
import torch
from torch.testing import assert_close

import teleport as tp
from common import published
from common.mlp import cross_entropy
from common.sharpness import Sharpness
from teleport import (
    IDENTITY,
    RELU,
    SIGMOID,
    TANH,
    curve_curvature,
    forward,
    hidden_layers,
    leaky_relu,
    preactivation_action,
    sharpness,
)

LEAKY = leaky_relu(0.1)


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def pair(units=5, inputs=6, n=12, outputs=4, E=()):
    return uniform(*E, outputs, units), uniform(*E, units, inputs, seed=1), uniform(*E, inputs, n, seed=2)


def golden_pair(golden):
    c = golden("curvature")
    weights = (c["W0"], c["W1"], c["W2"])
    h = hidden_layers(weights, c["X"], LEAKY)
    return c, weights[2], weights[1], h[1]


# ---------------------------------------------------------------------------------------------------------------------
# curve_curvature


def test_curve_curvature_is_the_published_one(golden):
    c, U, V, h = golden_pair(golden)
    kappa, slope = curve_curvature(U, V, h, c["curve_M"], LEAKY)
    assert_close(kappa, c["curve_kappa"], rtol=1e-9, atol=0)
    assert_close(slope, c["curve_dkappa"], rtol=1e-9, atol=0)


def test_published_and_minimal_change_curves_coincide_at_full_row_rank(golden):
    """So the curvature teleport needs no published arm; with fewer samples than units they differ."""
    c, U, V, h = golden_pair(golden)
    for t in (-0.3, 0.0, 0.2):
        g = torch.linalg.matrix_exp(t * c["curve_M"])
        ours, theirs = preactivation_action(U, V, h, g, LEAKY), published.preactivation_action(U, V, h, g, LEAKY)
        assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-10)
    few = h[:, :3]
    g = torch.linalg.matrix_exp(0.2 * c["curve_M"])
    ours = preactivation_action(U, V, few, g, LEAKY)[0]
    assert (ours - published.preactivation_action(U, V, few, g, LEAKY)[0]).abs().max() > 0.01


@pytest.mark.parametrize("n", (3, 5, 12))  # fewer samples than units, as many, more
@pytest.mark.parametrize("activation", (LEAKY, IDENTITY, TANH), ids=lambda a: a.name)
@pytest.mark.parametrize("t", (0.0, 0.4))
def test_derivatives_of_the_action_curve_match_finite_differences(n, activation, t):
    U, V, h = pair(n=n)
    M = uniform(5, 5, seed=3) / 2
    derivatives = tp._action_curve(U, V, h, M, activation, torch.tensor(t, dtype=torch.float64))

    def curve(s):
        return preactivation_action(U, V, h, torch.linalg.matrix_exp((t + s) * M), activation)

    e = 1e-3
    points = [curve(k * e) for k in (-3, -2, -1, 0, 1, 2, 3)]
    stencils = ((0, 1, -8, 0, 8, -1, 0), (0, -1, 16, -30, 16, -1, 0), (1, -8, 13, 0, -13, 8, -1))
    for order, (stencil, divisor) in enumerate(zip(stencils, (12, 12, 8)), start=1):
        for i in (0, 1):
            expected = sum(w * p[i] for w, p in zip(stencil, points)) / divisor / e**order
            scale = expected.abs().max().item()
            assert_close(derivatives[order - 1][i], expected, rtol=0, atol=1e-5 * scale + 1e-8)


@pytest.mark.parametrize("n", (3, 12))
@pytest.mark.parametrize("activation", (LEAKY, RELU, SIGMOID), ids=lambda a: a.name)
def test_slope_of_the_curvature_matches_finite_differences(n, activation):
    U, V, h = pair(n=n)
    M = uniform(5, 5, seed=3) / 2

    def kappa(t):
        return curve_curvature(U, V, h, M, activation, t)[0]

    e = 1e-5
    expected = (kappa(0.2 + e) - kappa(0.2 - e)) / (2 * e)
    assert_close(curve_curvature(U, V, h, M, activation, 0.2)[1], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", (3, 12))
def test_closed_form_equals_nested_forward_mode(n):
    U, V, h = pair(n=n, E=(2,))
    M, t = uniform(5, 5, seed=3), torch.tensor([0.0, 0.3], dtype=torch.float64)
    closed = tp._action_curve(U, V, h, M, LEAKY, t)
    g = torch.linalg.matrix_exp(t[:, None, None] * M)
    for mine, reference in zip(closed, tp._action_curve_forward_mode(U, V, h, M, LEAKY, g)):
        for a, b in zip(mine, reference):
            assert_close(a, b, rtol=1e-8, atol=1e-9 * b.abs().max().item())


def test_a_dead_unit_takes_the_forward_mode_and_stays_dead():
    U, V, h = pair()
    V[2], h = -1.0, h.abs()  # unit 2 is off for every sample: a row of zeros, no full rank
    M = uniform(5, 5, seed=3) / 2
    M[2] = 0
    M[2, 2] = 0.3
    kappa, slope = curve_curvature(U, V, h, M, RELU)
    e = 1e-5
    near = [curve_curvature(U, V, h, M, RELU, s * e)[0] for s in (-1, 1)]
    assert kappa > 0
    assert_close(slope, (near[1] - near[0]) / (2 * e), rtol=1e-6, atol=1e-8)


def test_curvature_of_a_curve_worked_by_hand():
    """One unit, one weight each: the curve (U e^-tM, V e^tM), a hyperbola."""
    U, V, h, M = (torch.tensor([[v]], dtype=torch.float64) for v in (2.0, 3.0, 1.0, 0.7))
    t = torch.tensor(0.25, dtype=torch.float64)
    u, v = 2 * torch.exp(-0.7 * t), 3 * torch.exp(0.7 * t)
    kappa, slope = curve_curvature(U, V, h, M, LEAKY, t)
    assert_close(kappa, 2 * u * v / (u**2 + v**2) ** 1.5)
    assert_close(slope, -3 * kappa * 0.7 * (v**2 - u**2) / (u**2 + v**2))


def test_ensembles_give_each_member_its_own_curvature():
    U, V, h = pair(E=(2, 3))
    M, t = uniform(2, 3, 5, 5, seed=3), uniform(2, 3, seed=4)
    kappa, slope = curve_curvature(U, V, h, M, LEAKY, t)
    assert kappa.shape == slope.shape == (2, 3)
    for i, j in ((0, 0), (1, 2)):
        one = curve_curvature(U[i, j], V[i, j], h[i, j], M[i, j], LEAKY, t[i, j])
        assert_close(torch.stack(one), torch.stack((kappa[i, j], slope[i, j])), rtol=1e-8, atol=1e-9)


def test_curve_curvature_rejects_bad_input():
    U, V, h = pair()
    M = uniform(5, 5, seed=3)
    with pytest.raises(ValueError, match="M is 4×4, expected 5×5"):
        curve_curvature(U, V, h, M[:4, :4], LEAKY)
    with pytest.raises(ValueError, match="stands still"):
        curve_curvature(U, V, h, 0 * M, LEAKY)
    with pytest.raises(ValueError, match="M has values that are not finite"):
        curve_curvature(U, V, h, M * float("nan"), LEAKY)
    with pytest.raises(ValueError, match="t must be finite"):
        curve_curvature(U, V, h, M, LEAKY, float("inf"))
    with pytest.raises(ValueError, match="do not chain"):
        curve_curvature(U[:, :4], V, h, M, LEAKY)


# ---------------------------------------------------------------------------------------------------------------------
# Sharpness: the objective with its gradient written out


def batch(dims=(7, 6, 5, 4), n=11, k=9, E=()):
    weights = tuple(uniform(*E, o, i, seed=m) for m, (i, o) in enumerate(zip(dims, dims[1:])))
    x, labels = uniform(dims[0], n, seed=10), torch.arange(n) % dims[-1]
    directions = uniform(k, sum(o * i for i, o in zip(dims, dims[1:])), seed=11)
    return weights, x, labels, directions, torch.linspace(0.1, 0.9, k, dtype=torch.float64)


def loss_on(x, labels, activation=LEAKY):
    return lambda weights: cross_entropy(forward(weights, x, activation), labels)


@pytest.mark.parametrize("E", ((), (2, 1)))
@pytest.mark.parametrize("activation", (LEAKY, TANH), ids=lambda a: a.name)
@pytest.mark.parametrize("dims", ((7, 6, 5, 4), (7, 6, 4), (5, 6, 5, 6, 4)), ids=len)
def test_sharpness_objective_is_sharpness_and_so_is_its_gradient(E, activation, dims):
    weights, x, labels, directions, radii = batch(dims, E=E)
    objective = Sharpness(x, labels, directions, radii, dims, activation, chunk=4)  # 9 copies: a last chunk of one
    values, gradients = [], []
    for phi in (objective, lambda w: sharpness(w, loss_on(x, labels, activation), directions, radii)):
        independent = [W.clone().requires_grad_() for W in weights]
        values.append(phi(independent))
        gradients.append(torch.autograd.grad((values[-1] * 2).sum(), independent))
    assert values[0].shape == E
    assert_close(values[0], values[1], rtol=1e-12, atol=0)
    for mine, reference in zip(*gradients):
        assert_close(mine, reference, rtol=1e-10, atol=1e-14)


def test_sharpness_objective_reproduces_the_published_numbers(golden):
    s = golden("sharpness")
    dims = (8, 6, 5, 4)
    objective = Sharpness(s["X"], s["Y"], s["directions"], s["radii"], dims, LEAKY)
    assert_close(objective((s["W0"], s["W1"], s["W2"])), s["mean"], rtol=1e-12, atol=0)


def test_sharpness_objective_rejects_bad_input():
    weights, x, labels, directions, radii = batch()
    dims = (7, 6, 5, 4)
    with pytest.raises(ValueError, match="dims"):
        Sharpness(x, labels, directions[:, :-1], radii, dims, LEAKY)
    with pytest.raises(ValueError, match="dims"):
        Sharpness(x, labels, directions, radii[:-1], dims, LEAKY)
    with pytest.raises(ValueError, match="dims"):
        Sharpness(x[:-1], labels, directions, radii, dims, LEAKY)
    for bad in (0.0, float("nan")):
        spoilt = directions.clone()
        spoilt[3] = bad
        with pytest.raises(ValueError, match="directions"):
            Sharpness(x, labels, spoilt, radii, dims, LEAKY)
    with pytest.raises(ValueError, match="radii"):
        Sharpness(x, labels, directions, radii * float("inf"), dims, LEAKY)
