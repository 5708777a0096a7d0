"""What an optimizer remembers follows the parameters: against optimizers that lived at the moved weights all along."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from teleporter import Teleporter


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.LeakyReLU(0.3), nn.Conv2d(4, 2, 2)
        )

    def forward(self, x):
        return self.body(x).mean((2, 3))


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.3), nn.Linear(4, 3), nn.LeakyReLU(0.3), nn.Linear(3, 2))


def matrices():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))


# What moves exactly: a name, a model, an optimizer. Epsilons are zero where past updates are remembered.
EXACT = {
    "SGD": (mlp, lambda p: optim.SGD(p, lr=0.1, weight_decay=0.1)),
    "SGD momentum": (mlp, lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3)),
    "SGD nesterov": (mlp, lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "Adam": (mlp, lambda p: optim.Adam(p, lr=0.1, eps=1e-2)),
    "Adam amsgrad": (mlp, lambda p: optim.Adam(p, lr=0.1, amsgrad=True, decoupled_weight_decay=True, weight_decay=0.1)),
    "AdamW": (mlp, lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True)),
    "NAdam": (mlp, lambda p: optim.NAdam(p, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1)),
    "RAdam": (mlp, lambda p: optim.RAdam(p, lr=0.1)),
    "Adamax": (mlp, lambda p: optim.Adamax(p, lr=0.1, eps=0.0)),
    "Adagrad": (mlp, lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.3)),
    "RMSprop": (mlp, lambda p: optim.RMSprop(p, lr=0.1, eps=1e-2)),
    "RMSprop momentum": (mlp, lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, eps=0.0)),
    "RMSprop centered": (mlp, lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, eps=0.0)),
    "Rprop": (mlp, lambda p: optim.Rprop(p, lr=0.1)),
    "ASGD": (mlp, lambda p: optim.ASGD(p, lr=0.1, t0=0, weight_decay=0.1)),
    "Adafactor": (Convolutional, lambda p: optim.Adafactor(p, lr=0.1)),
    "Muon": (matrices, lambda p: optim.Muon(p, lr=0.1)),
}


def data(model):
    x = torch.randn(6, 2, 5, 5) if isinstance(model, Convolutional) else torch.randn(6, 3)
    return x.double(), torch.randint(2, (6,))


def trained(model, optimizer, x, y, steps):
    """Train; [(weights, gradients)] before each step."""
    past = []
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model((1 + i % 3) * x), y).backward()
        past.append([(p.detach().clone(), p.grad.clone()) for p in model.parameters()])
        optimizer.step()
    return past


def moved(model, optimizer, **options):
    """Move at random by up to e^±1; {parameter: its factors}, found from the weights themselves."""
    before = [p.detach().clone() for p in model.parameters()]
    teleporter = Teleporter(model, "rescale", optimizer=optimizer, **options)
    teleporter.apply([2 * torch.rand(s.shape, dtype=torch.float64) - 1 for s in teleporter.symmetries])
    return teleporter, [p.detach() / b for p, b in zip(model.parameters(), before)]


def repeated(make, twin, past, factors):
    """An optimizer whose past is the same, but at the moved weights; the twin stays where it is."""
    parameters, optimizer = list(twin.parameters()), make(list(twin.parameters()))
    now = [p.detach().clone() for p in parameters]
    for step in past:
        for p, f, (w, g) in zip(parameters, factors, step):
            p.data, p.grad = f * w, g / f
        optimizer.step()
    for p, q in zip(parameters, now):
        p.data = q
    for i, (p, f) in enumerate(zip(parameters, factors)):
        if "ax" in optimizer.state.get(p, {}):  # the only one that saw what its own steps led to
            optimizer.state[p]["ax"] = sum([f * step[i][0] for step in past[2:]], now[i].clone()) / (len(past) - 1)
    return optimizer


def assert_same_for_ten_steps(model, optimizer, twin, other, x, y):
    start = [p.detach().clone() for p in model.parameters()]
    for m, o in ((model, optimizer), (twin, other)):
        trained(m, o, x, y, 10)
    for p, q, s in zip(model.parameters(), twin.parameters(), start):
        assert not torch.equal(p, s)
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EXACT)
def test_the_next_ten_steps_are_those_of_an_optimizer_that_saw_the_moved_past(name):
    make_model, make = EXACT[name]
    model = make_model().double()
    (x, y), optimizer = data(model), make(list(model.parameters()))
    past = trained(model, optimizer, x, y, 6)
    teleporter, factors = moved(model, optimizer, strict=True)
    assert "not exact" not in repr(teleporter)
    twin = copy.deepcopy(model)
    other = repeated(make, twin, past, factors)
    assert_same_for_ten_steps(model, optimizer, twin, other, x, y)
    for p, q in zip(model.parameters(), twin.parameters()):
        for key, value in optimizer.state.get(p, {}).items():
            torch.testing.assert_close(value, other.state[q][key], rtol=1e-9, atol=1e-12)


class LimitedMemory:
    """L-BFGS written again, from recorded weights and gradients (lists of flat tensors)."""

    def __init__(self, weights, gradients, rate):
        pairs = [(b - a, h - g) for a, b, g, h in zip(weights, weights[1:], gradients, gradients[1:])]
        self.pairs = [(s, y) for s, y in pairs if s @ y > 1e-10]
        self.rate = rate

    def direction(self, gradient):
        q, used = gradient.clone(), []
        for s, y in reversed(self.pairs):
            used.append((s @ q) / (s @ y))
            q -= used[-1] * y
        s, y = self.pairs[-1]
        q *= (s @ y) / (y @ y)
        for (s, y), a in zip(self.pairs, reversed(used)):
            q += (a - (y @ q) / (s @ y)) * s
        return -self.rate * q


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_lbfgs_takes_the_steps_that_the_moved_pairs_ask_for():
    model = mlp().double()
    (x, y), weights, gradients = data(model), [], []
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=1, tolerance_change=0, history_size=100)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.05 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        weights.append(flat(model.parameters()))
        gradients.append(flat(p.grad for p in model.parameters()))
        return loss

    for _ in range(6):
        optimizer.step(closure)
    _, factors = moved(model, optimizer, strict=True)
    f = flat(factors)
    weights[:], gradients[:] = [f * w for w in weights], [g / f for g in gradients]
    for _ in range(10):
        w = flat(model.parameters())
        optimizer.step(closure)
        expected = LimitedMemory(weights, gradients, 0.1)
        assert torch.equal(weights[-1], w) and len(optimizer.state[model[0].weight]["ro"]) == len(expected.pairs)
        step = flat(model.parameters()) - w
        torch.testing.assert_close(step, expected.direction(gradients[-1]), rtol=1e-8, atol=1e-12)


def test_sparse_adam_and_sparse_gradients_that_wait():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.LeakyReLU(0.3), nn.Linear(4, 2, bias=False)).double()
    tokens, y = torch.tensor([0, 1, 1, 3]), torch.randint(2, (4,))

    def make(m):
        return optim.SparseAdam([m[0].weight], lr=0.1), optim.Adam([m[2].weight], lr=0.1)

    def train(m, optimizers, steps):
        for _ in range(steps):
            m.zero_grad()
            F.cross_entropy(m(tokens), y).backward()
            [o.step() for o in optimizers]

    optimizers = make(model)
    train(model, optimizers, 3)
    grad = model[0].weight.grad.to_dense().clone()
    state = {k: v.clone() for k, v in optimizers[0].state[model[0].weight].items() if torch.is_tensor(v)}
    _, (f, _) = moved(model, optimizers, strict=True)
    assert model[0].weight.grad.is_sparse
    torch.testing.assert_close(model[0].weight.grad.to_dense(), grad / f)
    after = optimizers[0].state[model[0].weight]
    torch.testing.assert_close(after["exp_avg"], state["exp_avg"] / f)
    torch.testing.assert_close(after["exp_avg_sq"], state["exp_avg_sq"] / f**2)
    before = model(tokens)
    moved_by_step = Teleporter(model, optimizer=optimizers).step(tokens, lambda out: F.cross_entropy(out, y))
    assert moved_by_step.objective_after > moved_by_step.objective_before
    torch.testing.assert_close(model(tokens), before)


# What does not move exactly is said, or refused

INEXACT = {
    "SGD": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), "weight_decay 0.1 is coupled"),
    "Adam": (lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1), "weight_decay 0.1 is coupled"),
    "NAdam": (lambda p: optim.NAdam(p, lr=0.1, weight_decay=0.1), "weight_decay 0.1 is coupled"),
    "RAdam": (lambda p: optim.RAdam(p, lr=0.1, weight_decay=0.1), "weight_decay 0.1 is coupled"),
    "Adagrad": (lambda p: optim.Adagrad(p, lr=0.1, weight_decay=0.1), "weight_decay 0.1 is coupled"),
    "Adamax": (lambda p: optim.Adamax(p, lr=0.1, eps=1e-4), "eps 0.0001 stays"),
    "RMSprop": (lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, eps=1e-4), "eps 0.0001 stays"),
    "Adadelta": (lambda p: optim.Adadelta(p), "eps 1e-06 stays"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_is_not_exact_is_printed_with_its_size_or_refused(name):
    make, message = INEXACT[name]
    model = mlp().double()
    (x, y), optimizer = data(model), make(list(model.parameters()))
    with pytest.raises(ValueError, match=f"strict: not exact: {name}: {message}"):
        Teleporter(model, optimizer=optimizer, strict=True)
    trained(model, optimizer, x, y, 6)
    line = next(line for line in repr(Teleporter(model, optimizer=optimizer)).splitlines() if "not exact" in line)
    assert message in line and 0 < float(line.partition("up to ")[2].split()[0]) < 100


def test_adadelta_is_exact_where_its_epsilon_does_not_count():
    model = mlp().double()
    (x, y), make = data(model), lambda p: optim.Adadelta(p, lr=1.0, eps=1e-30)
    optimizer = make(list(model.parameters()))
    past = trained(model, optimizer, x, y, 6)
    _, factors = moved(model, optimizer)
    other = repeated(make, twin := copy.deepcopy(model), past, factors)
    for p, q in zip(model.parameters(), twin.parameters()):
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(value, other.state[q][key], rtol=1e-9, atol=0)


def test_adafactor_moves_the_estimate_that_its_factors_make():
    model = mlp().double()
    (x, y), optimizer = data(model), optim.Adafactor(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Adafactor: factored squares"):
        Teleporter(model, optimizer=optimizer, strict=True)
    trained(model, optimizer, x, y, 3)

    def estimates():
        states = [optimizer.state[p] for p in model.parameters()]
        return [s["row_var"] @ s["col_var"] / s["row_var"].mean() if "row_var" in s else s["variance"] for s in states]

    before = [v.clone() for v in estimates()]
    teleporter, factors = moved(model, optimizer)
    for v, b, f in zip(estimates(), before, factors):
        torch.testing.assert_close(v, b / f**2)
    teleporter.undo()
    for v, b in zip(estimates(), before):
        torch.testing.assert_close(v, b)


def test_squares_under_attention_are_said_to_be_approximate():
    model = nn.MultiheadAttention(4, 2).double()
    with pytest.raises(ValueError, match="Adam: under attention squares move as those of uncorrelated entries"):
        Teleporter(model, optimizer=optim.Adam(model.parameters()), strict=True)
    optimizer, x = optim.Adamax(model.parameters()), torch.randn(3, 2, 4, dtype=torch.float64)
    model(x, x, x)[0].square().sum().backward()
    optimizer.step()
    before = {p: optimizer.state[p]["exp_inf"].clone() for p in model.parameters()}
    teleporter = Teleporter(model, optimizer=optimizer)
    teleporter.apply(teleporter.random_tangents())
    after = optimizer.state[model.in_proj_weight]["exp_inf"]
    assert (after > 0).all() and not torch.allclose(after, before[model.in_proj_weight])


# Every optimizer, and unknown ones


def test_every_optimizer_of_torch_is_in_a_table():
    names = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)} - {"Optimizer"}
    assert names == {name.split()[0] for name in EXACT} | {"LBFGS", "SparseAdam", "Adadelta"}


class Unknown(optim.SGD):
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p] |= {"steps": 1, "scale": torch.tensor(2.0), "z": p.detach().clone(), "cake": p.grad.clone()}


@pytest.mark.parametrize("then", [None, "keep", "reset"])
def test_a_memory_of_unknown_kind_is_an_error_unless_told_what_to_do(then):
    model = mlp().double()
    (x, y), optimizer = data(model), Unknown(model.parameters(), lr=0.1)
    teleporter = Teleporter(model, optimizer=optimizer, on_unknown_state=then)
    trained(model, optimizer, x, y, 1)
    before = copy.deepcopy((model.state_dict(), [optimizer.state[p]["cake"] for p in model.parameters()]))
    if then is None:
        for attempt in (lambda: Teleporter(model, optimizer=optimizer), lambda: moved(model, optimizer),
                        lambda: teleporter.step(x, lambda out: F.cross_entropy(out, y)), teleporter.undo):  # fmt: skip
            with pytest.raises(ValueError, match="Unknown keeps 'cake' of 0.weight"):
                attempt()
        assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
        return
    teleporter.apply(teleporter.random_tangents())
    for p, cake in zip(model.parameters(), before[1]):
        assert torch.equal(optimizer.state[p]["cake"], 0 * cake if then == "reset" else cake)
        torch.testing.assert_close(optimizer.state[p]["z"], p.detach())
    with pytest.raises(ValueError, match="on_unknown_state"):
        Teleporter(model, on_unknown_state="move")


def test_optimizers_that_do_not_hold_the_parameters_are_refused():
    model = mlp()
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="does not hold 0.weight, 0.bias, 2.weight and 2 more"):
        Teleporter(model, optimizer=optim.SGD(copy.deepcopy(model).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="does not hold 0.weight"):
        Teleporter(model, optimizer=optim.SGD(parameters[1:], lr=0.1))
    with pytest.raises(ValueError, match="StepLR has no state"):
        Teleporter(model, optimizer=optim.lr_scheduler.StepLR(optim.SGD(parameters, lr=0.1), 1))
    Teleporter(model, optimizer=[optim.SGD(parameters[:2], lr=0.1), optim.Adam(parameters[2:])])
    optimizer = optim.SGD(parameters, lr=0.1)
    teleporter = Teleporter(model, optimizer=optimizer)
    optimizer.param_groups[0]["params"] = parameters[:3]
    with pytest.raises(ValueError, match="does not hold 2.bias, 4.weight:"):
        teleporter.apply(teleporter.random_tangents())


# Averaged copies


def test_averages_of_the_weights_move_and_are_undone():
    model, x = mlp().double(), torch.randn(5, 3, dtype=torch.float64)
    swa = optim.swa_utils.AveragedModel(model)
    shadow = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    for p in swa.parameters():
        p.data += 0.1 * torch.randn_like(p)
    before, weights = swa(x), {name: p.clone() for name, p in [*swa.named_parameters(), *shadow.items()]}
    teleporter, factors = moved(model, None, averaged=[swa, shadow])
    for copy_, prefix in ((dict(swa.named_parameters()), "module."), (shadow, "")):
        for (name, _), f in zip(model.named_parameters(), factors):
            torch.testing.assert_close(copy_[prefix + name].detach(), f * weights[prefix + name])
    torch.testing.assert_close(swa(x), before, rtol=1e-12, atol=1e-12)
    teleporter.undo()
    torch.testing.assert_close(shadow["0.weight"], weights["0.weight"])
    with pytest.raises(ValueError, match="averaged: Sequential has no copy of 0.weight"):
        Teleporter(model, averaged=nn.Sequential(nn.Linear(2, 2)))
