"""How fast, and how far from this machine's floor: one command, one run, times and ratios.

    python benchmarks/benchmark.py

The floor of a stacked step is what its bytes and floating-point operations cost in bare tensor calls, measured in the
same run: the three matrix products that meet the input, and, for Adam, one pass over the weights per buffer it moves.
"× faster": a member's step against one network's own, with nn.Module, autograd and torch.optim.
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from common import published  # noqa: E402
from common.claims import table  # noqa: E402
from common.mlp import StackedMLP, cross_entropy, initial_weights, published_seeds  # noqa: E402
from common.run import device_name  # noqa: E402
from teleport import (  # noqa: E402
    forward,
    leaky_relu,
    postactivation_action,
    preactivation_action,
    rescaling_action,
    squared_gradient_norm,
    teleport,
)

DIMS, BATCH, SAMPLES = (784, 16, 10, 10), 20, 200
ACTIVATION = leaky_relu(0.1)


def best(function, seconds=0.5):
    """The fastest of as many calls as fit, after two to warm up: what the code costs when nothing else runs."""
    function(), function()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_rate(n=1024):
    a, b = torch.rand(2, n, n)
    return 2 * n**3 / best(lambda: a @ b) / 1e9


def floor(members, optimizer):
    """Seconds of the bare tensor calls that no stacked step can avoid."""
    W, x = torch.rand(members * DIMS[1], DIMS[0]), torch.rand(BATCH, DIMS[0])
    delta = torch.rand(members * DIMS[1], BATCH)
    products = best(lambda: torch.mm(W, x.T)) + best(lambda: W.addmm_(delta, x))
    if optimizer == "SGD":
        return products
    m, v, G = torch.zeros(3, *W.shape)
    return products + best(lambda: m.mul_(0.9)) + best(lambda: v.addcmul_(G, G)) + best(lambda: W.addcdiv_(m, v))


def one_network(optimizer, x, y):
    """Seconds of the same step for one network, the usual way: nn.Module, autograd, torch.optim."""
    layers = [layer for i, o in zip(DIMS, DIMS[1:]) for layer in (nn.Linear(i, o, bias=False), nn.LeakyReLU(0.1))]
    net = nn.Sequential(*layers[:-1])
    update = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[optimizer](net.parameters(), 1e-3)

    def step():
        update.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        update.step()

    return best(step)


def training(rate):
    rows = []
    for optimizer in ("SGD", "Adam"):
        alone = one_network(optimizer, torch.rand(BATCH, DIMS[0]), torch.randint(10, (BATCH,)))
        rows.append([f"{optimizer}, one nn.Module", f"{alone * 1e3:.3f}", f"{alone * 1e6:.1f}", "1", "", ""])
        for members in (5, 20, 100, 600):
            net = StackedMLP(initial_weights(DIMS, published_seeds(members)), optimizer, 1e-3)
            x, y = torch.rand(BATCH, DIMS[0]), torch.randint(10, (BATCH,))
            step, bound = best(lambda: net.step(x, y)), floor(members, optimizer)  # noqa: B023
            multiply_adds = sum(i * o for i, o in zip(DIMS, DIMS[1:])) * 3 - DIMS[0] * DIMS[1]
            share = 2 * multiply_adds * BATCH * members / step / 1e9 / rate
            rows.append(
                [f"{optimizer}, {members} members", f"{step * 1e3:.3f}", f"{step / members * 1e6:.1f}"]
                + [f"{alone / step * members:.0f}", f"{step / bound:.1f}", f"{share:.0%}"]
            )
    return table(["stacked training step, batch 20", "ms", "µs/member", "× faster", "× floor", "of GEMM rate"], rows)


def teleporting():
    W = initial_weights(DIMS, published_seeds(5))
    X, y = torch.rand(DIMS[0], SAMPLES), torch.randint(10, (SAMPLES,))

    def loss_fn(weights):
        return cross_entropy(forward(weights, X, ACTIVATION), y)

    def gradient():
        torch.func.grad(lambda w: loss_fn(w).sum())(W)

    unit, rows = best(gradient), []
    options = dict(objective=squared_gradient_norm, activation=ACTIVATION, lr=1e-3, steps=10)
    for action in (preactivation_action, postactivation_action, rescaling_action):
        call = best(lambda: teleport(W, X, loss_fn, action=action, **options))  # noqa: B023
        rows.append([f"teleport, 10 steps, {action.__name__}", f"{call * 1e3:.1f}", f"{call / 10 / unit:.1f} a step"])
    call = best(lambda: published.teleport_gradient_norm(W, X, loss_fn, activation=ACTIVATION, lr=1e-3, steps=10))
    rows.append(["teleport, 10 steps, as published", f"{call * 1e3:.1f}", f"{call / 10 / unit:.1f} a step"])
    g, s = torch.eye(16) + 0.1 * torch.rand(5, 16, 16), torch.rand(5, 16) + 0.5
    for action, arguments in (
        (preactivation_action, (X, g)),
        (postactivation_action, (X, g)),
        (rescaling_action, (s,)),
    ):
        call = best(partial(action, W[1], W[0], *arguments, ACTIVATION))
        rows.append([f"one {action.__name__}", f"{call * 1e3:.3f}", f"{call / unit:.2f}"])
    title = f"5 members, {SAMPLES} samples (one gradient: {unit * 1e3:.2f} ms)"
    return table([title, "ms", "× one gradient"], rows)


def main():
    rate = gemm_rate()
    print(f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"fp32 matrix product, 1024³: {rate:.0f} GFLOP/s\n")
    print(training(rate), end="\n\n")
    print(teleporting())


if __name__ == "__main__":
    main()
