"""The sampling variant as its notebook trains it, with the control that it lacks: the same network not teleported.

Leaky ReLU on the output too, and a softmax before a cross-entropy that takes another. Initialization, order of the data
and draws are ours.
"""

import torch
from biases import affine_action, diagonally_dominant, homogeneous, parameters

from common.losses import cross_entropy
from common.published import approximate_score
from teleport import apply_to_layers, forward

ARMS = ("none", "published")


def probabilities(weights, X, activation):
    """What the network puts out for X (d_0, n): (*E, C, n)."""
    return activation.f(forward(weights, X, activation)).softmax(-2)


def doubled_softmax(X, labels, activation):
    """loss_fn(weights) -> (*E,)."""
    return lambda weights: cross_entropy(probabilities(weights, X, activation), labels)


def selected(W, X, loss_fn, m, elements, activation):
    """One run's W moved on hidden layer m by the element of the highest approximate score."""
    score = approximate_score(parameters(W), lambda P: loss_fn(homogeneous(P)), m, elements[:, :-1, :-1].to(W[0]))
    return moved_by(W, X, m, elements[int(score.argmax())], activation)


def moved_by(W, X, m, element, activation):
    """W moved on hidden layer m alone."""
    elements = [element.to(W[0]) if layer == m else None for layer in range(len(W) - 1)]
    return apply_to_layers(W, X, elements, affine_action, activation)


def train(s, weights, seeds, x, data, x_test, activation, progress):
    """SGD of S runs from weights (S, d_m, d_{m-1}), homogeneous, without the teleport and with it: accuracies on the
    test set after each epoch, (2, S, epochs)."""
    W, accuracies = tuple(V.expand(len(ARMS), *V.shape) for V in weights), []
    gradient = torch.func.grad(lambda P, X, y: doubled_softmax(X, y, activation)(homogeneous(P)).sum())
    for epoch in progress(range(s.variant_epochs), desc="variant", unit="epoch"):
        if epoch == s.teleport_epoch:
            X, labels = x[: s.batch].T.double(), data.y[: s.batch]
            moved = [teleport(s, [V[1, i] for V in W], X, labels, seed, activation) for i, seed in enumerate(seeds)]
            W = tuple(torch.stack([V[0], torch.stack(rows).to(V)]) for V, rows in zip(W, zip(*moved)))
        for rows, labels in zip(x.split(s.batch), data.y.split(s.batch)):
            P = parameters(W)
            W = homogeneous([V - s.lr * G for V, G in zip(P, gradient(P, rows.T, labels))])
        right = probabilities(W, x_test.T, activation).argmax(-2) == data.y_test
        accuracies.append(right.double().mean(-1))
    return {"accuracy": torch.stack(accuracies, -1)}


def teleport(s, W, X, labels, seed, activation):
    """One run's best of the candidates, on a random hidden layer, in float64."""
    generator = torch.Generator().manual_seed(seed)
    m = int(torch.randint(len(W) - 1, (), generator=generator))
    elements = diagonally_dominant(torch.eye(W[m].shape[-2]), s.candidates, s.norm, generator)
    W = tuple(V.double() for V in W)
    return selected(W, X, doubled_softmax(X, labels, activation), m, elements, activation)
