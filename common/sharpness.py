"""φ (paper A, Eq. 4) of a network with cross-entropy, fast: value and ∂φ/∂W without a graph per perturbed copy.

`teleport.sharpness` is the definition and takes any loss. Here the loss is known, so that three things can be had:

  * the first layer of copy j is (W_1 + D_j) X = W_1 X + D_j X; the products D_j X do not depend on the weights and are
    formed once, for all steps of an ascent and all members of an ensemble;
  * ∂φ/∂W_1 = (Σ_j δ_j) Xᵀ / k: the copies' back-propagated errors are summed before they meet X;
  * the copies are worked through a few at a time, so that what they need stays in the cache.
"""

import torch
from torch.nn.functional import log_softmax


class Sharpness:
    """φ of one batch as an objective for `teleport.teleport`: Sharpness(...)(weights) -> E, differentiable once.

    x (d_0, n), columns are samples; labels (n,); directions (k, P) and radii (k,) as in `teleport.sharpness`; dims =
    (d_0, …, d_L). It holds the k·d_1·n products D_j X, and nothing of `directions`; `chunk` copies are worked on at
    once (default: such that a first hidden layer of theirs takes 1 MiB). Raises ValueError for shapes that do not
    match, a zero direction, values that are not finite.
    """

    def __init__(self, x, labels, directions, radii, dims, activation, chunk=None):
        sizes = [o * i for i, o in zip(dims, dims[1:])]
        k = len(directions)
        if directions.shape != (k, sum(sizes)) or radii.shape != (k,) or len(x) != dims[0]:
            shapes = ", ".join(str(tuple(t.shape)) for t in (x, directions, radii))
            needed = f"({dims[0]}, n), (k, {sum(sizes)}), (k,)"
            raise ValueError(f"x, directions, radii are {shapes}: dims need {needed}")
        norms = torch.linalg.vector_norm(directions, dim=1)
        if not ((norms > 0) & norms.isfinite()).all():
            raise ValueError("directions: each must be finite and not zero")
        if not radii.isfinite().all():
            raise ValueError("radii must be finite")
        scale = radii / norms
        self.x, self.labels, self.activation = x, labels, activation
        self.chunk = chunk or max(1, 2**18 // (dims[1] * x.shape[1]))
        first, *rest = directions.split(sizes, 1)
        self.products = x.new_empty(k, dims[1], x.shape[1])  # D_j X
        for part, s, out in zip(first.split(32), scale.split(32), self.products.split(32)):
            torch.mm(part.reshape(-1, dims[0]), x, out=out.flatten(0, 1))
            out.mul_(s[:, None, None])
        self.steps = [(D * scale[:, None]).unflatten(1, (o, -1)) for D, o in zip(rest, dims[2:])]  # D_j behind layer 1

    def __call__(self, weights):
        return _Perturbed.apply(self, *weights)

    def value_and_gradient(self, weights, want_gradient):
        """φ and, if wanted, [∂φ/∂W_1, …] of one member."""
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


class _Perturbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, objective, *weights):
        flat = zip(*(W.detach().reshape(-1, *W.shape[-2:]) for W in weights))
        values, gradients = zip(*(objective.value_and_gradient(member, any(ctx.needs_input_grad)) for member in flat))
        ctx.save_for_backward(*(torch.stack(G).reshape(W.shape) for G, W in zip(zip(*gradients), weights)))
        return torch.stack(values).reshape(weights[0].shape[:-2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return None, *(upstream[..., None, None] * G for G in ctx.saved_tensors)
