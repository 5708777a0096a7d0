"""rotations.py: scaled rotations under rotary positions and O(d) on the stream of a Llama-like model, given by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import set_seed
from torch import nn

from teleporter import Rotary, Stream, Teleporter

TOKENS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
D, HEADS, KV, D_HEAD = 12, 4, 2, 4


class Norm(nn.Module):
    """RMSNorm as Llama writes it."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def rotated(x, layout):
    """Rotary positions on (batch, heads, tokens, d_head)."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    if layout == "half":
        angle = torch.cat([angle, angle], 1)
        turned = torch.cat([-x[..., D_HEAD // 2 :], x[..., : D_HEAD // 2]], -1)
    else:
        angle = angle.repeat_interleave(2, 1)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angle.cos() + turned * angle.sin()


class Block(nn.Module):
    def __init__(self, layout, norm, fused, normalized):
        super().__init__()
        self.layout, self.fused = layout, fused
        self.norm1, self.norm2 = norm(D), norm(D)
        self.between = norm(D_HEAD) if normalized else nn.Identity()
        if fused:
            self.qkv = nn.Linear(D, (HEADS + 2 * KV) * D_HEAD)
        else:
            self.q, self.k, self.v = (nn.Linear(D, n * D_HEAD) for n in (HEADS, KV, KV))
        self.out = nn.Linear(HEADS * D_HEAD, D)
        self.gate, self.up, self.down = nn.Linear(D, 7), nn.Linear(D, 7), nn.Linear(7, D)

    def forward(self, x):
        h = self.norm1(x)
        parts = self.qkv(h).split([n * D_HEAD for n in (HEADS, KV, KV)], -1) if self.fused else None
        q, k, v = (y.unflatten(2, (-1, D_HEAD)).transpose(1, 2) for y in parts or (self.q(h), self.k(h), self.v(h)))
        q, k = (rotated(self.between(y), self.layout) for y in (q, k))
        k, v = k.repeat_interleave(HEADS // KV, 1), v.repeat_interleave(HEADS // KV, 1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Two blocks; all that a token goes through."""

    def __init__(self, layout="half", norm=Norm, fused=False, normalized=False, tied=False):
        super().__init__()
        set_seed(0)
        self.embed = nn.Embedding(11, D)
        self.blocks = nn.ModuleList(Block(layout, norm, fused, normalized) for _ in range(2))
        self.norm, self.head = norm(D), nn.Linear(D, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def disturbed(model, gains=True):
    """In float64, with gains and biases that would show a mistake."""
    with torch.no_grad():
        for name, p in model.double().named_parameters():
            p += 0 if "norm" in name and not gains else 0.2 * torch.randn_like(p)
    return model


def stream(fused=False):
    writers, readers = ["embed"], {"norm": "head"}
    for i in range(2):
        b = f"blocks.{i}."
        writers += [b + "out", b + "down"]
        readers |= {b + "norm1": [b + n for n in (["qkv"] if fused else "qkv")], b + "norm2": [b + "gate", b + "up"]}
    return Stream(writers, readers)


def rotary(i=0, layout="half", fused=False):
    q, k = ("qkv", "qkv") if fused else ("q", "k")
    return Rotary(f"blocks.{i}.{q}", f"blocks.{i}.{k}", HEADS, KV, layout)


def moved(teleporter, inputs=TOKENS, tolerance=1e-12):
    """Apply large random tangents: outputs stay, all that has a slot changes."""
    model, before = teleporter.model, {n: p.detach().clone() for n, p in teleporter.model.named_parameters()}
    tangents = [s.tangent(torch.randn(s.shape, dtype=torch.float64)) for s in teleporter.symmetries]
    with torch.no_grad():
        y = model(inputs)
        teleporter.apply(tangents)
        assert (model(inputs) - y).norm() <= tolerance * y.norm()
    changed = {n for n, p in model.named_parameters() if (p - before[n]).norm() > 1e-3 * before[n].norm()}
    assert changed == {slot.name for s in teleporter.symmetries for slot in s.slots}
    return before


@pytest.mark.parametrize("layout, fused", [("half", False), ("half", True), ("interleaved", False)])
def test_both_are_exact_and_are_undone(layout, fused):
    model = disturbed(Llama(layout, fused=fused))
    items = [rotary(0, layout, fused), rotary(1, layout, fused), stream(fused)]
    teleporter = Teleporter(model, items, inputs=TOKENS)
    assert [s.kind for s in teleporter.symmetries] == ["rotary", "rotary", "stream"] and not teleporter.left_alone
    before = moved(teleporter)
    teleporter.undo()
    assert all((p - before[n]).norm() <= 1e-12 * before[n].norm() for n, p in model.named_parameters())
    pairs, stays = [s for s in teleporter.symmetries if s.kind == "rotary"], "norm1 norm2 norm".split()
    assert not any(slot.name.split(".")[-2] in stays for s in teleporter.symmetries for slot in s.slots)
    assert [s.dimension for s in pairs] == [2 * KV * D_HEAD // 2] * 2
    assert teleporter.table()[-1]["dimension"] == D * (D - 1) // 2
    assert f"stream      embed, blocks.0.out, blocks.0.down, blocks.1.out, blocks.1.down: stream 1×{D}×{D}" in repr(
        teleporter
    )


def test_what_forbids_them_is_said():
    with pytest.raises(RuntimeError, match="every symmetry found changed the output"):
        Teleporter(disturbed(Llama()), [rotary(layout="interleaved")], inputs=TOKENS)
    teleporter = Teleporter(disturbed(Llama(normalized=True)), [rotary(), stream()], inputs=TOKENS)
    assert [s.kind for s in teleporter.symmetries] == ["stream"]
    assert "changed the output" in teleporter.left_alone["blocks.0.q, blocks.0.k: rotary"]
    with pytest.raises(ValueError, match="norm is no RMSNorm"):
        Teleporter(disturbed(Llama(norm=nn.LayerNorm)), [stream()])
    forgotten = stream()._replace(writers=stream().writers[:-1])
    with pytest.raises(RuntimeError, match="every symmetry found changed the output"):
        Teleporter(disturbed(Llama()), [forgotten], inputs=TOKENS)
    with pytest.raises(ValueError, match="not alike.*tied"):
        Teleporter(disturbed(Llama(tied=True)), [stream()])
    with pytest.raises(ValueError, match="fit"):
        Teleporter(Llama(), [Rotary("blocks.0.q", "blocks.0.k", 3, 2)])
    model = Llama()
    model.blocks[0].norm2.weight.data[3] = 0
    with pytest.raises(ValueError, match="spread"):
        Teleporter(model, [stream()])
    teleporter = Teleporter(disturbed(Llama()), [stream()])
    with pytest.raises(ValueError, match="moves along its tangent"):
        teleporter.apply([torch.ones(1, D, D)])


@pytest.mark.parametrize("norm", [Norm, nn.RMSNorm, lambda d: nn.RMSNorm(d, elementwise_affine=False)])
def test_tied_embeddings_turn_while_their_gains_are_alike(norm):
    model = disturbed(Llama(norm=norm, tied=True), gains=False)
    teleporter = Teleporter(model, [stream()], inputs=TOKENS)
    moved(teleporter)
    if model.norm.weight is not None:
        model.norm.weight.data[0] += 0.1
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="tied"):
            teleporter.undo()
        assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def loss_of(output):
    return F.cross_entropy(output.flatten(0, 1), TOKENS.flatten())


def gradients(model):
    model.zero_grad()
    loss_of(model(TOKENS)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_that_wait_follow_even_those_of_trained_gains():
    model = disturbed(Llama())
    teleporter = Teleporter(model, [rotary(), stream(), "rescale"], inputs=TOKENS)
    before = gradients(model)
    teleporter.apply([s.tangent(torch.randn(s.shape, dtype=torch.float64)) for s in teleporter.symmetries])
    waiting = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, fresh in gradients(model).items():
        assert (waiting[name] - fresh).norm() <= 1e-11 * fresh.norm()
    assert (before["norm.weight"] - waiting["norm.weight"]).norm() > 1e-3 * waiting["norm.weight"].norm()


def test_momentum_does_not_notice_a_rotation():
    runs = []
    for rotate in (False, True):
        model = disturbed(Llama(), gains=False)
        for name, p in model.named_parameters():
            p.requires_grad_("norm" not in name)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        teleporter = Teleporter(model, [rotary(), stream()], optimizer=sgd, inputs=TOKENS, strict=True)
        for step in range(4):
            if rotate and step == 2:
                start = model.embed.weight.detach().clone()
                teleporter.apply([(T - T.mT) / 2 for T in (torch.randn(s.shape) for s in teleporter.symmetries)])
                assert (model.embed.weight - start).norm() > 0.1
            gradients(model)
            sgd.step()
        if rotate:
            teleporter.undo()
        runs.append([*model.parameters(), *(sgd.state[p]["momentum_buffer"] for p in sgd.param_groups[0]["params"])])
    assert all((x - y).norm() <= 1e-12 * x.norm() for x, y in zip(*runs))


def test_what_an_optimizer_cannot_follow_is_noted():
    model = disturbed(Llama())
    items, adam = [rotary(), stream()], torch.optim.Adam(model.parameters())
    text = repr(Teleporter(model, items, optimizer=adam))
    assert "under rotary, stream squares move as those of uncorrelated entries" in text
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for optimizer in (adam, momentum):
        assert "remembers of the gains" in repr(Teleporter(model, items, optimizer=optimizer))
        with pytest.raises(ValueError, match="strict"):
            Teleporter(model, items, optimizer=optimizer, strict=True)
    Teleporter(model, items, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), strict=True)


def test_only_an_objective_that_feels_a_rotation_moves_along_it():
    model = disturbed(Llama())
    teleporter = Teleporter(model, [rotary(), stream()], inputs=TOKENS)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    turned = start["blocks.0.q.weight"].unflatten(0, (HEADS, 2, -1))
    for options in ({}, {"objective": "line_search_decrease"}, {"objective": "balance"}):
        teleporter = Teleporter(model, [rotary(), stream()], inputs=TOKENS, **options)
        result = teleporter.step(TOKENS, loss_of)
        assert result.objective_after > result.objective_before
        q = model.blocks[0].q.weight.detach().unflatten(0, (HEADS, 2, -1))
        assert torch.equal(model.embed.weight, start["embed.weight"])
        ratio = q / turned  # of pairs: scaled, not turned
        assert (ratio - ratio[:, :1, :, :1]).abs().max() < 1e-12 < (ratio - 1).abs().max()
        teleporter.undo()

    def sparse(loss, parameters):
        return sum(parameters[n].pow(4).sum() for n in ("embed.weight", "blocks.0.q.weight", "blocks.1.up.weight"))

    teleporter = Teleporter(model, [rotary(), stream()], sparse, inputs=TOKENS)
    embed = model.embed.weight.detach().clone()
    result = teleporter.step(TOKENS, loss_of)
    assert result.objective_after > 1.01 * result.objective_before and abs(result.drift) < 1e-12
    assert (model.embed.weight - embed).norm() > 1e-2
    assert all(len(T) == s.shape[0] for s, T in zip(teleporter.symmetries, teleporter.random_tangents()))


def test_derivatives_agree_with_finite_differences():
    model = disturbed(Llama())
    P = {n: p.detach().clone() for n, p in model.named_parameters()}
    C = {n: torch.randn_like(p) for n, p in P.items()}
    for s in Teleporter(model, [rotary(), stream()], inputs=TOKENS).symmetries:
        T, values = s.tangent(torch.randn(s.shape, dtype=torch.float64)), []
        for sign in (1e-6, -1e-6):
            now = {n: p.clone() for n, p in P.items()}
            s.act_(now, sign * T)
            values.append(sum((C[n] * now[n]).sum() for n in P))
        torch.testing.assert_close((s.derivative(C, P) * T).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def test_rotations_have_factor_one_and_a_copy_has_its_own_gains():
    model = disturbed(Llama())
    teleporter = Teleporter(model, [stream()], inputs=TOKENS, total_bound=2.0)
    for _ in range(5):
        teleporter.apply([3 * T for T in teleporter.random_tangents()], TOKENS)
    twin = copy.deepcopy(teleporter)
    with torch.no_grad():
        twin.model.norm.weight.mul_(torch.rand(D) + 0.5)
        y = twin.model(TOKENS)
    twin.apply(twin.random_tangents())
    assert (twin.model(TOKENS) - y).norm() <= 1e-12 * y.norm()
