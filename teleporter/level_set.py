"""Raise the gradient norm within a level set of the loss, for models without any symmetry."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport import Teleportation
from teleporter.passes import check_trials, gradient, kept_buffers, same_randomness, undone_on_error


def level_set_teleport(
    model: nn.Module, loss_fn: Callable, steps: int = 10, *, radius: float = 0.01, tolerance: float = 1e-3
) -> Teleportation:
    """Raise ‖∇L‖ without raising L, for any twice differentiable model, in place (Mishkin, Bietti, Gower 2025).

    Sequential programming for: maximize ½ log ‖∇L(w)‖² subject to L(w) ≤ L(w_0). With q = ∇²L ∇L / ‖∇L‖², the gradient
    of that objective (a Hessian-vector product; thanks to the logarithm the step does not depend on the scale of the
    loss), each step solves

        max_d ⟨q, d⟩ − ‖d‖²/2ρ   subject to   L + ⟨∇L, d⟩ ≤ L_0,      d = ρq − v∇L,  v = (ρ⟨q, ∇L⟩ + L − L_0)_+ / ‖∇L‖²,

    and takes it if the merit ½ log ‖∇L‖² − γ (L − L_0)_+ grows by a tenth of ‖d‖²/ρ, which it promises to first order
    when γ ≥ v/ρ, the multiplier. ρ doubles after a step that was taken and is divided by 4 after one that was not.

    loss_fn(model) -> scalar, deterministic: the same batch each time. steps: trials, whether taken or not, each at the
    cost of one gradient and at most one Hessian-vector product. radius: length of the first trial, relative to ‖w‖.
    tolerance: no step goes above L_0 + tolerance (1 + |L_0|). Returns the Teleportation, its weights {name: parameter},
    its objective ‖∇L‖²; drift may be negative, since the loss may fall. Raises ValueError for a loss that is not a
    finite scalar, a zero gradient, parameters on several devices or in half precision, numbers that are not positive
    and finite.
    """
    check_trials(steps, radius, tolerance)
    W = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if len({(p.device, p.dtype) for p in W.values()}) != 1 or next(iter(W.values())).dtype.itemsize < 4:
        raise ValueError("trainable parameters must share one device and one dtype, float32 or float64")

    with torch.enable_grad(), kept_buffers(model), undone_on_error(W):
        w = torch.cat([p.detach().flatten() for p in W.values()])
        loss_0, g = _evaluate(model, loss_fn, W, w)
        if not loss_0.isfinite() or not 0 < g.norm() < math.inf:
            raise ValueError(f"loss {loss_0}, gradient norm {g.norm()}: they must be finite, the latter not zero")
        g, q = _curved(W, g)
        loss, norm2_0, gamma = loss_0, g @ g, torch.zeros_like(loss_0)
        rho = radius * w.norm() / (q - ((q @ g) / (g @ g)).clamp_min(0) * g).norm()
        for step in range(steps):
            v = ((rho * (q @ g) + loss - loss_0) / (g @ g)).clamp_min(0)
            d = rho * q - v * g
            if not 0 < d.norm() < math.inf:  # a stationary point of the problem
                break
            gamma = torch.maximum(gamma, 1.1 * v / rho)
            trial, g_trial = _evaluate(model, loss_fn, W, w + d)
            gain = (g_trial.detach().norm() / g.norm()).log()
            gain = gain - gamma * ((trial - loss_0).clamp_min(0) - (loss - loss_0).clamp_min(0))
            if gain >= 0.1 * (d @ d) / rho and trial - loss_0 <= tolerance * (1 + abs(loss_0)):
                w, loss, rho = w + d, trial, 2 * rho
                g, q = _curved(W, g_trial) if step < steps - 1 else (g_trial.detach(), None)
            else:
                rho = rho / 4
        _assign(W, w)
    return Teleportation(W, loss_0, loss, norm2_0, g @ g)


def _assign(W: Mapping[str, Tensor], w: Tensor) -> None:
    with torch.no_grad():
        for p, x in zip(W.values(), w.split([p.numel() for p in W.values()])):
            p.copy_(x.view_as(p))
    torch.clear_autocast_cache()


def _evaluate(model: nn.Module, loss_fn: Callable, W: Mapping[str, Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """L and ∇L, with its graph, at w."""
    _assign(W, w)
    with same_randomness(model), sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(model)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        raise ValueError(f"loss_fn must return a scalar that depends on the parameters, got {loss}")
    return loss.detach(), torch.cat([g.flatten() for g in gradient(loss, W, create_graph=True).values()])


def _curved(W: Mapping[str, Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
    """∇L without its graph, and q."""
    norm2 = g.detach().square().sum()
    q = torch.autograd.grad(g, list(W.values()), g.detach() / norm2, allow_unused=True, materialize_grads=True)
    return g.detach(), torch.cat([x.flatten() for x in q])
