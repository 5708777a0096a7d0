"""traced.py: what one real run shows, tried on the real model with an element of size e^±1 on each symmetry."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teleporter import Teleporter
from teleporter.traced import traced

X, IMAGES, TOKENS = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                     for shape in ((2, 6), (2, 3, 8, 8), (2, 5, 8)))  # fmt: skip


def found(model, x, tolerance=1e-12):
    """Move by every symmetry found; the output must stay, the moved weights must change. Returns the symmetries."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():  # gains of one and biases of zero would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
    candidates = traced(model, x)
    symmetries = [s for s, _, reason in candidates if reason is None]
    assert all(reason for s, _, reason in candidates if s not in symmetries)
    parameters, state = dict(model.named_parameters()), torch.random.get_rng_state()
    with torch.no_grad():
        before = model(x)
        for s in symmetries:
            T = torch.randn(s.shape, dtype=torch.float64).sign()
            if s.kind != "rescale":
                T = s.tangent(torch.randn(s.shape, dtype=torch.float64))
                T /= torch.linalg.matrix_norm(T, ord=2)[:, None, None]
            weights = {slot.name: parameters[slot.name].clone() for slot in s.slots}
            s.act_(parameters, T)
            torch.random.set_rng_state(state)
            assert (model(x) - before).norm() <= tolerance * before.norm(), s.name
            assert all(not torch.equal(parameters[name], w) for name, w in weights.items())
    return symmetries


def kinds(symmetries):
    return [(s.kind, *s.shape) for s in symmetries]


class Between(nn.Module):
    """Something between two layers."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first, self.second = first or nn.Linear(6, 4), second or nn.Linear(4, 3)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize("between", [
    lambda h: 0.2 * h.relu(),
    lambda h: h.clamp(min=0),
    lambda h: torch.maximum(h, torch.zeros_like(h)),
    lambda h: torch.maximum(h, torch.tensor(0.0)),
    lambda h: torch.where(h > 0, h, 0.1 * h),
    lambda h: F.leaky_relu(h)[None].squeeze(0),
    lambda h: torch.stack([h, h.relu()]).amax(0),
])  # fmt: skip
def test_what_passes_between_linear_layers(between):
    assert kinds(found(Between(between), X)) == [("rescale", 4)]


@pytest.mark.parametrize("pool", [
    lambda h: F.adaptive_avg_pool2d(h, 1).squeeze(-1).squeeze(-1),
    lambda h: F.adaptive_max_pool2d(h, 1).squeeze(),
    lambda h: h.mean(3).mean(2),
    lambda h: h.flatten(2).mean(-1),
    lambda h: h.amax((2, 3)),
    lambda h: h.sum((2, 3)),
    lambda h: h.flatten(2).max(-1).values,
    lambda h: h[:, :, 0, 0],
    lambda h: F.interpolate(h, 12, mode="bilinear").mean((2, 3)),
    lambda h: F.pad(h, (1, 2)).view(8, -1).sum(1).view(2, 4),
])  # fmt: skip
def test_what_passes_between_a_convolution_and_a_linear_layer(pool):
    assert kinds(found(Between(lambda h: pool(h.relu()), nn.Conv2d(3, 4, 3)), IMAGES)) == [("rescale", 4)]


@pytest.mark.parametrize("mix, first, second", [
    (lambda h: h.relu().view(8, 36), nn.Conv2d(3, 4, 3), nn.Linear(36, 3)),  # rows are channels of all images
    (lambda h: h.relu().reshape(-1, 16), nn.Conv2d(3, 4, 3), nn.Linear(16, 3)),
    (lambda h: F.avg_pool3d(h.relu(), 2).mean((2, 3)), nn.Conv2d(3, 4, 3), nn.Linear(2, 3)),
])  # fmt: skip
def test_channels_that_mix_are_scaled_together(mix, first, second):
    assert kinds(found(Between(mix, first, second), IMAGES)) == [("rescale", 1)]


@pytest.mark.parametrize("between", [
    F.gelu,
    lambda h: h.relu() // 1,
    lambda h: h.relu() * (h > 1),
    lambda h: h.relu() + 1,
    lambda h: h.relu() ** 2,
    lambda h: h.clamp(0, 6),
    lambda h: h[:, h[0].argsort()],
    lambda h: h.masked_fill(h > 0, 1),
])  # fmt: skip
def test_what_is_not_homogeneous_is_left_alone_with_a_reason(between):
    model = Between(between).double()
    reasons = {s.name: reason for s, _, reason in traced(model, X)}
    assert "not homogeneous" in reasons["first"] or "not scaled" in reasons["first"]
    assert reasons["second"] == "it is the output of the model"


class Products(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.activation, self.gain = activation, nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.gain * self.down(self.activation(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.sigmoid])
def test_gated_units_and_gains(activation):
    symmetries = found(Products(activation), TOKENS)
    assert [s.name for s in symmetries] == ["up -> down", "down -> gain"]
    assert kinds(symmetries) == [("rescale", 6), ("rescale", 8)]


class Fused(nn.Module):
    """Gate and up in one layer."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.down(gate.relu() * up)


class Normalized(Products):
    """What the product of two scales would change is normalized: one may still undo the other."""

    def forward(self, x):
        return self.down(F.layer_norm(self.gate(x) * self.up(x), (6,)))


@pytest.mark.parametrize("model, expected", [
    (Products(F.relu), ["gate -> down", "up -> down", "down -> gain"]),
    (Fused(), ["both -> down", "both -> down'"]),
    (Normalized(None), ["up -> gate"]),
    (Between(lambda h: h * h.relu()), []),  # would take a square root
])  # fmt: skip
def test_each_factor_of_a_product_that_scales_is_a_symmetry(model, expected):
    assert [s.name for s in found(model, X if isinstance(model, Between) else TOKENS)] == expected


class Convolutions(nn.Module):
    """Concatenation, depthwise, grouped and transposed convolutions, a batch norm without a class."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(9, 6, 1)
        self.depthwise, self.grouped = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2)
        self.up, self.head = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.Linear(6, 2)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x):
        a = F.batch_norm(self.a(x), None, None, self.scale, self.shift, True).relu()
        c = self.c(torch.cat([a, self.b(a).relu()], 1)).relu()
        c = self.grouped(self.depthwise(c).relu()).relu()
        return self.head(self.up(c).relu().mean((2, 3)))


def test_concatenation_and_grouped_convolutions():
    symmetries = found(Convolutions(), IMAGES)
    names = [
        "a",
        "scale, shift -> b, c",
        "b -> c",
        "c -> depthwise",
        "depthwise -> grouped",
        "grouped -> up",
        "up -> head",
    ]
    assert {s.name for s in symmetries} == set(names[1:])
    assert sum(math.prod(s.shape) for s in symmetries) == 4 + 5 + 6 + 6 + 4 + 6


class RMS(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gain, self.head = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

    def forward(self, x):
        x = self.linear(x)
        return self.head(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


class InPlace(nn.Module):
    """A residual sum written into its first term, as torchvision's and timm's networks do."""

    def __init__(self, blocked=False):
        super().__init__()
        self.blocked = blocked
        self.stem, self.inner = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        y = self.inner(x)
        y += x
        y = F.relu(y, inplace=True)
        return self.head(F.hardswish(2 * x, inplace=True).mean((2, 3)) if self.blocked else y.mean((2, 3)))


def test_sums_in_place_join_the_stream():
    assert [s.name for s in found(InPlace(), IMAGES)] == ["stem, inner -> inner, head"]
    assert found(InPlace(blocked=True), IMAGES) == []


def test_a_norm_written_by_hand():
    assert [s.name for s in found(RMS(), TOKENS)] == ["gain -> head", "linear: stream"]


class LowRank(nn.Module):
    def __init__(self, merged):
        super().__init__()
        self.base, self.merged = nn.Linear(8, 8).requires_grad_(False), merged
        self.A, self.B, self.head = nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        if self.merged:
            return self.head(F.linear(x, self.base.weight + self.B.weight @ self.A.weight, self.base.bias).tanh())
        return self.head((self.base(x) + 2 * self.B(self.A(x))).tanh())


@pytest.mark.parametrize("merged", [False, True])
def test_low_rank_factors_have_the_whole_linear_group(merged):
    assert kinds(found(LowRank(merged), TOKENS)) == [("linear", 1, 3, 3)]


class Grouped(nn.Module):
    """Grouped-query attention: 4 heads share 2 heads of keys and values."""

    def __init__(self, mode):
        super().__init__()
        self.mode, self.norm = mode, nn.RMSNorm(4)
        self.q, self.k, self.v, self.out = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.mode == "normalized":
            q, k = self.norm(q), self.norm(k)
        if self.mode == "rotary":
            angle = torch.arange(5.0, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype)
            q, k = (z * angle.cos() + torch.cat([-z[..., 2:], z[..., :2]], -1) * angle.sin() for z in (q, k))
        if self.mode == "fused":
            y = F.scaled_dot_product_attention(query=q, key=k, value=v, enable_gqa=True, is_causal=True)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            y = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode, expected", [
    ("plain", [("attention", 2, 4, 4), ("attention", 2, 4, 4)]),
    ("fused", [("attention", 2, 4, 4), ("attention", 2, 4, 4)]),
    ("rotary", [("attention", 2, 4, 4), ("rotary", 4, 2, 2)]),  # for each pair of frequencies, head of keys
    ("normalized", [("attention", 2, 4, 4)]),
])  # fmt: skip
def test_attention_in_every_form(mode, expected):
    assert sorted(kinds(found(Grouped(mode), TOKENS))) == expected


class Loop(nn.Module):
    """torch.fx cannot trace it: the input decides how often it runs."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = self.enter(x[:, 0]).relu()
        for t in range(int(x.shape[1] + (x.sum() > 1e9))):
            h = (self.again(h) + self.enter(x[:, t])).relu()
        self.count += 1
        return self.leave(h)


def test_a_teleporter_with_inputs_moves_what_fx_cannot_trace():
    model = Loop().double()
    teleporter = Teleporter(model, inputs=TOKENS)
    assert [s.name for s in teleporter.symmetries] == ["enter, again -> again, leave"]
    assert model.count == 0
    moved = teleporter.step(TOKENS, lambda output: output.square().sum())
    assert abs(moved.drift) <= 1e-12 * moved.loss_before and moved.objective_after > moved.objective_before


def test_derivatives_agree_with_finite_differences():
    eps = 1e-6
    for model in (Products(F.silu).double(), LowRank(False).double(), Grouped("rotary").double()):
        P = {name: p.detach().clone() for name, p in model.named_parameters()}
        C = {name: torch.randn_like(p) for name, p in P.items()}
        for s in (s for s, _, reason in traced(model, TOKENS) if reason is None):
            T = s.tangent(torch.randn(s.shape, dtype=torch.float64))
            values = []
            for sign in (1, -1):
                moved = {name: p.clone() for name, p in P.items()}
                s.act_(moved, sign * eps * T)
                values.append(sum((C[name] * moved[name]).sum() for name in P))
            numeric = (values[0] - values[1]) / (2 * eps)
            torch.testing.assert_close((s.derivative(C, P) * T).sum(), numeric, rtol=1e-5, atol=1e-6)


def test_tied_weights_and_frozen_ones_keep_the_function():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.inner(self.embed(x)).relu())

    x = torch.randint(7, (2, 3))
    found(Tied(), x)
    reasons = {s.name: reason for s, _, reason in traced(Tied(), x)}
    assert reasons["embed"] == "embed.weight is used in more than one way"  # s as it writes, 1/s as it reads: only ±1
    model = Between(F.relu)
    model.second.requires_grad_(False)
    assert all("second" not in slot.name for s in found(model, X) for slot in s.slots)


def test_a_buffer_that_remembers_the_activations_keeps_them():
    class Remembers(Between):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            h = self.first(x).relu()
            self.mean.mul_(0.9).add_(h.detach().mean(0))
            return self.second(h - self.mean)

    assert found(Remembers(), X) == []


def test_torchs_own_transformer_and_half_precision():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert kinds(found(model, TOKENS)) == [("attention", 2, 4, 4), ("attention", 2, 4, 4), ("rescale", 16)]
    assert [s.shape for s, _, reason in traced(Between(F.relu).bfloat16(), X.bfloat16()) if reason is None] == [(4,)]


def test_a_run_that_cannot_be_followed_leaves_the_graph():
    class Refuses(nn.Sequential):
        def forward(self, x):
            if torch.is_inference_mode_enabled():
                raise RuntimeError("no")
            return super().forward(x)

    teleporter = Teleporter(Refuses(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double(), inputs=X)
    assert len(teleporter.symmetries) == 1 and "RuntimeError" in teleporter.left_alone["trace of the inputs"]
