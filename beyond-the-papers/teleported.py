"""The pre-activation teleport beside its linear part, on networks of ICLR 2024 that start anew.

The linear part of a teleport is the positive rescaling that takes the weights nearest to where the teleport takes them
(least squares, twins.best_rescaling). It is exact, and by the identity of twins.py nothing but rates per unit.
"""

from functools import partial
from itertools import product

import layer_rates
import numpy as np
import torch
import twins
from twins import ACTIVATION

from common.arms import Arm, Stack, draw_batches
from common.losses import batch_loss
from common.mlp import initial_weights
from common.protocol import number
from common.tuning import in_chunks, room
from teleport import (
    Teleportation,
    apply_to_layers,
    preactivation_action,
    rescaling_action,
    squared_gradient_norm,
    teleport,
)

RATES = {"SGD": 1e-2, "Adam": 1e-4}  # published (SGD: AdaGrad's)
LR_T = 5e-2  # of the ascent
BOUND = 2.0  # of a unit's scale in a teleport, along rescalings: ‖∂L/∂W‖² has no maximum there
CAP = 100.0  # ascent stops once ‖∂L/∂W‖² is above it
ARMS = ("baseline", "preactivation", "linear part", "rescaling")


def dimensions(data):
    return data.features, 16, 10, 10


def ascend(s, action, weights, X, labels, **bound):
    options = dict(activation=ACTIVATION, lr=LR_T, steps=s.ascent_steps, cap=CAP, **bound)
    loss = batch_loss(X, labels, ACTIVATION)
    return teleport(weights, X, loss, objective=squared_gradient_norm, action=action, **options)


def linear_part(s, weights, X, labels):
    """The teleport by the rescaling that is nearest to the pre-activation one."""
    return nearest(ascend(s, preactivation_action, weights, X, labels), weights, X, labels)


def nearest(whole, weights, X, labels):
    """The linear part of a teleport that was made."""
    loss = batch_loss(X, labels, ACTIVATION)
    scales = twins.best_rescaling(weights, whole.weights)
    moved = apply_to_layers(weights, None, scales, rescaling_action, ACTIVATION)
    after = loss(moved), squared_gradient_norm(moved, loss)
    return Teleportation(moved, whole.loss_before, after[0], whole.objective_before, after[1])


def train(run, data, optimizer, which, factors, seeds):
    """The arms numbered `which`, at factors (A, F) of the published rate: curves (A, F, S, epochs)."""
    s = run.settings
    every = (
        Arm("baseline"),
        Arm("preactivation", partial(ascend, s, preactivation_action)),
        Arm("linear part", partial(linear_part, s)),
        Arm("rescaling", partial(ascend, s, rescaling_action, bound=BOUND)),
    )

    def chunk(seeds):
        W = initial_weights(dimensions(data), seeds, run.device)
        rates = RATES[optimizer] * torch.tensor(factors, dtype=W[0].dtype)
        stack = Stack([every[a] for a in which], W, optimizer, rates, s.teleports)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def before(i):
            if i < s.teleports:
                stack.move(i, *draw_batches(data.x, data.y, s.teleport_batch, generators))

        curves = stack.train(run, data, s.epochs, s.batch, {0: before}, desc=optimizer)
        return {key: curves[key] for key in ("train_loss", "test_loss")}

    one = initial_weights(dimensions(data), seeds[:1])
    return in_chunks(chunk, seeds, factors.size, one, room(run.device))


def train_layers(run, data, optimizer, factors, seeds):
    """No teleport, a rate for every layer, at factors (F, L): (F, S, epochs)."""
    s, W, F = run.settings, initial_weights(dimensions(data), seeds, run.device), len(factors)
    rates = RATES[optimizer] * torch.tensor(factors, dtype=W[0].dtype).to(W[0]).repeat_interleave(len(seeds), 0)
    curves = layer_rates.train([w.repeat(F, 1, 1) for w in W], optimizer, rates, data, s.epochs, s.batch)
    return {key: values.unflatten(0, (F, len(seeds))) for key, values in curves.items()}


def tune_layers(run, data, optimizer, seeds, budget):
    """What layer_rates.search finds within a budget of runs on these seeds."""

    def score(points, runs):
        factors = np.array([layer_rates.factors(p) for p in points])
        return number(train_layers(run, data, optimizer, factors, seeds[:runs])["train_loss"]).mean(-1).tolist()

    return layer_rates.search(score, len(dimensions(data)) - 1, budget)


def measure(run, data, optimizer, factors, seeds):
    """The first teleport of S runs, whole and its linear part, on its batch: "growth" of ‖∂L/∂W‖ (2, S), "share" (S,)
    of the squared way that the linear part goes, "decrease" (2, 3, S) of the batch's loss in the optimizer's next step,
    at the published rate and at the baseline's best (factors (2, L)), from the start, after the linear part, after the
    whole; "drift" (S,) of the whole, relative."""
    s = run.settings
    W = tuple(w.double() for w in initial_weights(dimensions(data), seeds, run.device))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    X, labels = draw_batches(data.x.double(), data.y, s.teleport_batch, generators)
    whole = ascend(s, preactivation_action, W, X, labels)
    linear = nearest(whole, W, X, labels)
    left, way = (sum((A - B).square().sum((1, 2)) for A, B in zip(whole.weights, V)) for V in (linear.weights, W))
    decrease = []
    for rate, start in product(RATES[optimizer] * factors[:, 0], (W, linear.weights, whole.weights)):
        step = twins.Descent(start, optimizer, [twins.Entry(rate, twins.OPTIMIZERS[optimizer].eps)] * len(W))
        before, gradients = twins.gradients(start, X, labels)
        step.step(gradients)
        decrease.append(before - batch_loss(X, labels, ACTIVATION)(step.weights))
    return {
        "growth": torch.stack([(m.objective_after / m.objective_before).sqrt() for m in (linear, whole)]),
        "share": 1 - left / way,
        "decrease": torch.stack(decrease).unflatten(0, (2, 3)),
        "drift": whole.drift / whole.loss_before,
    }
