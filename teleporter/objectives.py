"""What a teleport may aim at, for any list of parameters and any ensemble: the larger, the better.

    teleport(weights, x, loss_fn, objective=partial(line_search_decrease, output_fn=…, criterion=…), …)

    squared_gradient_norm (teleport.py)   no maximum on an orbit of rescalings, and at a tuned rate the wrong aim
    line_search_decrease                  what the best step along a direction gains, by the Gauss-Newton parabola
    true_decrease                         what it gains indeed
    look_ahead                            the loss after k steps of the optimizer, on batches of its own
    balance                               ‖incoming‖ = ‖outgoing‖ for every unit, minimal Σ‖W‖²: in closed form

Weights are tensors (*E, …), *E any ensemble shape, () for one network, of which the loss returns one number a member.
What has no maximum needs a bound or a cap (`require_limit`). With the true Hessian in place of Gauss-Newton's the
decrease has a pole wherever the curvature along the direction vanishes, which rescalings reach.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teleport import Loss, Weights

Direction = Callable[[Tensor], Tensor]  # ∂L/∂W of one parameter -> the direction in which it would step, uphill
_WITHOUT_MAXIMUM = {
    "squared_gradient_norm": "is a/s² + b s² in a unit's scale s",
    "gradient_norm": "is a/s² + b s² in a unit's scale s",
    "line_search_decrease": "may grow towards a limit that no element attains",
    "true_decrease": "may grow towards a limit that no element attains",
}


def require_limit(name: str, bound: float | None, cap: float | Tensor | None = None) -> None:
    """ValueError where the objective of this name may have no maximum on the orbit, and neither bound nor cap is given.

    bound: the largest factor by which a unit is rescaled; cap: of the objective.
    """
    why = _WITHOUT_MAXIMUM.get(name) if isinstance(name, str) else None
    if why and bound is None and cap is None:
        raise ValueError(f"{name} {why}, so it has no maximum on the orbit: give a bound on the scales, or a cap on it")


def rescale(
    weights: Weights,
    objective: Callable[..., Tensor],
    loss_fn: Loss | None = None,
    *,
    bound: float | None = None,
    cap: float | Tensor | None = None,
    steps: int = 10,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Ascend an objective over positive rescalings. Returns log s of every hidden layer, (*E, d_m), the objective
    before and after, (E).

    weights: (*E, d_m, d_{m-1}) of a network with a homogeneous activation; objective(weights, loss_fn) or, without
    loss_fn, objective(weights), the larger the better. A member's step has a length (of its largest log-scale) that
    starts at a quarter of log(bound), or log 2, grows by half where the objective grew and halves where it did not,
    which is then undone: steps + 1 evaluations with derivative, whatever happens. bound: s stays within [1/bound,
    bound]; cap: a member above it stops. Raises ValueError for an objective without a maximum if neither is given, a
    bound that is not above 1 and finite, an objective that is not finite at the start or not one number a member.
    """
    require_limit(getattr(getattr(objective, "func", objective), "__name__", ""), bound, cap)
    if bound is not None and not 1 < bound < math.inf:
        raise ValueError(f"bound must be a finite factor above 1, got {bound}")
    score = (lambda W: objective(W, loss_fn)) if loss_fn is not None else objective
    here = [torch.zeros_like(W[..., 0]) for W in weights[:-1]]
    value, slopes = _slopes(score, weights, here)
    if value.shape != weights[0].shape[:-2] or not value.isfinite().all():
        raise ValueError(f"objective must be finite and one number a member, got {value}")
    start, limit = value, math.inf if bound is None else math.log(bound)
    length = torch.full_like(value, math.log(2) if bound is None else limit / 4)
    for _ in range(steps):
        going = torch.ones_like(value, dtype=torch.bool) if cap is None else value <= cap
        largest = torch.stack([g.abs().amax(-1) for g in slopes]).amax(0)
        step = torch.where(going & (largest > 0), length / largest.clamp_min(torch.finfo(largest.dtype).tiny), 0)
        there = [(t + _like(step, g) * g).clamp(-limit, limit) for t, g in zip(here, slopes)]
        trial, new = _slopes(score, weights, there)
        better = trial > value  # NaN is not
        here, slopes = (
            [torch.where(_like(better, x), x, y) for x, y in zip(a, b)] for a, b in ((there, here), (new, slopes))
        )
        value, length = torch.where(better, trial, value), length * torch.where(better, 1.5, 0.5)
    return here, start, value


def rescaled(weights: Weights, log_scales: Sequence[Tensor]) -> list[Tensor]:
    """Incoming rows times s, outgoing columns divided by it; log s (*E, d_m) of every hidden layer."""
    W = list(weights)
    for m, t in enumerate(log_scales):
        W[m], W[m + 1] = W[m] * t.exp().unsqueeze(-1), W[m + 1] * (-t).exp().unsqueeze(-2)
    return W


def _slopes(score: Loss, weights: Weights, log_scales: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The objective at these log-scales, and its derivative in each."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in log_scales]
        value = score(rescaled([W.detach() for W in weights], leaves))
        slopes = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    return value.detach(), slopes


# ---------------------------------------------------------------------------------------------------------------------
# Decrease along a direction


class Parabola(NamedTuple):
    """The loss along −ηu by Gauss-Newton: L − η slope + η²/2 bend, of each member; and what its derivative needs."""

    slope: Tensor  # ∇L·u
    bend: Tensor  # uᵀGu
    gradients: tuple[Tensor, ...]
    direction: tuple[Tensor, ...]
    curved: tuple[Tensor, ...]  # H J u, of the outputs: Gu = Jᵀ of it

    @property
    def decrease(self) -> Tensor:
        """(∇L·u)² / (2 uᵀGu), reached at η = ∇L·u / uᵀGu."""
        return self.slope.square() / (2 * self.bend)


def parabola(
    loss: Tensor,
    outputs: Sequence[Tensor],
    weights: Weights,
    direction: Direction | None = None,
    create_graph: bool = False,
) -> Parabola:
    """The Gauss-Newton parabola of a loss, shape E, that was computed from outputs, which were computed from weights.

    Of the outputs none may have been computed from another. G = JᵀHJ, J = ∂outputs/∂weights, H the loss's Hessian in
    the outputs: positive semidefinite for a convex loss. direction: default ∂L/∂W. create_graph: it can be
    differentiated in the weights. Costs one gradient and one product with J. Raises ValueError where the loss is linear
    in the outputs (nothing bends).
    """
    E, weights = loss.ndim, tuple(weights)
    slopes = torch.autograd.grad(loss.sum(), outputs, create_graph=True, materialize_grads=True)
    if not any(s.requires_grad for s in slopes):
        raise ValueError("loss_fn is linear in the outputs: without curvature the best step is infinite")
    z = [s.view_as(s) if create_graph else s.detach().requires_grad_() for s in slopes]
    gradients = torch.autograd.grad(outputs, weights, z, create_graph=True, materialize_grads=True)
    u = tuple(map(direction, gradients)) if direction else gradients
    u = u if create_graph else tuple(x.detach() for x in u)
    # J u is the derivative of Jᵀz in z along u: no forward mode needed.
    live = [i for i, g in enumerate(gradients) if g.requires_grad]  # the others' parameters are not used
    used = [i for i, s in enumerate(slopes) if s.requires_grad]
    options = dict(create_graph=create_graph, retain_graph=True, materialize_grads=True)
    along = torch.autograd.grad([gradients[i] for i in live], z, [u[i] for i in live], **options)
    curved = torch.autograd.grad([slopes[i] for i in used], outputs, [along[i] for i in used], **options)
    return Parabola(_inner(gradients, u, E), _inner(curved, along, E), gradients, u, curved)


def line_search_decrease(
    weights: Weights, output_fn: Callable[[Weights], Tensor], criterion: Callable, direction: Direction | None = None
) -> Tensor:
    """D = (∇L·u)² / (2 uᵀGu): the decrease of the loss by the best step along −u, G Gauss-Newton's; shape E.

    output_fn(weights) -> outputs (*E, …); criterion(outputs) -> E, convex. direction(∂L/∂W) -> u for each parameter,
    default ∂L/∂W itself (gradient descent); `sign` is Adam's first. Differentiable in the weights. D ignores that the
    network bends, and promises too much where it does.
    """
    with torch.enable_grad():
        independent = _independent(weights)
        outputs = output_fn(independent)
        graph = any(W.requires_grad for W in weights)
        found = parabola(criterion(outputs), [outputs], independent, direction, graph).decrease
    return found if graph else found.detach()


def covectors(found: Parabola, outputs: Sequence[Tensor], weights: Weights) -> tuple[Tensor, ...]:
    """∂D/∂u of one member at fixed weights: with it D is known, to first order, along a whole orbit.

    The objective at Aw is D at w along the direction pulled back by A^-1: for a rescaling of gradient descent u/s² of
    incoming rows and u s² of outgoing ones, for `sign` u/s and u s. One more product with Jᵀ. The graph is not kept.
    """
    Gu = torch.autograd.grad(outputs, tuple(weights), found.curved, materialize_grads=True)
    ratio = (found.slope / found.bend).detach()
    return tuple(ratio * g.detach() - ratio.square() * c for g, c in zip(found.gradients, Gu))


def sign(gradient: Tensor, eps: float = 1e-8) -> Tensor:
    """The direction of Adam's first step (AdaGrad's and RMSprop's up to a factor): g / (|g| + ε)."""
    return gradient / (gradient.abs() + eps)


def true_decrease(
    weights: Weights, loss_fn: Loss, direction: Direction | None = None, steps: Sequence[float] | None = None
) -> Tensor:
    """max_η L(W) − L(W − ηu) over a grid of η ≥ 0, shape E; direction as in `line_search_decrease`.

    steps: the grid, default 31 powers of 2 from 2^-20. Its derivative in the weights is taken at the best η, which does
    not move to first order. As many evaluations of the loss as the grid has points. NaN and infinite losses never win.
    """
    with torch.enable_grad():
        graph = any(W.requires_grad for W in weights)
        W = _independent(weights)
        loss = loss_fn(W)
        gradients = torch.autograd.grad(loss.sum(), W, create_graph=graph, materialize_grads=True)
        u = tuple(map(direction, gradients)) if direction else gradients
    grid = loss.new_tensor([2.0**k for k in range(-20, 11)] if steps is None else list(steps))
    with torch.no_grad():
        along = torch.stack([loss_fn([w - eta * d for w, d in zip(W, u)]) for eta in grid])
        best = grid[along.nan_to_num(math.inf).argmin(0)]
        gain = loss - along.nan_to_num(math.inf).amin(0) > 0  # else the best step is none
    there = loss_fn([w - _like(best, w) * d for w, d in zip(W, u)])
    found = torch.where(gain, loss - there, loss * 0)
    return found if graph else found.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Looking ahead

Rule = Callable[[Tensor, Tensor, Any, int], tuple[Tensor, Any]]  # (W, ∂L/∂W, state or None, step) -> (W, state)


def look_ahead(weights: Weights, losses: Sequence[Loss], held_out: Loss, rule: Rule | Sequence[Rule]) -> Tensor:
    """Minus the loss `held_out` after one step of the optimizer on each of `losses`, from an empty state; shape E.

    losses: loss_fn(weights) -> E, one for each mini-batch; held_out: that of other samples. rule: `descent` or `adam`,
    or one for each parameter. Differentiable in the weights, through all steps: about three gradients a step.
    """
    with torch.enable_grad():
        graph = any(W.requires_grad for W in weights)
        W = _independent(weights)
        rules = [rule] * len(W) if callable(rule) else list(rule)
        states = [None] * len(W)
        for t, loss_fn in enumerate(losses, start=1):
            options = dict(create_graph=graph, materialize_grads=True)
            gradients = torch.autograd.grad(loss_fn(W).sum(), W, **options)
            W, states = zip(*(step(*args, t) for step, *args in zip(rules, W, gradients, states)))
            if not graph:
                W = _independent(W)
    found = -held_out(W)
    return found if graph else found.detach()


def descent(lr: float | Tensor, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Rule:
    """Gradient descent as torch.optim.SGD has it. lr: a number, or one per member (E)."""

    def step(W: Tensor, G: Tensor, state: Tensor | None, t: int) -> tuple[Tensor, Tensor]:
        G = G + weight_decay * W if weight_decay else G
        v = G if state is None else momentum * state + G
        return W - _like(lr, W) * (G + momentum * v if nesterov else v), v

    return step


def adam(
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Rule:
    """Adam, or AdamW (decoupled), as torch.optim has them. lr: a number, or one per member (E)."""

    def step(W: Tensor, G: Tensor, state: tuple | None, t: int) -> tuple[Tensor, tuple]:
        if weight_decay and not decoupled:
            G = G + weight_decay * W
        m, v = state or (torch.zeros_like(G), torch.zeros_like(G))
        m, v = m + (1 - betas[0]) * (G - m), betas[1] * v + (1 - betas[1]) * G * G
        seen = v > 0  # the root has no derivative at 0
        root = torch.where(seen, torch.where(seen, v, 1).sqrt(), 0) / (1 - betas[1] ** t) ** 0.5
        W = W * (1 - _like(lr, W) * weight_decay) if decoupled and weight_decay else W
        return W - _like(lr, W) / (1 - betas[0] ** t) * m / (root + eps), (m, v)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Balance


def balancing(incoming: Tensor, outgoing: Tensor) -> Tensor:
    """log s that makes s²·incoming + outgoing/s² minimal, so equal: ¼ log(outgoing/incoming). 0 where either is 0.

    incoming, outgoing: Σ W² of what writes into a unit and of what reads from it, same shapes.
    """
    both = (incoming > 0) & (outgoing > 0)
    return torch.where(both, (torch.where(both, outgoing, 1) / torch.where(both, incoming, 1)).log() / 4, 0)


def balancing_matrix(incoming: Tensor, outgoing: Tensor) -> Tensor:
    """The same for GL(r): the symmetric T for which M = exp(T) makes tr(M S Mᵀ) + tr(M^-T R M^-1) minimal, (…, r, r).

    incoming S = Σ W Wᵀ of the writers, outgoing R = Σ Wᵀ W of the readers. MᵀM is the geometric mean of S^-1 and R, and
    M S Mᵀ and M^-T R M^-1 then have equal traces (and spectra). 0 where S or R is singular: there is no minimum.
    """
    eps = torch.finfo(incoming.dtype).eps * incoming.shape[-1]
    (s, Q), r = torch.linalg.eigh(incoming), torch.linalg.eigvalsh(outgoing)
    regular = (s[..., 0] > eps * s[..., -1]) & (r[..., 0] > eps * r[..., -1])
    s = torch.where(regular[..., None], s, 1)
    root, inverse = ((Q * s.pow(p).unsqueeze(-2)) @ Q.mT for p in (0.5, -0.5))
    P = inverse @ _function(root @ outgoing @ root, lambda x: x.clamp_min(0).sqrt()) @ inverse
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    return _function(torch.where(regular[..., None, None], P, eye), torch.log) / 2


def balance(weights: Weights, sweeps: int = 100, tolerance: float = 1e-12) -> list[Tensor]:
    """The rescaling that makes Σ‖W_m‖² minimal: log s of every hidden layer, (*E, d_m), for `rescaled`.

    weights: (*E, d_m, d_{m-1}). One hidden layer takes the closed form once; several share matrices, and take it in
    turns until no log-scale moves by more than the tolerance (a convex problem: the minimum). A unit without incoming
    or outgoing weights stays. Raises ValueError for fewer than two matrices.
    """
    if len(weights) < 2:
        raise ValueError(f"weights: a network with a hidden layer needs at least two matrices, got {len(weights)}")
    squares = [W.detach().square() for W in weights]
    total = [torch.zeros_like(S[..., 0]) for S in squares[:-1]]
    for _ in range(sweeps):
        largest = 0.0
        for m, (V, U) in enumerate(zip(squares, squares[1:])):
            t = balancing(V.sum(-1), U.sum(-2))
            squares[m], squares[m + 1] = V * (2 * t).exp().unsqueeze(-1), U * (-2 * t).exp().unsqueeze(-2)
            total[m] = total[m] + t
            largest = max(largest, t.abs().max().item())
        if largest <= max(tolerance, 4 * torch.finfo(V.dtype).eps):
            break
    return total


# ---------------------------------------------------------------------------------------------------------------------


def _function(S: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of a symmetric matrix."""
    values, Q = torch.linalg.eigh((S + S.mT) / 2)
    return (Q * f(values).unsqueeze(-2)) @ Q.mT


def _independent(weights: Weights) -> tuple[Tensor, ...]:
    """The weights as variables of their own, even where they were computed from one another."""
    return tuple(W.view_as(W) if W.requires_grad else W.detach().requires_grad_() for W in weights)


def _inner(a: Weights, b: Weights, E: int) -> Tensor:
    """Σ a·b over all but the first E dimensions, on the device of the first."""
    parts = [(x * y).reshape(*x.shape[:E], -1).sum(-1) for x, y in zip(a, b)]
    return sum(part.to(parts[0].device) for part in parts)


def _like(members: float | Tensor, tensor: Tensor) -> float | Tensor:
    """A number, or a tensor of shape E to broadcast against (*E, …)."""
    if not isinstance(members, Tensor):
        return members
    return members.reshape(*members.shape, *[1] * (tensor.ndim - members.ndim))
