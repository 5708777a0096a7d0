"""The published teleports of common/published.py are what the authors' code does, faults and all."""

import torch
from test_sharpness import LEAKY, batch, loss_on, uniform
from torch.testing import assert_close

from common import published
from common.sharpness import Sharpness
from teleport import hidden_layers, preactivation_action, sharpness


def test_published_sharpness_teleport_is_the_published_recipe():
    """Redone step by step as published: two layers, directions new in every step, stale hidden layers, the sum / 10."""
    (W1, W2, W3), x, labels, _, radii = batch(n=30)
    draws = [uniform(9, W1.numel() + W2.numel() + W3.numel(), seed=20 + i) for i in range(3)]
    objectives = iter([Sharpness(x, labels, d, radii, (7, 6, 5, 4), LEAKY) for d in draws])
    loss_fn = loss_on(x, labels)
    result = published.teleport_sharpness(
        (W1, W2, W3), x, loss_fn, lambda: next(objectives), activation=LEAKY, lr=0.3, steps=3, maximize=False
    )

    def act(W, h, T):
        W = list(W)
        for m in (0, 1):
            V = W[m] + T[m] @ W[m]
            W[m + 1] = W[m + 1] @ LEAKY.f(W[m] @ h[m]) @ torch.linalg.pinv(LEAKY.f(V @ h[m]))
            W[m] = V
        return W

    W, h = [W1, W2, W3], hidden_layers((W1, W2, W3), x, LEAKY)
    for d in draws:
        T = [torch.zeros(6, 6).double().requires_grad_(), torch.zeros(5, 5).double().requires_grad_()]
        phi = sharpness(act(W, h, T), loss_fn, d, radii) * 9 / 10
        T = [-0.3 * G for G in torch.autograd.grad(phi, T)]
        W = act(W, h, T)
        h = [x, h[1] + T[0] @ h[1], h[2] + T[1] @ h[2]]
    for mine, theirs in zip(result.weights, W):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    phi = Sharpness(x, labels, draws[0], radii, (7, 6, 5, 4), LEAKY)
    assert_close(result.objective_before, phi((W1, W2, W3)))
    assert_close(result.objective_after, phi(W))


def test_published_sharpness_teleport_stops_above_the_cap_in_both_directions():
    weights, x, labels, directions, radii = batch(n=30)
    phi = Sharpness(x, labels, directions, radii, (7, 6, 5, 4), LEAKY)
    value, options = phi(weights).item(), dict(activation=LEAKY, lr=0.1, steps=2)
    for maximize in (True, False):
        for cap, moves in ((0.89 * value, False), (0.91 * value, True)):  # it sees 0.9 φ
            result = published.teleport_sharpness(
                weights, x, loss_on(x, labels), lambda: phi, maximize=maximize, cap=cap, **options
            )
            assert (result.objective_after != result.objective_before) == moves


def test_published_curvature_teleport_goes_along_the_curve(golden):
    c = golden("curvature")
    weights, M = (c["W0"], c["W1"], c["W2"]), c["curve_M"]
    h = hidden_layers(weights, c["X"], LEAKY)[1]
    up = published.teleport_curvature(weights, c["X"], M, activation=LEAKY, lr=0.1)
    t = 0.1 * c["curve_dkappa"]
    assert_close(up[1], torch.linalg.matrix_exp(t * M) @ c["W1"])
    assert_close(up[2], preactivation_action(c["W2"], c["W1"], h, torch.linalg.matrix_exp(t * M), LEAKY)[0])
    down = published.teleport_curvature(weights, c["X"], M, activation=LEAKY, lr=0.1, maximize=False)
    assert_close(down[1], torch.linalg.matrix_exp(-t * M) @ c["W1"])
    lost = published.teleport_curvature(weights, c["X"], M, activation=LEAKY, lr=-1e5)
    assert lost[1].isnan().all() and lost[2].isnan().all()
