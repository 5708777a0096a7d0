"""The fast φ of common/sharpness.py is teleport.sharpness, and so is its gradient."""

import pytest
import torch
from torch.testing import assert_close

from common.losses import cross_entropy
from common.sharpness import Sharpness
from teleport import TANH, forward, leaky_relu, sharpness

LEAKY = leaky_relu(0.1)


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


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
    fits = dict(x=x, labels=labels, directions=directions, radii=radii, dims=(7, 6, 5, 4), activation=LEAKY)
    zero, nan = directions.clone(), directions.clone()
    zero[3], nan[3] = 0.0, float("nan")
    for name, message, values in (
        ("directions", "dims need", (directions[:, :-1], directions[0])),
        ("directions", "directions: each must be finite and not zero", (zero, nan)),
        ("radii", "dims need", (radii[:-1], radii[:, None])),
        ("radii", "radii must be finite and positive", (0 * radii, -radii, radii * float("inf"))),
        ("x", "dims need", (x[:-1], x[0], x[:, :0], x[None])),
        ("labels", "dims need", (labels[:-1], labels[None])),
        ("chunk", "chunk must be positive", (0, -1)),
        ("x", "x has values that are not finite", (x * float("nan"),)),
        ("x", "one floating-point dtype", (x.float(), x.long(), x.to("meta"))),
        ("directions", "one floating-point dtype", (directions.float(), directions.long())),
        ("radii", "one device", (radii.to("meta"),)),
        ("labels", "labels must be class indices", (labels.double(), labels.int())),
    ):
        for value in values:
            with pytest.raises(ValueError, match=message):
                Sharpness(**{**fits, name: value})
    with pytest.raises(ValueError, match="k and n not 0"):
        Sharpness(**{**fits, "directions": directions[:0], "radii": radii[:0]})
    for wrong in (weights[:-1], weights[::-1], (weights[0][:, :-1], *weights[1:])):
        with pytest.raises(ValueError, match="weights are .* dims need"):
            Sharpness(**fits)(wrong)
    for wrong in ((weights[0].expand(2, 6, 7), *weights[1:]), [W.float() for W in weights]):
        with pytest.raises(ValueError, match="weights must share"):
            Sharpness(**fits)(wrong)
