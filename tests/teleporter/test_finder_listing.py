"""listing.py: a deep model prints few lines, and all of it is in the table."""

import torch
from torch import nn

from teleporter import Teleporter


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h)[0]
        return x + self.mlp(x)


def test_a_deep_model_prints_a_line_a_symmetry_and_few_for_the_rest():
    model = nn.Sequential(nn.Linear(3, 8), *(Block() for _ in range(12)), nn.Linear(8, 2))
    teleporter = Teleporter(model, inputs=torch.randn(2, 4, 3))
    text = repr(teleporter).splitlines()
    assert len(teleporter.symmetries) == 12 * 4 and len(text) <= 12 * 4 + 8
    assert "output of *.mlp.*: gelu in *.mlp.* is not homogeneous (12 times)" in repr(teleporter)
    assert "attention   1.attention -> 1.attention.out_proj 2×4×4 = 32" in repr(teleporter)
    dimension = 12 * (2 * 8 + 2 * 32)
    assert f"{len(teleporter.symmetries)} symmetries, {dimension} dimensions" in repr(teleporter)
    table = teleporter.table()
    assert sum(row["dimension"] for row in table) == dimension
    assert {row["name"]: row["reason"] for row in table if row["reason"]} == teleporter.left_alone
    assert [row["shape"] for row in table if not row["reason"]] == [tuple(s.shape) for s in teleporter.symmetries]


def test_long_lines_are_cut():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(60)]

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList(layers), nn.Linear(4, 1)

        def forward(self, x):
            x = self.layers[0](x)
            for layer in self.layers[1:]:
                x = x + layer(x)
            return self.head(x)

    teleporter = Teleporter(Stream(), inputs=torch.randn(2, 4))
    assert max(map(len, repr(teleporter).splitlines())) <= 125 and len(teleporter.table()[0]["name"]) > 500
