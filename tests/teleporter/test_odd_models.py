"""Odd models: what is not proved to keep the function stays where it is, and one odd layer stops no other."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from teleporter import Teleporter

CONV, CONV1, LINEAR = lambda: nn.Conv2d(2, 4, 1), lambda: nn.Conv1d(2, 4, 1), lambda: nn.Linear(3, 4)
IMAGES, IMAGE, SIGNAL, TOKENS, ROWS = (2, 2, 4, 4), (2, 4, 4), (2, 8), (3, 4, 3), (5, 3)


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class AddsOne(nn.Module):
    def forward(self, x):
        return x + 1


def patched(module, forward):
    module.forward = forward
    return module


def hooked():
    module = nn.Linear(3, 4)
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


# name: (shape of the input, first layer, what comes between, second layer)
ODD = {
    "view joins images and channels": (IMAGES, CONV, lambda h: h.view(8, 16), nn.Linear(16, 2)),
    "reshape joins images and channels": (IMAGES, CONV, lambda h: h.reshape(-1, 16), nn.Linear(16, 2)),
    "flatten joins images and channels": (IMAGES, CONV, lambda h: h.flatten(end_dim=1).flatten(1), nn.Linear(16, 2)),
    "batch norm over tokens": (TOKENS, LINEAR, nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "group norm over tokens": (TOKENS, LINEAR, nn.GroupNorm(2, 4), nn.Linear(4, 2)),
    "batch norm of an image without a batch": (SIGNAL, CONV1, nn.BatchNorm1d(8), nn.Conv1d(4, 2, 1)),
    "an image without a batch": (IMAGE, CONV, lambda h: h.flatten(1), nn.Linear(16, 2)),
    "a signal without a batch": (SIGNAL, CONV1, lambda h: h.flatten(1), nn.Linear(8, 2)),
    "batch norm 2d of tokens": ((2, 4, 5, 3), LINEAR, nn.BatchNorm2d(4), nn.Linear(4, 2)),
    "pooling over channels": (IMAGES, CONV, lambda h: F.avg_pool3d(h, (2, 1, 1)).flatten(1), nn.Linear(32, 2)),
    "max pooling over channels": (IMAGES, CONV, nn.MaxPool3d((2, 1, 1)), nn.Conv2d(2, 2, 1)),
    "pooling over features": (TOKENS, LINEAR, nn.AvgPool1d(2), nn.Linear(2, 2)),
    "mean over features": ((4, 3), LINEAR, lambda h: h.mean(1), nn.Linear(4, 2)),
    "squeeze of what is not one": ((4, 2, 4, 4), CONV, lambda h: h.squeeze(3).squeeze(2), nn.Linear(4, 2)),
    "transpose": (TOKENS, LINEAR, lambda h: h.transpose(1, 2), nn.Linear(4, 2)),
    "padding of channels": (IMAGES, CONV, nn.ZeroPad3d((0, 0, 0, 0, 1, 0)), nn.Conv2d(5, 2, 1)),
    "padding with ones": (IMAGES, CONV, lambda h: F.pad(h, (1, 1), value=1.0), nn.Conv2d(4, 2, 1)),
    "pixel shuffle": (IMAGES, CONV, nn.PixelShuffle(2), nn.Conv2d(1, 2, 1)),
    "floor division": (ROWS, LINEAR, lambda h: torch.div(h, 0.1, rounding_mode="floor"), nn.Linear(4, 2)),
    "floor division as an operator": (ROWS, LINEAR, lambda h: h // 0.1, nn.Linear(4, 2)),
    "a mask": (ROWS, LINEAR, lambda h: (h > 0.1) * h, nn.Linear(4, 2)),
    "a mask alone": (ROWS, LINEAR, lambda h: (h > 0.1).to(h.dtype), nn.Linear(4, 2)),
    "masked_fill": (ROWS, LINEAR, lambda h: h.masked_fill(h > 0.2, 1.0), nn.Linear(4, 2)),
    "where": (ROWS, LINEAR, lambda h: torch.where(h > 0.2, h, 0.1 * h), nn.Linear(4, 2)),
    "piecewise encoder": (ROWS, LINEAR, lambda h: torch.cat([h.relu(), (h - 0.3).relu()], 1), nn.Linear(8, 2)),
    "bucketize": (ROWS, LINEAR, lambda h: torch.bucketize(h, torch.linspace(-1, 1, 5)).to(h.dtype), nn.Linear(4, 2)),
    "round": (ROWS, LINEAR, lambda h: h.round(decimals=1), nn.Linear(4, 2)),
    "sort": (ROWS, LINEAR, lambda h: h.sort(-1)[0], nn.Linear(4, 2)),
    "cumsum": (ROWS, LINEAR, lambda h: h.cumsum(1), nn.Linear(4, 2)),
    "a constant matrix": (ROWS, LINEAR, lambda h: h @ torch.ones(4, 4, dtype=h.dtype), nn.Linear(4, 2)),
    "divided by its norm": (ROWS, LINEAR, lambda h: h / h.norm(), nn.Linear(4, 2)),
    "added in place": (ROWS, LINEAR, lambda h: h.add_(1.0), nn.Linear(4, 2)),
    "relu6": (ROWS, LINEAR, F.relu6, nn.Linear(4, 2)),
    "softmax": (ROWS, LINEAR, nn.Softmax(-1), nn.Linear(4, 2)),
    "a module that adds": (ROWS, LINEAR, AddsOne(), nn.Linear(4, 2)),
    "a subclass": (ROWS, lambda: Subclass(3, 4), nn.ReLU(), nn.Linear(4, 2)),
    "a patched activation": (ROWS, LINEAR, patched(nn.ReLU(), torch.tanh), nn.Linear(4, 2)),
    "a hook": (ROWS, hooked, nn.ReLU(), nn.Linear(4, 2)),
    "spectral norm": (ROWS, lambda: nn.utils.parametrizations.spectral_norm(LINEAR()), nn.ReLU(), nn.Linear(4, 2)),
}


class Odd(nn.Module):
    """first, between, second; beside them two layers that can move."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first(), copy.deepcopy(between), copy.deepcopy(second)
        self.sound = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.second(self.between(self.first(x))), self.sound(x.flatten()[:3])


def total(output):
    return sum(x.square().sum() for x in output)


@pytest.mark.parametrize("how", ["without inputs", "with inputs", "step"])
@pytest.mark.parametrize("name", ODD)
def test_odd_layers_keep_their_function_and_sound_ones_move(name, how):
    shape, *layers = ODD[name]
    model, x = Odd(*layers).double(), torch.randn(shape, dtype=torch.float64)
    model.train(name != "spectral norm")  # its own training changes it at every pass
    with torch.no_grad():
        for p in model.parameters():  # biases of zero would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
        before, weight = model(x), model.sound[0].weight.clone()
    teleporter = Teleporter(model, inputs=x if how == "with inputs" else None)
    if how == "step" and name != "floor division as an operator":  # which has no derivative
        teleporter.step(x, total)
    else:
        teleporter.apply([2 * torch.rand(s.shape, dtype=torch.float64) - 1 for s in teleporter.symmetries])
    for a, b in zip(model(x), before):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.equal(model.sound[0].weight, weight)


# What used to end in a traceback, or to be believed


class Heads(nn.Module):
    """Attention by keyword, with one projection of the output or one for each head."""

    def __init__(self, projections):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 4) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(4 // projections, 2) for _ in range(projections))
        self.sound = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        q, k, v = (layer(x).view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(query=q, key=k, value=v)
        if len(self.out) > 1:
            return self.sound(self.out[0](y[:, 0]) + self.out[1](y[:, 1]))
        return self.sound(self.out[0](y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 4)))


@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_attention_by_keyword_and_with_an_output_for_each_head(projections, given):
    model, x = Heads(projections).double(), torch.randn(2, 5, 3, dtype=torch.float64)
    teleporter, before = Teleporter(model, inputs=x if given else None), model(x)
    kinds = [s.kind for s in teleporter.symmetries]
    assert "rescale" in kinds and ("attention" in kinds or projections == 2)
    teleporter.apply(teleporter.random_tangents())
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


def test_a_weight_whose_dtype_is_read_is_not_shared():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(F.relu(self.a(x.to(self.b.weight.dtype))))

    assert [s.name for s in Teleporter(Reads()).symmetries] == ["a -> b"]


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)


def squares(output):
    return output.float().square().sum()


@pytest.mark.parametrize("model", [mlp(), nn.MultiheadAttention(6, 2, batch_first=True)])
def test_the_default_device_is_of_no_concern(model):
    inputs = (torch.randn(5, 3, 6),) * 3 if isinstance(model, nn.MultiheadAttention) else torch.randn(5, 6)
    with torch.device("meta"):
        teleporter = Teleporter(model, inputs=inputs)
        teleporter.apply(teleporter.random_tangents(), inputs=inputs)
        teleporter.step(inputs, lambda out: squares(out[0] if isinstance(out, tuple) else out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_in_float32_and_reports_its_rounding(dtype):
    model, x = mlp(dtype), torch.randn(5, 6, dtype=dtype)
    wide = copy.deepcopy(model).double()
    teleporter, before = Teleporter(model), model(x)
    assert f"weights in {dtype} round at every move" in repr(teleporter)
    T = [torch.linspace(-1, 1, 8, dtype=torch.float64)]
    teleporter.apply(T, inputs=x)
    for p, q in zip((model[0].weight, model[2].weight), (T[0].exp()[:, None], (-T[0]).exp())):
        exact = q * (wide[0] if p is model[0].weight else wide[2]).weight
        torch.testing.assert_close(p.detach(), exact.detach().float().to(dtype), rtol=0, atol=0)
    assert (model(x) - before).norm() < 8 * torch.finfo(dtype).eps * before.norm()
    moved = teleporter.step(x, squares)
    assert moved.objective_after > moved.objective_before and moved.drift.abs() < 1e-3 * moved.loss_before


def test_autocast_does_not_hide_a_move():
    model, x = mlp(), torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teleporter, before = Teleporter(model, inputs=x), model(x)
        moved = teleporter.step(x, squares)
        assert moved.objective_after > 1.05 * moved.objective_before and torch.equal(model(x), before)
        with torch.no_grad():
            model[0].weight.mul_(3.0)  # a model that was not moved along a symmetry is seen to have changed
        s = teleporter.symmetries[0]
        teleporter.symmetries = [s._replace(slots=s.slots[:-1])]
        with pytest.raises(RuntimeError, match="was undone"):
            teleporter.apply([torch.ones(8, dtype=torch.float64)], inputs=x)
        attention = nn.MultiheadAttention(6, 2, batch_first=True)
        inputs = (x[None],) * 3
        Teleporter(attention, inputs=inputs).step(inputs, lambda out: squares(out[0]))
    assert all(p.dtype == torch.float32 for p in attention.parameters())


def test_reentrant_checkpointing_is_refused_and_the_other_kind_works():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.body, self.head, self.reentrant = mlp(), nn.Linear(4, 2), reentrant

        def forward(self, x):
            return self.head(F.relu(checkpoint(self.body, x, use_reentrant=self.reentrant)))

    x, loss_fn = torch.randn(5, 6, requires_grad=True), squares
    with pytest.raises(ValueError, match="use_reentrant=False"):
        Teleporter(Checkpointed(True)).step(x, loss_fn)
    moved = Teleporter(Checkpointed(False)).step(x, loss_fn)
    assert moved.objective_after > moved.objective_before


def test_a_teleporter_is_pickled_and_copied_with_its_model():
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    teleporter = Teleporter(model, optimizer=torch.optim.Adam(model.parameters()))
    teleporter.apply([torch.full((8,), 2.0, dtype=torch.float64).log()])
    for other in (copy.deepcopy(teleporter), pickle.loads(pickle.dumps(teleporter))):
        assert other.model is not model and other.parameters["0.weight"] is other.model[0].weight
        other.undo()
        assert all(torch.equal(p, start[name]) for name, p in other.model.named_parameters())
    assert not torch.equal(model[0].weight, start["0.weight"])


def test_models_over_several_processes_are_refused_before_anything_moves():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel, whose processes would move differently"):
            Teleporter(nn.parallel.DistributedDataParallel(mlp()))
        model = mlp()
        teleporter = Teleporter(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match="is not what it was"):
            teleporter.apply(teleporter.random_tangents())
        with pytest.raises(ValueError, match="is sharded"):
            Teleporter(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Linear(2, 3), nn.ReLU(), mlp(torch.complex64)])
def test_models_without_a_symmetry_say_so(model):
    with pytest.raises(ValueError, match="no symmetry found"):
        Teleporter(model)
