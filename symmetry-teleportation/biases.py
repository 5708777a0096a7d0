"""Biases in homogeneous coordinates: an extra column of the weights, and a hidden unit that is always 1.

Every layer's input ends with a constant 1, and each hidden layer's weights end with the row (0, …, 0, 1) that hands it
on. diag(g, 1) leaves that row alone, whatever the action; it takes no part in training or in gradient norms.
"""

import torch

from teleport import apply_to_layers, preactivation_action, rescaling_action, squared_gradient_norm, teleport

COST = 3  # gradient evaluations of an ascent step: one for ∂L/∂W, about two for a Hessian-vector product
BISECTIONS = 10  # of the last ascent step, one gradient evaluation each


def homogeneous(weights):
    """Append the row (0, …, 0, 1) to each hidden layer's weights (…, d_m, d_{m-1} + 1), the last column the biases."""
    rows = (torch.eye(W.shape[-1]).to(W)[-1:].expand(*W.shape[:-2], 1, -1) for W in weights[:-1])
    return (*(torch.cat([W, row], -2) for W, row in zip(weights, rows)), weights[-1])


def parameters(weights):
    """The opposite: what is trained."""
    return (*(W[..., :-1, :] for W in weights[:-1]), weights[-1])


def gradient_norm(weights, loss_fn):
    """‖∂L/∂W‖² over the parameters: an objective of teleport and random_search."""
    return squared_gradient_norm(parameters(weights), lambda W: loss_fn(homogeneous(W)))


def affine_action(U, V, h, g, activation):
    """The pre-activation action of diag(g, 1), g without its last row and column: the constant unit stays."""
    g = torch.nn.functional.pad(g[..., :-1, :-1], (0, 1, 0, 1))
    g = g + torch.diag_embed(torch.eye(g.shape[-1])[-1]).to(g)
    return preactivation_action(U, V, h, g, activation)


def diagonally_dominant(identity, count, scale, generator):
    """The variant's elements: uniform in [0, 1], each row's sum on the diagonal, then of Frobenius norm `scale`."""
    d = len(identity) - 1
    g = torch.rand(count, d, d, generator=generator)
    g = torch.diagonal_scatter(g, g.sum(-1), dim1=-2, dim2=-1)
    g = torch.nn.functional.pad(scale * g / g.norm(dim=(-2, -1), keepdim=True), (0, 1, 0, 1))
    g[:, -1, -1] = 1  # the constant unit
    return g


def rescale(W, layers, target, loss_fn, activation):
    """Positive rescaling of hidden layers, one number below 1 for all their units, whose ‖∂L/∂W‖² is the target."""

    def rescaled(log_scale):
        elements = [None] * (len(W) - 1)
        for m in layers:
            elements[m] = torch.full_like(W[m][:, 0], log_scale).exp()
            elements[m][-1] = 1  # the constant unit
        return apply_to_layers(W, None, elements, rescaling_action, activation)

    low, high = -10.0, 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient_norm(rescaled(middle), loss_fn) > target else (low, middle)
    return rescaled(high)


def ascend(W, X, loss_fn, target, activation, rate, steps, cap):
    """At most so many steps, up to the cap. Returns the weights whose norm is the target, on the way there (else the
    last ones); how many gradient evaluations that took; and the norms after each step, NaN after the end."""

    def step(W, lr):
        options = dict(objective=gradient_norm, action=affine_action, activation=activation)
        return teleport(W, X, loss_fn, lr=lr, steps=1, **options)

    curve, reached = [gradient_norm(W, loss_fn)], None
    while len(curve) <= steps and curve[-1] < cap:
        moved = step(W, rate)
        if reached is None and moved.objective_after >= target:
            low, high, reached = 0.0, rate, moved.weights
            for _ in range(BISECTIONS):  # the step that crosses the target may be a leap: shorten it
                shorter = step(W, (low + high) / 2)
                if shorter.objective_after >= target:
                    high, reached = (low + high) / 2, shorter.weights
                else:
                    low = (low + high) / 2
            evaluations = COST * len(curve) + BISECTIONS
        W = moved.weights
        curve.append(moved.objective_after)
    if reached is None:
        reached, evaluations = W, COST * (len(curve) - 1)
    curve += [torch.full_like(curve[0], torch.nan)] * (steps + 1 - len(curve))
    return reached, evaluations, torch.stack(curve)
