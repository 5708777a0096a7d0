"""Teleportation: move a network along its parameter symmetries, leaving its loss alone. One file, torch only.

Notation of Zhao, Gower, Walters, Yu, *Improving Convergence and Generalization Using Parameter Symmetries* ("ICLR
2024", arXiv 2305.13404) and Zhao, Dehmamy, Walters, Yu, *Symmetry Teleportation for Accelerated Optimization*
("NeurIPS 2022", arXiv 2205.10637). Columns are samples: X is (d_0, n), n ≥ 1. A network is a tuple (W_1, …, W_L), W_m
of shape (*E, d_m, d_{m-1}): h_m = σ(W_m h_{m-1}), h_0 = X, output W_L h_{L-1}. *E is any ensemble shape, () for one
network: every function works on the whole ensemble at once and returns one result per member. Nothing is changed in
place; what is made is made with the dtype and on the device of the arguments, whatever torch's defaults are.

    action = preactivation_action                                    # or postactivation_action, rescaling_action
    moved = teleport(weights, x, loss_fn, objective=squared_gradient_norm, action=action, activation=leaky_relu(),
                     lr=1e-2, steps=10)
    weights = moved.weights                                          # moved.drift is loss_after - loss_before

Group actions act on a pair (U, V) = (W_{m+1}, W_m). They are written in minimal-change form: the identity at g = I for
any data, exact as soon as the samples number at most the units (see each action), a least-squares fit otherwise.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Weights = Sequence[Tensor]  # (W_1, …, W_L)
Loss = Callable[[Weights], Tensor]  # weights -> one number per member, shape E
Action = Callable[..., tuple[Tensor, Tensor]]  # (U, V, h, g, activation) -> (U', V')

# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Activation(NamedTuple):
    """An elementwise σ, with σ' (a function of the pre-activation) and σ^-1 (None where σ is not injective)."""

    name: str
    f: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor] | None
    homogeneous: bool  # σ(sz) = sσ(z) for s > 0: what rescaling needs; also σ'' = 0 almost everywhere


def leaky_relu(slope: float = 0.1) -> Activation:
    """max(z, slope·z), slope in [0, 1]: at 0 it is ReLU and has no inverse. Raises ValueError for another slope."""
    if not 0 <= slope <= 1:
        raise ValueError(f"slope must be in [0, 1], got {slope}")
    return Activation(
        f"leaky_relu({slope})" if slope else "relu",
        lambda z: torch.nn.functional.leaky_relu(z, slope),
        lambda z: torch.ones_like(z).where(z > 0, slope),
        (lambda y: torch.where(y > 0, y, y / slope)) if slope else None,
        True,
    )


def _sigmoid_derivative(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


RELU = leaky_relu(0.0)
TANH = Activation("tanh", torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, torch.atanh, False)
SIGMOID = Activation("sigmoid", torch.sigmoid, _sigmoid_derivative, torch.logit, False)
IDENTITY = Activation("identity", lambda z: z, torch.ones_like, lambda y: y, True)


def forward(weights: Weights, x: Tensor, activation: Activation) -> Tensor:
    """The network's output W_L h_{L-1}, (*E, d_L, n); weights W_m (*E, d_m, d_{m-1}), x (d_0, n) or (*E, d_0, n).

    Raises ValueError for fewer than two matrices, shapes that do not chain, no samples, values that are not finite,
    tensors that are not of one floating-point dtype on one device.
    """
    return weights[-1] @ hidden_layers(weights, x, activation)[-1]


def hidden_layers(weights: Weights, x: Tensor, activation: Activation) -> list[Tensor]:
    """[h_0 = X, h_1, …, h_{L-1}], h_m of shape (*E, d_m, n). Raises ValueError as `forward` does."""
    _check_network(weights, x)
    h = [x]
    for W in weights[:-1]:
        h.append(activation.f(W @ h[-1]))
    return h


# ---------------------------------------------------------------------------------------------------------------------
# Group actions


def preactivation_action(U: Tensor, V: Tensor, h: Tensor, g: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """g acts before σ (ICLR 2024, Figures 4 and 5): V' = gV, U' = U + (Uσ(Vh) − Uσ(gVh)) σ(gVh)^+.

    U (*E, d_{m+1}, d_m), V (*E, d_m, d_{m-1}), h (*E, d_{m-1}, n) or (d_{m-1}, n) the input of V, g (*E, d_m, d_m) or
    (d_m, d_m). Returns (U', V'). The output U'σ(V'h) = Uσ(Vh) exactly if σ(gVh) has full column rank (so n ≤ d_m);
    otherwise U' is the least-squares solution nearest to U. At full row rank U' is the published Uσ(Vh) σ(gVh)^+.
    Raises ValueError for shapes that do not chain, a singular g, values that are not finite, tensors that are not of
    one floating-point dtype on one device.
    """
    _check_pair(U, V, h, g)
    z = V @ h
    gz = g @ z
    moved = activation.f(gz)
    return U + _times_pinv(U @ (activation.f(z) - moved), moved), g @ V


def postactivation_action(U: Tensor, V: Tensor, h: Tensor, g: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """g acts after σ (NeurIPS 2022, Eq. 8): U' = Ug^-1, V' = V + (σ^-1(gσ(Vh)) − Vh) h^+.

    Shapes as in `preactivation_action`; returns (U', V'). Exact if h has full column rank (so n ≤ d_{m-1}). Raises
    ValueError as there, and if σ has no inverse or gσ(Vh) leaves its range.
    """
    if activation.inverse is None:
        raise ValueError(f"activation {activation.name} has no inverse, which the post-activation action needs")
    _check_pair(U, V, h, g)
    z = V @ h
    target = activation.inverse(g @ activation.f(z))
    _require(target.isfinite().all(), f"g: g σ(Vh) leaves the range of {activation.name}")
    batch = torch.broadcast_shapes(g.shape[:-2], U.shape[:-2])  # else solve may take U for a stack of vectors
    moved = torch.linalg.solve(_single(g), _single(U).expand(*batch, *U.shape[-2:]), left=False)
    return moved.to(U.dtype), V + _times_pinv(target - z, h)


def rescaling_action(U: Tensor, V: Tensor, s: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Scale unit i's input by s_i and undo it at its output: V' = diag(s) V, U' = U diag(s)^-1.

    U, V as in `preactivation_action`, s (*E, d_m) or (d_m,), positive. Exact for every input whenever σ is positively
    homogeneous. Returns (U', V').
    Raises ValueError for another activation, an s that is not positive and finite, shapes that do not chain.
    """
    if not activation.homogeneous:
        raise ValueError(f"activation {activation.name} is not positively homogeneous, which rescaling needs")
    _check_alike(U=U, V=V, s=s)
    if min(U.ndim, V.ndim) < 2 or U.shape[-1] != V.shape[-2] or s.shape[-1:] != V.shape[-2:-1]:
        raise ValueError(f"shapes do not chain: U {_shape(U)}, V {_shape(V)}, s {_shape(s)}")
    _require(((s > 0) & s.isfinite()).all(), "s must be positive and finite")
    _check_broadcast(U=U.shape[:-2], V=V.shape[:-2], s=s.shape[:-1])
    _check_finite(U=U, V=V)
    return U / s.unsqueeze(-2), V * s.unsqueeze(-1)


def apply_to_layers(
    weights: Weights,
    x: Tensor | None,
    elements: Sequence[Tensor | None],
    action: Action,
    activation: Activation,
) -> tuple[Tensor, ...]:
    """Act with one group element per hidden layer, first layer first; None leaves a layer alone.

    Each action sees the true hidden layer of the network as it has been transformed so far. elements: L−1 matrices for
    `preactivation_action` and `postactivation_action`, L−1 vectors s for `rescaling_action`, which alone needs no x.
    Returns the new weights. Raises ValueError if the number of elements is wrong, and as the actions do.
    """
    if x is None and action is not rescaling_action:
        raise ValueError("x: only rescaling_action does without")
    _check_network(weights, *(() if x is None else (x,)))
    if len(elements) != len(weights) - 1:
        raise ValueError(f"elements: {len(elements)} given, the network has {len(weights) - 1} hidden layers")
    weights, h = list(weights), x
    for m, g in enumerate(elements):
        if g is not None:
            arguments = (g,) if action is rescaling_action else (h, g)
            weights[m + 1], weights[m] = action(weights[m + 1], weights[m], *arguments, activation)
        if action is not rescaling_action and any(later is not None for later in elements[m + 1 :]):
            h = activation.f(weights[m] @ h)
    return tuple(weights)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: each returns one number per member, shape E


def squared_gradient_norm(weights: Weights, loss_fn: Loss) -> Tensor:
    """‖∂L/∂W‖², summed over all layers, shape E: what Theorem 3.1 (ICLR 2024) has a teleport maximize. Differentiable.

    weights: any number of (*E, d_m, d_{m-1}); loss_fn(weights) -> E. The derivative is taken with respect to these
    weights as independent variables, even when they were computed from one another (later layers of a transformed
    network depend on earlier ones through the hidden layers). NaN for members that have diverged. Raises ValueError
    where there are no weights, or the loss is no tensor.
    """
    if not len(weights):
        raise ValueError("weights: none given")
    _check_alike(**_named(weights))

    def total(w: Weights) -> Tensor:
        losses = loss_fn(w)
        _check_alike(loss_fn=losses)
        return losses.sum()

    gradients = torch.func.grad(total)(tuple(weights))
    return sum(torch.linalg.vector_norm(g, dim=(-2, -1)).square() for g in gradients)


def sharpness(
    weights: Weights, loss_fn: Loss, directions: Tensor, radii: Tensor, chunk_size: int | None = None
) -> Tensor:
    """φ (ICLR 2024, Eq. 4): the mean over directions of the loss at W + r d/‖d‖, shape E.

    directions (k, P), P the number of parameters of one member, in the order of the weights, each flattened by rows;
    radii (k,), positive, in the units of the weights. loss_fn(weights) -> E. chunk_size: how many perturbed copies are
    evaluated at once (default: all). Raises ValueError for shapes that do not match, no or a zero direction, a radius
    that is not positive, values that are not finite.
    """
    _check_network(weights)
    P, E = sum(W.shape[-2:].numel() for W in weights), torch.broadcast_shapes(*(W.shape[:-2] for W in weights))
    if directions.ndim != 2 or directions.shape[1] != P or radii.shape != directions.shape[:1] or not len(radii):
        raise ValueError(f"directions {_shape(directions)} and radii {_shape(radii)} must be (k, {P}) and (k,), k > 0")
    if chunk_size is not None:
        _check_count("chunk_size", chunk_size)
    _check_alike(directions=directions)
    if {directions.device, radii.device} != {weights[0].device}:
        raise ValueError(f"directions and radii must be on the weights' device, {weights[0].device}")
    norms = directions.norm(dim=1)
    _require((norms > 0).all() & norms.isfinite().all(), "directions: each must be finite and not zero")
    _require((radii.isfinite() & (radii > 0)).all(), "radii must be finite and positive")
    steps = _split(directions * (radii / norms).unsqueeze(1), weights)

    def perturbed(step: Weights) -> Tensor:
        return _check_members("loss_fn", loss_fn(tuple(W + D for W, D in zip(weights, step))), E)

    return torch.func.vmap(perturbed, chunk_size=chunk_size)(steps).mean(0)


def curvature(weights: Weights, x: Tensor, lie_elements: Sequence[Tensor], activation: Activation) -> Tensor:
    """ψ (ICLR 2024, Eq. 5): curvature at t = 0 of γ(t), the network moved by the post-activation action of exp(tM).

    This is Table 1's ψ: all hidden layers, elements of norm 1. Figure 4's is another one, see `curve_curvature`.
    x (d_0, n) or (*E, d_0, n); lie_elements: M_m (*E, d_m, d_m) or (d_m, d_m) for each of the L−1 hidden layers. γ',
    γ'' are sums over hidden layers of the closed forms of Eqs. 57 and 60; κ by Eq. 47, in 1 / the weights' unit,
    shape E. Raises ValueError for shapes that do not match, values that are not finite, an activation without an
    inverse, and where the curve of a member stands still (κ is undefined).
    """
    first, second = _curve_derivatives(weights, x, lie_elements, activation)
    speed = _inner(first, first)
    _require((speed > 0).all(), "lie_elements: γ' = 0, the curve stands still and has no curvature")
    along = _inner(first, second) / speed
    across = [b - _like(along, b) * a for a, b in zip(first, second)]
    # Eq. 47, κ = √(‖γ'‖²‖γ''‖² − (γ'·γ'')²) / ‖γ'‖³, is ‖γ'' across γ'‖ / ‖γ'‖², in which nothing cancels.
    return _inner(across, across).sqrt() / speed


def _inner(first: Weights, second: Weights) -> Tensor:
    return sum((a * b).sum((-2, -1)) for a, b in zip(first, second))


def curve_curvature(
    U: Tensor, V: Tensor, h: Tensor, M: Tensor, activation: Activation, t: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """κ and dκ/dt at t of the curve t ↦ preactivation_action(U, V, h, exp(tM)): two tensors, each of shape E.

    This is Figure 4's ψ (ICLR 2024, Section 4; κ as in Eq. 47): the pre-activation curve of the layers 2 and 3, M
    uniform in [0, 1]. Table 1's is another one, see `curvature`.
    U, V, h, M as U, V, h, g in `preactivation_action`; t a number, or one per member (shape E). For homogeneous σ
    (σ'' = 0 almost everywhere) and a full-rank hidden layer a closed form; otherwise forward mode, nested three deep.
    At full row rank the published action runs through the same curve, so κ and dκ/dt are the published ones. dκ/dt is
    NaN where the curve is straight. Raises ValueError for shapes that do not chain, values that are not finite, and
    where the curve of a member stands still (κ is undefined).
    """
    _check_pair(U, V, h, M, "M", invertible=False)
    if M.dtype.itemsize < 4:  # see `_single`
        half = curve_curvature(U.float(), V.float(), h.float(), M.float(), activation, t)
        return half[0].to(M.dtype), half[1].to(M.dtype)
    t = torch.as_tensor(t, dtype=M.dtype, device=M.device)
    _require(t.isfinite().all(), "t must be finite")
    _check_broadcast(t=t.shape, **{name: a.shape[:-2] for name, a in dict(U=U, V=V, h=h, M=M).items()})
    a, b, c = _action_curve(U, V, h, M, activation, t)
    speed = _inner(a, a)
    _require((speed > 0).all(), "M: γ' = 0, the curve stands still and has no curvature")
    along = _inner(a, b) / speed
    across = [q - _like(along, q) * p for p, q in zip(a, b)]
    length = _inner(across, across).sqrt()
    return length / speed, (_inner(across, c) / length - 3 * along * length) / speed


Jet = tuple[tuple[Tensor, Tensor], ...]  # three derivatives of a curve, each one (of U', of V')


def _action_curve(U: Tensor, V: Tensor, h: Tensor, M: Tensor, activation: Activation, t: Tensor) -> Jet:
    """γ', γ'', γ''' of the curve in `curve_curvature`: three pairs (of U', of V'). See there."""
    g = torch.linalg.matrix_exp(t[..., None, None] * M)
    gV = [g @ V]  # Taylor coefficients in t of gV, of A = σ(gVh) and of F = Uσ(Vh) − UA; U' = U + F A^+
    for k in (1, 2, 3):
        gV.append(M @ gV[-1] / k)
    z = [g @ (V @ h)]
    for k in (1, 2, 3):
        z.append(M @ z[-1] / k)
    slope = activation.derivative(z[0])
    A = [slope * z_k for z_k in z]
    wide = A[0].shape[-2] <= A[0].shape[-1]
    _, R = torch.linalg.qr(A[0].mT if wide else A[0])
    if not (activation.homogeneous and _full_rank(R, max(A[0].shape[-2:]))):
        return _action_curve_forward_mode(U, V, h, M, activation, g)
    F = [-U @ A_k for A_k in A]
    F[0] = F[0] + U @ activation.f(V @ h)
    # From here in coordinates in which A is orthonormal at t; no inverse but that of R is needed.
    if wide:  # A^+ = A^T (A A^T)^-1
        A = [torch.linalg.solve_triangular(R.mT, A_k, upper=False) for A_k in A]
        A_T = [A_k.mT for A_k in A]
        U_t = _series_quotient(_series_product(F, A_T), _series_product(A, A_T))
        U_t = [torch.linalg.solve_triangular(R.mT, U_k, upper=False, left=False) for U_k in U_t]
    else:  # A^+ = (A^T A)^-1 A^T
        A, F = ([torch.linalg.solve_triangular(R, B_k, upper=True, left=False) for B_k in B] for B in (A, F))
        A_T = [A_k.mT for A_k in A]
        U_t = _series_product(_series_quotient(F, _series_product(A_T, A)), A_T)
    return tuple((k * U_k, k * V_k) for k, U_k, V_k in zip((1, 2, 6), U_t[1:], gV[1:]))


def _series_product(A: list[Tensor], B: list[Tensor]) -> list[Tensor]:
    """Taylor coefficients of AB from those of A and B."""
    return [sum(A[i] @ B[k - i] for i in range(k + 1)) for k in range(len(A))]


def _series_quotient(B: list[Tensor], G: list[Tensor]) -> list[Tensor]:
    """Taylor coefficients of B G^-1 from those of B and of G, whose first one is the identity."""
    X = []
    for k, B_k in enumerate(B):
        X.append(B_k - sum(X[i] @ G[k - i] for i in range(k)))
    return X


def _action_curve_forward_mode(U: Tensor, V: Tensor, h: Tensor, M: Tensor, activation: Activation, g: Tensor) -> Jet:
    """`_action_curve` for any σ and any rank. exp(sM) to third order in s is all that three derivatives see."""
    target, zero, one = U @ activation.f(V @ h), V.new_zeros(()), V.new_ones(())

    def curve(s: Tensor) -> tuple[Tensor, Tensor]:
        step = g + s * (M @ g) + s**2 / 2 * (M @ M @ g) + s**3 / 6 * (M @ M @ M @ g)
        moved = activation.f(step @ V @ h)
        return U + (target - U @ moved) @ torch.linalg.pinv(moved), step @ V

    def derivative(f: Callable) -> Callable:
        return lambda s: torch.func.jvp(f, (s,), (one,))[1]

    first = derivative(curve)
    second = derivative(first)
    return first(zero), second(zero), derivative(second)(zero)


def _curve_derivatives(
    weights: Weights, x: Tensor, lie_elements: Sequence[Tensor], activation: Activation
) -> tuple[list[Tensor], list[Tensor]]:
    """γ' (Eq. 57) and γ'' (Eq. 60) of `curvature`: two lists with one (*E, d_m, d_{m-1}) per layer.

    Where the input is wide (d_0 > n), the first layer's are coordinates (*E, d_1, n) in an orthonormal basis of the
    space that the samples span: the same inner products, and x is factored once for the whole ensemble.
    """
    _check_network(weights, x)
    if activation.inverse is None:
        raise ValueError(f"activation {activation.name} has no inverse, which the post-activation action needs")
    if len(lie_elements) != len(weights) - 1:
        raise ValueError(f"lie_elements: {len(lie_elements)} given, the network has {len(weights) - 1} hidden layers")
    first, second = [0] * len(weights), [0] * len(weights)
    h = x
    for m, (M, V, U) in enumerate(zip(lie_elements, weights, weights[1:])):
        _check_pair(U, V, h, M, f"lie_elements: M_{m + 1}", invertible=False)
        # The curve in V's output is z(t) = σ^-1(exp(tM) σ(Vh)): from σ(z)' = Mσ(z) follow z' and z''.
        z = V @ h
        slope, y = activation.derivative(z), activation.f(z)
        y1 = M @ y
        z1, z2 = y1 / slope, M @ y1 / slope
        if not activation.homogeneous:  # σ'' is not zero
            z2 = z2 - z1 * torch.func.jvp(activation.derivative, (z,), (z1,))[1] / slope
        V1, V2 = _times_pinv(torch.cat((z1, z2), -2), h, coordinates=m == 0).chunk(2, -2)
        first[m], first[m + 1] = first[m] + V1, -U @ M  # Eq. 57
        second[m], second[m + 1] = second[m] + V2, U @ M @ M  # Eq. 60
        h = y
    return first, second


# ---------------------------------------------------------------------------------------------------------------------
# Teleportation


class Teleportation(NamedTuple):
    """Where a teleport went, and what it did to the loss (which it must not change) and to its objective; shape E."""

    weights: tuple[Tensor, ...]
    loss_before: Tensor
    loss_after: Tensor
    objective_before: Tensor
    objective_after: Tensor

    @property
    def moved(self) -> Tensor:
        """Did the objective move (bool)? Where no step helped, neither it nor the weights did."""
        same = self.objective_after == self.objective_before
        return ~(same | (self.objective_after.isnan() & self.objective_before.isnan()))

    @property
    def drift(self) -> Tensor:
        """loss_after − loss_before: zero, up to rounding, wherever the action is exact."""
        return self.loss_after - self.loss_before


def teleport(
    weights: Weights,
    x: Tensor,
    loss_fn: Loss,
    *,
    objective: Callable[..., Tensor],
    action: Action,
    activation: Activation,
    lr: float | Tensor,
    steps: int,
    maximize: bool = True,
    cap: float | Tensor | None = None,
    retraction: str = "first_order",
    bound: float | None = None,
    backtracking: bool = False,
    tolerance: float = 1e-3,
) -> Teleportation:
    """Symmetry teleportation (NeurIPS 2022): ascent of the objective over the group, T ← ±lr ∂objective/∂T at T = 0.

    weights: W_m (*E, d_m, d_{m-1}); x (d_0, n) or (*E, d_0, n), the batch that data-dependent actions preserve.
    loss_fn(weights) -> E. objective(weights, loss_fn) -> E or objective(weights) -> E: the larger, the better; the
    smaller, with maximize=False. lr, cap: a positive number, or one per member (E; lr 0 leaves a member alone); a
    member stops once its objective is beyond cap. retraction: the element of T is I + T ("first_order") or exp(T)
    ("exp"), its inverse exact either way. bound ≥ 1 (rescaling only; the gradient norm has no maximum on that orbit): a
    unit's total scale stays within [1/bound, bound]. backtracking: halve a member's step until its objective improves
    and its loss is within tolerance (relative) of where it started; where 30 halvings do not help it stays where it is,
    as `moved` says. Raises ValueError for options that do not exist, numbers that must be positive and finite and are
    not, values that are not finite, and as the actions do.
    """
    _check_ascent(action, steps, retraction, bound, tolerance)
    E = _check_ensemble(weights, x)
    lr, cap = _per_member("lr", lr, x, E, zero=True), None if cap is None else _per_member("cap", cap, x, E)
    weights, score, sign = tuple(W.detach() for W in weights), _score(objective, loss_fn), 1.0 if maximize else -1.0
    act = partial(_act, x=x, action=action, activation=activation, retraction=retraction, bound=bound)
    identity = [_identity(action, W) for W in weights[:-1]]
    scales = [torch.ones_like(i).expand(*E, *i.shape) for i in identity]  # total ones, for bound
    with torch.no_grad():
        start = _check_members("loss_fn", loss_fn(weights), E)
    value_before, moved = None, torch.zeros(E, dtype=torch.bool, device=x.device)
    for _ in range(steps):
        value, gradients = _value_and_gradient(score, weights)
        value_before = value if value_before is None else value_before
        going = torch.ones_like(moved) if cap is None else sign * value <= sign * cap
        if not going.any():
            break
        tangents = _pull_back(weights, x, gradients, identity, action, activation)
        _require(all(t.isfinite().all() for t in tangents), "objective: its gradient is not finite")
        step, trial = torch.where(going, sign * lr, 0), partial(act, weights, tangents, scales)
        with torch.no_grad():
            if backtracking:
                step = _backtrack(partial(_better, trial, score, loss_fn, value, start, sign, tolerance), step)
            if not step.any():
                break
            weights, scales = trial(step)
        moved = moved | (step != 0)
    with torch.no_grad():
        value_after = torch.where(moved, score(weights).detach(), value_before)
        return Teleportation(weights, start, loss_fn(weights), value_before, value_after)


def random_search(
    weights: Weights,
    x: Tensor,
    loss_fn: Loss,
    *,
    action: Action,
    activation: Activation,
    candidates: int,
    scale: float,
    generator: torch.Generator,
    objective: Callable[..., Tensor],
    layers: Iterable[int] | None = None,
    draw: Callable[[Tensor, int, float, torch.Generator], Tensor] | None = None,
    chunk_size: int = 50,
) -> Teleportation:
    """Teleport by sampling: of `candidates` random group elements, keep for each member the one that scores best.

    An element is I + scale·R, R uniform in [−1, 1] with Frobenius norm 1 (so invertible for scale < 1); for rescaling
    s = exp(scale·r), r uniform in [−1, 1]. draw(identity, candidates, scale, generator) replaces that; it returns a
    stack (candidates, *identity.shape). Members share the candidates. layers: indices of the hidden layers to act on
    (default: all at once). A member that no candidate improves stays where it is, as `moved` says. weights, x, loss_fn,
    objective as in `teleport`; both are vectorized over candidates, chunk_size of them at a time. Raises ValueError as
    `teleport` does. Source: a variant of NeurIPS 2022 that samples where the paper ascends.
    """
    _check_count("candidates", candidates)
    _check_count("chunk_size", chunk_size)
    _check_positive("scale", scale)
    E = _check_ensemble(weights, x)
    layers = _check_layers(layers, len(weights) - 1)
    weights, score = tuple(W.detach() for W in weights), _score(objective, loss_fn)
    with torch.no_grad():
        start, value = _check_members("loss_fn", loss_fn(weights), E), _check_members("objective", score(weights), E)
        best, best_value = weights, value.detach()
        elements = [None] * (len(weights) - 1)
        for m in layers:
            identity = _identity(action, weights[m])
            drawn = (draw or _random_elements)(identity, candidates, scale, generator).to(identity)
            if drawn.shape != (candidates, *identity.shape):
                raise ValueError(f"draw must return {candidates} elements {_shape(identity)}, returned {_shape(drawn)}")
            elements[m] = drawn.reshape(candidates, *[1] * len(E), *identity.shape)
        for first in range(0, candidates, chunk_size):
            chunk = [None if g is None else g[first : first + chunk_size] for g in elements]
            count = min(chunk_size, candidates - first)
            there = apply_to_layers(weights, x, chunk, action, activation)  # layers no element touches stay (*E, …)
            stack = tuple(W.expand(count, *S.shape) for W, S in zip(there, weights))
            values = torch.func.vmap(score)(stack).detach()
            values, index = values.masked_fill(values.isnan(), -math.inf).max(0)  # a candidate that overflows loses
            better = values > best_value
            chosen = (S.gather(0, _like(index, W).expand(1, *W.shape))[0] for S, W in zip(stack, weights))
            best = tuple(torch.where(_like(better, C), C, B) for C, B in zip(chosen, best))
            best_value = torch.where(better, values, best_value)
        return Teleportation(best, start, loss_fn(best), value.detach(), best_value)


def _score(objective: Callable[..., Tensor], loss_fn: Loss) -> Loss:
    """Objective as a function of the weights alone, whether or not it also takes loss_fn."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(objective).parameters.values()
    needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return objective if len(needed) == 1 else lambda weights: objective(weights, loss_fn)


def _value_and_gradient(score: Loss, weights: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        independent = tuple(W.detach().requires_grad_() for W in weights)
        value = _check_members("objective", score(independent), weights[0].shape[:-2])
        gradients = torch.autograd.grad(value.sum(), independent, materialize_grads=True)
    return value.detach(), gradients


def _pull_back(
    weights: Weights, x: Tensor, gradients: Weights, identity: Weights, action: Action, activation: Activation
) -> Sequence[Tensor]:
    """∂objective/∂T at T = 0, one tangent per hidden layer: the action's transposed derivative of ∂objective/∂W.

    At the identity the elements of different layers do not interact, and A^+ is not differentiated: it multiplies a
    difference that is zero there. That makes closed forms short; an action of the user's own goes through autograd.
    """
    if action in _TRANSPOSED:
        h = hidden_layers(weights, x, activation)
        pairs = zip(weights[1:], weights, h, gradients[1:], gradients)
        return [_TRANSPOSED[action](*pair, activation) for pair in pairs]
    E = weights[0].shape[:-2]
    tangents = [torch.zeros_like(i).expand(*E, *i.shape).requires_grad_() for i in identity]
    with torch.enable_grad():
        moved = apply_to_layers(weights, x, [i + t for i, t in zip(identity, tangents)], action, activation)
        return torch.autograd.grad(moved, tangents, gradients)


def _pull_preactivation(U: Tensor, V: Tensor, h: Tensor, G_U: Tensor, G_V: Tensor, activation: Activation) -> Tensor:
    z = V @ h
    back = U.mT @ _times_pinv(G_U, activation.f(z).mT)  # G_U (A^+)^T for dU' = -U (σ'(z) ⊙ Tz) A^+
    return G_V @ V.mT - (activation.derivative(z) * back) @ z.mT


def _pull_postactivation(U: Tensor, V: Tensor, h: Tensor, G_U: Tensor, G_V: Tensor, activation: Activation) -> Tensor:
    z = V @ h
    back = _times_pinv(G_V, h.mT)  # G_V (h^+)^T for dV' = (Tσ(z) / σ'(z)) h^+, and dU' = -UT
    return (back / activation.derivative(z)) @ activation.f(z).mT - U.mT @ G_U


def _pull_rescaling(U: Tensor, V: Tensor, h: Tensor, G_U: Tensor, G_V: Tensor, activation: Activation) -> Tensor:
    return (G_V * V).sum(-1) - (G_U * U).sum(-2)


_TRANSPOSED = {
    preactivation_action: _pull_preactivation,
    postactivation_action: _pull_postactivation,
    rescaling_action: _pull_rescaling,
}


def _act(
    weights: Weights,
    tangents: Weights,
    scales: Weights,
    step: Tensor,
    *,
    x: Tensor,
    action: Action,
    activation: Activation,
    retraction: str,
    bound: float | None,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The members with a step at the elements of step·T, and the total scales there."""
    elements = []
    for W, T, total in zip(weights, tangents, scales):
        g, T = _identity(action, W), _like(step, T) * T
        if retraction == "first_order":
            g = g + T
        else:
            g = T.exp() if action is rescaling_action else torch.linalg.matrix_exp(_single(T)).to(T.dtype)
        elements.append(g if bound is None else (total * g).clamp(1 / bound, bound) / total)
    moved = apply_to_layers(weights, x, elements, action, activation)
    moving = step != 0
    scales = [total * torch.where(_like(moving, g), g, 1) for total, g in zip(scales, elements)]
    return tuple(torch.where(_like(moving, W), there, W) for there, W in zip(moved, weights)), scales


def _backtrack(better: Callable[[Tensor], Tensor], step: Tensor) -> Tensor:
    """Halve each member's step until better(step) of all that still move; 0 for those whom 30 halvings do not help."""
    for _ in range(30):
        accepted = better(step) | (step == 0)
        if accepted.all():
            break
        step = torch.where(accepted, step, step / 2)
    return torch.where(accepted, step, 0)


def _better(
    trial: Callable,
    score: Loss,
    loss_fn: Loss,
    value: Tensor,
    start: Tensor,
    sign: float,
    tolerance: float,
    step: Tensor,
) -> Tensor:
    """Is the objective beyond `value` at trial(step), with a loss within tolerance of `start`? Bool, per member."""
    try:
        there, _ = trial(step)
        improved = sign * (score(there).detach() - value) > 0
        return improved & ((loss_fn(there) - start).abs() <= tolerance * start.abs())
    except ValueError:  # too far for somebody: a singular element, out of the range of σ, an overflow
        alone = torch.zeros_like(step, dtype=torch.bool)
        moving = step.nonzero()
        for index in map(tuple, moving) if len(moving) > 1 else ():  # a member depends on no other: who was it?
            only = torch.zeros_like(step)
            only[index] = step[index]
            alone[index] = _better(trial, score, loss_fn, value, start, sign, tolerance, only)[index]
        return alone


def _identity(action: Action, W: Tensor) -> Tensor:
    """The identity element for the hidden layer behind W: a vector of ones for rescaling, a matrix otherwise."""
    ones = W.new_ones(W.shape[-2])
    return ones if action is rescaling_action else torch.diag(ones)


def _random_elements(identity: Tensor, candidates: int, scale: float, generator: torch.Generator) -> Tensor:
    like = dict(generator=generator, device=generator.device, dtype=torch.float32)  # one stream for every dtype
    R = 2 * torch.rand(candidates, *identity.shape, **like).to(identity) - 1
    if identity.ndim == 1:
        return (scale * R).exp()
    return identity + scale * R / R.norm(dim=(-2, -1), keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Linear algebra and checks


def _times_pinv(B: Tensor, A: Tensor, coordinates: bool = False) -> Tensor:
    """B A^+ for B (*E, r, n), A (*E, k, n): by QR at full rank, by pinv as soon as one member is deficient.

    QR's error grows with the condition number, not with its square as the normal equations' does. coordinates=True: if
    k > n, the result may be B R^-1 (*E, r, n), its rows in the orthonormal basis Q of A = QR, which is never formed.
    """
    if A.dtype.itemsize < 4:
        return _times_pinv(_single(B), _single(A), coordinates).to(A.dtype)
    k, n = A.shape[-2:]
    wide = k <= n
    Q, R = torch.linalg.qr(A.mT if wide else A, mode="r" if coordinates and not wide else "reduced")
    if _full_rank(R.detach(), max(k, n)):
        if wide:  # A = R^T Q^T, A^+ = Q R^-T
            return torch.linalg.solve_triangular(R.mT, B @ Q, upper=False, left=False)
        rows = B.reshape(-1, n) if A.ndim == 2 else B  # one solve for the whole ensemble if it shares A
        B = torch.linalg.solve_triangular(R, rows, upper=True, left=False).reshape(B.shape)
        return B if coordinates else B @ Q.mT  # A = QR, A^+ = R^-1 Q^T
    return B @ torch.linalg.pinv(A)


def _single(tensor: Tensor) -> Tensor:
    """Half precision in single precision: torch's linear algebra knows no other."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _full_rank(R: Tensor, size: int) -> bool:
    """Is the condition number of the triangular R (*E, r, r) below the one at which pinv would truncate?"""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device).expand(R.shape)
    inverse = torch.linalg.solve_triangular(R, eye, upper=True)
    condition = R.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1))
    try:
        return bool((condition * size * torch.finfo(R.dtype).eps < 1).all())
    except RuntimeError:  # inside vmap no value can be looked at; pinv is right in both cases
        return False


def _split(flat: Tensor, weights: Weights) -> tuple[Tensor, ...]:
    """Rows of (k, P) as a tuple of tensors (k, *1, d_m, d_{m-1}) that broadcast against the ensemble."""
    sizes = [W.shape[-2:].numel() for W in weights]
    return tuple(part.unflatten(1, W.shape[-2:]) for part, W in zip(flat.split(sizes, 1), weights))


def _like(members: Tensor, tensor: Tensor) -> Tensor:
    """Give a per-member tensor (shape E) trailing dimensions of size 1 to broadcast against (*E, …)."""
    return members.reshape(*members.shape, *[1] * (tensor.ndim - members.ndim))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _require(condition: Tensor | bool, message: str) -> None:
    """Raise ValueError(message) unless the 0-d boolean tensor is true. Inside vmap values cannot be looked at."""
    try:
        holds = bool(condition)
    except RuntimeError:
        return
    if not holds:
        raise ValueError(message)


def _check_alike(**tensors: Tensor) -> None:
    """All are tensors of one floating-point dtype on one device."""
    first = None
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor of a floating-point dtype, got {got}")
        kind = t.dtype, t.device
        first = first or (name, kind)
        if kind != first[1]:
            raise ValueError(
                f"{name} is {kind[0]} on {kind[1]}, {first[0]} {first[1][0]} on {first[1][1]}: the same dtype and the "
                "same device are needed"
            )


def _check_broadcast(**members: torch.Size) -> None:
    try:
        torch.broadcast_shapes(*members.values())
    except RuntimeError:
        found = ", ".join(f"{name} {tuple(E)}" for name, E in members.items())
        raise ValueError(f"ensemble shapes do not fit: {found}") from None


def _check_finite(**tensors: Tensor) -> None:
    """A sum is not finite if one of its terms is not: that is quick to see, and only then is the culprit looked for."""
    tensors = {name: t.detach() for name, t in tensors.items()}
    try:
        if sum(t.sum() for t in tensors.values()).isfinite():
            return
    except RuntimeError:  # inside vmap
        return
    for name, t in tensors.items():
        _require(t.isfinite().all(), f"{name} has values that are not finite")


def _named(weights: Weights) -> dict[str, Tensor]:
    return {f"weights: W_{m}": W for m, W in enumerate(weights, start=1)}


def _check_network(weights: Weights, *batch: Tensor) -> None:
    """The weights and, where there is one, the batch x are in order."""
    if len(weights) < 2:
        raise ValueError(f"weights: a network with a hidden layer needs at least two matrices, got {len(weights)}")
    named = _named(weights) | dict(zip("x", batch))
    _check_alike(**named)
    for m, (V, U) in enumerate(zip(weights, weights[1:]), start=1):
        if V.ndim < 2 or U.ndim < 2 or U.shape[-1] != V.shape[-2]:
            raise ValueError(f"weights: W_{m} {_shape(V)} and W_{m + 1} {_shape(U)} do not chain")
    for name, W in _named(weights).items():
        if 0 in W.shape[-2:]:
            raise ValueError(f"{name} {_shape(W)} is empty")
    for x in batch:
        if x.ndim < 2 or x.shape[-2] != weights[0].shape[-1]:
            raise ValueError(f"x {_shape(x)} does not fit W_1 {_shape(weights[0])}: columns are samples")
        if not x.shape[-1]:
            raise ValueError("x has no samples")
    _check_broadcast(**{name: t.shape[:-2] for name, t in named.items()})
    _check_finite(**named)


def _check_positive(name: str, number: float) -> None:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {number}")


def _check_count(name: str, number: int) -> None:
    try:
        valid = operator.index(number) > 0
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{name} must be a positive whole number, got {number!r}")


def _check_ascent(action: Action, steps: int, retraction: str, bound: float | None, tolerance: float) -> None:
    _check_count("steps", steps)
    _check_positive("tolerance", tolerance)
    if retraction not in ("first_order", "exp"):
        raise ValueError(f'retraction must be "first_order" or "exp", got {retraction!r}')
    if bound is not None and (action is not rescaling_action or not math.isfinite(bound) or bound < 1):
        raise ValueError(f"bound needs the rescaling action and must be finite and at least 1, got {bound}")


def _check_layers(layers: Iterable[int] | None, hidden: int) -> Sequence[int]:
    layers = range(hidden) if layers is None else list(layers)
    if not layers or not set(layers) <= set(range(hidden)):
        raise ValueError(f"layers: {layers}, the network's hidden layers are {list(range(hidden))}")
    return layers


def _check_ensemble(weights: Weights, x: Tensor) -> torch.Size:
    """The ensemble's shape E, once the network is found in order."""
    _check_network(weights, x)
    E = weights[0].shape[:-2]
    if any(W.shape[:-2] != E for W in weights):
        raise ValueError(f"weights: the ensemble shapes differ: {', '.join(_shape(W) for W in weights)}")
    if torch.broadcast_shapes(E, x.shape[:-2]) != E:
        raise ValueError(f"x {_shape(x)} is for more members than the weights have, {tuple(E)}")
    return E


def _check_members(name: str, values: Tensor, E: torch.Size) -> Tensor:
    """What a function of the user's returned, if it is one number per member."""
    if not isinstance(values, Tensor) or values.shape != E:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must return one number per member, a tensor of shape {tuple(E)}, returned {got}")
    return values


def _per_member(name: str, value: float | Tensor, like: Tensor, E: torch.Size, zero: bool = False) -> Tensor:
    """A positive number, or one per member, as a tensor of shape E. zero: single members may have 0."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    positive = (value >= 0) if zero and value.ndim else (value > 0)
    _require((positive & value.isfinite()).all(), f"{name} must be positive and finite")
    try:
        return value.expand(E)
    except RuntimeError:
        raise ValueError(f"{name} must be a number or one per member, {tuple(E)}: it is {_shape(value)}") from None


def _check_pair(U: Tensor, V: Tensor, h: Tensor, g: Tensor, name: str = "g", invertible: bool = True) -> None:
    _check_alike(U=U, V=V, h=h, **{name: g})
    if min(U.ndim, V.ndim, h.ndim) < 2 or U.shape[-1] != V.shape[-2] or h.shape[-2] != V.shape[-1]:
        raise ValueError(f"shapes do not chain: U {_shape(U)}, V {_shape(V)}, h {_shape(h)}")
    if not h.shape[-1]:
        raise ValueError("h has no samples")
    d = V.shape[-2]
    if g.shape[-2:] != (d, d):
        raise ValueError(f"{name} is {_shape(g)}, expected {d}×{d} for V {_shape(V)}")
    if 0 in (*U.shape[-2:], *V.shape[-2:]):
        raise ValueError(f"U {_shape(U)} or V {_shape(V)} is empty")
    _check_broadcast(**{key: t.shape[:-2] for key, t in {"U": U, "V": V, "h": h, name: g}.items()})
    _check_finite(U=U, V=V, h=h, **{name: g})
    if invertible:
        _check_invertible(_single(g.detach()), name)


def _check_invertible(g: Tensor, name: str) -> None:
    distance = (g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)).norm(dim=(-2, -1))
    try:
        if (distance < 0.9).all():  # the Neumann series of g^-1 converges: nothing to compute
            return
    except RuntimeError:  # inside vmap no value can be looked at
        return
    inverse, info = torch.linalg.inv_ex(g)
    condition = inverse.norm(dim=(-2, -1)) * g.norm(dim=(-2, -1))
    _require(((info == 0) & (condition * torch.finfo(g.dtype).eps < 1)).all(), f"{name} is singular")
