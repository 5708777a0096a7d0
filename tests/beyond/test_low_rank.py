"""LowRankRotation on a model built as peft builds a LoRA: exact, with the optimizer's memory, loud where it is not."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teleporter import LowRankRotation, Teleporter


class LoraLinear(nn.Module):
    """peft's layer: a frozen base, and scaling · B A dropout(x), a dictionary entry for each adapter."""

    def __init__(self, base, rank=3, scaling=2.0, dropout=0.0):
        super().__init__()
        self.base_layer, self.scaling = base.requires_grad_(False), {"default": scaling}
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        inner = self.lora_A["default"](self.lora_dropout["default"](x))
        return self.base_layer(x) + self.lora_B["default"](inner) * self.scaling["default"]


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(LoraLinear(nn.Linear(6, 8)), nn.Tanh(), LoraLinear(nn.Linear(8, 5))).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 6, generator=generator).to(dtype), torch.randint(5, (40,), generator=generator)


def descend(net, optimizer, steps, after=lambda: None, dtype=torch.float64):
    x, y = data(dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        after()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rotation_moves_nothing_that_can_be_seen(name):
    """Outputs to 1e-12; back by the transpose, parameters, gradients and means of gradients are what they were; a
    signed permutation is not felt by any optimizer, the squares included."""
    net, (x, _) = model(), data()
    optimizer = OPTIMIZERS[name](trainable(net))
    rotation = LowRankRotation(net, optimizer)
    descend(net, optimizer, 5)
    before, output = copy.deepcopy((net.state_dict(), optimizer.state_dict())), net(x)
    Q = [torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] for _ in range(2)]
    rotation.apply(Q)
    assert (net[0].lora_A["default"].weight - before[0]["0.lora_A.default.weight"]).norm() > 0.1
    assert torch.allclose(net(x), output, rtol=1e-12, atol=1e-13)
    rotation.apply([q.T for q in Q])
    for key, value in net.state_dict().items():
        assert torch.allclose(value, before[0][key], rtol=1e-12, atol=1e-13)
    for i, state in optimizer.state_dict()["state"].items():
        for key in {"exp_avg", "momentum_buffer"} & set(state):
            assert torch.allclose(state[key], before[1]["state"][i][key], rtol=1e-10, atol=1e-14)
    runs = []
    for moved in (False, True):
        net = model()
        optimizer = OPTIMIZERS[name](trainable(net))
        rotation = LowRankRotation(net, optimizer)
        descend(net, optimizer, 5)
        if moved:
            permutation = torch.tensor([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]).double()
            rotation.apply([permutation, permutation.T])
        runs.append(descend(net, optimizer, 30))
    assert torch.allclose(*runs, rtol=1e-10)


def test_it_diagonalizes_the_covariance_and_changes_what_adam_does_but_not_momentum():
    for name, same in (("AdamW", False), ("momentum", True)):
        runs = []
        for rotates in (False, True):
            net = model()
            optimizer = OPTIMIZERS[name](trainable(net))
            rotation = LowRankRotation(net, optimizer, every=2)
            runs.append(descend(net, optimizer, 40, rotation.step if rotates else lambda: None))
        assert torch.allclose(*runs, rtol=1e-9) == same
        for C in rotation._covariances:
            assert torch.allclose(C, torch.diag(C.diagonal()), atol=1e-9 * C.max().item())


def test_the_run_is_the_twin_s():
    """After Q, AdamW is the untouched run with the update QᵀAdam(QG_A), Adam(G_BQᵀ)Q: to 1e-10 over 200 steps."""
    net, (x, y) = model(), data()
    optimizer = OPTIMIZERS["AdamW"](trainable(net))
    Q = [torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] for _ in range(2)]
    LowRankRotation(net, optimizer).apply(Q)
    losses = descend(net, optimizer, 200)
    twin, moments = model(), {}
    for t in range(1, 201):
        loss = F.cross_entropy(twin(x), y)
        twin.zero_grad()
        loss.backward()
        assert abs(loss.item() / losses[t - 1].item() - 1) < 1e-10
        with torch.no_grad():
            for layer, q in zip((twin[0], twin[2]), Q):
                for parameter, turn, back in (
                    (layer.lora_A["default"].weight, lambda g, q=q: q @ g, lambda u, q=q: q.T @ u),
                    (layer.lora_B["default"].weight, lambda g, q=q: g @ q.T, lambda u, q=q: u @ q),
                ):
                    g, (m, v) = turn(parameter.grad), moments.get(parameter, (0, 0))
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    moments[parameter] = m, v
                    update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                    parameter.mul_(1 - 0.01 * 0.01).sub_(0.01 * back(update))


def test_a_thousand_rotations_in_single_precision_do_not_drift():
    net, (x, _) = model(torch.float32), data(torch.float32)
    optimizer = OPTIMIZERS["AdamW"](trainable(net))
    rotation = LowRankRotation(net, optimizer)
    descend(net, optimizer, 5, dtype=torch.float32)
    output = net(x)
    for _ in range(1000):
        rotation.apply([torch.linalg.qr(torch.randn(3, 3))[0] for _ in range(2)])
    assert (net(x) - output).abs().max() < 1e-4 * output.abs().max()


def test_what_it_cannot_do_it_says():
    net = model()
    adam = OPTIMIZERS["AdamW"](trainable(net))
    with pytest.raises(ValueError, match="no low-rank pair"):
        LowRankRotation(nn.Linear(3, 3), adam)
    with pytest.raises(ValueError, match="does not hold.*0.lora_A.default"):
        LowRankRotation(net, OPTIMIZERS["AdamW"](trainable(net)[2:]))
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        LowRankRotation(net, adam, pairs=[("nowhere", "0.lora_B.default")])
    with pytest.raises(ValueError, match="too coarse"):
        LowRankRotation(model(torch.bfloat16), adam)
    for bad in ({"every": 0}, {"every": 1.5}, {"decay": 1.5}, {"decay": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LowRankRotation(net, adam, **bad)
    rotation = LowRankRotation(net, adam)
    assert rotation.names == ["0.default", "2.default"]
    with pytest.raises(ValueError, match="no gradient"):
        rotation.step()
    descend(net, adam, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="not an orthogonal"):
        rotation.apply([torch.eye(3).double(), torch.ones(3, 3).double()])
    net[2].lora_A["default"].weight.grad[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        rotation.step()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net[2].lora_A["default"] = nn.Linear(8, 3, bias=False).double()
    with pytest.raises(RuntimeError, match="2.default changed"):
        rotation.step()
    net = model()
    adamax = torch.optim.Adamax(trainable(net))
    descend(net, adamax, 1)
    with pytest.raises(ValueError, match="exp_inf"):
        LowRankRotation(net, adamax).step()


def test_frozen_shared_and_biased_factors_are_left_alone_with_the_reason():
    net = model()
    net[0].lora_A["default"].weight.requires_grad_(False)
    adam = OPTIMIZERS["AdamW"](trainable(net))
    rotation = LowRankRotation(net, adam)
    assert rotation.names == ["2.default"] and "frozen" in rotation.left_alone["0.default"]
    assert "frozen" in repr(rotation)
    net = nn.Sequential(LoraLinear(nn.Linear(6, 6)), LoraLinear(nn.Linear(6, 6)), LoraLinear(nn.Linear(6, 6)))
    net[1].lora_A["default"].weight = net[0].lora_A["default"].weight
    net[2].lora_A["default"] = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="shared.*bias"):
        LowRankRotation(net, OPTIMIZERS["AdamW"](net.parameters()))


def test_pairs_by_name():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 5)).double()
    adam = OPTIMIZERS["AdamW"](net.parameters())
    rotation, (x, _) = LowRankRotation(net, adam, pairs=[("0", "1")]), data()
    descend(net, adam, 3)
    output = net(x)
    rotation.step()
    assert torch.allclose(net(x), output, rtol=1e-12, atol=1e-13)


def test_the_teleporter_rotates_a_lora_and_refuses_what_has_no_meaning_for_it():
    """The same run as LowRankRotation's, bit for bit, and another than without."""
    runs = []
    for make in (LowRankRotation, teleporter_of, None):
        net = model()
        adam = OPTIMIZERS["AdamW"](trainable(net))
        runs.append(descend(net, adam, 30, make(net, adam).step if make else lambda: None))
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], rtol=1e-6)
    teleporter = teleporter_of(net, adam)
    assert "0.default: rank 3" in repr(teleporter) and teleporter.low_rank.names == ["0.default", "2.default"]
    x, y = data()
    for call in (
        lambda: teleporter.step(x, lambda output: F.cross_entropy(output, y)),
        lambda: teleporter.apply([]),
        teleporter.random_tangents,
        teleporter.undo,
        lambda: Teleporter(net, "low_rank", optimizer=adam),
        lambda: Teleporter(net, objective="gradient_eigenbasis", optimizer=adam),
        lambda: Teleporter(net, ["low_rank", "rescale"], "gradient_eigenbasis", optimizer=adam),
        lambda: Teleporter(net, "low_rank", "gradient_eigenbasis", bound=3.0, optimizer=adam),
        lambda: Teleporter(net, "low_rank", "gradient_eigenbasis"),
        lambda: Teleporter(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))).step(),
    ):
        with pytest.raises(ValueError, match="low_rank|rotation|optimizer must be given|needs inputs"):
            call()


def teleporter_of(net, adam):
    return Teleporter(net, symmetries="low_rank", objective="gradient_eigenbasis", optimizer=adam)


def test_a_pair_with_something_in_between_is_found_out_by_inputs_even_where_b_is_zero():
    net, (x, _) = model(), data()
    nn.init.zeros_(net[0].lora_B["default"].weight)
    net[0].forward = lambda x, layer=net[0]: (
        layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x).relu())
    )
    before = copy.deepcopy(net.state_dict())
    adam = OPTIMIZERS["AdamW"](trainable(net))
    rotation = LowRankRotation(net, adam, inputs=x)
    assert rotation.names == ["2.default"] and "changed the output" in rotation.left_alone["0.default"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net[2].lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks see"):
        LowRankRotation(net, adam, inputs=x)


def test_averaged_copies_rotate_too_and_several_optimizers_are_one():
    net, (x, _) = model(), data()
    factors = trainable(net)
    optimizers = [OPTIMIZERS["AdamW"](factors[:2]), OPTIMIZERS["momentum"](factors[2:])]
    average = torch.optim.swa_utils.AveragedModel(net)
    rotation = LowRankRotation(net, optimizers, averaged=average)
    for _ in range(3):
        F.cross_entropy(net(x), data()[1]).backward()
        [o.step() for o in optimizers]
    output, moments = average(x), optimizers[1].state[factors[2]]["momentum_buffer"].clone()
    before = average.module[0].lora_A["default"].weight.clone()
    rotation.step()
    assert torch.allclose(average(x), output, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(average.module[0].lora_A["default"].weight, before)
    assert not torch.allclose(optimizers[1].state[factors[2]]["momentum_buffer"], moments)
    with pytest.raises(ValueError, match="averaged"):
        LowRankRotation(net, optimizers, averaged=nn.Linear(2, 2))


def test_an_optimizer_that_keeps_what_does_not_rotate_moves_nothing():
    for kind in (torch.optim.Adafactor, torch.optim.Adadelta, torch.optim.Rprop):
        net = model()
        optimizer = kind(trainable(net))
        descend(net, optimizer, 2)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="rotates is not known"):
            LowRankRotation(net, optimizer).step()
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_example_runs_and_its_rotations_keep_the_loss():
    command = [sys.executable, "examples/lora.py", "--seeds", "2", "--steps", "20"]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith(("Adam", "LoRA+"))]
    assert len(rows) == 4 and sum("%" in row for row in rows) == 2
    for row in rows:
        assert float(row[58:68]) < 1e-5, row
