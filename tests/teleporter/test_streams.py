"""streams.py: which residual streams rotate as a whole, seen in one run, and which only look like it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import set_seed
from torch import nn

from teleporter import Teleporter
from teleporter.traced import traced

TOKENS = torch.randint(9, (2, 4), generator=torch.Generator().manual_seed(0))
D = 6


class Norm(nn.Module):
    """x γ / rms(x) as it is written by hand."""

    def __init__(self, eps=1e-6, shift=False, one=False, power=2, half=False, gain=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D)) if gain else 1
        self.bias = nn.Parameter(torch.zeros(D)) if shift else 0
        self.eps, self.one, self.power, self.half = eps, one, power, half

    def forward(self, x):
        size = x[..., : D // 2] if self.half else x
        x = x * torch.rsqrt(size.pow(self.power).mean(-1, keepdim=True) + self.eps)
        x = x * (self.weight + 1) if self.one else x * self.weight
        return x + self.bias if isinstance(self.bias, nn.Parameter) else x


class Residual(nn.Module):
    """embed, two additions, head; on(x) acts on the stream in between, twist(model, x) on all that it knows."""

    def __init__(self, norm=Norm, on=lambda x: x, twist=None, tied=False, times=1, pool=lambda x: x):
        super().__init__()
        set_seed(0)
        self.embed, self.place = nn.Embedding(9, D), nn.Parameter(torch.randn(1, 8, D))
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.up, self.down, self.mix = nn.Linear(D, 5), nn.Linear(5, D), nn.Linear(D, D, bias=False)
        self.head, self.on, self.twist, self.times, self.pool = nn.Linear(D, 9, bias=False), on, twist, times, pool
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.place[:, : tokens.shape[1]]
        for _ in range(self.times):
            x = x + self.down(self.up(self.norms[0](x)).tanh())
            x = self.on(x)
            x = x + self.mix(self.norms[1](x))  # reads and writes
        if self.twist:
            x = self.twist(self, x)
        return self.head(self.norms[2](self.pool(x)))


def in_place(x):
    x += 2 * x
    return x.mul_(0.5)


def joined_late(model, x):
    y = model.down(model.up(model.norms[0](x)).tanh())
    return x * y.relu().sum() + y


def streams(model, tokens=TOKENS, gains=True):
    """(names of the streams that rotate, {name: reason} of the others); all that was found is tried."""
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            p += 0 if "norm" in name and not gains else 0.1 * torch.randn_like(p)
    found = traced(model, tokens)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        before = model(tokens)
        for s, _, reason in found:
            if reason is None:
                T = s.tangent(torch.randn(s.shape, dtype=torch.float64))
                s.act_(parameters, T if s.kind == "rescale" else T / 2)
                assert (model(tokens) - before).norm() <= 1e-12 * before.norm(), s.name
    found = [(s.name, reason) for s, _, reason in found if s.kind == "stream"]
    return [name for name, reason in found if reason is None], {name: reason for name, reason in found if reason}


@pytest.mark.parametrize("model", [
    Residual(),
    Residual(lambda: nn.RMSNorm(D)),
    Residual(lambda: nn.RMSNorm(D, elementwise_affine=False)),
    Residual(times=2),
    Residual(on=lambda x: 0.5 * x.neg() / 3),
    Residual(on=lambda x: x * x.square().sum(-1, keepdim=True).tanh()),
    Residual(on=lambda x: F.normalize(x, dim=-1) + x / x.norm(dim=-1, keepdim=True)),
    Residual(on=in_place),
    Residual(on=lambda x: torch.cat([x[:, 1:], x[:, :1]], 1)),
    Residual(pool=lambda x: x.mean(1)),
    Residual(pool=lambda x: x[:, -1]),
])  # fmt: skip
def test_streams_that_rotate(model):
    names, others = streams(model)
    assert sorted(names[0].removesuffix(": stream").split(", ")) == ["down", "embed", "mix", "place"] and not others


def test_frozen_gains_and_gains_alike_before_a_tied_head():
    model = Residual()
    for norm in model.norms:
        norm.weight.requires_grad_(False)
    assert len(streams(model)[0]) == 1
    assert len(streams(Residual(tied=True), gains=False)[0]) == 1
    both = Residual(twist=lambda model, x: x + F.linear(model.norms[0](x), model.mix.weight.T))
    both.norms.requires_grad_(False)
    assert len(streams(both, gains=False)[0]) == 1
    for norm in (0, 2):  # gains that another layer lets scale, and that a second reader without any forbids
        model = Residual(twist=lambda model, x, norm=norm: x + model.mix(model.norms[norm](x) if norm == 0 else x))
        names, others = streams(model, gains=norm > 0)
        assert not names and ("that scale" if norm == 0 else "not alike") in str(others)
    names, others = streams(Residual(tied=True))
    assert not names and "not alike" in str(others)


@pytest.mark.parametrize("model, reason", [
    (Residual(lambda: Norm(shift=True)), "add in norms.0 does not rotate"),
    (Residual(lambda: Norm(one=True)), "mul in norms.0"),
    (Residual(lambda: Norm(power=4)), "pow in norms.0"),
    (Residual(lambda: Norm(half=True)), "slice in norms.0"),
    (Residual(on=torch.relu), "relu in the model"),
    (Residual(on=lambda x: x * torch.arange(D)), "mul in the model"),
    (Residual(on=lambda x: x + 1), "add in the model"),
    (Residual(on=lambda x: x.flip(-1)), "flip in the model"),
    (Residual(on=lambda x: F.dropout(x, 0.5)), "native_dropout in the model"),
    (Residual(on=lambda x: x.mul_(x)), "mul_ in the model"),
    (Residual(on=lambda x: torch.zeros_like(x).copy_(x)), "copy_ in the model"),
    (Residual(on=lambda x: x * x.square().sum(1, keepdim=True)[..., :1]), "sum in the model"),
    (Residual(twist=lambda model, x: x + model.place[:, :4].flip(-1)), "add in the model"),
    (Residual(twist=joined_late), "relu in the model"),
    (Residual(twist=lambda model, x: x * model.embed.weight.tanh().sum()), "more than one way"),
    (Residual(twist=lambda model, x: x * torch.cat([model.down.bias, model.up.bias]).sum()), "more than one way"),
    (Residual(twist=lambda model, x: x + model.norms[0].weight * model.norms[1](x)), "mul in the model"),
])  # fmt: skip
def test_streams_that_stay(model, reason):
    set_seed(0)
    model.double()
    found = [(s.name, why) for s, _, why in traced(model, TOKENS) if s.kind == "stream"]
    assert len(found) == 1 and reason in str(found[0][1]), found


def test_layer_norm_a_frozen_writer_and_an_output():
    names, others = streams(Residual(lambda: nn.LayerNorm(D)))
    assert not names
    frozen = Residual()
    frozen.down.requires_grad_(False)
    names, others = streams(frozen)
    assert not names and "add in the model" in str(others)
    outer = nn.Sequential(Residual())
    outer[0].head = nn.Identity()
    names, others = streams(outer)
    assert not names and "output of the model" in str(others)


def test_a_teleporter_finds_it_tries_it_and_undoes_it():
    model = Residual().double()
    teleporter = Teleporter(model, "stream", inputs=TOKENS)
    before = [p.clone() for p in model.parameters()]
    teleporter.apply([3 * T for T in teleporter.random_tangents()], TOKENS)
    assert (model.place - before[0]).norm() > 0.1
    teleporter.undo()
    assert all(torch.allclose(p, q, rtol=1e-12, atol=1e-12) for p, q in zip(model.parameters(), before))
    rounding = Residual(on=lambda x: x.float().double()).double()  # as Llama's norms do
    assert len(Teleporter(rounding, "stream", inputs=TOKENS).symmetries) == 1
    assert "embed" not in teleporter.left_alone and [s.kind for s in teleporter.symmetries] == ["stream"]


def test_transformers_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=50)  # fmt: skip
    model, inputs = transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(50, (2, 6))}
    kinds = [s.kind for s in Teleporter(model, inputs=inputs).symmetries]
    assert kinds.count("rotary") == 2 and kinds.count("stream") == 1 and kinds.count("attention") == 2
