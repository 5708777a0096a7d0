"""What the teleports of Figure 4 cost: one step on the curvature, one on the sharpness. One run, times and memory.

    python benchmarks/sharpness_curvature.py

An ascent step on φ draws 9 × 100 directions, forms their products with 2000 samples (nearly all of the work: the floor
is that matrix product at this machine's rate), and moves; a further step on the same directions needs no products.
"""

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from common.claims import table  # noqa: E402
from common.mlp import cross_entropy, initial_weights  # noqa: E402
from common.run import device_name  # noqa: E402
from common.sharpness import Sharpness  # noqa: E402
from teleport import (  # noqa: E402
    _action_curve_forward_mode,
    curve_curvature,
    forward,
    leaky_relu,
    preactivation_action,
    teleport,
)

ACTIVATION, SAMPLES, COPIES = leaky_relu(0.1), 2000, 900


def best(function, repeats):
    """The fastest call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def curvature_row(dtype, members):
    generator = torch.Generator().manual_seed(0)
    shapes = ((members, 10, 10), (members, 10, 16), (16, SAMPLES), (10, 10))
    U, V, h, M = (torch.rand(shape, generator=generator, dtype=dtype) - 0.5 for shape in shapes)
    g = torch.linalg.matrix_exp(0.01 * M)
    action = best(lambda: preactivation_action(U, V, h, g, ACTIVATION), 50)
    closed = best(lambda: curve_curvature(U, V, h, M, ACTIVATION), 50)
    nested = best(lambda: _action_curve_forward_mode(U, V, h, M, ACTIVATION, g), 5)
    name = f"{str(dtype).removeprefix('torch.')}, {members} member{'s' * (members > 1)}"
    return [name, *(f"{1e3 * t:.2f}" for t in (action, closed, nested)), f"{closed / action:.1f}"]


def sharpness_row(dims):
    generator = torch.Generator().manual_seed(0)
    weights = tuple(W[0] for W in initial_weights(dims, [54321]))
    x = torch.rand(dims[0], SAMPLES, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    radii = (torch.arange(1, 10) / 10).repeat_interleave(COPIES // 9)
    P = sum(W.numel() for W in weights)

    def objective():
        return Sharpness(x, labels, torch.rand(COPIES, P, generator=generator), radii, dims, ACTIVATION)

    def step(phi):
        options = dict(objective=phi, action=preactivation_action, activation=ACTIVATION, lr=5e-2)
        teleport(weights, x, lambda w: cross_entropy(forward(w, x, ACTIVATION), labels), steps=1, **options)

    phi = objective()
    D = torch.rand(30 * dims[1], dims[0])
    floor = COPIES / 30 * best(lambda: D @ x, 30)
    times = best(lambda: step(objective()), 3), best(lambda: step(phi), 5), floor
    return ["-".join(map(str, dims)), *(f"{t:.2f}" for t in times)]


def main():
    a, b = torch.rand(2, 2048, 2048)
    rate = 2 * 2048**3 / best(lambda: a @ b, 10) / 1e9
    print(f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, {rate:.0f} GFLOP/s\n")
    header = [f"ms, 16-10-10, {SAMPLES} samples", "action", "curve_curvature", "nested forward mode", "/ action"]
    rows = [curvature_row(dtype, members) for dtype in (torch.float32, torch.float64) for members in (1, 5)]
    print(table(header, rows) + "\n")
    rows = [sharpness_row(dims) for dims in ((784, 16, 10, 10), (3072, 32, 10, 10))]
    print(table([f"s per step on φ, {COPIES} copies", "step", "same directions", "floor"], rows))
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, PyTorch included")


if __name__ == "__main__":
    main()
