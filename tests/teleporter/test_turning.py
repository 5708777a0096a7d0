"""turning.py: which rotary attentions turn, seen in one run, and which only look like it."""

import pytest
import torch
from conftest import set_seed
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from teleporter import Teleporter
from teleporter.traced import traced

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF, INTERLEAVED = [1.0, 0.1, 1.0, 0.1], [1.0, 1.0, 0.1, 0.1]


def half(x):
    return torch.cat([-x[..., 2:], x[..., :2]], -1)


def interleaved(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rotary(turn=half, frequencies=HALF, before=lambda x: x, after=lambda x: x, first=False):
    """Rotary positions on (batch, heads, tokens, 4)."""

    def rotated(x):
        x = before(x)
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor(frequencies, dtype=x.dtype)
        terms = x * angle.cos(), turn(x) * angle.sin()
        return after(terms[1] + terms[0] if first else terms[0] + terms[1])

    return rotated


def partial(x):
    """Two of the entries rotate."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
    a, b = x[..., :2], x[..., 2:]
    return torch.cat([a * angle.cos() + torch.stack([-a[..., 1], a[..., 0]], -1) * angle.sin(), b], -1)


class Attended(nn.Module):
    """Two heads of queries, one of keys; on_q, on_k act on what is projected, again: a second pair, of other layout."""

    def __init__(self, on_q, on_k=None, again=None, bias=True):
        super().__init__()
        set_seed(0)
        self.q, self.k, self.v, self.out = (
            nn.Linear(6, 8, bias),
            nn.Linear(6, 4, bias),
            nn.Linear(6, 4),
            nn.Linear(8, 6),
        )
        self.on_q, self.on_k, self.again = on_q, on_k or on_q, again

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(self.on_q(q), self.on_k(k), v, enable_gqa=True)
        if self.again:
            y = y + scaled_dot_product_attention(self.again(q), self.again(k), v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def between_queries_and_keys(model, x=X):
    """(kind, *shape) of what moves q and k; all that was found is tried with large elements."""
    symmetries = [s for s, _, reason in traced(model.double(), x) if reason is None]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        before = model(x)
        for s in symmetries:
            s.act_(parameters, s.tangent(torch.randn(s.shape, dtype=torch.float64)))
            assert (model(x) - before).norm() <= 1e-12 * before.norm(), s.name
    return [(s.kind, *s.shape) for s in symmetries if {"q.weight", "k.weight"} & {slot.name for slot in s.slots}]


@pytest.mark.parametrize("model, expected", [
    (Attended(rotary()), [("rotary", 2, 2, 2)]),
    (Attended(rotary(), bias=False), [("rotary", 2, 2, 2)]),
    (Attended(rotary(interleaved, INTERLEAVED)), [("rotary", 2, 2, 2)]),
    (Attended(rotary(first=True), rotary()), [("rotary", 2, 2, 2)]),
    (Attended(rotary(), rotary(before=lambda x: -x, after=lambda x: x / 3)), [("rotary", 2, 2, 2)]),
    (Attended(rotary(), again=rotary()), [("rotary", 2, 2, 2)]),
    (Attended(partial), [("rotary", 1, 2, 2), ("attention", 1, 2, 2)]),
])  # fmt: skip
def test_pairs_that_turn(model, expected):
    assert between_queries_and_keys(model) == expected


@pytest.mark.parametrize("model, expected", [
    (Attended(rotary(frequencies=[1.0, 0.1, 1.0, 0.2])), [("rescale", 2)]),  # a pair of two frequencies
    (Attended(rotary(turn=lambda x: half(x).abs())), [("rescale", 2)]),
    (Attended(rotary(turn=lambda x: torch.cat([x[..., 2:], x[..., :2]], -1))), [("rescale", 2)]),  # a reflection
    (Attended(rotary(before=torch.relu)), [("rescale", 2)]),
    (Attended(rotary(after=torch.relu)), [("rescale", 2)]),
    (Attended(rotary(), again=rotary(interleaved, INTERLEAVED)), [("rescale", 1)]),  # used in two ways
    (Attended(rotary(), rotary(interleaved, INTERLEAVED)), [("rescale", 1)]),
    (Attended(lambda x: rotary()(x.add_(rotary()(x)))), [("rescale", 2)]),  # written over
])  # fmt: skip
def test_pairs_that_only_scale(model, expected):
    assert between_queries_and_keys(model) == expected


@pytest.mark.parametrize("on_k, expected", [
    (lambda x: -x / 2, [("attention", 1, 4, 4)]),
    (lambda x: torch.cat([x[..., :2], -x[..., 2:]], -1), [("attention", 2, 2, 2)]),
    (lambda x: torch.cat([2 * x[..., :2], 3 * x[..., 2:]], -1), [("attention", 2, 2, 2)]),
    (lambda x: torch.cat([x[..., :2], x[..., 2:] * x.new_tensor(2.0)], -1), [("attention", 2, 2, 2)]),
    (lambda x: torch.cat([x[..., :2], 0 - x[..., 2:]], -1), [("attention", 2, 2, 2)]),
])  # fmt: skip
def test_parts_of_a_head_that_have_other_factors_do_not_mix(on_k, expected):
    assert between_queries_and_keys(Attended(lambda x: x, on_k)) == expected


def test_a_single_token_shows_no_rotation():
    assert between_queries_and_keys(Attended(rotary()), X[:, :1]) == [("rescale", 2)]


class Twice(nn.Module):
    """One layer for two attentions, of unlike layouts."""

    def __init__(self, layouts, bias):
        super().__init__()
        self.inner, self.layouts = Attended(None, bias=bias), layouts

    def forward(self, x):
        for layout in self.layouts:
            self.inner.on_q = self.inner.on_k = layout
            x = x + self.inner(x)
        return x


def test_a_layer_that_is_called_twice_only_scales():
    for bias in (False, True):
        model = Twice([rotary(), rotary(interleaved, INTERLEAVED)], bias)
        kinds = [s.kind for s, _, reason in traced(model.double(), X) if reason is None]
        assert "rotary" not in kinds and "rescale" in kinds


def test_a_teleporter_finds_and_undoes_it():
    model = Attended(rotary()).double()
    teleporter = Teleporter(model, "attention", inputs=X)
    before = [p.clone() for p in model.parameters()]
    assert sorted(s.kind for s in teleporter.symmetries) == ["attention", "rotary"]
    result = teleporter.step(X, lambda y: y.square().mean())
    assert result.objective_after > result.objective_before and abs(result.drift) < 1e-12
    teleporter.apply(teleporter.random_tangents(), X)
    teleporter.undo()
    assert all(torch.allclose(p, q, rtol=1e-12, atol=1e-12) for p, q in zip(model.parameters(), before))
