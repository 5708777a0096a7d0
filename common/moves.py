"""Moves to sharper, flatter, more and less curved points (Figure 4 of ICLR 2024), and at random of a given size.

A Move is a Teleportation that also says how far it went, so that an arm that follows it can go as far at random. The
moves are of one network with one batch; `attempt` makes them those of a stack of one run (`common.arms.Stack.move`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import published
from common.arms import Stack, draw_batches
from common.data import Dataset
from common.losses import batch_loss
from common.sharpness import Sharpness
from teleport import (
    Activation,
    apply_to_layers,
    curvature,
    curve_curvature,
    hidden_layers,
    leaky_relu,
    preactivation_action,
    rescaling_action,
    squared_gradient_norm,
    teleport,
)

ACTIVATION = leaky_relu(0.1)
RADII = torch.arange(1, 10, dtype=torch.float32, device="cpu") / 10  # published: of φ in Figure 4
MEASURED = ("phi", "psi", "loss", "gradient_norm", "psi_table")  # by a Meter; psi_table: Table 1's ψ
DRIFT = 1e-3  # relative change of the loss that backtracking allows
HALVINGS = 30  # of a step on ψ that goes too far


class Move(NamedTuple):
    """teleport.Teleportation, and its size: the distance between the weights before and after."""

    weights: tuple[Tensor, ...]
    loss_before: Tensor
    loss_after: Tensor
    objective_before: Tensor
    objective_after: Tensor
    size: Tensor


class Draws(NamedTuple):
    """What all arms of a run share in one teleport."""

    x: Tensor  # (d_0, n)
    labels: Tensor  # (n,)
    loss_fn: Callable
    new_phi: Callable  # () -> φ on the batch, with directions that nobody has seen
    phi: Sharpness
    M: Tensor  # (d_2, d_2), uniform in [0, 1]
    generator: torch.Generator

    @classmethod
    def of(cls, x: Tensor, labels: Tensor, dims: Sequence[int], directions: int, generator: torch.Generator) -> "Draws":
        """For a network of widths dims = (d_0, …, d_3), and so many directions for each radius of φ."""
        new_phi = partial(random_sharpness, x, labels, dims, directions, generator)
        phi, M = new_phi(), torch.rand(dims[2], dims[2], generator=generator).to(x)
        return cls(x, labels, batch_loss(x, labels, ACTIVATION), new_phi, phi, M, generator)


class Meter:
    """What is MEASURED on a batch, with directions and elements that no teleport has seen.

    psi is Figure 4's ψ; psi_table is Table 1's (`teleport.curvature`: post-activation action, all hidden layers,
    elements of norm 1), with the elements of Table 1's first batch.
    """

    def __init__(
        self, x: Tensor, labels: Tensor, dims: Sequence[int], directions: int, elements: int, generator: torch.Generator
    ) -> None:
        """x (d_0, n), labels (n,); φ of so many directions for each radius, ψ a mean over so many M."""
        self.x, self.loss_fn = x, batch_loss(x, labels, ACTIVATION)
        self.phi = random_sharpness(x, labels, dims, directions, generator)
        self.M = torch.rand(elements, dims[2], dims[2], generator=generator).to(x)
        generator = torch.Generator().manual_seed(12345)
        self.elements = [torch.rand(d, d, generator=generator).to(x) for d in dims[1:-1]]

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        """weights (E, d_m, d_{m-1}) -> (E, len(MEASURED)); NaN for members that diverged."""
        values = self.x.new_full((len(weights[0]), len(MEASURED)), torch.nan)
        alive = torch.stack([W.isfinite().all(-1).all(-1) for W in weights]).all(0)
        weights = tuple(W[alive] for W in weights)
        psi = torch.stack([kappa_along(self.M, member, self.x).mean() for member in zip(*weights)]).to(self.x)
        gradient_norm = squared_gradient_norm(weights, self.loss_fn).sqrt()
        members = [W.double() for W in weights]  # in float32 γ' of a member that explodes overflows
        elements = [M.double() / M.norm() for M in self.elements]
        psi_table = curvature(members, self.x.double(), elements, ACTIVATION).to(psi)
        values[alive] = torch.stack([self.phi(weights), psi, self.loss_fn(weights), gradient_norm, psi_table], 1)
        return values


def teleporter(
    stack: Stack, data: Dataset, dims: Sequence[int], seed: int, s: Any, measured: bool = True
) -> tuple[dict[str, Tensor], Callable[[int], None]]:
    """What measures one run's arms before and after each teleport, and the function that moves them before batch k.

    stack: of one run, (A, [F,] 1). s: Figure 4's Settings. The record, {measure: (A, [F,] 1, K, [before, after],
    [batch, held out])}, is filled in as the arms are moved, unless they are not to be measured: then it is empty.
    """
    K, weights = stack.objective.shape[-2], stack.net.weights
    record = {key: torch.zeros(*stack.objective.shape, 2) for key in MEASURED if measured}
    other = held_out(data, dims, seed, s) if measured else None  # the same for all teleports of the run

    def move_arms(k: int) -> None:
        if k >= K:
            return
        generator = torch.Generator().manual_seed(seed + 1 + k)
        batch = _draw(data.x, data.y, s, generator)
        if not measured:
            stack.move(k, Draws.of(*batch, dims, s.directions, generator))
            return
        meters = (Meter(*batch, dims, s.measured_directions, s.measured_elements, generator), other)
        before = torch.stack([measure(weights) for measure in meters], 1)
        stack.move(k, Draws.of(*batch, dims, s.directions, generator))
        after = torch.stack([measure(weights) for measure in meters], 1)
        for i, key in enumerate(MEASURED):
            record[key][..., k, :, :] = stack.by_arm(torch.stack([before[..., i], after[..., i]], 1))

    return record, move_arms


def held_out(data: Dataset, dims: Sequence[int], seed: int, s: Any) -> Meter:
    """The meter of one run on a batch of the test set, with draws that no teleport sees."""
    generator = torch.Generator().manual_seed(seed)
    batch = _draw(data.x_test, data.y_test, s, generator)
    return Meter(*batch, dims, s.measured_directions, s.measured_elements, generator)


def _draw(x: Tensor, y: Tensor, s: Any, generator: torch.Generator) -> list[Tensor]:
    return [part[0] for part in draw_batches(x, y, s.teleport_batch, [generator])]


def random_sharpness(
    x: Tensor, labels: Tensor, dims: Sequence[int], per_radius: int, generator: torch.Generator
) -> Sharpness:
    """φ on a batch, with new directions drawn uniformly from [0, 1]: the mean of such a direction is 87 % of it."""
    radii = RADII.repeat_interleave(per_radius)
    P = sum(i * o for i, o in zip(dims, dims[1:]))
    directions = torch.rand(len(radii), P, generator=generator).to(x.device)
    return Sharpness(x, labels, directions, radii.to(x), dims, ACTIVATION)


# ---------------------------------------------------------------------------------------------------------------------
# The moves


def attempt(move: Callable[..., Move], weights: Sequence[Tensor], draws: Draws, *lead: Move) -> Move:
    """move(weights W_m (d_m, d_{m-1}), draws, [the size of the move that it follows]) for a stack of one run, which has
    (*E, d_m, d_{m-1}).

    A member that has diverged, or whose step is so long that its element is singular or infinite, stays where it is:
    its losses and objectives are NaN, its size is 0.
    """
    shape = weights[0].shape[:-2]
    members = zip(*(W.flatten(0, -3) for W in weights))
    sizes = zip(*(one.size.flatten() for one in lead)) if lead else repeat(())
    made = [_attempt(move, member, draws, *size) for member, size in zip(members, sizes)]
    moved = tuple(torch.stack(W).unflatten(0, shape) for W in zip(*(one.weights for one in made)))
    return Move(moved, *(torch.stack(values).unflatten(0, shape) for values in zip(*(one[1:] for one in made))))


def _attempt(move: Callable[..., Move], member: tuple[Tensor, ...], draws: Draws, *size: Tensor) -> Move:
    try:
        if not all(W.isfinite().all() for W in member):
            raise ValueError("weights are not finite")
        return move(member, draws, *size)
    except (ValueError, torch.linalg.LinAlgError):
        nowhere = member[0].new_zeros(())
        return Move(member, *[nowhere * torch.nan] * 4, nowhere)


def move_at_random(objective: str, weights: Sequence[Tensor], draws: Draws, length: Tensor) -> Move:
    """By a random element that moves the weights as far as `length`; what is recorded is the objective, φ or κ."""
    moved = random_move(weights, draws.x, length, ACTIVATION, draws.generator)
    record = draws.phi if objective == "sharpness" else lambda W: kappa_along(draws.M, W, draws.x)
    return Move(moved, draws.loss_fn(weights), draws.loss_fn(moved), record(weights), record(moved), length)


def move_sharpness(
    action: str,
    weights: Sequence[Tensor],
    draws: Draws,
    *,
    lr: float,
    maximize: bool,
    steps: int,
    cap: float,
) -> Move:
    """Ascent or descent of φ by the action (preactivation, rescaling, published; backtracking: preactivation, its steps
    halved until φ improves and the loss stays within 1e-3)."""
    x, loss_fn, phi = draws.x, draws.loss_fn, draws.phi
    options = dict(activation=ACTIVATION, lr=lr, steps=steps, maximize=maximize)
    if action == "backtracking":
        options |= dict(backtracking=True)
    if action == "published":
        result = published.teleport_sharpness(weights, x, loss_fn, draws.new_phi, cap=cap, **options)
    else:
        along = rescaling_action if action == "rescaling" else preactivation_action
        result = teleport(weights, x, loss_fn, objective=phi, action=along, cap=cap if maximize else None, **options)
    return Move(*result, distance(result.weights, weights))


def move_curvature(
    action: str, weights: Sequence[Tensor], draws: Draws, *, lr: float, maximize: bool, tolerance: float
) -> Move:
    """One step on κ along t ↦ exp(tM) by the action: preactivation, backtracking, rescaling or published."""
    x, loss_fn = draws.x, draws.loss_fn
    if action == "published":
        moved = published.teleport_curvature(weights, x, draws.M, activation=ACTIVATION, lr=lr, maximize=maximize)
        kappas = (kappa_along(draws.M, W, x) for W in (weights, moved))
        return Move(moved, loss_fn(weights), loss_fn(moved), *kappas, distance(moved, weights))
    M = draws.M.diag().diag() if action == "rescaling" else draws.M  # exp(tM), M diagonal: a positive rescaling
    tolerance = DRIFT if action == "backtracking" else tolerance
    return curvature_teleport(weights, x, loss_fn, M, lr if maximize else -lr, tolerance)


def curvature_teleport(
    weights: Sequence[Tensor], x: Tensor, loss_fn: Callable, M: Tensor, lr: float, tolerance: float
) -> Move:
    """Move along t ↦ exp(tM) to t = lr dκ/dt, up (lr > 0) or down; the objective is κ.

    t is halved until κ has moved the way that lr points and the loss by no more than tolerance (relative); if no
    halving helps, t = 0 and the weights stay. dκ/dt is often so large that exp(tM) at the published lr lies orders of
    magnitude beyond where it holds. weights W_m (d_m, d_{m-1}), x (d_0, n), M (d_2, d_2).
    """
    kappa, slope = curve_curvature(*_pair(weights, x), M.double(), ACTIVATION)
    loss, t = loss_fn(weights), lr * slope
    for _ in range(HALVINGS):
        try:
            moved = along_curve(weights, x, t * M)
            after, moved_loss = kappa_along(M, moved, x), loss_fn(moved)
            if (after - kappa) * lr > 0 and (moved_loss - loss).abs() <= tolerance * loss:
                return Move(moved, loss, moved_loss, kappa, after, distance(moved, weights))
        except ValueError:  # a singular element
            pass
        t = t / 2
    return Move(tuple(weights), loss, loss, kappa, kappa, torch.zeros_like(loss))


def along_curve(weights: Sequence[Tensor], x: Tensor, M: Tensor) -> tuple[Tensor, ...]:
    """exp(M) on the layers 2 and 3 by the pre-activation action, in float64: M (d_2, d_2).

    Raises ValueError for weights or an exp(M) that are not finite, or an exp(M) that is singular.
    """
    U, V = preactivation_action(*_pair(weights, x), torch.linalg.matrix_exp(M.double()), ACTIVATION)
    return weights[0], V.to(x), U.to(x)


def kappa_along(M: Tensor, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """κ of t ↦ exp(tM) at t = 0, in float64: M (*k, d_2, d_2) -> (*k,); NaN for weights that are not finite."""
    if not all(W.isfinite().all() for W in weights):
        return torch.full(M.shape[:-2], torch.nan, dtype=torch.float64, device=x.device)
    return curve_curvature(*_pair(weights, x), M.double(), ACTIVATION)[0]


def _pair(weights: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and V's input h, in float64."""
    return weights[2].double(), weights[1].double(), hidden_layers(weights, x, ACTIVATION)[1].double()


def random_move(
    weights: Sequence[Tensor], x: Tensor, length: Tensor, activation: Activation, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """The pre-activation action of I + sR, R random, with s such that the weights move by `length`.

    weights W_m (*E, d_m, d_{m-1}), x (d_0, n) or (*E, d_0, n), length (*E,). Where it is 0 nothing moves. Returns the
    new weights. Raises ValueError where the action does (a singular element, weights that are not finite).
    """
    R = [torch.randn(W.shape[:-1] + W.shape[-2:-1], generator=generator).to(W) for W in weights[:-1]]
    R = [r / torch.linalg.matrix_norm(r, keepdim=True) for r in R]
    far = length > 0
    s = torch.where(far, 1e-3, 0.0).to(weights[0])
    for _ in range(12):
        elements = [torch.eye(r.shape[-1]).to(r) + s[..., None, None] * r for r in R]
        moved = apply_to_layers(weights, x, elements, preactivation_action, activation)
        # The distance grows faster than s: half a step of the way.
        s = torch.where(far, s * (length / distance(moved, weights)).sqrt(), 0.0)
    return tuple(torch.where(far[..., None, None], new, W) for new, W in zip(moved, weights))


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """‖a − b‖ over all layers: weights (*E, d_m, d_{m-1}) -> (*E,)."""
    return sum((p - q).square().sum((-2, -1)) for p, q in zip(a, b)).sqrt()
