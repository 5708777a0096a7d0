"""The arms that the claim about sampling rests on, each at its best learning rate; see random_search.py.

arrays = stages(run, x, data)       # every arm's best rate, then fresh runs at it
"""

import math

import numpy as np
import torch
from biases import affine_action, diagonally_dominant, gradient_norm, homogeneous, rescale
from variant import moved_by

from common import plots
from common.losses import batch_loss
from common.mlp import StackedMLP, initial_weights
from common.protocol import RATES, number
from common.tuning import Tuned, disjoint_seeds, in_chunks, room, runs, tune
from teleport import leaky_relu, random_search

SLOPE = 0.01
ACTIVATION = leaky_relu(SLOPE)
ARMS = ("baseline", "search", "random", "rescaling", "lr x10")


def start_weights(s, x, seeds, device="cpu"):
    """The published initialization of a network with biases (biases.py), for inputs x with their column of ones."""
    W = initial_weights((x.shape[1], *(d + 1 for d in s.widths), 10), seeds, device)
    return homogeneous((*(V[:, :-1] for V in W[:-1]), W[-1]))


def new_net(weights, lr):
    return StackedMLP(tuple(W.float() for W in weights), "SGD", lr, SLOPE)


def train_epoch(net, x, y, batch):
    """One epoch in which the rows of constants stay what they are."""

    def keep_constants(_):
        for W in net.weights[:-1]:
            W[:, -1] = 0
            W[:, -1, -1] = 1

    loss = net.train_epoch(x, y, batch, keep_constants)
    keep_constants(None)
    return loss


def hidden_layer(s, seed):
    """The hidden layer that a run's elements act on."""
    return int(torch.randint(len(s.widths), (), generator=torch.Generator().manual_seed(seed)))


def elements(s, m, seed):
    """A run's candidates for hidden layer m."""
    return diagonally_dominant(torch.eye(s.widths[m] + 1), s.candidates, s.norm, torch.Generator().manual_seed(seed))


def search(s, W, X, loss_fn, seed, candidates, layers):
    """The best of so many candidates by the true gradient norm after the move, an element for each of the layers."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(action=affine_action, activation=ACTIVATION, scale=s.norm, objective=gradient_norm)
    options |= dict(draw=diagonally_dominant, generator=generator)
    return random_search(W, X, loss_fn, layers=layers, candidates=candidates, **options)


def moved(s, arm, W, X, loss_fn, seed):
    """One network W (d_m, d_{m-1}), in float64, moved as the arm is, on the batch X (d_0, n)."""
    m = hidden_layer(s, seed)
    if arm == "random":
        return moved_by(W, X, m, elements(s, m, seed)[0], ACTIVATION)
    found = search(s, W, X, loss_fn, seed, s.candidates, [m])
    return found.weights if arm == "search" else rescale(W, [m], found.objective_after, loss_fn, ACTIVATION)


def train(s, names, factors, seeds, x, data):
    """Train the arms (A) at factors (A, F) of the learning rate and seeds (S): the training loss, (A, F, S, epochs)."""
    shape = (*factors.shape, len(seeds))
    W = tuple(V.expand(*shape, *V.shape[-2:]).flatten(0, 2) for V in start_weights(s, x, seeds, x.device))
    net = new_net(W, s.lr * torch.tensor(factors, dtype=torch.float32)[..., None].expand(shape).flatten())
    X, labels, losses = x[: s.batch].T.double(), data.y[: s.batch], []
    loss_fn = batch_loss(X, labels, ACTIVATION)
    for epoch in range(s.tuned_epochs):
        if epoch == s.teleport_epoch:
            for i, (a, _, k) in enumerate(torch.cartesian_prod(*map(torch.arange, shape)).tolist()):
                mine = tuple(V[i].double() for V in net.weights)
                if names[a] == "lr x10":
                    net.lr[i] *= 10
                elif names[a] != "baseline" and math.isfinite(gradient_norm(mine, loss_fn)):
                    moving = moved(s, names[a], mine, X, loss_fn, seeds[k])
                    net.set(slice(i, i + 1), [V[None].float() for V in moving])
        losses.append(train_epoch(net, x, data.y, s.batch))
    return {"train_loss": torch.stack(losses, -1).view(*shape, -1)}


def stages(run, x, data):
    """Tune every arm's rate, then compare all at their best on fresh runs, as many as the tuning asks for.

    Returns {"tuning/…": of Tuned, "tuned/train_loss": (A, S, epochs), "tuned/margin": what S runs can reach}.
    """
    s = run.settings
    tuning, fresh = disjoint_seeds(s.tuning_seeds, s.tuned_seeds)

    def curves(which, factors, seeds):
        names, one = [ARMS[a] for a in which], start_weights(s, x[:1], seeds[:1])
        return in_chunks(
            lambda some: train(s, names, factors, some, x, data), seeds, factors.size, one, room(run.device)
        )["train_loss"]

    def best_rates(_):
        return tune(lambda *where: numbers(s, curves(*where, tuning)), len(ARMS), s.grid).save("")

    found = run.parts(best_rates, {"tuning": None})[0]["tuning"]
    tuned = Tuned.load(found, "")
    plan = runs(tuned, [ARMS.index("search")], (s.least, s.tuned_seeds))
    parts, _ = run.parts(
        lambda a: {"train_loss": curves([a], tuned.best_factors()[[[a]]], fresh[: plan.n])[0, 0]},
        {f"tuned.{name}": a for a, name in enumerate(ARMS)},
    )
    arrays = {f"tuning/{key}": value for key, value in found.items()} | {"tuned/margin": np.float64(plan.margin)}
    return arrays | {"tuned/train_loss": np.stack([part["train_loss"] for part in parts.values()])}


def numbers(s, loss):
    """One number a run: the mean log training loss (…, epochs) from the teleport on."""
    return number(loss[..., s.teleport_epoch :])


def plot(outcome, found, against):
    """search against every other arm, {against(rate, other): Comparison}, at both rates; and the tuning."""
    figure, ((ax, tuning),) = plots.panels(1, 2, width=4.2, height=3.2)
    others = [arm for arm in ARMS if arm != "search"]
    for k, rate in enumerate(RATES):
        each = [found[against(rate, other)] for other in others]
        plots.intervals(ax, each, np.arange(len(each)) + 0.24 * k - 0.12, k, f"{rate} rate")
    ax.set_yticks(range(len(others)), others)
    ax.set_xlabel(f"training loss of search against …, %, {outcome.label}")
    ax.invert_yaxis()
    plots.tuning_curves(tuning, Tuned.load(outcome.arrays, "tuning/"), ARMS)
    tuning.set(ylabel="above the baseline's best, %", xlabel=f"learning rate / {outcome.settings.lr:g}")
    for each in (ax, tuning):
        each.legend(fontsize=8)
    return figure
