"""Losses L = u² + v² of two variables, the orbits of SO(2) in (u, v), teleportation along them, and descent.

Source: Zhao, Dehmamy, Walters, Yu, *Symmetry Teleportation for Accelerated Optimization* (NeurIPS 2022, arXiv
2205.10637). In coordinates (u, v) with L = u² + v² a rotation by any angle θ leaves the loss alone; teleportation looks
along this orbit for a larger dL/dt = ‖∂L/∂w‖², the speed at which gradient flow lowers the loss.

w is a float64 tensor (2, *E) with rows x and y, *E any ensemble shape; angles are in radians.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TestFunction(NamedTuple):
    """A loss L(x, y) = u² + v²: elementwise functions of two tensors."""

    __test__ = False  # not a test case for pytest

    loss: Callable  # (x, y) -> L
    to_uv: Callable  # (x, y) -> (u, v)
    from_uv: Callable  # (u, v) -> (x, y)
    minimum: tuple  # (x, y)
    # what figures show:
    levels: tuple  # losses of the level sets
    window: tuple  # ((x from, to), (y from, to))
    floor: float  # smallest loss


# Derivatives, by autograd


def gradient(function: TestFunction, w: Tensor, create_graph: bool = False) -> Tensor:
    """∂L/∂w, (2, *E). With create_graph, w must require grad and the result can be differentiated again."""
    w = w if create_graph else w.detach().requires_grad_()
    return torch.autograd.grad(function.loss(*w).sum(), w, create_graph=create_graph)[0]


def hessian(function: TestFunction, w: Tensor) -> Tensor:
    """∂²L/∂w², (2, 2, *E)."""
    w = w.detach().requires_grad_()
    rows = gradient(function, w, create_graph=True)
    return torch.stack([torch.autograd.grad(row.sum(), w, retain_graph=True)[0] for row in rows])


def newton_direction(function: TestFunction, w: Tensor) -> Tensor:
    """(∂²L/∂w²)⁻¹ ∂L/∂w, (2, *E)."""
    H, g = hessian(function, w), gradient(function, w)
    return torch.linalg.solve(H.movedim((0, 1), (-2, -1)), g.movedim(0, -1)).movedim(-1, 0)


# The group and teleportation


def act(function: TestFunction, theta: Tensor, w: Tensor) -> Tensor:
    """g·w for the rotation g by theta in (u, v): (2, *E), the loss unchanged. theta and w[0] broadcast."""
    u, v = function.to_uv(*w)
    return torch.stack(function.from_uv(theta.cos() * u - theta.sin() * v, theta.sin() * u + theta.cos() * v))


def along_orbit(function: TestFunction, theta: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The point g·w, dL/dt = ‖∂L/∂w‖² there, and the first and second derivative of dL/dt in theta."""
    theta = theta.detach().requires_grad_()
    point = act(function, theta, w)
    speed = gradient(function, point, create_graph=True).square().sum(0)
    (first,) = torch.autograd.grad(speed.sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), theta)
    return point.detach(), speed.detach(), first.detach(), second


def published_teleport(function: TestFunction, w: Tensor, theta: Tensor, lr: float, steps: int = 10) -> Tensor:
    """Gradient ascent on dL/dt from the angle theta (*E). As published, the point is that before the last update."""
    for _ in range(steps):
        point, _, first, _ = along_orbit(function, theta, w)
        theta = theta + lr * first
    return point


def orbit_maximum(function: TestFunction, w: Tensor, starts: int = 64) -> Tensor:
    """The angle in [−π, π] at which dL/dt is largest on the orbit of w, (*E); the smallest one if there are several.

    Newton's method on the angle from a grid of starts. On the orbit of a polynomial, dL/dt is a trigonometric
    polynomial (of degree 2 for Booth, 4 for Rosenbrock): the grid cannot miss a maximum.
    """
    spacing = 2 * torch.pi / starts

    def newton_steps(theta, count):
        for _ in range(count):
            _, _, first, second = along_orbit(function, theta, w)
            step = torch.where(second < 0, -first / second, 0)  # a start between maxima stays, and is not chosen
            theta = theta + step.clamp(-spacing, spacing)
        return theta

    grid = (torch.arange(starts, dtype=w.dtype) - starts // 2) * spacing
    theta = newton_steps(grid.view(-1, *[1] * (w.ndim - 1)).expand(starts, *w.shape[1:]), 6)
    theta = torch.remainder(theta + torch.pi, 2 * torch.pi) - torch.pi
    speed = along_orbit(function, theta, w)[1]
    as_good = speed >= speed.amax(0) * (1 - 1e-12)
    best = torch.where(as_good, theta.abs(), torch.inf).argmin(0, keepdim=True)
    # Equal to 1e-12 in dL/dt is 1e-6 in the angle: the chosen one is polished.
    return newton_steps(theta.gather(0, best)[0], 3)


# Optimizers: functions (w, ∂L/∂w) -> what to subtract from w


def gradient_descent(lr: float) -> Callable:
    return lambda w, g: lr * g


def adagrad(lr: float) -> Callable:
    total = 0

    def update(w, g):
        nonlocal total  # teleportation keeps this state
        total = total + g.square()
        return lr * g / (total.sqrt() + 1e-10)

    return update


def newton(function: TestFunction) -> Callable:
    return lambda w, g: newton_direction(function, w)


def descend(function, start, steps, update, teleport=None, when=()):
    """`steps` steps from `start` (2, *E): the iterates and where they were left from, two (steps + 1, 2, *E) tensors.

    They differ at the steps in `when`: there w is replaced by teleport(w) first. Raises ValueError for a start that is
    not finite.
    """
    if not torch.isfinite(start).all():
        raise ValueError("start: not finite")
    w, iterates, departures = start, [], []
    for step in range(steps + 1):
        iterates.append(w)
        if step in when:
            w = teleport(w)
        departures.append(w)
        w = w - update(w, gradient(function, w))
    return torch.stack(iterates), torch.stack(departures)
