"""The objectives of teleport.py: ψ of Table 1, ψ of Figure 4 and φ, each against its definition. All in float64."""

import pytest
import torch
from test_teleport import LEAKY, losses
from torch import func
from torch.testing import assert_close

import teleport as tp
from common import published
from teleport import (
    IDENTITY,
    RELU,
    SIGMOID,
    TANH,
    curvature,
    curve_curvature,
    hidden_layers,
    postactivation_action,
    preactivation_action,
    sharpness,
)


def random_network(dims, *E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = tuple(torch.randn(*E, o, i, generator=generator).double() / i**0.5 for i, o in zip(dims, dims[1:]))
    elements = tuple(torch.rand(d, d, generator=generator).double() for d in dims[1:-1])
    return weights, elements, generator


def member(weights, i):
    return tuple(W[i] for W in weights)


# ---------------------------------------------------------------------------------------------------------------------
# curvature, Table 1


def curvature_by_definition(weights, x, elements, activation):
    """γ', γ'' by automatic differentiation of the action, one hidden layer at a time; κ by its definition, Eq. 5."""
    first, second = [torch.zeros_like(W) for W in weights], [torch.zeros_like(W) for W in weights]
    h = x
    for m, M in enumerate(elements):

        def curve(t, U=weights[m + 1], V=weights[m], h=h, M=M):
            g = torch.eye(len(M)).double() + t * M + t**2 / 2 * M @ M  # exp(tM), as far as two derivatives see it
            return postactivation_action(U, V, h, g, activation)

        velocity = func.jacrev(curve)  # not func.jvp: nested, it loses a term of torch.linalg.solve (torch 2.13)
        for total, derivative in ((first, velocity), (second, func.jacrev(velocity))):
            U_t, V_t = derivative(x.new_zeros(()))
            total[m + 1], total[m] = total[m + 1] + U_t, total[m] + V_t
        h = activation.f(weights[m] @ h)
    a, b = (torch.cat([W.flatten() for W in derivative]) for derivative in (first, second))
    return ((a @ a) * (b @ b) - (a @ b) ** 2).sqrt() / (a @ a) ** 1.5


def test_curvature_golden(golden):
    c = golden("curvature")
    kappa = curvature((c["W0"], c["W1"], c["W2"]), c["X"], (c["M0"], c["M1"]), LEAKY)
    assert abs(kappa / c["kappa"] - 1) < 1e-9


@pytest.mark.parametrize("samples", [1, 4, 30])  # one; fewer and more than the units of every layer
@pytest.mark.parametrize("activation", [LEAKY, TANH], ids=["leaky_relu", "tanh"])
def test_curvature_is_that_of_the_curve(samples, activation):
    weights, elements, generator = random_network((9, 6, 5, 3), seed=samples)
    x = torch.randn(9, samples, generator=generator).double()
    kappa = curvature(weights, x, elements, activation)
    assert abs(kappa / curvature_by_definition(weights, x, elements, activation) - 1) < 1e-9


def test_curvature_by_finite_differences():
    (V, U), (M,), generator = random_network((4, 3, 2))
    x = torch.randn(4, 10, generator=generator).double()

    def curve(t):
        pair = postactivation_action(U, V, x, torch.linalg.matrix_exp(t * M), LEAKY)
        return torch.cat([W.flatten() for W in pair])

    t = 1e-4
    a, b = (curve(t) - curve(-t)) / (2 * t), (curve(t) - 2 * curve(0) + curve(-t)) / t**2
    kappa = ((a @ a) * (b @ b) - (a @ b) ** 2).sqrt() / (a @ a) ** 1.5
    assert abs(curvature((V, U), x, (M,), LEAKY) / kappa - 1) < 1e-6


@pytest.mark.parametrize("dims", [(40, 7, 6, 3), (5, 7, 6, 3)], ids=["wide", "narrow"])
def test_curvature_member_by_member(dims):
    weights, elements, generator = random_network(dims, 2, 3)
    x = torch.rand(dims[0], 12, generator=generator).double()
    kappa = curvature(weights, x, elements, LEAKY)
    assert kappa.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            single = curvature(member(weights, (i, j)), x, elements, LEAKY)
            assert_close(kappa[i, j], single, rtol=1e-12, atol=0)


def test_curvature_zero():
    (V, U), _, generator = random_network((4, 3, 2))
    x = torch.rand(4, 10, generator=generator).double()
    nilpotent = torch.zeros(3, 3).double()
    nilpotent[0, 1] = 2  # M² = 0: for a piecewise linear σ the curve is a straight line
    assert curvature((V, U), x, (nilpotent,), LEAKY) < 1e-15
    eye = torch.eye(3).double()  # M = I only scales V; with U = 0 that too is a line
    assert curvature((V, 0 * U), x, (eye,), LEAKY) < 1e-15


@pytest.mark.parametrize("d", [6, 40])
def test_curvature_rank_deficient(d):
    """Every sample twice: (B B)(h h)^+ = B h^+, so the curvature stays."""
    weights, elements, generator = random_network((d, 5, 4, 3), 2)
    x = torch.rand(d, 5, generator=generator).double()
    expected = curvature(weights, x, elements, LEAKY)
    doubled = curvature(weights, torch.cat((x, x), 1), elements, LEAKY)
    assert_close(doubled, expected, rtol=1e-9, atol=0)


def test_curvature_refuses_bad_input():
    (V, U), (M,), generator = random_network((4, 3, 2))
    x = torch.rand(4, 10, generator=generator).double()
    nan = float("nan")
    for arguments, message in (
        (((V * nan, U), x, (M,), LEAKY), "W_1 has values that are not finite"),
        (((V, U), x * nan, (M,), LEAKY), "x has values that are not finite"),
        (((V, U), x, (M * nan,), LEAKY), "M_1 has values that are not finite"),
        (((V, U), x, (M, M), LEAKY), "lie_elements: 2 given"),
        (((V, U), x, (M[:2],), LEAKY), "M_1 is 2×3, expected 3×3"),
        (((V, U), x, (0 * M,), LEAKY), "stands still"),
        (((V, U), x, (M,), RELU), "relu has no inverse"),
    ):
        with pytest.raises(ValueError, match=message):
            curvature(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# sharpness


def test_sharpness_golden(golden):
    s = golden("sharpness")
    weights = (s["W0"], s["W1"], s["W2"])
    loss = losses(s["X"], s["Y"])
    assert abs(sharpness(weights, loss, s["directions"], s["radii"]) / s["mean"] - 1) < 1e-9
    for direction, radius, expected in zip(s["directions"], s["radii"], s["losses"]):
        assert abs(sharpness(weights, loss, direction[None], radius[None]) / expected - 1) < 1e-9


def perturbed_networks(dims, members, samples, k):
    weights, _, generator = random_network(dims, members)
    x = torch.rand(dims[0], samples, generator=generator).double()
    labels = torch.randint(dims[-1], (samples,), generator=generator)
    P = sum(W[0].numel() for W in weights)
    directions = torch.rand(k, P, generator=generator).double()
    return weights, x, labels, directions, 0.1 * torch.arange(1, k + 1).double()


def test_sharpness_member_by_member():
    weights, x, labels, directions, radii = perturbed_networks((6, 5, 4, 3), 3, 7, 4)
    phi = sharpness(weights, losses(x, labels), directions, radii, chunk_size=3)
    for i in range(3):
        around = []
        for d, r in zip(directions, radii):
            flat = torch.cat([W[i].flatten() for W in weights]) + r * d / d.norm()
            parts = flat.split([W[i].numel() for W in weights])
            around.append(losses(x, labels)(tuple(p.view(W[i].shape) for p, W in zip(parts, weights))))
        assert_close(phi[i], torch.stack(around).mean(), rtol=1e-12, atol=0)


def test_sharpness_refuses_bad_input():
    weights, x, labels, directions, radii = perturbed_networks((6, 5, 4, 3), 2, 7, 4)
    nan = float("nan")
    for network, d, r, message in (
        (member(weights, slice(1)), 0 * directions, radii, "directions: each must be finite and not zero"),
        (weights, directions * nan, radii, "directions: each must be finite and not zero"),
        (weights, directions, radii * nan, "radii must be finite"),
        (weights, directions[:, 1:], radii, "must be"),
        (weights, directions, radii[1:], "must be"),
        ((weights[0] * nan, *weights[1:]), directions, radii, "W_1 has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            sharpness(network, losses(x, labels), d, r)


# ---------------------------------------------------------------------------------------------------------------------
# curve_curvature, Figure 4


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
