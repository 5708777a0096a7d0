"""Learning rates layer by layer, tuned within a budget of runs: the control of whatever scales units.

A layer's rate is a base rate times 2^(k/2), k whole. The search starts at the base rates, with all layers one step up
or down, or one of them; the best of these eight neighbours is next, until none is better, in steps of 8 on one run a
trial, then of 2 on three, then of √2 on six, or as far as the budget of runs goes.
"""

import torch
from twins import OPTIMIZERS, Descent, Entry

from common.mlp import StackedMLP

STAGES = ((6, 1), (2, 3), (1, 6))  # step in k, runs a trial
FINE = 2  # rates are found once no neighbour at this step is better


def train(weights, optimizer, rates, data, epochs, batch):
    """Train E networks W_m (E, d_m, d_{m-1}) with rates (E, L): train_loss and test_loss, (E, epochs) each.

    train_loss is the mean of an epoch's mini-batches, as StackedMLP.train_epoch has it.
    """
    eps = OPTIMIZERS[optimizer].eps
    run = Descent(weights, optimizer, [Entry(rate.view(-1, 1, 1), eps) for rate in rates.T])
    net, curves = StackedMLP(weights), {"train_loss": [], "test_loss": []}
    net.weights = tuple(run.weights)
    for _ in range(epochs):
        total = torch.zeros_like(rates[:, 0])
        for x, y in zip(data.x.split(batch), data.y.split(batch)):
            gradients, loss = net.gradients(x, y)
            run.step(gradients)
            total += loss * len(y)
        curves["train_loss"].append(total / len(data.x))
        curves["test_loss"].append(net.evaluate(data.x_test, data.y_test)[0])
    return {key: torch.stack(values, -1) for key, values in curves.items()}


def factors(point):
    """What the point multiplies the base rate by, layer by layer."""
    return [2 ** (int(k) / 2) for k in point]


def search(score, layers, budget):
    """(the best point, whether rates were found, trials (n, layers + 3)) within a budget of runs.

    score(points, runs) -> their scores on so many runs each, smaller is better, NaN for one that diverged; a point is a
    k for each layer. A trial is its point, step, runs and score.
    """
    best, trials, found = (0,) * layers, [], False
    for stride, runs in STAGES:
        scores, moving = {}, True
        while moving:
            new = [p for p in around(best, stride) if p not in scores]
            affordable = new[: int(budget - sum(t[-2] for t in trials)) // runs]
            for p, x in zip(affordable, score(affordable, runs) if affordable else ()):
                scores[p] = x if x == x else float("inf")
                trials.append((*p, stride, runs, scores[p]))
            known = [p for p in around(best, stride) if p in scores]
            nearest = min(known, key=scores.get) if known else best
            moving, best = nearest != best, nearest
            if len(affordable) < len(new):
                return best, found, trials
        found = stride <= FINE and scores[best] < float("inf")
    return best, found, trials


def around(point, stride):
    """The point, all layers up and down from it, and each alone."""
    yield point
    for layers in (range(len(point)), *((m,) for m in range(len(point)))):
        for step in (stride, -stride):
            yield tuple(k + step * (m in layers) for m, k in enumerate(point))
