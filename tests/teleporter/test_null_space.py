"""null_space.py: outputs on the batch stay while the gradient norm rises, and what has no room is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleporter import null_space_teleport
from teleporter.null_space import patches

few = settings(max_examples=12, deadline=None, derandomize=True)


def squares(x):
    """A loss of everything that the model returns."""
    return lambda model: (model(x) - 1).square().mean()


def moved(model, x, **options):
    """Teleport; the outputs on x must stay (1e-9 in float64), the objective rise. Returns the Teleportation."""
    before, exact = model(x).detach(), x.dtype == torch.float64
    weights = copy.deepcopy(model.state_dict())
    teleported = null_space_teleport(model, squares(x), **options)
    assert all(torch.equal(b, weights[name]) for name, b in model.named_buffers())
    assert (model(x) - before).norm() <= (1e-9 if exact else 1e-3) * before.norm()
    assert teleported.objective_after > 1.01 * teleported.objective_before > 0
    torch.testing.assert_close(squares(x)(model).detach(), teleported.loss_after)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert changed
    return teleported, changed


class Tiny(nn.Module):
    """A tiny transformer over 3 tokens: MultiheadAttention, or plain projections."""

    def __init__(self, width=16, plain=False, **options):
        super().__init__()
        self.embed, self.plain, self.norm = nn.Linear(3, width), plain, nn.LayerNorm(width)
        if plain:
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        else:
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **options)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.embed(x)
        h = self.norm(x)
        if self.plain:
            q, k, v = (y.unflatten(2, (2, -1)).transpose(1, 2) for y in self.qkv(h).chunk(3, -1))
            y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        else:
            y = self.attention(h, h, h)[0]
        return self.head((x + y + self.mlp(self.norm(x + y))).mean(1))


@few
@given(st.data())
def test_random_mlps(data):
    widths = data.draw(st.lists(st.integers(4, 9), min_size=2, max_size=3))
    bias, activation = data.draw(st.booleans()), data.draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]))
    layers = [m for a, b in zip([3, *widths], widths) for m in (nn.Linear(a, b, bias=bias), activation())]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 2, bias=bias)).double()
    moved(model, torch.randn(3, 3, dtype=torch.float64))


@few
@given(st.data())
def test_random_cnns(data):
    n, groups = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2]))
    conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")
    options = {"stride": data.draw(st.integers(1, 2)), "dilation": data.draw(st.integers(1, 2))}
    options["padding_mode"] = data.draw(st.sampled_from(["zeros", "circular"]))
    layers = [conv(2, 12, 2, padding=1), norm(12), nn.ReLU(), conv(12, 4, 2, groups=groups, **options), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(2, 2, *[4 if n < 3 else 3] * n, dtype=torch.float64)
    with torch.no_grad():
        model(x)  # LazyLinear
    moved(model.train(data.draw(st.booleans())), x)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 16, "vdim": 16}, {"plain": True}])
def test_transformers_move_every_projection(options):
    model = Tiny(**options).double()
    _, changed = moved(model, torch.randn(2, 3, 3, dtype=torch.float64))
    wanted = {"out.weight", "qkv.weight"} if options.get("plain") else {"attention.out_proj.weight"}
    assert changed >= wanted | {"mlp.0.weight", "mlp.2.weight"}


def test_float32_and_dropout():
    model = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))
    x = torch.randn(4, 3)
    before = torch.random.get_rng_state()
    teleported = null_space_teleport(model, squares(x))
    assert torch.equal(before, torch.random.get_rng_state())
    assert abs(teleported.drift) <= 1e-4 and teleported.objective_after > teleported.objective_before


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)),
])  # fmt: skip
def test_full_rank_is_refused_and_approximate_reports_its_drift(model):
    x, model = torch.randn(40, 3, dtype=torch.float64), model.double()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no room"):
        null_space_teleport(model, squares(x))
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())
    teleported = null_space_teleport(model, squares(x), approximate=True, energy=1e-12, radius=1e-3)
    assert teleported.drift != 0 and teleported.drift <= 1e-3 * (1 + teleported.loss_before)
    assert teleported.objective_after > teleported.objective_before
    torch.testing.assert_close(squares(x)(model).detach(), teleported.loss_after)


def test_a_last_layer_with_room_that_the_objective_does_not_see_is_refused():
    model = nn.Sequential(nn.Linear(30, 2), nn.Tanh(), nn.Linear(2, 2)).double()  # only the first layer has room
    with pytest.raises(ValueError, match="no room"):
        null_space_teleport(model, squares(torch.randn(10, 30, dtype=torch.float64)))


class Twice(nn.Module):
    """A weight that is used once more, in the open or out of sight."""

    def __init__(self, hidden):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)
        self.hidden = hidden

    def forward(self, x):
        x = torch.tanh(self.shared(torch.tanh(self.first(x))))
        return self.last(self.hidden(x, self.shared.weight))


@pytest.mark.parametrize("use, moves", [
    (F.linear, True),  # both inputs count
    (lambda x, W: x @ W.T, False),
    (lambda x, W: x * W.sum(), False),
    (lambda x, W: x * W.data.sum(), False),
])  # fmt: skip
def test_every_use_of_a_weight_counts(use, moves):
    _, changed = moved(Twice(use).double(), torch.randn(3, 3, dtype=torch.float64))
    assert ("shared.weight" in changed) == moves and "last.weight" in changed


@few
@given(st.data())
def test_patches_times_the_weight_are_the_convolution(data):
    n, groups, k = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 3))
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    padding = data.draw(st.sampled_from([0, 1, "valid"] + (["same"] if stride == 1 else [])))
    x = torch.randn(2, 4, *[6] * n, dtype=torch.float64)
    W = torch.randn(6, 4 // groups, *[k] * n, dtype=torch.float64)
    h = patches(x, W.shape[2:], groups, stride, padding, dilation)
    y = getattr(F, f"conv{n}d")(x, W, None, stride, padding, dilation, groups)
    torch.testing.assert_close((W.view(groups, 6 // groups, -1) @ h).flatten(0, 1), y.movedim(1, 0).flatten(1))


def test_bad_input():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="finite scalar"):
        null_space_teleport(model, lambda m: m(torch.randn(2, 3)))
    with pytest.raises(ValueError, match="float32 or float64"):
        null_space_teleport(copy.deepcopy(model).bfloat16(), squares(torch.randn(2, 3)))
    with pytest.raises(ValueError, match="norm"):
        null_space_teleport(model, lambda m: 0 * m(torch.randn(2, 3)).sum())
