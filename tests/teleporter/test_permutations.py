"""permutations.py: hidden units are permuted with all that belongs to them, and the function is left alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from grammar import built
from test_grammar import plant
from torch import nn

from teleporter import Teleporter, axes, permutations, rearranged, units
from teleporter.verify import relative_change, tensors_of


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """A function of the input and of named parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def cnn():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.PReLU(4),
                         nn.Flatten(), nn.Linear(16, 2))  # fmt: skip


class Block(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.up, self.norm1 = nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.down, self.norm2 = nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x):
        return F.relu(x + self.scale * self.norm2(self.down(F.gelu(self.norm1(self.up(x))))))


def resnet():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block(4, 5), Block(4, 6), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, 2))  # fmt: skip


def mobile():
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 6, 3, groups=6),
                         nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 2, 1))  # fmt: skip


def swiglu():
    return Net(lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x)),
               gate=nn.Linear(3, 6), up=nn.Linear(3, 6), down=nn.Linear(6, 2))  # fmt: skip


def glu():
    return Net(lambda s, x: s.down(F.glu(s.both(x))), both=nn.Linear(3, 12), down=nn.Linear(6, 2))


def norm_by_hand():
    return Net(lambda s, x: s.b(s.norm(s.a(x).tanh()) * s.gain), a=nn.Linear(3, 6), norm=nn.LayerNorm(6),
               gain=nn.Parameter(torch.rand(6)), b=nn.Linear(6, 2))  # fmt: skip


def scaled():
    model = Net(lambda s, x: s.b(torch.tanh(s.a(x) * s.scale)), a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    model.register_buffer("scale", torch.rand(6))
    return model


def twice():
    square = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), square, nn.Tanh(), square, nn.Tanh(), nn.Linear(6, 2))


class Former(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(7, 8), nn.Parameter(torch.randn(5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens) + self.position))


def heads():
    def forward(s, x):
        q, k, v = s.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return s.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    return Net(forward, qkv=nn.Linear(3, 36), out=nn.Linear(12, 2))


def apart():
    def forward(s, x):
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (s.q, s.k, s.v))
        return s.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    return Net(forward, **{name: nn.Linear(3, 12) for name in "qkv"}, out=nn.Linear(12, 2))


def recurrent():
    return Net(lambda s, x: s.head(s.cell(x)[0][:, -1]), cell=nn.GRU(3, 5, batch_first=True), head=nn.Linear(5, 2))


IMAGES, TOKENS = (4, 3, 6, 6), (2, 5, 3)
KINDS = {
    "mlp": (mlp, (4, 3), {"0 -> 2": 6, "2 -> 4": 5}),
    "cnn": (cnn, IMAGES, {"0 -> 3": 6, "3 -> 6": 4}),
    "resnet": (resnet, IMAGES, {"0, 2.down, 3.down -> 2.up, 3.up, 6": 4, "2.up -> 2.down": 5, "3.up -> 3.down": 6}),
    "mobile": (mobile, IMAGES, {"0, 3 -> 6": 6}),
    "swiglu": (swiglu, (4, 3), {"gate, up -> down": 6}),
    "glu": (glu, (4, 3), {"both -> down": 6}),
    "norm": (norm_by_hand, (4, 3), {"a -> b": 6}),
    "buffer": (scaled, (4, 3), {"a -> b": 6}),
    "twice": (twice, (4, 3), {"0, 2 -> 2, 6": 6}),
    "former": (Former, "tokens", {"embed, layer.self_attn.out_proj, layer.linear2 -> "
               "layer.self_attn, layer.linear1, head": 8, "layer.self_attn -> layer.self_attn.out_proj": 2,
               "layer.self_attn -> layer.self_attn.out_proj'": 4, "layer.linear1 -> layer.linear2": 12}),
    "heads": (heads, TOKENS, {"qkv -> out": 3, "qkv -> out'": 4}),
    "apart": (apart, TOKENS, {"q, k, v -> out": 3, "q, k": 4, "v -> out": 4}),
    "recurrent": (recurrent, TOKENS, {"cell -> cell, head": 5}),
}  # fmt: skip
WITHOUT_INPUTS = {"mlp": 2, "mobile": 1, "resnet": 2, "cnn": 1}


def made(kind):
    """A model whose biases, gains and statistics would show a mistake, and inputs."""
    make, shape, _ = KINDS[kind]
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        for b in model.buffers():
            b.copy_(torch.rand(b.shape) + 0.5 if b.is_floating_point() else b)
    return model, torch.randint(7, (3, 5)) if shape == "tokens" else torch.randn(shape)


def outputs(model, *inputs):
    with torch.no_grad():
        return [y for x in inputs for y in tensors_of(model(x))]


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def copied(model):
    return {name: x.detach().clone() for name, x in tensors(model).items()}


def same(model, state):
    return all(torch.equal(x, state[name]) for name, x in tensors(model).items())


def moved(teleporter, *inputs, **options):
    """Permute: outputs stay in both modes, all that has a slot changes and nothing else."""
    model, before, modes = teleporter.permutations.model, copied(teleporter.permutations.model), (False, True)
    expected = [outputs(copy.deepcopy(model).train(mode), *inputs) for mode in modes]
    teleporter.permute(**options)
    for mode, y in zip(modes, expected):
        assert relative_change(y, outputs(copy.deepcopy(model).train(mode), *inputs)) <= 1e-12
    changed = {name for name, x in tensors(model).items() if not torch.equal(x, before[name])}
    assert changed == {slot.name for s in teleporter.symmetries for slot in s.slots}
    return before


def teleporter_of(model, inputs=None, **options):
    return Teleporter(model, "permutation", inputs=inputs, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_is_exact_and_is_undone_bit_for_bit(kind):
    model, x = made(kind)
    rng, state = torch.get_rng_state(), copied(model)
    teleporter = teleporter_of(model, x)
    assert torch.equal(torch.get_rng_state(), rng) and same(model, state)
    assert {s.name: s.shape[0] for s in teleporter.symmetries} == KINDS[kind][2]
    before = moved(teleporter, x, generator=torch.Generator().manual_seed(3))
    teleporter.permute()
    teleporter.undo()
    assert same(model, before)


def loss_of(model, x):
    return model(x).square().mean()


def steps(model, optimizer, batches):
    for x in batches:

        def closure(x=x):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        optimizer.step(closure)


def remembered(optimizer, model):
    """All tensors in the state of a parameter, in order."""
    return [t for p in model.parameters() for t in torch.utils._pytree.tree_leaves(optimizer.state.get(p, {}))
            if isinstance(t, torch.Tensor)]  # fmt: skip


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-4),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind in ("cnn", "former", "swiglu", "twice") for name in ("SGD", "Adam", "AdamW")]
    + [("mlp", name) for name in OPTIMIZERS],
)
def test_training_goes_on_as_if_nothing_had_happened(kind, name):
    model, x = made(kind)
    twin = copy.deepcopy(model)
    batches = [x + 0.1 * torch.randn(x.shape) if x.is_floating_point() else x for _ in range(8)]
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    for m, o in ((model, optimizer), (twin, other)):
        steps(m, o, batches[:3])
    teleporter = teleporter_of(model, x, optimizer=optimizer)
    weights, state = copied(model), [t.clone() for t in remembered(optimizer, model)]
    teleporter.permute()
    assert not same(model, weights)
    teleporter.undo()
    exact = [torch.equal(a, b) for a, b in zip(state, remembered(optimizer, model))]
    assert same(model, weights) and (all(exact) or name == "LBFGS")  # which keeps a quotient of sums
    teleporter.permute()
    for m, o in ((model, optimizer), (twin, other)):
        steps(m, o, batches[3:])
    teleporter.undo()
    for a, b in zip([*copied(model).values(), *remembered(optimizer, model)],
                    [*copied(twin).values(), *remembered(other, twin)]):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_that_wait_and_averaged_copies_move_too():
    model, x = made("cnn")
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model, x).backward()
    teleporter = teleporter_of(model, x, averaged=[average, plain])
    before = outputs(average.eval(), x)
    teleporter.permute()
    grads = [p.grad.clone() for p in model.parameters()]
    assert relative_change(before, outputs(average, x)) <= 1e-12
    assert all(torch.equal(p, average.module.get_parameter(n)) for n, p in model.named_parameters())
    assert all(torch.equal(p, plain[n]) for n, p in model.named_parameters())
    model.train().zero_grad()
    loss_of(model, x).backward()
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-10)


def test_sparse_gradients_of_an_embedding_move():
    model = nn.Sequential(nn.Embedding(7, 6, sparse=True), nn.Tanh(), nn.Linear(6, 2))
    x = torch.randint(7, (4,))
    loss_of(model, x).backward()
    dense, order = model[0].weight.grad.to_dense(), torch.randperm(6)
    teleporter_of(model, x).permute({"0 -> 2": order})
    assert torch.equal(model[0].weight.grad.to_dense(), dense[:, order])


class Preconditioned(torch.optim.SGD):
    """Keeps a matrix for each weight, as Shampoo and SOAP do."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["preconditioners"] = [torch.ones(n, n) for n in p.shape]


def test_a_state_that_cannot_follow_is_an_error_with_its_name():
    model, x = made("mlp")
    optimizer = Preconditioned(model.parameters())
    optimizer.step()
    with pytest.raises(ValueError, match="Preconditioned keeps 'preconditioners' of 0.weight"):
        teleporter_of(model, x, optimizer=optimizer)
    teleporter_of(model, x, optimizer=optimizer, on_unknown_state="keep").permute()
    kept = [t.sum() for t in remembered(optimizer, model)]
    teleporter_of(model, x, optimizer=optimizer, on_unknown_state="reset").permute()
    reset = [t.sum() for t in remembered(optimizer, model)]
    assert all(kept) and not any(reset[:4])
    with pytest.raises(ValueError, match="optimizer does not hold"):
        teleporter_of(model, x, optimizer=torch.optim.SGD(mlp().parameters()))


def linear_pair(between, hidden=6, **parts):
    return lambda: Net(lambda s, x: s.b(between(s, s.a(x))), a=nn.Linear(3, 6), b=nn.Linear(hidden, 2), **parts)


def tied_to_the_input():
    square = nn.Linear(3, 3)
    return nn.Sequential(square, nn.Tanh(), square, nn.Tanh(), nn.Linear(3, 2))


def frozen():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    model[2].weight.requires_grad_(False)
    return model


def unsaved():
    model = scaled()
    model.register_buffer("scale", torch.rand(6), persistent=False)
    return model


class Stored(nn.Module):
    """Writes its units into a tensor of its own, which it reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.cache = nn.Linear(3, 6), nn.Linear(6, 2), torch.zeros(4, 6)

    def forward(self, x):
        self.cache[:] = self.a(x).tanh()
        return self.b(self.cache)


def convolutions(between):
    return lambda: nn.Sequential(nn.Conv2d(3, 6, 3), between(), nn.Conv2d(6, 2, 1))


LEFT_ALONE = {
    "softmax": (linear_pair(lambda s, h: h.softmax(-1)), (4, 3), "softmax in .* mixes it"),
    "cumsum": (linear_pair(lambda s, h: h.cumsum(-1)), (4, 3), "cumsum in .* mixes it"),
    "sort": (linear_pair(lambda s, h: h.sort(-1)[0]), (4, 3), "sort in .* mixes it"),
    "flip": (linear_pair(lambda s, h: h + h.flip(-1)), (4, 3), "flip in .* mixes it"),
    "slice": (linear_pair(lambda s, h: h[:, :5], 5), (4, 3), "takes a part of it"),
    "every second": (linear_pair(lambda s, h: h[:, ::2], 3), (4, 3), "slice in .* mixes it"),
    "one": (linear_pair(lambda s, h: h * h[:, :1]), (4, 3), "takes a part of it"),
    "one by number": (linear_pair(lambda s, h: h * h[:, 0, None]), (4, 3), "takes a part of it"),
    "positions": (linear_pair(lambda s, h: h * torch.arange(6.0)), (4, 3), "input or a constant"),
    "a parameter of positions": (linear_pair(lambda s, h: h + s.p[:, None] + s.p, p=nn.Parameter(torch.rand(6))),
                                 (6, 3), "input or a constant|output"),
    "concatenation": (linear_pair(lambda s, h: torch.cat([h, h], -1), 12), (4, 3), "concatenates it"),
    "the input": (lambda: Net(lambda s, x: s.b(s.a(x) + x.repeat(1, 2)), a=nn.Linear(3, 6), b=nn.Linear(6, 2)), (4, 3),
                  "input or a constant"),
    "index": (linear_pair(lambda s, h: h[:, torch.randperm(6)]), (4, 3), "index in .* may tell"),
    "tied": (tied_to_the_input, (4, 3), "input or a constant"),
    "frozen": (frozen, (4, 3), "2.weight is frozen"),
    "unsaved": (unsaved, (4, 3), "scale is not saved"),
    "stored": (Stored, (4, 3), "input or a constant"),
    "group norm": (convolutions(lambda: nn.GroupNorm(2, 6)), IMAGES, "group_norm in 1 may tell"),
    "pool over channels": (convolutions(lambda: nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))), IMAGES, "pool3d in 1 mixes it"),
    "view": (linear_pair(lambda s, h: h.reshape(8, 3).tanh().view(4, 2, 3).transpose(1, 2).reshape(4, 6)[:, :5], 5),
             (4, 3), "takes a part"),
    "nothing between": (nn.Linear, (4, 3), "output of the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_tells_units_apart_leaves_them_alone(name):
    make, shape, reason = LEFT_ALONE[name]
    model = make(3, 2) if make is nn.Linear else make()
    before = copied(model)
    with pytest.raises(ValueError, match=f"no symmetry found: .*({reason})"):
        teleporter_of(model, torch.randn(shape))
    assert same(model, before)


def test_what_is_left_alone_stands_beside_what_moves():
    model = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 4), nn.Softmax(-1), nn.Linear(4, 2))
    teleporter = teleporter_of(model, torch.randn(4, 3))
    assert teleporter.left_alone == {"2": "_softmax in 3 mixes it", "4": "it is the output of the model"}
    kinds = [(row["kind"], row["name"], row["shape"], row["dimension"]) for row in teleporter.table()]
    assert kinds[:1] == [("permutation", "0 -> 2", (6,), 0)] and "permutation 0 -> 2 6 units" in repr(teleporter)


def test_groups_of_a_convolution_and_halves_are_kept_whole():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 1, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1))
    teleporter = teleporter_of(model, torch.randn(IMAGES))
    assert [(s.name, s.shape[0]) for s in teleporter.symmetries] == [("0, 2 -> 4", 2), ("0 -> 2", 3), ("2 -> 4", 2)]
    moved(teleporter, torch.randn(IMAGES), generator=torch.Generator().manual_seed(3))


def test_a_branch_of_the_other_mode_is_followed_as_well():
    model = Net(lambda s, x: s.b(h := s.a(x).tanh()) + (s.aux(h) if s.training else 0),
                a=nn.Linear(3, 6), b=nn.Linear(6, 2), aux=nn.Linear(6, 2)).eval()  # fmt: skip
    x = torch.randn(4, 3)
    teleporter = teleporter_of(model, x)
    assert [s.name for s in teleporter.symmetries] == ["a -> b, aux"] and not model.training
    moved(teleporter, x)


def test_modes_may_change_and_dropout_is_compared_without():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x = torch.randn(4, 3)
    teleporter = teleporter_of(model, x)
    before = outputs(model.eval(), x)
    teleporter.permute()
    assert relative_change(before, outputs(model, x)) <= 1e-12
    model[2].train()
    teleporter.undo()
    assert [m.training for m in model] == [False, False, True, False, False]


def test_orders_say_which_unit_goes_where_and_bad_ones_are_refused():
    model, x = made("mlp")
    teleporter, before = teleporter_of(model, x), copied(model)
    for orders in ({"0 -> 2": [0, 1, 2, 3, 4, 4]}, {"0 -> 2": range(5)}, {"0 -> 2": torch.rand(6)}, {"0 -> 2": 3},
                   {"2 -> 4": [0, 1, 2, 3, 5]}, {"1 -> 2": range(6)}):  # fmt: skip
        with pytest.raises(ValueError) as error:
            teleporter.permute(orders)
        assert "orders: " in str(error.value) and "\n" not in str(error.value)
    assert same(model, before)
    order = torch.tensor([3, 0, 1, 2, 5, 4])
    made_of = teleporter.permute({"0 -> 2": order})
    assert list(made_of) == ["0 -> 2"] and torch.equal(made_of["0 -> 2"], order)
    expected = before | {"0.weight": before["0.weight"][order], "0.bias": before["0.bias"][order],
                         "2.weight": before["2.weight"][:, order]}  # fmt: skip
    assert same(model, expected)
    again = [teleporter.permute(generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])
    teleporter.undo()
    assert same(model, before)


def test_options_and_methods_without_meaning_are_refused():
    model, x = made("mlp")
    with pytest.raises(ValueError, match="stands alone"):
        Teleporter(model, ["rescale", "permutation"])
    with pytest.raises(ValueError, match="stands alone"):
        Teleporter(model, "permutation", bound=3.0)
    with pytest.raises(ValueError, match="on_unknown_state"):
        Teleporter(model, "permutation", on_unknown_state="odd")
    teleporter = teleporter_of(model, x)
    for call in (lambda: teleporter.step(x, lambda y: y.sum()), lambda: teleporter.apply([]),
                 teleporter.random_tangents):  # fmt: skip
        with pytest.raises(ValueError, match="use permute"):
            call()
    with pytest.raises(ValueError, match='permute needs symmetries "permutation"'):
        Teleporter(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).permute()
    assert not any(s.kind == "permutation" for s in Teleporter(swiglu(), inputs=x).symmetries)


class Hidden(nn.Module):
    """Reads its units where no operation is seen."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.rest = nn.Linear(3, 6), nn.Linear(6, 2), mlp()

    def forward(self, x):
        h = self.a(x).tanh()
        first = torch.tensor([row[0] for row in h.tolist()])
        return self.b(h) + first[:, None].to(x) + self.rest(x)


def test_a_trial_refutes_what_no_operation_shows():
    model, x = Hidden(), torch.randn(4, 3)
    nn.init.zeros_(model.a.weight)  # which the trial disturbs
    nn.init.zeros_(model.a.bias)
    before = copied(model)
    teleporter = teleporter_of(model, x)
    assert "a trial changed the output" in teleporter.left_alone["a -> b"] and same(model, before)
    assert [s.name for s in teleporter.symmetries] == ["rest.0 -> rest.2", "rest.2 -> rest.4"]
    moved(teleporter, x)


def test_outputs_are_compared_and_a_move_that_changes_them_is_undone():
    model, x = made("cnn")
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    steps(model, optimizer, [x])
    teleporter = teleporter_of(model, optimizer=optimizer)
    s = teleporter.symmetries[0]
    teleporter.symmetries[:] = [s._replace(slots=s.slots[:-1])]  # one that belongs to it is forgotten
    before, state = copied(model), [t.clone() for t in remembered(optimizer, model)]
    teleporter.permutations.verified = True
    with pytest.raises(RuntimeError, match="permuting changed the output by .* and was undone"):
        teleporter.permute(inputs=x)
    assert same(model, before) and all(torch.equal(a, b) for a, b in zip(state, remembered(optimizer, model)))
    teleporter.permutations.verified = False
    with pytest.raises(RuntimeError, match="every symmetry found changed the output when tried"):
        teleporter.permute(inputs=x)
    assert same(model, before)


def test_a_model_that_changed_since_is_refused():
    model, x = made("mlp")
    teleporter = teleporter_of(model, x)
    model[2] = nn.Linear(6, 5)
    with pytest.raises(RuntimeError, match="module 2 is not what it was"):
        teleporter.permute()
    with pytest.raises(RuntimeError, match="module 2 is not what it was"):
        teleporter.undo()


@pytest.mark.parametrize("kind", WITHOUT_INPUTS)
def test_without_inputs_plain_layers_are_found(kind):
    model, x = made(kind)
    teleporter = teleporter_of(model)
    assert len(teleporter.symmetries) == WITHOUT_INPUTS[kind]
    before = moved(teleporter, x, generator=torch.Generator().manual_seed(3))
    teleporter.undo()
    assert same(model, before)


WITHOUT = {
    "softmax": lambda: nn.Sequential(nn.Linear(3, 6), nn.Softmax(-1), nn.Linear(6, 2)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 1, groups=2)),
    "shapes": lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)),
    "slopes": lambda: nn.Sequential(nn.Linear(3, 6), nn.PReLU(6), nn.Linear(6, 2)),
    "group norm": convolutions(lambda: nn.GroupNorm(2, 6)),
    "twice": twice,
    "a constant": linear_pair(lambda s, h: h * torch.arange(6.0)),
    "positions": linear_pair(lambda s, h: h * torch.arange(h.shape[1])),
    "positions in place": linear_pair(lambda s, h: h.mul_(torch.arange(h.shape[1]))),
    "a parameter": lambda: linear_pair(lambda s, h: h * s.p, p=nn.Parameter(torch.ones(6)))(),
    "read twice": lambda: Net(lambda s, x: (s.b(h := s.a(x).tanh()), h), a=nn.Linear(3, 6), b=nn.Linear(6, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT)
def test_without_inputs_the_rest_is_left_alone(name):
    try:
        found = Teleporter(WITHOUT[name](), "permutation")
    except ValueError as error:
        assert "no symmetry found" in str(error)
    else:
        raise AssertionError(found)


def test_a_run_that_cannot_be_followed_falls_back_on_the_graph(monkeypatch):
    def failing(model, inputs):
        raise NotImplementedError("of this operation nothing is known")

    monkeypatch.setattr(permutations, "followed", failing)
    model, x = made("cnn")
    teleporter = teleporter_of(model, x)
    assert [s.name for s in teleporter.symmetries] == ["0 -> 3", "3 -> 6"]
    assert "nothing is known" in teleporter.left_alone["trace of the inputs"]
    moved(teleporter, x, generator=torch.Generator().manual_seed(3))
    last = Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 5, 3), b=nn.Linear(80, 2))
    with pytest.raises(ValueError, match="permute is not"):
        teleporter_of(last, x)


def test_what_is_computed_in_single_precision_rounds():
    def normed(h):
        return (h.float() * h.float().square().mean(-1, keepdim=True).rsqrt()).to(h)

    model = Net(lambda s, x: s.b(normed(s.a(x))), a=nn.Linear(3, 64), b=nn.Linear(64, 2))
    x = torch.randn(40, 3)
    teleporter = teleporter_of(model, x)
    before = outputs(model, x)
    teleporter.permute()
    assert [s.name for s in teleporter.symmetries] == ["a -> b"]
    assert 0 < relative_change(before, outputs(model, x)) <= 1e-6


def test_a_copy_moves_its_own_model():
    model, x = made("mlp")
    teleporter = teleporter_of(model, x)
    teleporter.permute()
    before = copied(model)
    for twin in (copy.deepcopy(teleporter), pickle.loads(pickle.dumps(teleporter))):
        y = outputs(twin.permutations.model, x)
        twin.permute()
        assert relative_change(y, outputs(twin.permutations.model, x)) <= 1e-12 and same(model, before)
        twin.undo()
    teleporter.undo()
    assert same(twin.permutations.model, copied(model)) and not same(model, before)


def test_half_precision_moves():
    model, x = made("mlp")
    model, x = model.bfloat16(), x.bfloat16()
    teleporter, before = teleporter_of(model, x), copied(model)
    teleporter.permute()
    assert not same(model, before)
    teleporter.undo()
    assert same(model, before)


# Random models, and planted bugs


def checked(model, inputs, other=None, found_by_inputs=True):
    """How many symmetries are found; outputs stay, and nothing has to be refuted by trial."""
    try:
        teleporter = teleporter_of(model, inputs if found_by_inputs else None)
    except ValueError as error:
        assert "no symmetry found" in str(error)
        return 0
    assert "trial" not in str(teleporter.left_alone), teleporter.left_alone
    model.eval()
    y = outputs(model, inputs, *([] if other is None else [other]))
    before = copied(model)  # a forward pass may write weights itself
    teleporter.permute(generator=torch.Generator().manual_seed(3))
    change = relative_change(y, outputs(model, inputs, *([] if other is None else [other])))
    assert change <= 1e-10, f"{change:.2g}: {teleporter}"
    teleporter.undo()
    assert same(model, before)
    return len(teleporter.symmetries)


@pytest.mark.parametrize("found_by_inputs", [True, False])
def test_random_models_keep_their_function_or_are_left_alone(found_by_inputs):
    found = [checked(*built(number), found_by_inputs) for number in range(100)]
    assert sum(map(bool, found)) > 40 and found.count(0) > 10


BUGS = {
    "none of axes": (axes, "for label in paired[1:]", "for label in paired[1:]"),
    "none of rearranged": (rearranged, "self.axes.fix(outer, reason)", "self.axes.fix(outer, reason)"),
    "none of units": (units, "order.to(x.device)", "order.to(x.device)"),
    "none of permutations": (permutations, "if change > allowed:", "if change > allowed:"),
    "a sum that joins nothing": (axes, "for label in paired[1:]", "for label in paired[2:]"),
    "statistics that stay": (axes, "for x in tensors[1:]:", "for x in tensors[1:3]:"),
    "a shift of a norm that stays": (axes, '(given.get("weight"), given.get("bias"))', '(given.get("weight"),)'),
    "a product that joins nothing": (axes, "self.axes.join(A[-1], B[k]", "self.axes.join((), ()"),
    "a batch that joins nothing": (axes, "self.axes.join(A[0], B[0]", "self.axes.join((), ()"),
    "groups that do not matter": (axes, "self.axes.join(outer[0], there[0]", "self.axes.join((), ()"),
    "a bias of a convolution": (axes, "self.axes.join(write, self.of(b)[0]", "self.axes.join((), ()"),
    "any operation": (axes, "self.axes.fix(label, reason)\n            found", "pass\n            found"),
    "outputs that move": (axes, 'self.axes.fix(label, "it is the output of the model")', "pass"),
    "constants that move": (axes, 'self.axes.new(n, "it meets an input or a constant")', "self.axes.new(n)"),
    "the inner part first": (axes, "tail.insert(0, axis)", "tail.append(axis)"),
    "mixed along a dimension": (rearranged, "self.axes.fix(labels[d], reason)", "pass"),
    "a part": (rearranged, "self.axes.fix(outer, reason)", "pass"),
    "one entry": (rearranged, 'self.axes.fix(labels[d], f"{self.place} takes a part of it")', "pass"),
    "a side of a concatenation": (rearranged, 'self.axes.fix(labels.pop(d), f"{self.place} concatenates it")',
                                  "labels.pop(d)"),
    "a transposition": (rearranged, "labels[i], labels[j] = labels[j], labels[i]", "pass"),
    "outer for inner": (units, "unflatten(0, (self.outer, self.size, self.inner))",
                        "unflatten(0, (self.inner, self.size, self.outer))"),
    "no inverse": (units, "(-T).argsort() if bool((T < 0).any()) else T", "T.abs()"),
    "frozen ones move": (units, 'fixed[name] = f"{name} is frozen"', "pass"),
    "unsaved ones move": (units, 'fixed[name] = f"{name} is not saved with the model"', "pass"),
    "one mode": (units, "evaluating(model, training):", "evaluating(model, model.training):"),
    "buffers that stay": (permutations, "self._act(self._tensors(), moves)", "self._act(self._moving(), moves)"),
    "gradients that stay": (permutations, "act({name: p.grad})", "pass"),
    "a memory that stays": (permutations, "act({name: value} if", "act({} if"),
    "copies that stay": (permutations, "act(self._buffers_of(copy) | tensors)", "pass"),
    "a copy's buffers": (permutations, "act(self._buffers_of(copy) | tensors)", "act(tensors)"),
    "an order of any numbers": (permutations, "order.sort()[0].tolist() != list(range(n))", "False"),
    "no measuring": (permutations, "if change > allowed:", "if False:"),
    "elementwise": (units, "|alphadropout)_?", "|alphadropout|softmax)_?"),
    "slopes": (units, "flow.dim != 1 or not own", "not own"),
    "arithmetic with anything": (units, "all(isinstance(x, bool | int | float | str | None) for x in others)", "True"),
    "statistics of chains": (units, '("weight", "bias", "running_mean", "running_var")', '("weight", "bias")'),
    "columns of chains": (units, '{"weight": int(type(module) in CONV)}', '{"weight": 0}'),
}  # fmt: skip


def judges():
    """The tests above that a single bug must break one of."""
    for kind in KINDS:
        yield lambda kind=kind: test_each_kind_is_found_is_exact_and_is_undone_bit_for_bit(kind)
    for name in LEFT_ALONE:
        yield lambda name=name: test_what_tells_units_apart_leaves_them_alone(name)
    for kind in WITHOUT_INPUTS:
        yield lambda kind=kind: test_without_inputs_plain_layers_are_found(kind)
    for name in WITHOUT:
        yield lambda name=name: test_without_inputs_the_rest_is_left_alone(name)
    yield lambda: test_training_goes_on_as_if_nothing_had_happened("mlp", "SGD")
    yield test_gradients_that_wait_and_averaged_copies_move_too
    yield test_groups_of_a_convolution_and_halves_are_kept_whole
    yield test_a_branch_of_the_other_mode_is_followed_as_well
    yield test_orders_say_which_unit_goes_where_and_bad_ones_are_refused
    yield test_outputs_are_compared_and_a_move_that_changes_them_is_undone


@pytest.mark.parametrize("bug", BUGS)
def test_every_bug_is_seen(bug, monkeypatch):
    plant(monkeypatch, *BUGS[bug])
    seen = False
    for judge in judges():
        try:
            judge()
        except (Exception, pytest.fail.Exception):
            seen = True
            break
    assert seen != bug.startswith("none")
