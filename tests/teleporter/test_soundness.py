"""What may never happen: a trace left by building, a function that moved without an error, weights without bounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teleporter import Pair, Teleporter


def mlp(*dims):
    return nn.Sequential(*[m for a, b in zip(dims, dims[1:]) for m in (nn.Linear(a, b), nn.ReLU())][:-1])


def cross_entropy(y):
    return lambda output: F.cross_entropy(output, y)


class Remembers(nn.Module):
    """Fills an attribute, a list and a buffer in its forward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.seen, self.log = mlp(3, 4, 2), None, []
        self.register_buffer("mean", torch.ones(3))
        self.count = torch.zeros(1)

    def forward(self, x):
        self.seen = x
        self.log.append(x)
        self.mean.mul_(0.9)
        self.count += 1
        self.extra = x
        return self.body(x)


def test_building_leaves_no_trace():
    model, x = Remembers(), torch.randn(5, 3)
    state, rng, log = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model.log
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    Teleporter(model)
    assert model.seen is None and model.log is log and log == [] and model.count.item() == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert torch.equal(torch.get_rng_state(), rng) and isinstance(model(x), torch.Tensor)


class Mixing(nn.Module):
    """`forward` is one of those whose shapes decide whether channels stay apart."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.sound = kind, mlp(2, 5, 2)
        self.conv, self.mixed = nn.Conv2d(2, 4, 1), nn.Linear(16, 2)
        if kind == "floor":
            self.mixed = nn.Linear(4, 2)
        if kind == "pool over channels":
            self.mixed = nn.Linear(2 * 4 * 4, 2)
        if kind == "tokens":
            self.conv, self.norm, self.mixed = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        if self.kind == "tokens":
            return self.mixed(F.relu(self.norm(self.conv(x)))).mean((1, 2))[:, None] + self.sound(x[:, 0, :2])
        h, rest = F.relu(self.conv(x)), self.sound(x[:, :, 0, 0])
        if self.kind == "view":
            return self.mixed(h.view(x.shape[0] * 4, 16)).view(x.shape[0], 4, 2).sum(1) + rest
        if self.kind == "floor":
            return self.mixed(torch.div(h, 0.3, rounding_mode="floor").mean((2, 3))) + rest
        return self.mixed(F.avg_pool3d(h, (2, 1, 1)).flatten(1)) + rest


@pytest.mark.parametrize("when", ["constructor", "first step", "apply", "apply without inputs"])
@pytest.mark.parametrize("kind", ["view", "tokens", "pool over channels", "floor"])
def test_what_real_inputs_refute_is_left_alone_and_the_rest_moves(kind, when):
    model = Mixing(kind).double()
    x = torch.randn(5, *((6, 3) if kind == "tokens" else (2, 4, 4)), dtype=torch.float64)
    teleporter, loss_fn = Teleporter(model), cross_entropy(torch.randint(2, (5,)))
    before = model(x)
    if when == "constructor":
        teleporter = Teleporter(model, inputs=x)
        teleporter.apply(teleporter.random_tangents())
    elif when == "first step":
        teleporter.step(x, loss_fn)
    else:
        teleporter.apply(teleporter.random_tangents(), inputs=x if when == "apply" else None)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert any(s.name == "sound.0 -> sound.2" for s in teleporter.symmetries)
    # a followed run may show that all mixed channels can be scaled by one number
    assert all(
        s.shape == (1,) and when in ("constructor", "first step") for s in teleporter.symmetries if "mixed" in s.name
    )


def test_a_symmetry_that_weights_of_zero_hide_is_refuted_all_the_same():
    model, x = Mixing("view"), torch.randn(5, 2, 4, 4)
    nn.init.zeros_(model.mixed.weight)
    before = copy.deepcopy(model.state_dict())
    teleporter = Teleporter(model, ["auto", Pair("conv", "mixed")])
    with pytest.raises(RuntimeError, match="nothing was moved"):
        teleporter.apply(teleporter.random_tangents(), inputs=x)
    assert [s.name for s in teleporter.symmetries] == ["sound.0 -> sound.2"]
    assert "changed the output" in teleporter.left_alone["conv -> mixed"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def changes():
    def tie(m):
        m[2].weight = m[0].weight

    yield tie, "parameter 2.weight"
    yield lambda m: m.__setitem__(2, nn.Linear(4, 4)), "module 2"
    yield lambda m: m.double(), "parameter 0.weight"
    yield lambda m: m[0].register_forward_hook(lambda *_: None), "hooks of 0"
    yield lambda m: setattr(m[0], "forward", lambda x: x), "module 0"
    yield lambda m: nn.utils.parametrizations.weight_norm(m[0]), "module 0"
    yield lambda m: m[2].weight.requires_grad_(False), "parameter 2.weight"
    yield lambda m: m.eval(), "training mode of 1"


@pytest.mark.parametrize("change, what", changes())
def test_a_model_that_changed_since_is_refused(change, what):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    teleporter = Teleporter(model)
    change(model)
    before = copy.deepcopy(model.state_dict())
    for move in (lambda: teleporter.apply(teleporter.random_tangents()), teleporter.undo,
                 lambda: teleporter.step(torch.randn(3, 4), lambda y: y.sum())):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{what} is not what it was"):
            move()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_are_checked_where_the_loss_is_too_small_to_tell():
    """At a loss of 0 any output does; the finder's map is made wrong after the trial."""
    model, x = mlp(3, 4, 2), torch.randn(5, 3)
    teleporter = Teleporter(model, inputs=x)
    s = teleporter.symmetries[0]
    teleporter.symmetries = [s._replace(slots=s.slots[:-1])]  # the reader is forgotten
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="of its size, and was undone"):
        teleporter.step(x, lambda output: 1e-6 * output.square().sum())
    with pytest.raises(RuntimeError, match="was undone"):
        teleporter.apply(teleporter.random_tangents(), inputs=x)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_many_steps_stay_within_the_total_bound_and_undo_returns_bit_for_bit():
    model, x = mlp(6, 5, 4, 3), torch.randn(7, 6)
    loss_fn, before = cross_entropy(torch.randint(3, (7,))), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    loss_fn(model(x)).backward()
    optimizer.step()
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    teleporter = Teleporter(model, optimizer=optimizer, total_bound=16.0)
    for _ in range(30):
        assert teleporter.step(x, loss_fn).drift == 0
    ratio = (model[0].weight / before["0.weight"]).abs().log2()
    assert ratio.abs().max() == 4
    with pytest.raises(ValueError, match="total_bound"):
        teleporter.apply([torch.full(s.shape, 5.0, dtype=torch.float64) for s in teleporter.symmetries])
    teleporter.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], v) for p, v in zip(model.parameters(), momentum))


def test_attention_stays_within_the_total_bound():
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)
    teleporter = Teleporter(model, total_bound=4.0)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        teleporter.step((x, x, x), lambda output: output[0].square().sum())
    assert all((p.detach() - s).norm() < 8 * s.norm() + 1e-9 for p, s in zip(model.parameters(), start))
    teleporter.undo()
    for p, s in zip(model.parameters(), start):
        torch.testing.assert_close(p.detach(), s, rtol=1e-4, atol=1e-5)


def test_attention_stops_where_float32_could_not_undo_it():
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 5, 4)
    teleporter = Teleporter(model, inputs=(x, x, x))
    before = model(x, x, x)[0]
    for _ in range(25):  # with total_bound alone, 2^20, the output is off by a multiple of the tolerance long before
        teleporter.step((x, x, x), lambda output: output[0].square().sum())
    torch.testing.assert_close(model(x, x, x)[0], before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [1.5, float("inf"), float("nan")])
def test_a_total_bound_below_the_bound_is_refused(bound):
    with pytest.raises(ValueError, match="total_bound"):
        Teleporter(mlp(2, 3, 2), total_bound=bound)


def test_a_pair_by_hand_that_is_none_is_refuted():
    model, before = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="every symmetry found changed the output"):
        Teleporter(model, [Pair("0", "2")], inputs=before)
