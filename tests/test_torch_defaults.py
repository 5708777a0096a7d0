"""torch's default device and default dtype change no bit of what the library computes: it goes by its arguments."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_teleport import ACTIONS, LEAKY, data, losses, network, random_elements
from torch import nn

from common.arms import Arm, Stack, draw_batches
from common.mlp import StackedMLP, initial_weights
from common.sharpness import Sharpness
from teleport import (
    TANH,
    apply_to_layers,
    curvature,
    curve_curvature,
    forward,
    postactivation_action,
    preactivation_action,
    random_search,
    rescaling_action,
    sharpness,
    squared_gradient_norm,
    teleport,
)
from teleporter import LowRankRotation, Teleporter, level_set_teleport, null_space_teleport

DIMS = (8, 6, 5, 4)
ASCENT = dict(objective=squared_gradient_norm, activation=LEAKY, lr=1e-2, steps=2)


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(width, 2), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


@pytest.fixture(scope="module")
def given():
    """What the calls need, made under the defaults that torch comes with."""
    dtype = torch.float32
    weights = network(0, DIMS, (2,), dtype)
    x, labels = data(0, 8, 5, 4, dtype)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 98, generator=generator, dtype=dtype)
    radii = torch.linspace(0.1, 0.6, 6, dtype=dtype)
    elements = {a: [g.to(dtype) for g in random_elements(1, weights, a)] for a in ACTIONS}
    torch.manual_seed(0)
    layers = nn.Conv1d(3, 4, 2), nn.ReLU(), nn.Flatten(1), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), Attention(6)
    model, inputs = nn.Sequential(*layers).to(dtype), torch.randn(3, 3, 3, dtype=dtype)
    return dict(weights=weights, x=x, labels=labels, directions=directions, radii=radii, elements=elements, model=model,
                inputs=inputs)  # fmt: skip


def actions(weights, x, elements, **_):
    return [apply_to_layers(weights, x, g, action, LEAKY) for action, g in elements.items()]


def teleports(weights, x, labels, **_):
    loss_fn = losses(x, labels)
    own = lambda *arguments: preactivation_action(*arguments)  # noqa: E731 - an action of one's own: autograd
    runs = [teleport(weights, x, loss_fn, action=action, **ASCENT) for action in (*ACTIONS, own)]
    runs += [teleport(weights, x, loss_fn, action=a, **ASCENT, retraction="exp", cap=5.0) for a in ACTIONS]
    runs += [teleport(weights, x, loss_fn, action=a, **{**ASCENT, "lr": 10.0}, backtracking=True) for a in ACTIONS]
    runs += [teleport(weights, x, loss_fn, action=rescaling_action, **ASCENT, bound=1.5, maximize=False)]
    return [*runs, *(run.moved for run in runs), *(run.drift for run in runs)]


def searches(weights, x, labels, **_):
    options = dict(activation=LEAKY, candidates=5, scale=0.3, objective=squared_gradient_norm)
    generator = torch.Generator("cpu").manual_seed(3)
    return [random_search(weights, x, losses(x, labels), action=a, generator=generator, **options) for a in ACTIONS]


def objectives(weights, x, labels, directions, radii, elements, **_):
    M = elements[postactivation_action]
    U, V = weights[1], weights[0]
    wide = torch.cat((x, x.flip(0), x + 1), 1)
    return [
        forward(weights, x, TANH),
        squared_gradient_norm(weights, losses(x, labels)),
        sharpness(weights, losses(x, labels), directions, radii, chunk_size=4),
        *(curvature(weights, h, M, activation) for h in (x, wide) for activation in (LEAKY, TANH)),
        *(curve_curvature(U, V, h, M[0], LEAKY, t) for h in (x, wide) for t in (0.0, 0.2)),
        curve_curvature(U[0], V[0], x, M[0], TANH, 0.2),  # in forward mode
    ]


def fast_sharpness(weights, x, labels, directions, radii, **_):
    phi = Sharpness(x, labels, directions, radii, DIMS, LEAKY, chunk=4)
    independent = [W.clone().requires_grad_() for W in weights]
    value = phi(independent)
    return [value.detach(), *torch.autograd.grad(value.sum(), independent)]


def training(weights, x, labels, **_):
    results = []
    for optimizer in ("SGD", "momentum", "AdaGrad", "RMSprop", "Adam"):
        net = StackedMLP(weights, optimizer, lr=0.01)
        results += [net.train_epoch(x.mT, labels, 2, lambda i, net=net: net.reset([0]) if i == 1 else None)]
        results += [*net.evaluate(x.mT, labels, 3), *net.gradients(x.mT, labels)[0], *net.weights]
    return results


def arms(weights, x, labels, directions, **_):
    W = [W[0].expand(3, *W.shape[1:]) for W in weights]
    move = lambda W, X, y: teleport(W, X, losses(X, y), action=preactivation_action, **ASCENT)  # noqa: E731
    stack = Stack((Arm("baseline"), Arm("moved", move, rate=0.5)), W, "Adam", [1e-2, 3e-2], moves=1)
    X, y = draw_batches(x.mT, labels, 4, [torch.Generator("cpu").manual_seed(i) for i in range(3)])
    samples = SimpleNamespace(x=x.mT, y=labels, x_test=x.mT, y_test=labels)
    run = SimpleNamespace(progress=lambda iterable, **_: iterable)
    curves = stack.train(run, samples, 2, 2, {1: lambda i: stack.move(0, X, y, dtype=x.dtype) if i == 0 else None})
    return [curves["train_loss"], curves["test_loss"], curves["test_accuracy"], stack.loss, stack.objective]


def teleporters(model, inputs, **_):
    def moved(way):
        net = copy.deepcopy(model)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        output(net).backward()
        optimizer.step()
        result = way(net, optimizer)
        state = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        return [*(result[1:] if isinstance(result, tuple) else ()), *(p.detach() for p in net.parameters()), *state]

    def output(net):
        return net(inputs).square().mean()

    def square(y):
        return y.square().mean()

    def apply(net, optimizer, **options):
        teleporter = Teleporter(net, optimizer=optimizer, **options)
        teleporter.apply(teleporter.random_tangents(torch.Generator("cpu").manual_seed(0)))

    return [
        moved(lambda net, optimizer: Teleporter(net, optimizer=optimizer).step(inputs, square)),
        moved(lambda net, optimizer: Teleporter(net, inputs=inputs, optimizer=optimizer).step(inputs, square)),
        moved(apply),
        moved(lambda net, optimizer: apply(net, optimizer, inputs=inputs)),
        moved(lambda net, optimizer: Teleporter(net, ["preactivation"]).step(inputs, square)),
        moved(lambda net, optimizer: level_set_teleport(net, output, 3)),
        moved(lambda net, optimizer: null_space_teleport(net, output, 3)),
    ]


def rotations(x, **_):
    net = nn.Sequential(nn.Linear(8, 3, bias=False, device="cpu"), nn.Linear(3, 5, device="cpu")).to(x.dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        [
            p.copy_(torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float64))
            for p in net.parameters()
        ]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    rotation = LowRankRotation(net, optimizer, pairs=[("0", "1")], inputs=x.mT)
    for _ in range(2):
        net(x.mT).square().mean().backward()
        optimizer.step()
        rotation.step()
    return [p.detach() for p in net.parameters()]


def initialization(**_):
    return initial_weights(DIMS, (1, 2))


def tensors(results):
    for value in results:
        yield from (value,) if isinstance(value, torch.Tensor) else tensors(value)


LIBRARY = (actions, teleports, searches, objectives, teleporters, rotations)
SHARED = (fast_sharpness, training, arms, initialization)


@pytest.mark.parametrize("call", (*LIBRARY, *SHARED))
def test_results_do_not_depend_on_the_defaults(call, given):
    expected = [*tensors(call(**given))]
    for defaults in (default_device(), default_dtype(torch.float64)):
        with defaults:
            got = [*tensors(call(**given))]
        for a, b in zip(expected, got, strict=True):
            assert (a.dtype, a.device) == (b.dtype, b.device)
            assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
