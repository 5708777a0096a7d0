"""φ (ICLR 2024, Eq. 4) of a network with cross-entropy, fast: value and ∂φ/∂W without a graph per perturbed copy.

`teleport.sharpness` is the definition and takes any loss. Here the loss is known, so that three things can be had:

  * the first layer of copy j is (W_1 + D_j) X = W_1 X + D_j X; the products D_j X do not depend on the weights and are
    formed once, for all steps of an ascent and all members of an ensemble;
  * ∂φ/∂W_1 = (Σ_j δ_j) Xᵀ / k: the copies' back-propagated errors are summed before they meet X;
  * the copies are worked through a few at a time, so that what they need stays in the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from teleport import Activation


class Sharpness:
    """φ of one batch as an objective for `teleport.teleport`: Sharpness(...)(weights) -> E, differentiable once.

    x (d_0, n), columns are samples; labels (n,); directions (k, P) and radii (k,) as in `teleport.sharpness`; dims =
    (d_0, …, d_L). It holds the k·d_1·n products D_j X, and nothing of `directions`; `chunk` copies are worked on at
    once (default: such that a first hidden layer of theirs takes 1 MiB). Raises ValueError for shapes that do not
    match, no samples, no or a zero direction, a radius or chunk that is not positive, values that are not finite.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        directions: Tensor,
        radii: Tensor,
        dims: Sequence[int],
        activation: Activation,
        chunk: int | None = None,
    ) -> None:
        """Form the products D_j X: the only place where the k·P numbers of `directions` are read."""
        sizes = [o * i for i, o in zip(dims, dims[1:])]
        k, norms = len(directions), _check(x, labels, directions, radii, dims[0], sum(sizes), chunk)
        scale = radii / norms
        self.x, self.labels, self.activation = x, labels, activation
        self.chunk = chunk or max(1, 2**18 // (dims[1] * x.shape[1]))
        first, *rest = directions.split(sizes, 1)
        self.products = x.new_empty(k, dims[1], x.shape[1])  # D_j X
        for part, s, out in zip(first.split(32), scale.split(32), self.products.split(32)):
            torch.mm(part.reshape(-1, dims[0]), x, out=out.flatten(0, 1))
            out.mul_(s[:, None, None])
        self.steps = [(D * scale[:, None]).unflatten(1, (o, -1)) for D, o in zip(rest, dims[2:])]  # D_j behind layer 1

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        """φ at the weights, W_m (*E, d_m, d_{m-1}): shape E. ValueError for weights not of `dims` or unlike x."""
        needed = [self.products.shape[1:2] + self.x.shape[:1], *(D.shape[1:] for D in self.steps)]
        if [W.shape[-2:] for W in weights] != needed:
            raise ValueError(f"weights are {[tuple(W.shape) for W in weights]}: dims need {[tuple(n) for n in needed]}")
        if len({W.shape[:-2] for W in weights}) > 1 or {(W.dtype, W.device) for W in weights} != {_kind(self.x)}:
            raise ValueError(f"weights must share their ensemble shape, and dtype and device of x, {_kind(self.x)}")
        return _Perturbed.apply(self, *weights)

    def value_and_gradient(self, weights: Sequence[Tensor], want_gradient: bool) -> tuple[Tensor, list[Tensor]]:
        """φ (a 0-d tensor) and, if wanted (zeros otherwise), [∂φ/∂W_1, …] of one member, W_m (d_m, d_{m-1})."""
        k, n = len(self.products), self.x.shape[1]
        z0, total = weights[0] @ self.x, 0.0
        error = torch.zeros_like(z0)  # Σ_j ∂L/∂z_1
        gradients = [error, *map(torch.zeros_like, weights[1:])]
        rows = zip(self.products.split(self.chunk), *(D.split(self.chunk) for D in self.steps))
        for product, *steps in rows:
            z = [z0 + product]
            W = [None, *(W + D for W, D in zip(weights[1:], steps))]
            h = [None]
            for W_m in W[1:]:
                h.append(self.activation.f(z[-1]))
                z.append(torch.bmm(W_m, h[-1]))
            log_p = log_softmax(z.pop(), 1)
            index = self.labels.expand(len(product), 1, n)
            total -= log_p.gather(1, index).sum()
            if want_gradient:
                delta = log_p.exp_().scatter_add_(1, index, log_p.new_full((1,), -1.0).expand(index.shape))
                for m in reversed(range(1, len(W))):
                    gradients[m] += torch.bmm(delta, h[m].mT).sum(0)
                    delta = torch.bmm(W[m].mT, delta).mul_(self.activation.derivative(z[m - 1]))
                error += delta.sum(0)
        gradients[0] = error @ self.x.T
        return total / (n * k), [G.div_(n * k) for G in gradients]


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device


def _check(x: Tensor, labels: Tensor, directions: Tensor, radii: Tensor, d_0: int, P: int, chunk: int | None) -> Tensor:
    """The directions' norms, (k,), once everything is found in order."""
    k, n = len(directions), x.shape[-1]
    if directions.shape != (k, P) or radii.shape != (k,) or x.shape != (d_0, n) or labels.shape != (n,) or not k * n:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, labels, directions, radii))
        needed = f"({d_0}, n), (n,), (k, {P}), (k,)"
        raise ValueError(f"x, labels, directions, radii are {shapes}: dims need {needed}, k and n not 0")
    if not x.is_floating_point() or _kind(directions) != _kind(x) or {labels.device, radii.device} != {x.device}:
        raise ValueError("x and directions must have one floating-point dtype, all tensors one device")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be class indices, int64, got {labels.dtype}")
    if not x.isfinite().all():
        raise ValueError("x has values that are not finite")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    norms = torch.linalg.vector_norm(directions, dim=1)
    if not ((norms > 0) & norms.isfinite()).all():
        raise ValueError("directions: each must be finite and not zero")
    if not (radii.isfinite() & (radii > 0)).all():
        raise ValueError("radii must be finite and positive")
    return norms


class _Perturbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, objective: Sharpness, *weights: Tensor) -> Tensor:
        flat = zip(*(W.detach().reshape(-1, *W.shape[-2:]) for W in weights))
        values, gradients = zip(*(objective.value_and_gradient(member, any(ctx.needs_input_grad)) for member in flat))
        ctx.save_for_backward(*(torch.stack(G).reshape(W.shape) for G, W in zip(zip(*gradients), weights)))
        return torch.stack(values).reshape(weights[0].shape[:-2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(upstream[..., None, None] * G for G in ctx.saved_tensors)
