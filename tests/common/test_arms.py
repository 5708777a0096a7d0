"""Arms as members of one stack: independent of each other, moved and recorded where they lie."""

from types import SimpleNamespace

import pytest
import torch

from common.arms import Arm, Stack, draw_batches
from common.losses import batch_loss
from common.mlp import StackedMLP, initial_weights
from teleport import Teleportation, leaky_relu

DIMS, SEEDS, RATES = (6, 5, 4, 3), [1, 2], torch.tensor([1e-2, 3e-2, 1e-1])
RUN = SimpleNamespace(progress=lambda iterable, **_: iterable)


def twice(weights, X, labels):
    """A move that everybody sees: all weights doubled."""
    moved, loss_fn = tuple(2 * W for W in weights), batch_loss(X, labels, leaky_relu(0.1))
    norm = sum(W.square().sum((-2, -1)) for W in weights)
    return Teleportation(moved, loss_fn(weights), loss_fn(moved), norm, 4 * norm)


ARMS = (Arm("baseline"), Arm("twice", twice), Arm("restart", restart=True), Arm("lr x3", rate=3.0))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=generator), torch.randint(3, (60,), generator=generator)
    return SimpleNamespace(x=x[:40], y=y[:40], x_test=x[40:], y_test=y[40:])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_member_of_the_stack_is_the_run_that_is_trained_alone(data, optimizer):
    stack = Stack(ARMS, initial_weights(DIMS, SEEDS), optimizer, RATES, moves=1)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    X, labels = draw_batches(data.x, data.y, 10, generators)
    curves = stack.train(RUN, data, 3, 10, {1: lambda i: stack.move(0, X, labels) if i == 0 else None})

    for a, arm in enumerate(ARMS):
        for f, rate in enumerate(RATES):
            for r, seed in enumerate(SEEDS):
                alone = StackedMLP(initial_weights(DIMS, [seed]), optimizer, rate * arm.rate)
                alone.train_epoch(data.x, data.y, 10)
                if arm.move:
                    alone.set(slice(None), twice(alone.weights, X[r], labels[r]).weights)
                if arm.restart:
                    alone.reset(slice(None))
                losses = [alone.train_epoch(data.x, data.y, 10) for _ in range(2)]
                torch.testing.assert_close(curves["train_loss"][a, f, r, 1:], torch.cat(losses))
                torch.testing.assert_close(
                    curves["test_loss"][a, f, r, -1:], alone.evaluate(data.x_test, data.y_test)[0]
                )


def test_moves_are_recorded_for_the_arms_that_move(data):
    stack = Stack(ARMS, initial_weights(DIMS, SEEDS), "SGD", 1e-2, moves=2)
    X, labels = draw_batches(data.x, data.y, 10, [torch.Generator().manual_seed(s) for s in SEEDS])
    stack.move(1, X.double(), labels, dtype=torch.float64)
    assert stack.objective.shape == (4, 2, 2, 2)
    moved = stack.objective != 0
    assert moved[1, :, 1].all() and moved.sum() == moved[1, :, 1].numel()
    torch.testing.assert_close(stack.objective[1, :, 1, 1], 4 * stack.objective[1, :, 1, 0])
    assert (stack.loss[1, :, 1, 0] != stack.loss[1, :, 1, 1]).all() and not stack.loss[[0, 2, 3]].any()
    assert stack.net.weights[0].dtype == torch.float32


def test_every_arm_may_have_its_own_rates(data):
    rates = torch.tensor([[1e-2, 2e-2], [3e-2, 1e-3]])
    stack = Stack(ARMS[:2], initial_weights(DIMS, SEEDS), "SGD", rates, moves=1)
    assert stack.by_arm(stack.net.lr).tolist() == rates[..., None].expand(2, 2, 2).tolist()


def test_a_rate_is_raised_as_much_as_the_move_would_have_raised_the_norm(data):
    arms = (Arm("baseline"), Arm("raised", twice, raises=True))
    stack = Stack(arms, initial_weights(DIMS, SEEDS), "SGD", RATES, moves=1)
    weights = [W.clone() for W in stack.net.weights]
    stack.move(0, *draw_batches(data.x, data.y, 10, [torch.Generator().manual_seed(s) for s in SEEDS]))
    assert all(W.equal(V) for W, V in zip(stack.net.weights, weights))
    rates = stack.by_arm(stack.net.lr)  # (A, F, S)
    torch.testing.assert_close(rates[1], 2 * rates[0])  # twice the weights: four times the squared norm


def test_arms_move_when_they_are_told_and_as_often(data):
    arms = (Arm("always", twice), Arm("epoch 1", twice, epoch=1), Arm("once", twice, epoch=1, moves=1))
    stack = Stack(arms, initial_weights(DIMS, SEEDS), "SGD", 1e-2, moves=3)
    X, labels = draw_batches(data.x, data.y, 10, [torch.Generator().manual_seed(s) for s in SEEDS])
    for k, epoch in enumerate((0, 1, 1)):
        stack.move(k, X, labels, epoch=epoch)
    assert (stack.objective[:, 0, :, 0] != 0).tolist() == [[True, True, True], [False, True, True], [False] * 3]
    stack.move(0, X, labels, epoch=1)
    assert (stack.objective[2, 0, :, 0] != 0).tolist() == [True, False, False]


def test_an_arm_that_follows_takes_the_move_of_the_other(data):
    taken = []

    def after(weights, X, labels, lead):
        taken.append(lead.objective_after)
        return lead

    arms = (Arm("baseline"), Arm("twice", twice, moves=1), Arm("random", after, moves=1, follows="twice"))
    stack = Stack(arms, initial_weights(DIMS, SEEDS), "SGD", 1e-2, moves=2)
    X, labels = draw_batches(data.x, data.y, 10, [torch.Generator().manual_seed(s) for s in SEEDS])
    for k in range(2):
        stack.move(k, X, labels)
    assert len(taken) == 1 and torch.equal(taken[0].double(), stack.objective[1, :, 0, 1])
    torch.testing.assert_close(stack.by_arm(stack.net.weights[0])[2], 2 * stack.by_arm(stack.net.weights[0])[0])
    assert not stack.objective[:, :, 1].any()


def test_arms_may_start_apart():
    weights = initial_weights(DIMS, [1, 2, 3, 4])
    stack = Stack(ARMS[:2], [W.unflatten(0, (2, 2)) for W in weights], "SGD", 1e-2, moves=0)
    assert all(torch.equal(W, V) for W, V in zip(stack.net.weights, weights))
