"""Stacked training equals PyTorch's, member by member; the published initialization; statistics."""

import math

import numpy as np
import pytest
import torch

from common.losses import batch_loss, cross_entropy
from common.mlp import StackedMLP, initial_weights, published_seeds
from teleport import leaky_relu

DIMS = (12, 7, 6, 5)
TORCH_OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "AdaGrad": lambda p, lr: torch.optim.Adagrad(p, lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr),
}


def batches(n=20, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n * size, DIMS[0], generator=generator, dtype=torch.float64)
    return x, torch.randint(DIMS[-1], (n * size,), generator=generator)


def weights(members=3, dtype=torch.float64):
    here = torch.empty(0).device
    return tuple(W.to(dtype) for W in initial_weights(DIMS, published_seeds(members), here))


def torch_training(member, optimizer, lr, x, y, size=8, rebuild_after=None):
    parameters = [W.clone().requires_grad_() for W in member]
    algorithm = TORCH_OPTIMIZERS[optimizer](parameters, lr)
    losses = []
    for i in range(0, len(x), size):
        if i // size == rebuild_after:
            algorithm = TORCH_OPTIMIZERS[optimizer](parameters, lr)
        h = x[i : i + size].T
        for W in parameters[:-1]:
            h = torch.nn.functional.leaky_relu(W @ h, 0.1)
        loss = torch.nn.functional.cross_entropy((parameters[-1] @ h).T, y[i : i + size])
        algorithm.zero_grad()
        loss.backward()
        algorithm.step()
        losses.append(loss.item())
    return [p.detach() for p in parameters], losses


@pytest.mark.parametrize("optimizer", TORCH_OPTIMIZERS)
def test_stack_equals_torch_member_by_member(optimizer):
    """Different learning rates in one stack; member 1's optimizer is rebuilt half way, the others' is not."""
    x, y = batches()
    W, rates = weights(), torch.tensor([0.01, 0.03, 0.1], dtype=torch.float64)
    net = StackedMLP(W, optimizer, rates)
    mean_loss = net.train_epoch(x, y, 8, before_step=lambda i: net.reset([1]) if i == 10 else None)
    for e in range(3):
        member, losses = torch_training([w[e] for w in W], optimizer, rates[e].item(), x, y, 8, 10 if e == 1 else None)
        assert math.isclose(mean_loss[e], np.mean(losses), rel_tol=1e-9)
        for mine, theirs in zip(net.weights, member):
            torch.testing.assert_close(mine[e], theirs, rtol=1e-8, atol=1e-10)


def test_gradients_set_and_evaluate():
    x, y = batches()
    net = StackedMLP(weights())
    leaves = [w.clone().requires_grad_() for w in net.weights]
    h = x.T
    for W in leaves[:-1]:
        h = torch.nn.functional.leaky_relu(W @ h, 0.1)
    loss = cross_entropy(leaves[-1] @ h, y)
    loss.sum().backward()
    gradients, batch_loss = net.gradients(x, y)
    torch.testing.assert_close(batch_loss, loss.detach())
    for G, leaf in zip(gradients, leaves):
        torch.testing.assert_close(G, leaf.grad)
    test_loss, accuracy = net.evaluate(x, y, batch_size=50)
    torch.testing.assert_close(test_loss, loss.detach())
    logits = leaves[-1] @ h
    torch.testing.assert_close(accuracy, (logits.argmax(1) == y).double().mean(1))
    net.set(slice(0, 1), [w[1:2] for w in net.weights])
    torch.testing.assert_close(net.evaluate(x, y)[0][0], test_loss[1])
    torch.testing.assert_close(net.evaluate(x, y)[0][2], test_loss[2])


def test_last_batch_may_be_smaller():
    x, y = batches()
    net, member = StackedMLP(weights(1), lr=0.1), None
    net.train_epoch(x[:30], y[:30], 8)
    member, _ = torch_training([w[0] for w in weights(1)], "SGD", 0.1, x[:30], y[:30], 8)
    torch.testing.assert_close(net.weights[0][0], member[0])


def test_published_initialization_is_torch_rand_after_manual_seed():
    for seed, member in zip(published_seeds(2), zip(*weights(2, torch.float32))):
        torch.manual_seed(seed)
        for W, i, o in zip(member, DIMS, DIMS[1:]):
            assert torch.equal(W, (2 * torch.rand(o, i) - 1) / i**0.5)
    assert published_seeds(3) == [54321, 108642, 162963]


def test_cross_entropy_with_labels_per_member():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(2, 3, 5, 7, generator=generator), torch.randint(5, (3, 7), generator=generator)
    expected = [[torch.nn.functional.cross_entropy(logits[a, b].T, labels[b]) for b in range(3)] for a in range(2)]
    torch.testing.assert_close(cross_entropy(logits, labels), torch.tensor(expected))


def test_batch_loss_lets_a_diverged_member_be_nan():
    """…and the others what torch computes, on a batch that is shared or each member's own."""
    x, y = batches(1)
    V, U = (W[:, :5, :12] for W in weights()[::2])
    gone = V.clone()
    gone[1] = math.nan
    U = U[..., :5]
    own = x.T.expand(3, *x.T.shape)
    for X, labels in ((x.T, y), (own, y.expand(3, -1))):
        loss = batch_loss(X, labels, leaky_relu(0.1))((gone, U))
        assert loss.isnan().tolist() == [False, True, False]
        logits = U[2] @ torch.nn.functional.leaky_relu(V[2] @ x.T, 0.1)
        torch.testing.assert_close(loss[2], torch.nn.functional.cross_entropy(logits.T, y))


@pytest.mark.parametrize("value", (0.0, -1.0, math.nan, math.inf))
def test_a_learning_rate_that_is_not_positive_and_finite_is_named(value):
    for lr in (value, torch.tensor([0.1, value, 0.1])):
        with pytest.raises(ValueError, match="lr must be positive and finite"):
            StackedMLP(weights(), lr=lr)


def test_what_does_not_fit_is_named():
    W, (x, y) = weights(), batches(1)
    for message, call in (
        ("optimizer must be one of", lambda: StackedMLP(W, "Lion")),
        ("weights must be .* that chain", lambda: StackedMLP(W[::2])),
        ("weights must be .* that chain", lambda: StackedMLP((W[0], W[1][:2], W[2]))),
        ("weights must be .* that chain", lambda: StackedMLP([w[0] for w in W])),
        ("weights must be .* that chain", lambda: StackedMLP(())),
        ("slope", lambda: StackedMLP(W, slope=-0.1)),
        ("slope", lambda: StackedMLP(W, slope=1.5)),
        ("dims", lambda: initial_weights((12,), [0])),
        ("dims", lambda: initial_weights((12, 0, 3), [0])),
        ("seeds: none given", lambda: initial_weights(DIMS, [])),
        ("batch_size", lambda: StackedMLP(W).train_epoch(x, y, 0)),
        ("batch_size", lambda: StackedMLP(W).evaluate(x, y, 0)),
        ("x has no samples", lambda: StackedMLP(W).train_epoch(x[:0], y[:0], 8)),
        ("x has no samples", lambda: StackedMLP(W).evaluate(x[:0], y[:0])),
        ("lr must be a number or one per member", lambda: StackedMLP(W, lr=torch.ones(2))),
        ("one floating-point dtype", lambda: StackedMLP((W[0].float(), *W[1:]))),
        ("one floating-point dtype", lambda: StackedMLP((W[0].to("meta"), *W[1:]))),
        ("one floating-point dtype", lambda: StackedMLP([w.long() for w in W])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_each_sample_has_its_label():
    """Fewer went through before: the samples without one were trained away from every class."""
    W, (x, y) = weights(), batches(1)
    net = StackedMLP(W)
    for labels in (y[:-1], y[:1], torch.cat((y, y)), y[0]):
        for call in (net.step, net.gradients, net.evaluate, lambda *batch: net.train_epoch(*batch, 3)):
            with pytest.raises(ValueError, match=r"y .* must be \(n, 12\) and \(n,\)"):
                call(x, labels)
        with pytest.raises(ValueError, match="labels .* do not fit logits"):
            cross_entropy(torch.zeros(5, 8), labels)
    with pytest.raises(ValueError, match=r"x .* must be \(n, 12\)"):
        net.step(x[:, :-1], y)
    assert all(torch.equal(a, b) for a, b in zip(net.weights, W))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", TORCH_OPTIMIZERS)
def test_cuda_graph_equals_the_cpu(optimizer):
    """An epoch of replayed steps, with a smaller last batch and one member's optimizer rebuilt on the way."""
    x, y = batches()
    nets = [StackedMLP([W.to(device) for W in weights()], optimizer, 0.01) for device in ("cpu", "cuda")]
    for net in nets:
        data, labels = x.to(net.lr.device), y.to(net.lr.device)
        net.train_epoch(data, labels, 12, before_step=lambda i, net=net: net.reset([1]) if i == 5 else None)
    for cpu, gpu in zip(nets[0].weights, nets[1].weights):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-8, atol=1e-10)
