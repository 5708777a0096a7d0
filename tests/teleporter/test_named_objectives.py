"""The Teleporter's named objectives: the function stays, the objective grows, the optimizer's state moves along."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import set_seed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from teleporter import Teleporter
from teleporter.objectives import sign

NAMES = ("line_search_decrease", "look_ahead", "balance")
Y = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])


class Transformer(nn.Module):
    """One pre-norm block and a head; attention and the MLP's hidden units can move."""

    def __init__(self, width=8):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norms[1](x))).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.LeakyReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn():
    head = [nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), *head)


MODELS = {"mlp": (mlp, (6,)), "cnn": (cnn, (2, 8, 8)), "transformer": (Transformer, (5, 8))}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
}


def trained(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), Y).backward()
        optimizer.step()


def setting(name, optimizer, scale=True):
    """A model in training mode, badly scaled, trained for three steps; its optimizer and data."""
    set_seed(0)
    make, shape = MODELS[name]
    model, x = make().double(), torch.randn(8, *shape, dtype=torch.float64)
    with torch.no_grad():
        for p in list(model.parameters())[:2]:
            p.mul_(4 if scale else 1)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    trained(model, optimizer, x)
    return model, optimizer, x


def loss_fn(output):
    return F.cross_entropy(output, Y)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_the_objective_grows_and_the_state_moves(name, objective, optimizer):
    """Gradient descent's momentum is a sum of gradients: moved, it is that of the moved model's past."""
    model, optimizer, x = setting(name, optimizer)
    weights, buffers = copy.deepcopy(model.state_dict()), [b.clone() for b in model.buffers()]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    teleporter = Teleporter(model, objective=objective, optimizer=optimizer, inputs=x)
    before = model(x).detach()
    for b, kept in zip(model.buffers(), buffers):
        b.copy_(kept)
    batches = [(torch.randn_like(x), loss_fn) for _ in range(3)]
    moved = teleporter.step(x, loss_fn, **({"ahead": batches} if objective == "look_ahead" else {}))
    assert moved.objective_after > moved.objective_before and abs(moved.drift) < 1e-12
    assert all(torch.equal(b, kept) for b, kept in zip(model.buffers(), buffers))
    assert (model(x) - before).abs().max() < 1e-12 * (1 + before.abs().max())
    assert any(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    for n, p in model.named_parameters():  # what the state pairs with the weights to is kept, scale by scale
        key = "momentum_buffer" if "momentum_buffer" in state[p] else "exp_avg"
        changed = not torch.equal(p, weights[n])
        assert torch.equal(optimizer.state[p][key], state[p][key]) is not changed or not state[p][key].any()


@pytest.mark.parametrize("name", MODELS)
def test_balance_makes_incoming_and_outgoing_weights_equal_without_a_loss(name):
    model, optimizer, x = setting(name, "SGD")
    teleporter = Teleporter(model, objective="balance", optimizer=optimizer, inputs=x)
    before = model(x).detach()
    moved = teleporter.step()
    assert moved.objective_after > moved.objective_before and moved.drift.isnan()
    assert (model(x) - before).abs().max() < 1e-12 * (1 + before.abs().max())
    W = dict(model.named_parameters())
    for s in teleporter.symmetries:
        sizes = [0.0, 0.0]
        for slot in s.slots:
            sizes[slot.reads] += slot.product(W[slot.name].detach(), W[slot.name].detach(), s.kind != "rescale")
        norms = [z if z.ndim == 1 else z.diagonal(dim1=-2, dim2=-1).sum(-1) for z in sizes]
        torch.testing.assert_close(*norms, rtol=1e-6, atol=1e-9)
    again = teleporter.step()
    assert abs(again.objective_after - again.objective_before) < 1e-9


@pytest.mark.parametrize("optimizer, power", [("SGD", 2), ("AdamW", 1)])
def test_the_decrease_and_its_ascent_are_those_of_the_moved_model(optimizer, power):
    """D at the moved model by definition; the steps' signs by finite differences of it."""
    model, optimizer, x = setting("mlp", optimizer)
    teleporter = Teleporter(model, objective="line_search_decrease", optimizer=optimizer, inputs=x)

    def decrease():
        outputs = model(x)
        loss = loss_fn(outputs)
        W = list(model.parameters())
        g = torch.autograd.grad(loss, W, retain_graph=True)
        u = [sign(z) for z in g] if power == 1 else g
        J = [torch.autograd.grad(o, W, retain_graph=True) for o in outputs.flatten()]
        along = torch.stack([sum((a * b).sum() for a, b in zip(row, u)) for row in J])
        H = torch.autograd.functional.hessian(lambda z: loss_fn(z.view_as(outputs)), outputs.detach().flatten())
        return sum((a * b).sum() for a, b in zip(g, u)) ** 2 / (2 * along @ H @ along)

    loss, value, tangents, _ = teleporter._evaluate(x, loss_fn, derivative=True)
    torch.testing.assert_close(value, decrease())
    for k, s in enumerate(teleporter.symmetries):
        for i in range(s.shape[0]):
            T = [torch.zeros(z.shape, dtype=torch.float64) for z in teleporter.symmetries]
            T[k][i] = 1e-6
            teleporter.apply(T)
            up = decrease()
            teleporter.apply([-2 * t for t in T])
            slope = up - decrease()
            teleporter.apply(T)
            assert slope.abs() < 1e-12 or slope.sign() == tangents[k][i].sign()


def test_look_ahead_is_the_loss_after_the_optimizers_own_steps():
    for optimizer in OPTIMIZERS:
        model, optimizer, x = setting("cnn", optimizer)
        optimizer.state.clear()
        batches = [(torch.randn_like(x), loss_fn) for _ in range(4)]
        teleporter = Teleporter(model, objective="look_ahead", optimizer=optimizer, inputs=x)
        moved = teleporter.step(x, loss_fn, ahead=batches)
        for inputs, loss in batches[:-1]:
            optimizer.zero_grad()
            loss(model(inputs)).backward()
            optimizer.step()
        torch.testing.assert_close(-loss_fn(model(batches[-1][0])).detach(), moved.objective_after, rtol=1e-9, atol=0)
        pickle.loads(pickle.dumps(teleporter))  # what it looked at is not kept


def test_the_decrease_costs_at_most_three_gradients():
    model, x = mlp(), torch.randn(8, 6)
    teleporter = Teleporter(model, objective="line_search_decrease", inputs=x)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    one = count(lambda: torch.autograd.grad(loss_fn(model(x)), list(model.parameters())))
    assert count(lambda: teleporter._evaluate(x, loss_fn, derivative=True)) <= 3 * one


def test_what_does_not_go_together_is_an_error():
    for options, message in (
        ({"objective": "look_ahead"}, "needs the optimizer"),
        ({"objective": "balance", "maximize": False}, "maximize must be True"),
        ({"objective": "balance", "symmetries": "preactivation"}, "exact for every input"),
        ({"objective": "line_search_decrease", "bound": None}, "no maximum on the orbit: give a bound"),
        ({"objective": "gradient_norm", "bound": None}, "no maximum on the orbit: give a bound"),
        ({"objective": "lookahead"}, "objective must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Teleporter(mlp(), **options)
    model = mlp()
    with pytest.raises(ValueError, match="not of RMSprop"):
        Teleporter(model, objective="look_ahead", optimizer=torch.optim.RMSprop(model.parameters()))
    with pytest.raises(ValueError, match="step needs inputs"):
        Teleporter(model, objective="line_search_decrease").step()
    some = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not hold"):
        Teleporter(model, objective="look_ahead", optimizer=some).step(torch.randn(8, 6), loss_fn)
