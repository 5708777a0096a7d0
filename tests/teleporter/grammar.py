"""A grammar of random modules: layers, norms, reshapes, branches, products, attention, weights used again.

A model is its number: `built(17)` is the same everywhere. Widths are at most 8, and sizes often equal by chance.
"""

import random

import torch
import torch.nn.functional as F
from conftest import set_seed
from torch import nn


class Do(nn.Module):
    """A function of the tensor and of layers or parameters."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(p for p in parts if isinstance(p, nn.Module))
        self.numbers = nn.ParameterList(p for p in parts if not isinstance(p, nn.Module))

    def forward(self, x):
        return self.function(x, *self.parts, *self.numbers)


def parameter(*shape):
    return nn.Parameter(1 + 0.3 * torch.randn(shape))


def width(r):
    return r.choice([1, 2, 3, 4, 4, 6, 8])


# Layers


def linear(r, x, out=None):
    return nn.Linear(x.shape[-1], out or width(r), bias=r.random() < 0.7)


def conv(r, x):
    if x.ndim not in (3, 4):
        return linear(r, x)
    n, channels = x.ndim - 2, x.shape[1]
    groups = r.choice([g for g in (1, 1, 2, channels) if channels % g == 0])
    kind = getattr(nn, f"{r.choice(['Conv', 'Conv', 'ConvTranspose'])}{n}d")
    return kind(
        channels, groups * r.choice([1, 2, 3]), r.choice([1, 3]), padding=1, groups=groups, bias=r.random() < 0.7
    )


def low_rank(r, x):
    rank = r.choice([1, 2, 3])
    return nn.Sequential(nn.Linear(x.shape[-1], rank, bias=False), nn.Linear(rank, width(r)))


def functional_linear(r, x):
    out = width(r)
    return r.choice([
        lambda: Do(F.linear, parameter(out, x.shape[-1]), parameter(out)),
        lambda: Do(lambda x, W: x @ W, parameter(x.shape[-1], out)),
        lambda: Do(lambda x, W: torch.einsum("...i,oi->...o", x, W), parameter(out, x.shape[-1])),
        lambda: Do(lambda x, A, B: F.linear(x, A @ B), parameter(out, 2), parameter(2, x.shape[-1])),
    ])()  # fmt: skip


def norm(r, x):
    features, channels = x.shape[-1], x.shape[1]
    found = [
        nn.LayerNorm(features), nn.RMSNorm(features), nn.LayerNorm(features, elementwise_affine=False),
        nn.LayerNorm(x.shape[1:]),
        nn.GroupNorm(r.choice([g for g in (1, 2, channels) if channels % g == 0]), channels),
        nn.BatchNorm2d(channels) if x.ndim == 4 else nn.BatchNorm1d(channels),
        Do(lambda x, w, b: F.layer_norm(x, w.shape, w, b), parameter(features), parameter(features)),
        Do(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), parameter(channels), parameter(channels)),
        Do(lambda x, w: w * x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt(), parameter(features)),
    ]  # fmt: skip
    return r.choice(found)


# What comes between them

HOMOGENEOUS = [
    torch.relu, torch.abs, torch.neg, lambda x: F.leaky_relu(x, 0.2), lambda x: 0.2 * x, lambda x: x * 3,
    lambda x: x / 2,
    lambda x: x.clamp(min=0), lambda x: torch.maximum(x, torch.zeros_like(x)), lambda x: x + x.relu(),
    lambda x: x - 2 * x,
]  # fmt: skip
BENT = [
    F.gelu, torch.tanh, F.silu, F.relu6, lambda x: x.clamp(0, 0.5), lambda x: x * x, lambda x: x + 1,
]  # fmt: skip
OTHER = [
    torch.sigmoid, F.hardswish, lambda x: x.relu() ** 2,
    lambda x: x.clamp(min=-0.3), lambda x: (x > 0.1) * x, lambda x: (x > 0) * x,
    lambda x: x.softmax(-1),
    lambda x: x // 0.5, lambda x: x / (1 + x.norm()), lambda x: x.sort(-1)[0], lambda x: x.cumsum(-1),
    lambda x: x.masked_fill(x < 0, 0.3), lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x - x.mean(-1, keepdim=True),
    lambda x: x * x.sigmoid(), lambda x: x * x.mean(1, keepdim=True),
]  # fmt: skip


def activation(r, x):
    kinds = {"homogeneous": HOMOGENEOUS, "bent": BENT, "other": OTHER}
    kind = r.choice(["module", "homogeneous", "homogeneous", "bent", "other"])
    if kind == "module":
        return r.choice([nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU, lambda: nn.Dropout(0.5), nn.Identity])()
    return Do(r.choice(kinds[kind]))


def bent(r, x):
    return Do(r.choice(BENT + HOMOGENEOUS[:3]))


def homogeneous(r, x):
    return Do(r.choice(HOMOGENEOUS[:8]))


def scalar(r, x):
    return r.choice([
        lambda: Do(lambda x, g: g * x, parameter(x.shape[-1])),
        lambda: Do(lambda x, g: x * g, parameter(1)),
        lambda: Do(lambda x, g: x * g[:, None], parameter(x.shape[-2])) if x.ndim > 2 else nn.Identity(),
        lambda: Do(lambda x, b: x + b, parameter(x.shape[-1])),
        lambda: Do(lambda x, g: x / g, parameter(x.shape[-1])),
    ])()  # fmt: skip


def reshape(r, x):
    shape, numbers = x.shape, [k for k in (2, 3, 4, 6, 8, 12, 16) if x.numel() % k == 0] or [1]
    k = r.choice(numbers)
    found = [
        lambda x: x.flatten(1), lambda x: x.reshape(shape[0], -1), lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape(-1, k), lambda x: x.transpose(-1, -2), lambda x: x.transpose(1, 0), lambda x: x.flip(-1),
        lambda x: x.roll(1, 1), lambda x: x[..., ::2], lambda x: x[:, :1], lambda x: F.pad(x, (1, 1)),
        lambda x: F.pad(x, (0, 1), value=0.5), lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
        lambda x: x.repeat(1, 2, *[1] * (len(shape) - 2)),
    ]  # fmt: skip
    if x.ndim > 2:
        found += [
            lambda x: x.flatten(0, 1), lambda x: x.flatten(end_dim=1), lambda x: x.flatten(-2),
            lambda x: x.reshape(shape[0] * shape[1], -1), lambda x: x.transpose(1, 2).flatten(1),
            lambda x: x.transpose(1, 2).reshape(shape), nn.Flatten(), nn.Flatten(0, 1), lambda x: x[:, 0],
            lambda x: x[..., 0],
        ]  # fmt: skip
    if x.ndim == 2 and shape[-1] % 2 == 0:
        found += [
            lambda x: x.unflatten(1, (-1, 2)),
            lambda x: x.view(shape[0], 2, -1),
            lambda x: x.unflatten(1, (2, -1)),
        ]
    if x.ndim == 4:
        found += [
            nn.PixelUnshuffle(2) if shape[2] % 2 == shape[3] % 2 == 0 else nn.Flatten(2),
            lambda x: x.permute(0, 2, 3, 1),
        ]
    f = r.choice(found)
    return f if isinstance(f, nn.Module) else Do(f)


def pool(r, x):
    if x.ndim == 4 and r.random() < 0.7:
        return r.choice([
            nn.AvgPool2d(2), nn.MaxPool2d(2, 1), nn.Upsample(scale_factor=2),
            nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)), nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)),
            Do(lambda x: x.mean((2, 3))), Do(lambda x: x.amax((2, 3))),
            Do(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
        ])  # fmt: skip
    if x.ndim == 3 and r.random() < 0.5:
        return r.choice([nn.AvgPool1d(2), nn.MaxPool1d(2, 1), nn.AdaptiveAvgPool1d(2)])
    return Do(r.choice([
        lambda x: x.mean(1), lambda x: x.amax(1), lambda x: x.mean(-1), lambda x: x.sum(-2), lambda x: x.amax(-1),
        lambda x: x.sum(-1, keepdim=True), lambda x: x.max(-1, keepdim=True)[0], lambda x: x.flatten(2).mean(-1),
    ]))  # fmt: skip


# Structures


def keeping(r, x, depth):
    """A chain whose output has the shape of x."""
    last = x.shape[-1]
    if x.ndim == 4 or x.ndim == 3 and r.random() < 0.2:
        kind = nn.Conv2d if x.ndim == 4 else nn.Conv1d
        hidden = width(r)
        middle = [
            m(r, torch.empty(x.shape[0], hidden, *x.shape[2:]))
            for m in r.choices([norm, activation], k=r.choice([0, 1, 2]))
        ]
        return nn.Sequential(kind(x.shape[1], hidden, 3, padding=1), *middle, kind(hidden, x.shape[1], 1))
    steps, y = chain(
        r, x, r.choice([1, 2, 3]), depth + 1, [linear, activation, activation, norm, scalar, low_rank, gated]
    )
    return nn.Sequential(steps, linear(r, y, last)) if y.shape[-1] != last else steps


def residual(r, x, depth):
    return Do(
        r.choice([lambda x, f: x + f(x), lambda x, f: f(x) + x, lambda x, f: x - f(x), lambda x, f: x.add(f(x))]),
        keeping(r, x, depth),
    )


def branches(r, x, depth):
    joined = r.choice([
        lambda x, f, g: torch.cat([f(x), g(x)], -1), lambda x, f, g: torch.cat([f(x), x], 1),
        lambda x, f, g: f(x) + g(x),
        lambda x, f, g: f(x) * g(x), lambda x, f, g: torch.stack([f(x), g(x)]).amax(0),
        lambda x, f, g: f(x) / (1 + g(x) ** 2),
        lambda x, f, g: f(x) + g(f(x)), lambda x, f, g: torch.maximum(f(x), g(x)), lambda x, f, g: f(x) @ g(x).mT @ x,
        lambda x, f, g: f(g(f(x))),
    ])  # fmt: skip
    return Do(joined, keeping(r, x, depth), keeping(r, x, depth))


def gated(r, x, depth=0):
    hidden, f = width(r), r.choice([torch.relu, F.silu, F.gelu, torch.sigmoid, lambda x: x])
    up, gate, down = nn.Linear(x.shape[-1], hidden), nn.Linear(x.shape[-1], hidden), nn.Linear(hidden, width(r))
    return r.choice([
        lambda: Do(lambda x, up, gate, down: down(f(gate(x)) * up(x)), up, gate, down),
        lambda: Do(lambda x, both, down: down(F.glu(both(x))), nn.Linear(x.shape[-1], 2 * hidden), down),
        lambda: Do(lambda x, h, d: d(torch.mul(*h(x).chunk(2, -1)).relu()), nn.Linear(x.shape[-1], 2 * hidden), down),
    ])()  # fmt: skip


def sdpa(x, q, k, v, out, heads, sharing):
    q, k, v = (
        layer(x).unflatten(-1, (-1, layer.out_features // n)).transpose(1, 2)
        for layer, n in ((q, heads), (k, heads // sharing), (v, heads // sharing))
    )
    if sharing > 1:
        k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)
    return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def plain(x, q, k, v, out, heads, causal):
    B, T, _ = x.shape
    q, k, v = (layer(x).view(B, T, heads, -1).transpose(1, 2) for layer in (q, k, v))
    return out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(B, T, -1))


def written(x, qkv, out, heads, scale):
    q, k, v = qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return out(((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


def attention(r, x, depth=0):
    heads, d, sharing, C = r.choice([1, 2]), r.choice([1, 2, 3]), r.choice([1, 1, 2]), x.shape[-1]
    out = nn.Linear(heads * d, C)
    if x.ndim != 3:
        return linear(r, x)
    kind = r.choice(["module", "plain", "plain", "grouped", "written"])
    if kind == "module":
        return Do(
            lambda x, m: m(x, x, x, need_weights=False)[0],
            nn.MultiheadAttention(C, 1 + (C % 2 == 0), batch_first=r.random() < 0.8, add_bias_kv=r.random() < 0.3),
        )
    if kind == "written":
        return Do(lambda x, qkv, out: written(x, qkv, out, heads, d**-0.5), nn.Linear(C, 3 * heads * d), out)
    if kind == "plain":
        causal = r.random() < 0.5
        return Do(
            lambda x, q, k, v, out: plain(x, q, k, v, out, heads, causal),
            *(nn.Linear(C, heads * d) for _ in "qkv"),
            out,
        )
    sharing = sharing if heads % sharing == 0 else 1
    return Do(
        lambda x, q, k, v, out: sdpa(x, q, k, v, out, heads, sharing),
        nn.Linear(C, heads * d),
        *(nn.Linear(C, heads // sharing * d) for _ in "kv"),
        out,
    )


STEPS = {linear: 5, conv: 5, functional_linear: 2, low_rank: 1, norm: 4, activation: 9, scalar: 2, reshape: 4, pool: 2,
         residual: 3, branches: 3, gated: 2, attention: 2}  # fmt: skip
PLAIN = [[conv, bent, pool, conv, norm, homogeneous], [linear, bent, linear, bent, norm, attention]]
DEEP = (residual, branches, gated, attention)


def chain(r, x, steps, depth=0, among=None, order=None):
    """Random steps, of which one may be used again, and what comes out."""
    found = []
    for i in range(steps):
        kind = order[i] if order else r.choice(among) if among else r.choices(list(STEPS), list(STEPS.values()))[0]
        if x.ndim < 2 or x.numel() > 400 or depth > 2:
            kind = activation
        step = kind(r, x, depth) if kind in DEEP else kind(r, x)
        if found and r.random() < 0.06:
            step = r.choice(found)
        try:
            y = step(x)
        except (RuntimeError, ValueError, IndexError, AssertionError):  # it does not fit
            continue
        if y.numel() and y.isfinite().all():
            found.append(step)
            x = y
    return nn.Sequential(*found), x


@torch.no_grad()
def built(number):
    """(model, inputs, other inputs)."""
    r = random.Random(number)
    set_seed(number)
    n, c = r.choice([1, 2, 3]), r.choice([2, 3, 4])
    shape = r.choice([(n, c, 4, 4), (n, c, 4, 4), (n, c, 6), (n, 4, c), (n, 4, 4), (n + 1, c), (c, 4, 4), "embedding"])
    if shape == "embedding":
        x, other = torch.randint(5, (n, 4)), torch.randint(5, (n, 4))
        first = nn.Embedding(5, r.choice([2, 4, 6]), max_norm=r.choice([None, None, 1.0]))
    else:
        x, other = (torch.randn(shape) for _ in range(2))
        first = nn.Identity()
    if number % 3:
        body, y = chain(r, first(x), r.choice([2, 3, 4, 5, 6]))
    else:
        body, y = chain(r, first(x), 6, order=r.choice(PLAIN))
    if number % 3 == 0 and y.ndim > 1:  # what textbooks end with
        hidden = nn.Linear(y[0].numel(), 4)
        head = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(4, 2))
    else:
        head = nn.Linear(y.shape[-1], 2) if y.ndim and r.random() < 0.8 else nn.Identity()
    model = nn.Sequential(first, body, head)
    for p in model.parameters():  # gains of one and biases of zero would hide mistakes
        p.add_(0.3 * torch.randn_like(p))
    return model.train(r.random() < 0.5), x, other
