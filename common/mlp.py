"""A stack of small networks trained together: every member sees the same mini-batches, the gradient is written out.

The networks of ICLR 2024 (Table 1, Figures 4 and 5): no biases, leaky ReLU, cross-entropy. Member e's weights are
W_m[e]; the first layer of the whole stack is one matrix product, so 100 members cost little more than a few.
Elementwise optimizers keep the members exactly independent, and learning rates and optimizer state are per member, so
that seeds, arms and learning rates can all be members of one stack.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu_, log_softmax

from common.losses import cross_entropy


def published_seeds(runs: int) -> list[int]:
    """Run i is seeded (i + 1)·54321 (the authors' code)."""
    return [(i + 1) * 54321 for i in range(runs)]


def initial_weights(
    dims: Sequence[int], seeds: Iterable[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Published initialization: W_m uniform in ±1/√d_{m-1}, drawn layer by layer on the CPU after manual_seed(seed).

    dims = (d_0, …, d_L). Returns a tuple of float32 tensors (len(seeds), d_m, d_{m-1}), whatever torch's defaults are.
    Raises ValueError for fewer than two dims, or one that is not positive, and where no seed is given.
    """
    seeds = list(seeds)
    if len(dims) < 2 or min(dims) < 1:
        raise ValueError(f"dims must be two positive widths or more, got {tuple(dims)}")
    if not seeds:
        raise ValueError("seeds: none given")
    members = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)  # the same stream as torch.manual_seed and torch.rand
        like = dict(generator=generator, device="cpu", dtype=torch.float32)
        members.append([(2 * torch.rand(o, i, **like) - 1) / i**0.5 for i, o in zip(dims, dims[1:])])
    return tuple(torch.stack(layer).to(device) for layer in zip(*members))


class StackedMLP:
    """E networks trained as one. weights: (E, d_m, d_{m-1}) each, copied; lr: a number or one per member, (E,).

    optimizer: SGD, momentum (0.9), AdaGrad, RMSprop or Adam, with PyTorch's formulas and defaults. slope: the leaky
    ReLU's, in [0, 1]. dtype and device are the weights'. Raises ValueError for another optimizer, weights that do not
    chain or are not alike, an lr that is not positive and finite, a slope outside [0, 1]; every method does for a batch
    of other shapes. Members that have diverged stay NaN.
    """

    def __init__(
        self, weights: Sequence[Tensor], optimizer: str = "SGD", lr: float | Tensor = 1e-2, slope: float = 0.1
    ) -> None:
        """Copy the weights and build every member's optimizer."""
        _check(weights, optimizer, lr, slope)
        self.weights = tuple(W.detach().clone(memory_format=torch.contiguous_format) for W in weights)
        first = self.weights[0]
        self.members = len(first)
        self.optimizer, self.slope = optimizer, slope
        self.lr = torch.as_tensor(lr, dtype=first.dtype, device=first.device).expand(self.members).clone()
        self._update, buffers = _UPDATES[optimizer]
        self._state = [[torch.zeros_like(W) for _ in range(buffers)] for W in self.weights]
        self._gradients = [torch.empty_like(W) for W in self.weights] if optimizer != "SGD" else None
        self._steps = first.new_zeros(self.members, 1, 1)  # since the member's optimizer was built: Adam needs it
        self._graphs = {}  # batch size -> the step as a CUDA graph

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on the batch x (n, d_0), classes y (n,). Returns the batch loss before it, (E,)."""
        h, delta, loss = self._forward(x, y)
        self._steps += 1
        lr = self.lr.view(-1, 1, 1)
        for m in reversed(range(len(self.weights))):
            W = self.weights[m]
            behind = torch.bmm(W.mT, delta) if m else None  # before W changes
            if self._gradients is None:  # SGD: a rank-n update in place, no gradient in memory
                _outer(delta.mul_(-lr), h[m], W, add=True)
            else:
                _outer(delta, h[m], self._gradients[m], add=False)
                self._update(W, self._gradients[m], self._state[m], lr, self._steps)
            if m:
                delta = torch.ops.aten.leaky_relu_backward(behind, h[m], self.slope, True)
        return loss

    def train_epoch(
        self, x: Tensor, y: Tensor, batch_size: int, before_step: Callable[[int], None] | None = None
    ) -> Tensor:
        """One pass in the dataset's order; before_step(i) comes before batch i. Returns the mean batch loss, (E,).

        x (n, d_0), y (n,). Raises ValueError where n or batch_size is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self._check_batch(x, y)
        total = torch.zeros_like(self.lr)
        for i, start in enumerate(range(0, len(x), batch_size)):
            if before_step is not None:
                before_step(i)
            batch, labels = x[start : start + batch_size], y[start : start + batch_size]
            total += (self._replay if x.is_cuda else self.step)(batch, labels) * len(batch)
        return total / len(x)

    def _replay(self, x: Tensor, y: Tensor) -> Tensor:
        """The same as step, on a GPU: its thirty small kernels, recorded once per batch size, start with one launch."""
        if len(x) not in self._graphs:
            tensors = [*self.weights, self._steps, *(buffer for state in self._state for buffer in state)]
            saved, inputs, side = [t.clone() for t in tensors], (x.clone(), y.clone()), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries set themselves up outside the recording; what this trains is undone
                    self.step(*inputs)
                for t, before in zip(tensors, saved):
                    t.copy_(before)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = self.step(*inputs)
            self._graphs[len(x)] = graph, inputs, loss
        graph, inputs, loss = self._graphs[len(x)]
        for buffer, value in zip(inputs, (x, y)):
            buffer.copy_(value)
        graph.replay()
        return loss

    def evaluate(self, x: Tensor, y: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy (in [0, 1]) on x (n, d_0), y (n,): two tensors (E,). ValueError for no samples."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self._check_batch(x, y)
        loss, correct = torch.zeros_like(self.lr), torch.zeros_like(self.lr)
        for batch, labels in zip(x.split(batch_size), y.split(batch_size)):
            h = _times_shared(self.weights[0], batch)
            for W in self.weights[1:]:
                h = torch.bmm(W, leaky_relu_(h, self.slope))
            loss += cross_entropy(h, labels) * len(batch)
            correct += (h.argmax(1) == labels).sum(1)
        return loss / len(x), correct / len(x)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """∂L/∂W on a batch x (n, d_0), y (n,): one (E, d_m, d_{m-1}) per layer, and the losses (E,). Nothing moves."""
        h, delta, loss = self._forward(x, y)
        gradients = [None] * len(self.weights)
        for m in reversed(range(len(self.weights))):
            gradients[m] = _outer(delta, h[m], torch.empty_like(self.weights[m]), add=False)
            if m:
                behind = torch.bmm(self.weights[m].mT, delta)
                delta = torch.ops.aten.leaky_relu_backward(behind, h[m], self.slope, True)
        return gradients, loss

    def set(self, members: slice | Sequence[int] | Tensor, weights: Sequence[Tensor]) -> None:
        """Replace the weights of some members (a slice, indices or a mask); their optimizer state stays."""
        for mine, new in zip(self.weights, weights):
            mine[members] = new

    def reset(self, members: slice | Sequence[int] | Tensor) -> None:
        """Build the optimizer of some members anew: their state starts from zero."""
        self._steps[members] = 0
        for state in self._state:
            for buffer in state:
                buffer[members] = 0

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        """Too few labels would go through: torch gathers as many as there are."""
        width = self.weights[0].shape[2]
        if x.ndim != 2 or x.shape[1] != width or y.shape != x.shape[:1]:
            raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must be (n, {width}) and (n,)")
        if not len(x):
            raise ValueError("x has no samples")

    def _forward(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Hidden layers [X as rows, h_1, …], ∂L/∂logits (E, C, n) and the losses (E,)."""
        self._check_batch(x, y)
        h = [x]
        z = _times_shared(self.weights[0], x)
        for W in self.weights[1:]:
            h.append(leaky_relu_(z, self.slope))
            z = torch.bmm(W, h[-1])
        log_p = log_softmax(z, 1)
        index = y.expand(self.members, 1, -1)
        loss = -log_p.gather(1, index).mean((1, 2))
        delta = log_p.exp_().scatter_add_(1, index, log_p.new_full((1,), -1.0).expand_as(index)).div_(len(y))
        return h, delta, loss


def _check(weights: Sequence[Tensor], optimizer: str, lr: float | Tensor, slope: float) -> None:
    if optimizer not in _UPDATES:
        raise ValueError(f"optimizer must be one of {', '.join(_UPDATES)}, got {optimizer!r}")
    shapes = [tuple(W.shape) for W in weights]
    if (
        not shapes
        or any(len(s) != 3 for s in shapes)
        or any(V[0] != U[0] or V[1] != U[2] for V, U in zip(shapes, shapes[1:]))
    ):
        raise ValueError(f"weights must be (E, d_m, d_{{m-1}}) matrices that chain, got {shapes}")
    kinds = {(W.dtype, W.device) for W in weights}
    if len(kinds) > 1 or not weights[0].is_floating_point():
        raise ValueError(f"weights must have one floating-point dtype and one device, got {kinds}")
    rates = torch.as_tensor(lr, device=weights[0].device)
    if rates.shape not in ((), (shapes[0][0],)):
        raise ValueError(f"lr must be a number or one per member, ({shapes[0][0]},), got {tuple(rates.shape)}")
    if not ((rates > 0) & rates.isfinite()).all():
        raise ValueError("lr must be positive and finite")
    if not 0 <= slope <= 1:
        raise ValueError(f"slope must be in [0, 1], got {slope}")


def _times_shared(W: Tensor, x: Tensor) -> Tensor:
    """W (E, d, d_0) times x.T for rows x (n, d_0) that all members share: one matrix product. Returns (E, d, n)."""
    return torch.mm(W.flatten(0, 1), x.T).unflatten(0, W.shape[:2])


def _outer(delta: Tensor, h: Tensor, out: Tensor, add: bool) -> Tensor:
    """out (+)= delta hᵀ: delta (E, d, n), h (E, d', n) or the shared rows (n, d'). Returns out."""
    if h.ndim == 2:
        out.flatten(0, 1).addmm_(delta.flatten(0, 1), h, beta=float(add))
    else:
        out.baddbmm_(delta, h.mT, beta=float(add))
    return out


# Updates in place, as torch.optim defines them: W -= lr·(something of the gradient G and the state). G may be spoilt.


def _momentum(W: Tensor, G: Tensor, state: list[Tensor], lr: Tensor, steps: Tensor) -> None:
    state[0].mul_(0.9).add_(G)
    W.sub_(torch.mul(state[0], lr, out=G))


def _adagrad(W: Tensor, G: Tensor, state: list[Tensor], lr: Tensor, steps: Tensor) -> None:
    state[0].addcmul_(G, G)
    W.sub_(G.mul_(lr).div_(state[0].sqrt().add_(1e-10)))


def _rmsprop(W: Tensor, G: Tensor, state: list[Tensor], lr: Tensor, steps: Tensor) -> None:
    state[0].mul_(0.99).addcmul_(G, G, value=0.01)
    W.sub_(G.mul_(lr).div_(state[0].sqrt().add_(1e-8)))


def _adam(W: Tensor, G: Tensor, state: list[Tensor], lr: Tensor, steps: Tensor) -> None:
    state[0].lerp_(G, 0.1)
    state[1].mul_(0.999).addcmul_(G, G, value=0.001)
    denominator = torch.sqrt(state[1], out=G).div_((1 - 0.999**steps).sqrt()).add_(1e-8)
    W.sub_(torch.div(state[0], denominator, out=G).mul_(lr / (1 - 0.9**steps)))


_UPDATES = {
    "SGD": (None, 0),
    "momentum": (_momentum, 1),
    "AdaGrad": (_adagrad, 1),
    "RMSprop": (_rmsprop, 1),
    "Adam": (_adam, 2),
}
