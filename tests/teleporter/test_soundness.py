"""What may never happen: a trace left by building, a function that moved without an error, weights without bounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from teleporter import Teleporter


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mlp(*dims):
    return nn.Sequential(*[m for a, b in zip(dims, dims[1:]) for m in (nn.Linear(a, b), nn.ReLU())][:-1])


def cross_entropy(y):
    return lambda output: F.cross_entropy(output, y)


class Remembers(nn.Module):
    """Fills an attribute, a list and a buffer in its forward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.seen, self.log = mlp(3, 4, 2), None, []
        self.register_buffer("mean", torch.ones(3))
        self.count = torch.zeros(1)

    def forward(self, x):
        self.seen = x
        self.log.append(x)
        self.mean.mul_(0.9)
        self.count += 1
        self.extra = x
        return self.body(x)


def test_building_leaves_no_trace():
    model, x = Remembers(), torch.randn(5, 3)
    state, rng, log = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model.log
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    Teleporter(model)
    assert model.seen is None and model.log is log and log == [] and model.count.item() == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert torch.equal(torch.get_rng_state(), rng) and isinstance(model(x), torch.Tensor)
