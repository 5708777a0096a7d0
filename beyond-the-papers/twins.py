"""The untouched twin of a rescaled run: torch's optimizers, with a rate, an ε and a weight decay for every entry.

A positive rescaling of hidden units multiplies every weight by a factor, w' = a·w (s_i on unit i's incoming row, 1/s_i
on its outgoing column, s_i/s_j between two hidden layers), and leaves the loss alone: the gradient is g' = g/a. Put w'
and g' into an optimizer's formula and divide by a: what the rescaled run does, pulled back, is the run from w with

                               gradient descent, momentum, Nesterov    Adam, RMSprop, AdaGrad
  rate η                       η/a²                                    η/a
  ε, which torch adds to √v    none                                    ε·a
  decay λw added to g          λa²·w added to g                        λa²·w added to g, before it is normalized
  decay beside g: w·(1 − ηλ)   unchanged                               unchanged: λ·a at AdamW's own rate η/a
  memory, if it stays put      means of gradients times a              the same, and of squares times a²

For gradient descent and momentum η/a² · λa² = ηλ: a decay that is added shrinks every weight as before. For an
optimizer that normalizes it does not: λ is replaced by λa², within what is normalized. The smallest example is one
weight w = 1 with g = −2 and λ = 1: Adam steps up (g + λw = −1), and down after a = 2 (g' + λw' = −1 + 2 = 1).
"""

from typing import NamedTuple

import torch

from common.losses import batch_loss
from teleport import apply_to_layers, leaky_relu, rescaling_action

ACTIVATION = leaky_relu(0.1)


class Exponents(NamedTuple):
    """Powers of a in the twin's numbers."""

    rate: int
    eps: int
    added: int  # a decay that is added to the gradient
    beside: int  # a decay that is not


DESCENT, NORMALIZED = Exponents(-2, 0, 2, 0), Exponents(-1, 1, 2, 0)


class Kind(NamedTuple):
    """An optimizer: torch's, and what the twin's table says of it."""

    theirs: type
    options: dict
    exponents: Exponents
    eps: float = 0.0  # torch's default


OPTIMIZERS = {
    "SGD": Kind(torch.optim.SGD, {}, DESCENT),
    "momentum": Kind(torch.optim.SGD, {"momentum": 0.9}, DESCENT),
    "Nesterov": Kind(torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, DESCENT),
    "Adam": Kind(torch.optim.Adam, {}, NORMALIZED, 1e-8),
    "RMSprop": Kind(torch.optim.RMSprop, {}, NORMALIZED, 1e-8),
    "AdaGrad": Kind(torch.optim.Adagrad, {}, NORMALIZED, 1e-10),
}
DECAYS = ("none", "added", "beside")  # torch: weight_decay; AdamW's


class Entry(NamedTuple):
    """One layer's numbers, each one number or a tensor that broadcasts to the layer's (E, d_m, d_{m-1})."""

    rate: float | torch.Tensor
    eps: float | torch.Tensor = 0.0
    added: float | torch.Tensor = 0.0  # λ of the decay that is added to the gradient
    beside: float | torch.Tensor = 0.0  # ηλ of the decay that is not


class Descent:
    """E networks W_m (E, d_m, d_{m-1}), copied, and an optimizer with torch's formulas and an Entry for every layer."""

    def __init__(self, weights, optimizer, entries):
        self.weights = [W.detach().clone() for W in weights]
        self.direction, self.entries, self.steps = DIRECTIONS[optimizer], entries, 0
        self.state = [{} for _ in weights]  # by torch's names

    def step(self, gradients):
        """One step, in place; gradients may be spoilt."""
        self.steps += 1
        for W, G, state, entry in zip(self.weights, gradients, self.state, self.entries):
            if isinstance(entry.beside, torch.Tensor):
                W.mul_(1 - entry.beside)
            if isinstance(entry.added, torch.Tensor):
                G = G + entry.added * W
            W.sub_(entry.rate * self.direction(G, state, entry.eps, self.steps))


def _sgd(G, state, eps, t):
    return G


def _momentum(G, state, eps, t):
    return _mean(state, "momentum_buffer", G, 0.9, 1)


def _nesterov(G, state, eps, t):
    return G + 0.9 * _momentum(G, state, eps, t)


def _adam(G, state, eps, t):
    mean, squares = _mean(state, "exp_avg", G, 0.9, 0.1), _mean(state, "exp_avg_sq", G * G, 0.999, 0.001)
    return mean / (1 - 0.9**t) / ((squares / (1 - 0.999**t)).sqrt() + eps)


def _rmsprop(G, state, eps, t):
    return G / (_mean(state, "square_avg", G * G, 0.99, 0.01).sqrt() + eps)


def _adagrad(G, state, eps, t):
    return G / (_mean(state, "sum", G * G, 1, 1).sqrt() + eps)


def _mean(state, key, x, keep, new):
    """state[key] ← keep · state[key] + new · x, from zero."""
    state[key] = new * x if key not in state else state[key].mul_(keep).add_(x, alpha=new)
    return state[key]


DIRECTIONS = dict(zip(OPTIMIZERS, (_sgd, _momentum, _nesterov, _adam, _rmsprop, _adagrad)))
# Powers of a that pull the memory back.
POWERS = dict(momentum_buffer=1, exp_avg=1, exp_avg_sq=2, square_avg=2, sum=2)


def twin(weights, optimizer, a, lr, decay="none", strength=0.0, exponents=None):
    """The untouched run that the run rescaled by a is, by the table (or by other exponents).

    a: a tensor for each layer, as `factors` gives them. decay: one of DECAYS, with λ = strength.
    """
    kind = OPTIMIZERS[optimizer]
    p = exponents or kind.exponents
    added, beside = (strength * (decay == name) for name in DECAYS[1:])
    entries = [
        Entry(
            lr * f**p.rate,
            kind.eps * f**p.eps,
            added * f**p.added if added else 0.0,
            lr * beside * f**p.beside if beside else 0.0,
        )
        for f in a
    ]
    return Descent(weights, optimizer, entries)


def factors(weights, scales):
    """What the rescaling by s_m (E, d_m), one for each hidden layer, multiplies every weight by: like the weights."""
    return apply_to_layers([torch.ones_like(W) for W in weights], None, scales, rescaling_action, ACTIVATION)


def gradients(weights, X, labels):
    """Losses (E,) and ∂L/∂W of each network on a batch X (d_0, n), labels (n,)."""
    leaves = [W.detach().requires_grad_() for W in weights]
    losses = batch_loss(X, labels, ACTIVATION)(leaves)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaves)


def race(weights, scales, optimizer, lr, batches, decay="none", strength=0.0, exponents=None):
    """The rescaled run by torch.optim itself, its untouched twin, and the untouched run with one rate, on the batches.

    Returns arrays with a row for each batch: the losses (steps, E) before it of "moved", "twin" and "untouched"; the
    relative difference (steps, E) of the pulled-back weights from the twin's after it, the largest of the layers, in
    "run", and in "step" from those of a twin that takes this one step from the moved run's weights and memory.
    """
    a, kind = factors(weights, scales), OPTIMIZERS[optimizer]
    theirs = torch.optim.AdamW if (optimizer, decay) == ("Adam", "beside") else kind.theirs
    moved = [(W * f).requires_grad_() for W, f in zip(weights, a)]
    torch_s = theirs(moved, lr=lr, weight_decay=0.0 if decay == "none" else strength, **kind.options)
    rule = dict(lr=lr, decay=decay, strength=strength)
    own = twin(weights, optimizer, a, **rule, exponents=exponents)
    untouched = twin(weights, optimizer, [torch.ones_like(f) for f in a], **rule)
    found = {key: [] for key in ("moved", "twin", "untouched", "run", "step")}
    for X, labels in batches:
        fresh = twin(pulled_back(moved, a), optimizer, a, **rule, exponents=exponents)
        fresh.steps, fresh.state = own.steps, [memory(torch_s.state[W], f) for W, f in zip(moved, a)]
        for run in (fresh, own, untouched):
            loss, G = gradients(run.weights, X, labels)
            run.step(G)
            if run is not fresh:
                found["twin" if run is own else "untouched"].append(loss)
        loss, G = gradients(moved, X, labels)
        for W, g in zip(moved, G):
            W.grad = g
        torch_s.step()
        found["moved"].append(loss)
        for key, run in (("run", own), ("step", fresh)):
            found[key].append(difference(pulled_back(moved, a), run.weights))
    return {key: torch.stack(values) for key, values in found.items()}


def pulled_back(weights, a):
    """The untouched weights that these are the rescaled ones of."""
    return [W.detach() / f for W, f in zip(weights, a)]


def memory(state, a):
    """An optimizer's memory of one layer, pulled back."""
    return {key: x * a ** POWERS[key] for key, x in state.items() if key in POWERS and x is not None}


def difference(mine, theirs):
    """‖mine − theirs‖/‖theirs‖ of the layer where it is largest: (E,)."""
    return torch.stack([(A - B).norm(dim=(1, 2)) / B.norm(dim=(1, 2)) for A, B in zip(mine, theirs)]).amax(0)


def best_rescaling(weights, moved, sweeps=10):
    """The linear part of a move: scales s_m (E, d_m) that take the weights nearest to the moved ones (least squares).

    Hidden layer by hidden layer a Gauss-Newton step in log s for each unit, its row against 1/its column; the sweeps
    converge to rounding for moves of some per cent.
    """
    logs = [W.new_zeros(W.shape[:-1]) for W in weights[:-1]]
    for _ in range(sweeps):
        for m in range(len(logs)):
            a = factors(weights, [x.exp() for x in logs])
            (V, V1), (U, U1) = ((weights[k] * a[k], moved[k]) for k in (m, m + 1))
            slope = (V * (V - V1)).sum(-1) - (U * (U - U1)).sum(-2)
            logs[m] = logs[m] - (slope / (V.square().sum(-1) + U.square().sum(-2))).clamp(-1, 1)
    return [x.exp() for x in logs]
