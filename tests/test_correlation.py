"""Sharpness and curvature, one by one and in stacks, and the experiment behind Table 1 and Figures 9 and 10."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import func

import correlation
import teleport
from common import UserError
from common.data import Dataset
from common.mlp import cross_entropy, published_seeds
from teleport import TANH, curvature, forward, leaky_relu, postactivation_action, sharpness

LEAKY = leaky_relu(0.1)


def random_network(dims, *E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = tuple(torch.randn(*E, o, i, generator=generator).double() / i**0.5 for i, o in zip(dims, dims[1:]))
    elements = tuple(torch.rand(d, d, generator=generator).double() for d in dims[1:-1])
    return weights, elements, generator


def loss_on(x, labels):
    return lambda weights: cross_entropy(forward(weights, x, LEAKY), labels)


def member(weights, i):
    return tuple(W[i] for W in weights)


# Curvature


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
            torch.testing.assert_close(kappa[i, j], single, rtol=1e-12, atol=0)


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
    torch.testing.assert_close(doubled, expected, rtol=1e-9, atol=0)


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
        (((V, U), x, (M,), teleport.RELU), "relu has no inverse"),
    ):
        with pytest.raises(ValueError, match=message):
            curvature(*arguments)


# Sharpness


def test_sharpness_golden(golden):
    s = golden("sharpness")
    weights = (s["W0"], s["W1"], s["W2"])
    loss = loss_on(s["X"], s["Y"])
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
    phi = sharpness(weights, loss_on(x, labels), directions, radii, chunk_size=3)
    for i in range(3):
        losses = []
        for d, r in zip(directions, radii):
            flat = torch.cat([W[i].flatten() for W in weights]) + r * d / d.norm()
            parts = flat.split([W[i].numel() for W in weights])
            losses.append(loss_on(x, labels)(tuple(p.view(W[i].shape) for p, W in zip(parts, weights))))
        torch.testing.assert_close(phi[i], torch.stack(losses).mean(), rtol=1e-12, atol=0)


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
            sharpness(network, loss_on(x, labels), d, r)


# Table 1


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 9, generator=generator), torch.randint(3, (60,), generator=generator)
    return Dataset("random", "random", x, y, x, y, (1, 3, 3), {})


SETUP = correlation.SETUPS["MNIST"]._replace(dims=(9, 6, 5, 3))
SETTINGS = correlation.Settings(epochs=2, batches=5, samples=20)  # a pass over the data is 3 batches


def test_measures_are_sharpness_and_curvature_with_the_published_draws(data):
    weights = tuple(W.float() for W in random_network(SETUP.dims, 3)[0])
    phi, psi = correlation.measure(weights, data, SETUP, SETTINGS)
    assert phi.shape == psi.shape == (3, 5)
    for b, rows in enumerate(correlation.random_batches(60, 5, 20)):
        x, labels = data.x[rows].T, data.y[rows]
        torch.manual_seed(12345 * b)
        elements = [torch.rand(d, d) for d in (6, 5)]
        directions = torch.stack([torch.rand(9 * 6 + 6 * 5 + 5 * 3) for _ in range(20)])
        radii = torch.tensor(np.arange(0.001, 0.2, 0.01)).float()
        expected = sharpness(weights, loss_on(x, labels), directions, radii)
        torch.testing.assert_close(phi[:, b], expected, rtol=1e-6, atol=0)
        expected = curvature(weights, x, [M / M.square().sum().sqrt() for M in elements], LEAKY)
        torch.testing.assert_close(psi[:, b], expected, rtol=1e-5, atol=0)


def test_batches_pass_over_the_data():
    batches = correlation.random_batches(65, 5, 20)
    assert [len(b) for b in batches] == [20] * 5
    assert len(set(torch.cat(batches[:3]).tolist())) == 60  # no sample twice in a pass
    assert torch.cat(batches[3:]).tolist() != torch.cat(batches[:2]).tolist()


def test_runs_do_not_depend_on_their_group(data):
    seeds = published_seeds(4)
    whole, loss = correlation.train(seeds, data, SETUP, SETTINGS)
    part, part_loss = correlation.train(seeds[2:], data, SETUP, SETTINGS)
    torch.testing.assert_close(part_loss, loss[2:])
    for W, V in zip(whole.weights, part.weights):
        torch.testing.assert_close(V, W[2:])


def test_correlation_interval_and_p_value():
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    y = x + 2 * generator.normal(size=50)
    c = correlation.correlation(x.astype(np.float32), y)
    r = np.corrcoef(x, y)[0, 1]
    np.testing.assert_allclose(c["r"], r, rtol=1e-6)
    z = np.arctanh(r) + np.array([-1, 1]) * 1.959963985 / 47**0.5
    np.testing.assert_allclose([c["low"], c["high"]], np.tanh(z), rtol=1e-6)
    permuted = [abs(np.corrcoef(x, generator.permutation(y))[0, 1]) >= abs(r) for _ in range(4000)]
    assert abs(c["p"] - np.mean(permuted)) < 0.01


def test_tiny_results_say_what_their_arrays_say(tiny):
    run = tiny("correlation.py")[0]
    (record,), (arrays,) = run.records.values(), run.arrays.values()
    assert len(record["seeds"]) == 12 and all(a.shape[0] == 12 for a in arrays.values())
    assert {"train_loss", "test_loss", "test_accuracy", "phi", "psi"} <= set(arrays)
    assert ((arrays["test_accuracy"] > 0.2) & (arrays["test_accuracy"] < 1)).all()
    for x, y in (("phi", "test_loss"), ("psi", "test_loss"), ("phi", "psi")):
        c = record["metrics"]["correlations"][f"{x}, {y}"]
        np.testing.assert_allclose(c["r"], np.corrcoef(arrays[x], arrays[y])[0, 1], rtol=1e-6)
        assert c["low"] < c["r"] < c["high"] and f"{c['r']:.3f}" in run.stdout
        assert (f"r({correlation.SYMBOLS[x]}, {correlation.SYMBOLS[y]})" in run.stdout.split("not:")[1]) == (
            c["p"] >= 0.05
        )


def test_too_few_runs_for_an_interval():
    with pytest.raises(UserError, match="at least 4 runs"):
        correlation.experiment(SimpleNamespace(settings=correlation.Settings(seeds=3)))
