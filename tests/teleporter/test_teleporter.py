"""teleporter.py: what it finds, that the function stays, that gradients and optimizers follow, level sets."""

import copy
import math
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleporter import Attention, Pair, Teleporter, level_set_teleport, null_space_teleport
from teleporter.hidden import pull_back

few = settings(max_examples=15, deadline=None, derandomize=True)
FLOATS = st.sampled_from([torch.float64, torch.float32])


def randomized(model, dtype=torch.float64):
    """Weights, biases, scales and statistics at random: an initial bias of zero would hide mistakes."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            size = tensor.abs().mean() if tensor.ndim > 1 else 0.3  # matrices keep the scale that their width asks for
            tensor.copy_(tensor + size * torch.randn_like(tensor))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return model.to(dtype)


def random_move(teleporter, spread=1.0):
    random = (2 * torch.rand(s.shape, dtype=torch.float64, device="cpu") - 1 for s in teleporter.symmetries)
    return [spread * T / (T.shape[-1] if T.ndim > 1 else 1) for T in random]


def assert_preserved(model, x, teleporter):
    """The function stays, the weights move, the inverse returns them."""
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    before, weights, T = model(x), copy.deepcopy(model.state_dict()), random_move(teleporter)
    teleporter.apply(T)
    assert (model(x) - before).abs().max() <= tolerance * (1 + before.abs().max())
    assert teleporter.symmetries
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
    assert {slot.name for s in teleporter.symmetries for slot in s.slots} == set(moved)
    teleporter.apply([-t for t in T])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=100 * tolerance, atol=100 * tolerance)


def gradients(model, x, loss_fn):
    G = torch.autograd.grad(loss_fn(model(x)), list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), G)}


def cross_entropy(y):
    return lambda output: F.cross_entropy(output, y)


def mlp(*dims, activation=nn.ReLU, **options):
    layers = [m for a, b in zip(dims, dims[1:]) for m in (nn.Linear(a, b, **options), activation())]
    return nn.Sequential(*layers[:-1])


# The function is preserved


@few
@given(st.data(), FLOATS)
def test_random_mlps(data, dtype):
    dims = data.draw(st.lists(st.integers(1, 6), min_size=3, max_size=5))
    layers = [nn.Linear(dims[0], dims[1])]
    for a, b in zip(dims[1:], dims[2:]):
        if data.draw(st.booleans()):
            layers.append(nn.BatchNorm1d(a))
        layers.append(data.draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.Identity()])))
        if data.draw(st.booleans()):
            layers.append(nn.Dropout(0.5))
        layers.append(nn.Linear(a, b, bias=data.draw(st.booleans())))
    model = randomized(nn.Sequential(*layers), dtype).eval()
    x = torch.randn(3, dims[0], dtype=dtype)
    teleporter = Teleporter(model, inputs=x)
    assert len(teleporter.symmetries) == len(dims) - 2  # each hidden layer
    assert_preserved(model, x, teleporter)


@few
@given(st.data(), FLOATS)
def test_random_cnns(data, dtype):
    kind = data.draw(st.sampled_from([1, 2, 3]))
    conv, norm, pool = ((getattr(nn, f"{name}{kind}d")) for name in ("Conv", "BatchNorm", "MaxPool"))
    transpose, average = getattr(nn, f"ConvTranspose{kind}d"), getattr(nn, f"AvgPool{kind}d")
    channels, layers, hidden = 2, [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        groups = data.draw(st.sampled_from([1, 2]))
        out = groups * data.draw(st.integers(1, 3))
        layer = data.draw(st.sampled_from([conv, conv, transpose]))
        stride, bias = data.draw(st.integers(1, 2)), data.draw(st.booleans())
        layers.append(layer(channels, out, 3, stride=stride, padding=1, groups=math.gcd(groups, channels), bias=bias))
        layers += [norm(out)] if data.draw(st.booleans()) else []
        layers += [nn.LeakyReLU()] if data.draw(st.booleans()) else []
        layers += data.draw(st.sampled_from([[], [pool(2, 1, 1)], [average(2, 1, 1)]]))
        channels, hidden = out, hidden + 1
    features = nn.Sequential(*layers).eval()
    x = torch.randn(2, 2, *[9] * kind, dtype=dtype)
    width = features.float()(x.float())[0].numel()
    head = [nn.Flatten(), nn.Linear(width, 3), nn.ReLU(), nn.Linear(3, 2)]
    model = randomized(nn.Sequential(*layers, *head), dtype).eval()
    teleporter = Teleporter(model, inputs=x)
    assert len(teleporter.symmetries) == hidden + 1
    assert_preserved(model, x, teleporter)


class Block(nn.Module):
    """A pre-norm transformer block; `plain` chooses how attention is written."""

    def __init__(self, width, heads, plain, bias):
        super().__init__()
        self.heads, self.plain = heads, plain
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        if plain == "fused":
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        elif plain == "separate":
            self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        else:
            self.attention = nn.MultiheadAttention(
                width, heads, bias=bias, add_bias_kv=plain == "bias_kv", batch_first=True
            )
        if plain in ("fused", "separate"):
            self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width, bias=bias), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        if self.plain in ("fused", "separate"):
            B, T, C = x.size()
            q, k, v = self.qkv(h).split(C, dim=2) if self.plain == "fused" else (self.q(h), self.k(h), self.v(h))
            q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            v = v.unflatten(-1, (self.heads, C // self.heads)).transpose(1, 2)
            y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(B, T, C))
        else:
            y = self.attention(h, h, h, need_weights=False)[0]
        x = x + y
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, plain="module", bias=True, depth=1):
        super().__init__()
        self.embed, self.position = nn.Linear(3, width), nn.Parameter(torch.zeros(4, width))
        self.blocks = nn.Sequential(*(Block(width, heads, plain, bias) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)).mean(1))


@few
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["module", "bias_kv", "fused", "separate"]), st.booleans(),
       st.integers(1, 2), FLOATS)  # fmt: skip
def test_random_transformers(heads, d, plain, bias, depth, dtype):
    model = randomized(Transformer(heads * d, heads, plain, bias, depth), dtype)
    teleporter = Teleporter(model)
    kinds = [s.kind for s in teleporter.symmetries]
    assert kinds.count("attention") == 2 * depth and kinds.count("rescale") == 3 * depth
    assert_preserved(model, torch.randn(2, 4, 3, dtype=dtype), teleporter)


class Residual(nn.Module):
    """A ResNet-like block between a stem and a head: the stream is written and read twice."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels)
        self.conv1, self.norm1 = nn.Conv2d(channels, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 2)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(x + self.norm2(self.conv2(y)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_a_residual_stream_is_one_space(training):
    model = randomized(Residual()).train(training)
    teleporter = Teleporter(model)
    assert [s.name for s in teleporter.symmetries] == ["stem_norm, norm2 -> conv1, head", "norm1 -> conv2"]
    assert_preserved(model, torch.randn(4, 3, 8, 8, dtype=torch.float64), teleporter)
    assert teleporter.left_alone == {
        "stem": "stem_norm normalizes it",
        "conv1": "norm1 normalizes it",
        "conv2": "norm2 normalizes it",
        "head": "it is the output of the model",
    }
    assert all(name in repr(teleporter) for name in ("stem_norm, norm2 -> conv1, head 4", "output of conv1: norm1"))


@pytest.mark.parametrize("training", [False, True])
def test_torch_transformer_layers(training):
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2)).train(training)
    teleporter = Teleporter(model)
    assert sorted(s.kind for s in teleporter.symmetries) == ["attention"] * 4 + ["rescale"] * 2
    assert_preserved(model, torch.randn(2, 4, 6, dtype=torch.float64), teleporter)


def test_different_keys_and_values():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 3, kdim=4, vdim=5, batch_first=True)
            self.a, self.b, self.c, self.out = nn.Linear(2, 6), nn.Linear(2, 4), nn.Linear(2, 5), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.attention(self.a(x), key=F.relu(self.b(x)), value=self.c(x))[0])

    model = randomized(Cross())
    teleporter = Teleporter(model)
    assert {s.name for s in teleporter.symmetries} == {
        "a -> attention", "b -> attention", "c -> attention", "attention -> out",
        "attention: queries, keys", "attention: values, output",
    }  # fmt: skip
    assert_preserved(model, torch.randn(2, 4, 2, dtype=torch.float64), teleporter)


def test_tokens_flattened_features_last():
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert_preserved(model, x, Teleporter(model, inputs=x))


def test_embedding_and_functional_operations():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.conv, self.fc = nn.Embedding(7, 6), nn.Conv2d(1, 4, 3), nn.Linear(6, 4)
            self.fc2, self.out = nn.Linear(4 * 4, 3), nn.Linear(3, 2)

        def forward(self, tokens, image):
            t = self.fc(F.relu(self.embed(tokens))).mean(dim=1)
            x = F.avg_pool2d(torch.relu(self.conv(image)), 2) * 0.5
            x = F.leaky_relu(self.fc2(x.view(x.size(0), -1)), 0.2)
            return self.out(x) + t.sum(1, keepdim=True)

    model = randomized(Model())
    inputs = torch.randint(7, (2, 5)), torch.randn(2, 1, 6, 6, dtype=torch.float64)
    teleporter = Teleporter(model, inputs=inputs)
    assert {s.name for s in teleporter.symmetries} == {"embed -> fc", "conv -> fc2", "fc2 -> out"}
    before = model(*inputs)
    teleporter.apply(random_move(teleporter))
    torch.testing.assert_close(model(*inputs), before, rtol=1e-12, atol=1e-12)


def test_channels_last_weights_move_too():
    model = randomized(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)))
    model = model.to(memory_format=torch.channels_last)
    assert_preserved(model, torch.randn(2, 2, 8, 8, dtype=torch.float64), Teleporter(model))


# By hand


class Untraceable(nn.Module):
    """Control flow on values: torch.fx cannot see through it, but the nested part is found all the same."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(3, 4), nn.Linear(4, 3), mlp(3, 5, 2)

    def forward(self, x):
        return self.inner(self.b(F.relu(self.a(x)))) if x.sum() > -1e9 else x


def test_an_untraceable_model_is_searched_module_by_module_and_takes_pairs_by_hand():
    model = randomized(Untraceable())
    found = Teleporter(model)
    assert [s.name for s in found.symmetries] == ["inner.0 -> inner.2"]
    both = Teleporter(model, ["auto", Pair("a", "b")])
    assert [s.name for s in both.symmetries] == ["inner.0 -> inner.2", "a -> b"]
    assert_preserved(model, torch.randn(3, 3, dtype=torch.float64), both)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_by_hand_with_grouped_queries(kv_heads):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 3 * kv_heads), nn.Linear(6, 2 * kv_heads)
            self.o = nn.Linear(8, 6)

        def forward(self, x):
            q, k, v = (p(x).unflatten(-1, (h, -1)) for p, h in ((self.q, 4), (self.k, kv_heads), (self.v, kv_heads)))
            k, v = (t.repeat_interleave(4 // kv_heads, dim=2) for t in (k, v))
            weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
            return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    model = randomized(Grouped())
    teleporter = Teleporter(model, [Attention("q", "k", "v", "o", heads=4, kv_heads=kv_heads)])
    assert_preserved(model, torch.randn(2, 5, 6, dtype=torch.float64), teleporter)


# What stays


def test_what_has_no_symmetry_is_left_alone_and_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))
            self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.lstm, self.norm = nn.LSTM(4, 4), nn.BatchNorm1d(4, affine=False)

        def forward(self, x):
            x = self.b(F.gelu(self.a(x)))  # not homogeneous
            x = self.c(F.relu(x) + 1.0)
            x = self.d(torch.cat([x[:, :2], x[:, 2:]], 1))
            x = self.parametrized(self.lstm(self.norm(x))[0])
            return self.e(F.relu(self.d(x)))  # d twice

    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="no symmetry found"):
        Teleporter(Model(), inputs=x)
    model = nn.Sequential(mlp(4, 3, 4), Model())
    left = Teleporter(model).left_alone
    assert left["1.a"] == "gelu is not homogeneous in each channel"
    assert left["1.b"] == "add is not homogeneous in each channel"
    assert left["1.c"] == "getitem is not homogeneous in each channel"
    assert left["1.norm"] == "shapes decide what 1.norm does, and no inputs were given"
    assert left["1.lstm"] == "1.lstm is not homogeneous in each channel"
    assert "1.parametrized" in left and left["1.d"]
    assert_preserved(randomized(model).eval(), x.double(), Teleporter(model))


def test_shared_frozen_and_reused_parameters_stay():
    tied = mlp(4, 4, 4, 4)
    tied[2].weight = tied[0].weight
    assert [*Teleporter(nn.Sequential(tied, nn.ReLU(), nn.Linear(4, 4))).left_alone.values()][:2] == [
        "0.0.weight is shared", "0.0.weight is shared"]  # fmt: skip
    frozen = randomized(mlp(4, 3, 3, 2))
    frozen[0].bias.requires_grad_(False)
    teleporter = Teleporter(frozen)
    assert teleporter.left_alone["0 -> 2"] == "0.bias is frozen" and [s.name for s in teleporter.symmetries] == [
        "2 -> 4"
    ]
    assert_preserved(frozen, torch.randn(3, 4, dtype=torch.float64), teleporter)
    layer = nn.Linear(3, 3)
    reused = nn.Sequential(mlp(4, 3, 3), nn.ReLU(), layer, nn.ReLU(), layer)
    assert {"2 is called more than once"} <= set(Teleporter(reused).left_alone.values())
    registered_twice = Untraceable()
    registered_twice.again = registered_twice.inner  # two names, one module: not shared
    assert len(Teleporter(registered_twice).symmetries) == 1


def test_level_sets_refuse_half_precision():
    with pytest.raises(ValueError, match="float32 or float64"):
        level_set_teleport(mlp(3, 4, 2).half(), lambda m: m(torch.randn(2, 3).half()).sum())


def test_parameters_on_two_devices():
    model = mlp(3, 4, 2).double()
    weights = copy.deepcopy(model.state_dict())
    model[2].to("meta")
    T = [torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)]
    Teleporter(model).apply(T)
    torch.testing.assert_close(model[0].weight.detach(), weights["0.weight"] * T[0].exp().unsqueeze(1))
    assert model[2].weight.is_meta
    with pytest.raises(ValueError, match="one device"):
        level_set_teleport(model, lambda m: m(torch.randn(2, 3)).sum())


# Steps


def models():
    norm = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    yield mlp(6, 5, 4, 3), torch.randn(7, 6)
    yield nn.Sequential(norm, nn.Dropout(0.3), nn.Linear(5, 3)), torch.randn(7, 1, 4, 4)
    yield nn.Sequential(Transformer(4, 2, depth=2), nn.Linear(2, 3)), torch.randn(7, 4, 3)


@pytest.mark.parametrize("index", range(3))
def test_gradients_move_by_the_inverse_transpose(index):
    model, x = list(models())[index]
    model, x = randomized(model).eval(), x.double()
    loss_fn = cross_entropy(torch.randint(3, (7,)))
    teleporter = Teleporter(model)
    T, expected = random_move(teleporter), gradients(model, x, loss_fn)
    for s, t in zip(teleporter.symmetries, T):
        s.act_(expected, t, like="gradients")
    teleporter.apply(T)
    for name, g in gradients(model, x, loss_fn).items():
        torch.testing.assert_close(g, expected[name], rtol=1e-9, atol=1e-12)


def hessian_norm(loss, parameters):
    return sum(g.square().sum() for g in torch.autograd.grad(loss, list(parameters.values()), create_graph=True))


@pytest.mark.parametrize("index", range(3))
def test_the_ascent_direction_three_ways(index):
    """From one gradient, from a Hessian-vector product, and by finite differences along random T."""
    model, x = list(models())[index]
    model, x = randomized(model).eval(), x.double()
    loss_fn = cross_entropy(torch.randint(3, (7,)))
    teleporter = Teleporter(model)
    G, W = gradients(model, x, loss_fn), dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        C = torch.autograd.grad(hessian_norm(loss_fn(model(x)), W), list(W.values()), materialize_grads=True)
    C = dict(zip(W, C))
    direct = [s.derivative({n: -2 * g for n, g in G.items()}, G) for s in teleporter.symmetries]
    for s, D in zip(teleporter.symmetries, direct):
        torch.testing.assert_close(s.derivative(C, W), D, rtol=1e-7, atol=1e-9)
    T = random_move(teleporter, 1e-5)
    values = []
    for sign in (1, -2):
        teleporter.apply([sign * t for t in T])
        values.append(sum(g.square().sum() for g in gradients(model, x, loss_fn).values()))
    slope = sum((D * t).sum() for D, t in zip(direct, T))
    torch.testing.assert_close((values[0] - values[1]).cpu(), 2 * slope, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_raises_the_gradient_norm_within_the_bound_and_leaves_no_trace(index, dtype):
    model, x = list(models())[index]
    model, x, loss_fn = model.to(dtype).train(), x.to(dtype), cross_entropy(torch.randint(3, (7,)))
    teleporter = Teleporter(model, bound=1.5)
    before, buffers, state = copy.deepcopy(model.state_dict()), list(model.buffers()), torch.get_rng_state()
    moved = teleporter.step(x, loss_fn)
    assert moved.objective_after > 1.05 * moved.objective_before
    assert moved.drift.abs() <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    names = dict(model.named_buffers())
    assert all(torch.equal(before[n], b) for n, b in names.items()) and len(names) == len(buffers)
    set_seed(1)
    T = teleporter._evaluate(x, loss_fn, derivative=True)[2]
    for s, t in zip(teleporter.symmetries, T):
        size = t.abs().max() if s.kind == "rescale" else torch.linalg.matrix_norm(t, 2).max()
        assert size <= math.log(1.5) + 1e-9


def test_the_best_rescaling_within_the_bound_is_found():
    """With one hidden layer the units are independent: compare with all corners of the box."""
    model, x = randomized(mlp(3, 4, 2)), torch.randn(5, 3).double()
    loss_fn = cross_entropy(torch.randint(2, (5,)))
    values = []
    for corner in range(16):
        trial = copy.deepcopy(model)
        signs = torch.tensor([(corner >> i) % 2 * 2.0 - 1 for i in range(4)], dtype=torch.float64)
        Teleporter(trial).apply([signs * math.log(2)])
        values.append(sum(g.square().sum() for g in gradients(trial, x, loss_fn).values()))
    moved = Teleporter(model).step(x, loss_fn)
    torch.testing.assert_close(moved.objective_after, max(values))


def test_rescaling_by_powers_of_two_is_exact_to_the_last_bit():
    model, x = list(models())[1]
    model, before = model.eval(), model.eval()(x)
    moved = Teleporter(model).step(x, cross_entropy(torch.randint(3, (7,))))
    assert torch.equal(model(x), before) and moved.drift == 0
    assert moved.objective_after > 2 * moved.objective_before


def test_how_many_passes_a_teleport_takes():
    model, x = list(models())[0]
    loss_fn, passes = cross_entropy(torch.randint(3, (7,))), []
    model.register_forward_hook(lambda *_: passes.append("forward"))
    teleporter = Teleporter(model, inputs=x)
    assert len(passes) == 3  # the run that is followed, and the trial, once
    passes.clear()
    teleporter.step(x, loss_fn)
    assert len(passes) == 2
    teleporter = Teleporter(model, objective=hessian_norm, inputs=x)
    passes.clear()
    teleporter.step(x, loss_fn)
    assert len(passes) == 2
    passes.clear()
    level_set_teleport(model, lambda m: loss_fn(m(x)), 5)
    assert len(passes) == 6


@pytest.mark.parametrize("maximize", [True, False])
def test_another_objective_in_both_directions(maximize):
    """The norm of the weights: its minimum over the orbit is balanced, which needs the step to be halved."""
    model, x = randomized(mlp(6, 5, 4, 3)), torch.randn(7, 6).double()
    loss_fn = cross_entropy(torch.randint(3, (7,)))

    def size(loss, parameters):
        return sum(p.square().sum() for p in parameters.values())

    teleporter = Teleporter(model, objective=size, maximize=maximize)
    for _ in range(3):
        before = model[0].weight.detach().clone()
        moved = teleporter.step({"input": x}, loss_fn)
        change, scales = moved.objective_after - moved.objective_before, (model[0].weight / before)[:, 0]
        assert (change > 0) == maximize and moved.drift.abs() < 1e-12
        assert (scales.log().abs() <= math.log(2) + 1e-9).all() and (scales != 1).any()


@pytest.mark.parametrize("index", range(3))
def test_the_gradient_norm_as_any_other_objective(index):
    model, x = list(models())[index]
    model, x, loss_fn = randomized(model), x.double(), cross_entropy(torch.randint(3, (7,)))
    twin = copy.deepcopy(model)
    a = Teleporter(model).step(x, loss_fn)
    b = Teleporter(twin, objective=hessian_norm).step((x,), loss_fn)
    for u, v in zip(a[1:], b[1:]):
        torch.testing.assert_close(u, v, rtol=1e-8, atol=1e-12)


def test_the_attention_step_is_the_sign_of_the_derivative():
    s = Teleporter(Transformer(8, 2), "attention").symmetries[0]
    D = torch.randn(s.shape, dtype=torch.float64)
    D, T = D + D.mT, s.steepest(D)
    torch.testing.assert_close((D * T).sum(), torch.linalg.svdvals(D).sum())
    torch.testing.assert_close(T @ T, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=0.0, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.9, centered=True, eps=1e-30),
    lambda p: torch.optim.Adagrad(p, lr=0.0),
])  # fmt: skip
@pytest.mark.parametrize("attention", [False, True])
def test_optimizer_states_are_those_of_the_moved_past(make, attention):
    """With learning rate 0 the past can be repeated at the moved weights."""
    model, x = list(models())[2 if attention else 0]
    model, x, loss_fn = randomized(model), x.double(), cross_entropy(torch.randint(3, (7,)))

    def run(model):
        optimizer = make(model.parameters())
        for batch in (x, 2 * x, -x):
            optimizer.zero_grad()
            loss_fn(model(batch)).backward()
            optimizer.step()
        return optimizer

    optimizer = run(model)
    teleporter = Teleporter(model, optimizer=optimizer)
    teleporter.apply(random_move(teleporter))
    repeated = run(twin := copy.deepcopy(model))
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)
        for key, value in optimizer.state[p].items():
            squares = "sq" in key or key == "sum" or "square_avg" in optimizer.state[p]
            if not (attention and squares):  # squares, and what they normalize: exact for a rescaling only
                torch.testing.assert_close(value, repeated.state[q][key], rtol=1e-8, atol=1e-10)
            elif value.ndim and "sq" in key:
                assert (value >= 0).all()


def test_a_hook_whose_effect_only_inputs_show_is_left_alone():
    model, x = randomized(mlp(6, 5, 4, 3)), torch.randn(7, 6).double()
    model[0].register_forward_hook(lambda module, args, output: output + 3.0)
    teleporter = Teleporter(model)
    assert [s.name for s in teleporter.symmetries] == ["2 -> 4"] and "0 has a hook" in teleporter.left_alone["0"]
    teleporter = Teleporter(model, inputs=x)
    assert [s.name for s in teleporter.symmetries] == ["2 -> 4"]
    assert_preserved(model, x, teleporter)


# Data-dependent actions


@pytest.mark.parametrize("kind, activation", [
    ("preactivation", nn.Tanh()), ("preactivation", nn.Sigmoid()), ("preactivation", nn.LeakyReLU(0.1)),
    ("postactivation", nn.LeakyReLU(0.2)), ("postactivation", nn.Tanh()),
])  # fmt: skip
def test_data_dependent_actions(kind, activation):
    """Exact on a batch no larger than the layers; the slope along T against finite differences, through two layers."""
    model, x = mlp(8, 7, 7, 3, activation=lambda: activation).double(), torch.randn(6, 8).double()
    loss_fn = cross_entropy(torch.randint(3, (6,)))
    teleporter = Teleporter(model, [kind])
    assert [s.name for s in teleporter.symmetries] == ["0 -> 2", "2 -> 4"]
    _, _, T, hidden = teleporter._evaluate(x, loss_fn, derivative=True)
    start, values = copy.deepcopy(model.state_dict()), []
    for sign in (1, -1):
        teleporter._move([sign * 1e-5 * t for t in T], hidden)
        values.append(teleporter._evaluate(x, loss_fn)[1])
        model.load_state_dict(start)
    W = dict(model.named_parameters())
    C = torch.autograd.grad(hessian_norm(loss_fn(model(x)), W), list(W.values()), materialize_grads=True)
    C = dict(zip(W, C))
    slope = sum((D * t).sum() for D, t in zip(pull_back(teleporter.action, teleporter.symmetries, W, C, hidden), T))
    torch.testing.assert_close((values[0] - values[1]).cpu() / 2e-5, slope, rtol=1e-5, atol=1e-9)
    moved = teleporter.step(x, loss_fn)
    assert moved.objective_after > moved.objective_before and moved.drift.abs() < 1e-9
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_a_data_dependent_step_that_cannot_keep_the_loss_stays_within_the_tolerance():
    model, x = randomized(mlp(4, 3, 3, 2, activation=nn.Tanh)), torch.randn(50, 4).double()
    moved = Teleporter(model, ["preactivation"], tolerance=1e-4).step(x, cross_entropy(torch.randint(2, (50,))))
    assert moved.drift.abs() <= 1e-4 * (1 + moved.loss_before) and moved.objective_after >= moved.objective_before


# Level sets


def test_level_set_finds_the_steepest_point_of_an_ellipsoid():
    """f = ½ Σ a w²: on f ≤ f_0 the norm is largest along the largest a, ‖∇f‖² = 2 a f_0."""
    model = nn.Linear(4, 1, bias=False).double()
    a = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    moved = level_set_teleport(model, lambda m: 0.5 * (a * m.weight**2).sum(), 200, radius=0.1)
    assert moved.drift.abs() < 1e-9
    torch.testing.assert_close(moved.objective_after, 10 * moved.loss_before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("index", range(3))
def test_level_set_on_any_model(index):
    model, x = list(models())[index]
    loss_fn, state = cross_entropy(torch.randint(3, (7,))), torch.get_rng_state()
    buffers = [b.clone() for b in model.buffers()]
    moved = level_set_teleport(model, lambda m: loss_fn(m(x)), 10)
    assert moved.objective_after > 1.2 * moved.objective_before
    assert moved.drift <= 1e-3 * (1 + moved.loss_before)
    assert torch.equal(torch.get_rng_state(), state) and all(map(torch.equal, buffers, model.buffers()))
    model.eval() if index != 1 else None
    if index != 1:  # without dropout and batch statistics the report can be checked
        torch.testing.assert_close(loss_fn(model(x)).detach(), moved.loss_after)


# Mistakes


@pytest.mark.parametrize("options, message", [
    ({"bound": 1.0}, "bound"), ({"bound": math.inf}, "bound"), ({"objective": "sharpness"}, "objective"),
    ({"bound": math.nan}, "bound"), ({"total_bound": math.nan}, "total_bound"), ({"tolerance": math.nan}, "tolerance"),
    ({"tolerance": math.inf}, "tolerance"), ({"tolerance": -1e-3}, "tolerance"),
    ({"symmetries": ["rescaling"]}, "'rescaling' is neither"), ({"symmetries": ["auto", "preactivation"]}, "alone"),
    ({"symmetries": [Pair("0", "nowhere")]}, "no module 'nowhere'"), ({"symmetries": [Pair("0", "4")]}, "one by one"),
    ({"symmetries": [Pair("1", "2")]}, "ReLU is not supported"), ({"symmetries": "attention"}, "no symmetry"),
    ({"symmetries": [Pair(["0", "2"], "4")]}, "writes 4 channels, 0 writes 5"),
    ({"symmetries": [Attention("0", "0", "0", "2", 2)]}, "do not fit"), ({"symmetries": "postactivation"}, None),
    ({"symmetries": [Attention("0", "1", "0", "2", 2)]}, "not a Linear"),
])  # fmt: skip
def test_bad_options(options, message):
    model = mlp(6, 5, 4, 3)
    if message is None:  # relu has no inverse: the action says so, no step is possible, nothing moves
        moved = Teleporter(model, **options)
        with pytest.raises(ValueError, match="no inverse"):
            moved.step(torch.randn(2, 6), cross_entropy(torch.tensor([0, 1])))
        return
    with pytest.raises(ValueError, match=message):
        Teleporter(model, **options)


def test_a_pair_by_hand_that_cannot_move_is_an_error():
    model = mlp(6, 5, 4, 3)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="0.weight is frozen"):
        Teleporter(model, [Pair("0", "2")])


def test_bad_losses_and_tangents():
    model, x = mlp(6, 5, 3), torch.randn(7, 6)
    teleporter, before = Teleporter(model), copy.deepcopy(model.state_dict())
    for bad in (lambda o: o, lambda o: o.sum() * math.nan, lambda o: o.sum().item(), lambda o: torch.tensor(1.0)):
        with pytest.raises(ValueError, match="loss_fn must return"):
            teleporter.step(x, bad)
    for bad in (lambda m: m(x), lambda m: 1.0):
        with pytest.raises(ValueError, match="loss_fn must return"):
            level_set_teleport(model, bad)
    with pytest.raises(ValueError, match="not zero"):
        level_set_teleport(model, lambda m: 0 * m(x).sum())
    with pytest.raises(ValueError, match="shapes"):
        teleporter.apply([torch.zeros(4)])
    with pytest.raises(ValueError, match="finite"):
        teleporter.apply([torch.full((5,), math.nan)])
    with pytest.raises(ValueError, match="use step"):
        Teleporter(model, "preactivation").apply([])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("teleported", [level_set_teleport, null_space_teleport])
def test_numbers_that_are_not_positive_and_finite_are_named(teleported):
    """With such a number nothing moved, or anything did, without a word."""
    model, x = mlp(6, 5, 3), torch.randn(2, 6)
    before = copy.deepcopy(model.state_dict())
    wrong = [(name, value) for name in ("radius", "tolerance") for value in (0.0, -1.0, math.nan, math.inf)]
    wrong += [("steps", value) for value in (0, -1, 1.5)]
    if teleported is null_space_teleport:
        wrong += [(name, value) for name in ("rank_tolerance", "energy") for value in (-1.0, 1.0, math.nan)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            teleported(model, lambda m: m(x).square().sum(), **{name: value})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tangents_of_any_dtype_move_as_in_float64():
    """Others were exponentiated in their own precision, and integers refused to be."""
    for T in (torch.tensor([0.5, 1.0, -2.0, 0.25, 3.0]), torch.tensor([1, 2, 0, -1, 1]), [1.0, 0.5, 0.0, 0.0, -1.0]):
        model = mlp(6, 5, 3).double()
        moved = copy.deepcopy(model)
        Teleporter(model).apply([torch.as_tensor(T, dtype=torch.float64, device="cpu")])
        Teleporter(moved).apply([T])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), moved.parameters()))


# The example


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["teleport_your_model.py", "--seeds", "1", "--samples", "1100"])
    runpy.run_path(str(ROOT / "examples" / "teleport_your_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    arms = [line for line in printed.splitlines() if line.startswith(("plain ", "plain, ", "random ", "teleport "))]
    assert len(arms) == 8
    drifts = [float(arm[16:].split()[3]) for arm in arms]
    assert all(0 <= drift < 1e-5 for drift in drifts)
    losses = [float(arm[16:].split()[1]) for arm in arms]
    assert losses[3] != losses[0] and losses[7] != losses[4]  # it did teleport
