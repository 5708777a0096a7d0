"""What a teleport costs, in forward-backward passes of the same model on the same batch: one run, times and ratios.

    python benchmarks/teleporter.py

Gradient norm: `Teleporter.step` as it comes, moving known gradients along the orbit. Any objective: the same norm as a
function of (loss, parameters), through a Hessian-vector product. Level set: one of ten steps. Checks: what comparing
the model and its outputs with what they were, keeping a way back and minding the bounds add to a step by gradient norm
after the first.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from teleporter import Teleporter, level_set_teleport  # noqa: E402
from teleporter.passes import kept_buffers  # noqa: E402

LIMITS = {"gradient norm": "≤ 4", "any objective": "no limit", "level set": "≤ 6"}  # in passes


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def models():
    """Name, model, input: each a few milliseconds to a few tens of milliseconds a pass on two cores."""
    mlp = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    transformer = nn.Sequential(
        nn.Linear(28, 64), Block(64, 4), Block(64, 4), nn.LayerNorm(64), nn.Flatten(), nn.Linear(28 * 64, 10)
    )
    yield "MLP", mlp, torch.randn(256, 784)
    yield "CNN", cnn, torch.randn(128, 1, 28, 28)
    yield "transformer", transformer, torch.randn(64, 28, 28)


def norm(loss, parameters):
    G = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    return sum(g.square().sum() for g in G)


def costs(model, x):
    """Milliseconds of one pass, and of each kind of teleport. The calls alternate: a busy machine slows all alike."""
    y = torch.randint(10, (len(x),))

    def loss_of(output):
        return F.cross_entropy(output, y)

    by_transport, by_hessian = Teleporter(model), Teleporter(model, objective=norm)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def bare():
        """A step without its checks."""
        with kept_buffers(model):
            tangents = by_transport._evaluate(x, loss_of, derivative=True)[2]
            by_transport._move(tangents)
            by_transport._transport(by_transport.symmetries, tangents)  # gradients that wait
            by_transport._evaluate(x, loss_of)

    by_transport.step(x, loss_of)  # the first one searches and tries
    calls = {
        "pass": lambda: loss_of(model(x)).backward(),
        "gradient norm": lambda: by_transport.step(x, loss_of),
        "bare": bare,
        "any objective": lambda: by_hessian.step(x, loss_of),
        "level set": lambda: level_set_teleport(model, lambda m: loss_of(m(x)), 10),
    }
    times = {name: [] for name in calls}
    for _ in range(9):
        for name, call in calls.items():
            model.load_state_dict(start)
            model.zero_grad()
            repeats = 5 if name == "pass" else 1
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append(1e3 * (time.perf_counter() - begin) / repeats)
    times = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    checks = times["gradient norm"] / times["bare"] - 1
    return times | {"level set": times["level set"] / 10, "checks": checks}


def main():
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of 9\n")
    print(
        f"{'':12}{'pass ms':>9}"
        + "".join(f"{f'{name} ({limit})':>25}" for name, limit in LIMITS.items())
        + f"{'checks (≤ 10 %)':>18}"
    )
    for name, model, x in models():
        ms = costs(model, x)
        ratios = "".join(f"{ms[kind] / ms['pass']:25.2f}" for kind in LIMITS)
        print(f"{name:12}{ms['pass']:9.1f}{ratios}{100 * ms['checks']:16.1f} %")


if __name__ == "__main__":
    main()
