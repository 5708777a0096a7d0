"""What the published code does, faults included. Only arms called `published` use this; everything else is exact.

The faults: when elements are applied, layers after the first see hidden layers of the network before the move (stale),
which are then followed by (I + T)h instead of being computed; the actions are not in minimal-change form, so that they
discard what a rank-deficient batch does not show; and with more samples than units the action is a least-squares fit.
The post-activation teleport of NeurIPS 2022 also takes I − T for the inverse of I + T, and an ascent direction to which
later layers' dependence on earlier ones adds a spurious term.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teleport import Activation, Teleportation, curve_curvature, hidden_layers, squared_gradient_norm


def preactivation_action(U: Tensor, V: Tensor, h: Tensor, g: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """U' = Uσ(Vh) σ(gVh)^+, V' = gV: ICLR 2024, as published. Shapes as in `teleport.preactivation_action`."""
    z = V @ h
    return U @ activation.f(z) @ torch.linalg.pinv(activation.f(g @ z)), g @ V


def apply_stale(
    weights: Sequence[Tensor],
    h: Sequence[Tensor],
    elements: Sequence[Tensor],
    action: Callable,
    activation: Activation,
) -> tuple[Tensor, ...]:
    """Act layer by layer with the given hidden layers h, whatever the elements before did to them.

    weights W_m (*E, d_m, d_{m-1}), h = [h_0 = X, h_1, …], one element (*E, d_m, d_m) per hidden layer.
    """
    weights = list(weights)
    for m, g in enumerate(elements):
        weights[m + 1], weights[m] = action(weights[m + 1], weights[m], h[m], g, activation)
    return tuple(weights)


def teleport_gradient_norm(
    weights: Sequence[Tensor],
    x: Tensor,
    loss_fn: Callable,
    *,
    activation: Activation,
    lr: float | Tensor,
    steps: int,
    cap: float = 100.0,
) -> Teleportation:
    """The published ascent on ‖∂L/∂W‖² through the pre-activation action (Figures 5 and 13). Ensembles as in teleport.

    A member stops once its squared gradient norm is above cap. The drift in the result is not zero.
    """
    return _ascend(weights, x, loss_fn, lambda: lambda w: squared_gradient_norm(w, loss_fn), activation, lr, steps, cap)


def teleport_sharpness(
    weights: Sequence[Tensor],
    x: Tensor,
    loss_fn: Callable,
    draw: Callable,
    *,
    activation: Activation,
    lr: float,
    steps: int,
    maximize: bool = True,
    cap: float = 2.0,
) -> Teleportation:
    """The published ascent (or descent) on φ through the pre-activation action (Figure 4). Ensembles as in teleport.

    draw() -> a new objective φ(weights) -> E: every step draws its own directions. The published sum over 9 radii is
    divided by 10, which is φ with 9/10 of lr and 10/9 of cap; up or down, a member stops once φ is above the cap.
    """
    lr = (0.9 if maximize else -0.9) * lr
    return _ascend(weights, x, loss_fn, draw, activation, lr, steps, cap / 0.9)


def teleport_curvature(
    weights: Sequence[Tensor], x: Tensor, M: Tensor, *, activation: Activation, lr: float, maximize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The published step on κ (Figure 4): exp(tM) acts on the layers 2 and 3, t = ±lr dκ/dt, however far that is.

    One network, M (d_2, d_2). Returns the new weights; NaN where the element overflows.
    """
    U, V, h = weights[2], weights[1], hidden_layers(weights, x, activation)[1]
    _, slope = curve_curvature(*(a.double() for a in (U, V, h, M)), activation)
    g = torch.linalg.matrix_exp((lr if maximize else -lr) * slope.to(M) * M)
    if not (g @ V @ h).isfinite().all():
        return weights[0], V * torch.nan, U * torch.nan
    U, V = preactivation_action(U, V, h, g, activation)
    return weights[0], V, U


def _ascend(
    weights: Sequence[Tensor],
    x: Tensor,
    loss_fn: Callable,
    draw: Callable,
    activation: Activation,
    lr: float | Tensor,
    steps: int,
    cap: float,
) -> Teleportation:
    """Each step's objective is draw()'s; the first one measures before and after."""
    weights = tuple(W.detach() for W in weights)
    h = hidden_layers(weights, x, activation)
    identity = [torch.eye(W.shape[-2], dtype=W.dtype, device=W.device) for W in weights[:-1]]
    start, value_before, first = loss_fn(weights), None, draw()
    for step in range(steps):
        objective = draw() if step else first
        independent = tuple(W.clone().requires_grad_() for W in weights)
        value = objective(independent)
        value_before = value.detach() if value_before is None else value_before
        going = (value <= cap)[..., None, None]
        gradients = torch.autograd.grad(value.sum(), independent)
        tangents = [i.new_zeros(*W.shape[:-2], *i.shape).requires_grad_() for W, i in zip(weights, identity)]
        moved = apply_stale(weights, h, [i + T for i, T in zip(identity, tangents)], preactivation_action, activation)
        directions = torch.autograd.grad(moved, tangents, gradients)
        elements = [i + lr * (going * D) for i, D in zip(identity, directions)]
        moved = apply_stale(weights, h, elements, preactivation_action, activation)
        weights = tuple(torch.where(going, new, W) for new, W in zip(moved, weights))
        h = [x] + [torch.where(going, g @ hidden, hidden) for g, hidden in zip(elements, h[1:])]
    return Teleportation(weights, start, loss_fn(weights), value_before, first(weights))


def postactivation_action(
    U: Tensor, V: Tensor, h: Tensor, h_inverse: Tensor, T: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """U' = U(I − T), V' = σ^-1((I + T)σ(Vh)) h^+: NeurIPS 2022, Eq. 8, as published: (I − T)(I + T) is not I.

    U, V, h as in `teleport.postactivation_action`, h_inverse = h^+ (*E, n, d_{m-1}), T (*E, d_m, d_m).
    """
    identity = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    return U @ (identity - T), activation.inverse((identity + T) @ activation.f(V @ h)) @ h_inverse


def teleport_postactivation(
    weights: Sequence[Tensor],
    x: Tensor,
    loss_fn: Callable,
    *,
    activation: Activation,
    lr: float | Tensor,
    steps: int,
    x_inverse: Tensor | None = None,
) -> Teleportation:
    """The published ascent on ‖∂L/∂W‖² through the post-activation action (NeurIPS 2022). Ensembles as in teleport.

    x may differ by member: (*E, d_0, n); lr too, as (*E, 1, 1). x_inverse: the pseudoinverse of x, if it is at hand.
    The drift in the result is large: U(I − T)(I + T)σ(Vh) = U(I − T²)σ(Vh).
    """
    x_inverse = torch.linalg.pinv(x) if x_inverse is None else x_inverse
    weights = tuple(W.detach() for W in weights)
    start, value_before = loss_fn(weights), squared_gradient_norm(weights, loss_fn)
    for _ in range(steps):
        # The direction: moved[m + 1] stays a function of moved[m] through h, so that these are not partial derivatives.
        tangents = [W.new_zeros(*W.shape[:-1], W.shape[-2]).requires_grad_() for W in weights[:-1]]
        moved, h, h_inverse = list(weights), x, x_inverse
        for m, T in enumerate(tangents):
            moved[m + 1], moved[m] = postactivation_action(moved[m + 1], moved[m], h, h_inverse, T, activation)
            h = activation.f(moved[m] @ h)
            h_inverse = torch.linalg.pinv(h)
        gradients = torch.autograd.grad(loss_fn(moved).sum(), moved, create_graph=True)
        directions = torch.autograd.grad(sum(G.square().sum() for G in gradients), tangents)
        stale = hidden_layers(weights, x, activation)
        weights = list(weights)
        for m, (h, D) in enumerate(zip(stale, directions)):
            h_inverse = torch.linalg.pinv(h) if m else x_inverse
            weights[m + 1], weights[m] = postactivation_action(
                weights[m + 1], weights[m], h, h_inverse, lr * D, activation
            )
        weights = tuple(weights)
    return Teleportation(weights, start, loss_fn(weights), value_before, squared_gradient_norm(weights, loss_fn))


def approximate_score(weights: Sequence[Tensor], loss_fn: Callable, m: int, elements: Tensor) -> Tensor:
    """‖g^-T ∂L/∂W_m‖ for candidates g (count, *E, d_m, d_m): how a published variant of NeurIPS 2022 ranks them.

    ∂L/∂W_m behind the pre-activation action would be g^-T ∂L/∂W_m if σ were the identity; the other layers' gradients,
    which the move changes too, do not enter. Returns (count, *E).
    """
    G = torch.func.grad(lambda W: loss_fn((*weights[:m], W, *weights[m + 1 :])).sum())(weights[m])
    batch = torch.broadcast_shapes(elements.shape[:-2], G.shape[:-2])
    return torch.linalg.solve(elements.mT, G.expand(*batch, *G.shape[-2:])).norm(dim=(-2, -1))
