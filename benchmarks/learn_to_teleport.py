"""Where the time of meta-training goes (Figure 6): one run, milliseconds per step of the optimizee.

    python benchmarks/learn_to_teleport.py

Each kind of stack trains at the paper's sizes. "In the graph" is the same training with the meta-optimizers'
weights as leaves of the autograd graph, which is how one would write it first: their gradients are then summed step by
step. The last lines compare the lean action with the library's, forward and backward. Measured on 2 shared cores:

  LSTM(update, teleport)  2.1 ms a step (0.5 update, 0.6 teleport, 0.7 meta-gradient, 0.3 Adam), in the graph 3.7
  LSTM(update)            0.8 ms a step, in the graph 1.4; the same with one thread as with two
  25 of the lr kind       1.7 ms a step for all of them, 0.7 for one alone
  action                  0.3 ms lean, 0.5 by teleport.py (checks, and a factorization of X, at each step)

The update kind reads 9 MB of weights a step (18 MB with the teleporter) and 5 MB (10 MB) of them again backward, in
matrix-vector products, since the recipe trains on one problem at a time: that is about half of its time.
"""

import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "learn-to-teleport"))

import torch  # noqa: E402
from meta_optimizer import Core, Learner, MetaOptimizer, Unroll, act, meta_train, regression  # noqa: E402

from common.claims import table  # noqa: E402
from common.run import device_name  # noqa: E402
from teleport import apply_to_layers, leaky_relu, postactivation_action  # noqa: E402

TELEPORT, LR = Learner("teleport", "rate", "learned"), Learner("lr", "rate", None)
STACKS = {  # arms, meta-seeds, hidden units, steps and runs of the paper's meta-training
    "LSTM(lr, teleport)": ([TELEPORT], 1, 20, 300, 30),
    "25 of the lr kind": ([TELEPORT] * 3 + [Learner("random", "rate", "random"), LR], 5, 20, 300, 30),
    "LSTM(update, teleport)": ([TELEPORT._replace(local="update")], 1, 300, 100, 700),
    "LSTM(update)": ([LR._replace(local="update")], 1, 300, 100, 600),
}


def measure(arms, count, hidden, steps, seconds=3.0):
    """Seconds of one run of meta-training, the fastest of as many as fit after one to warm up, and of its stages."""
    meta = MetaOptimizer(arms, range(count), width=20, layers=2, hidden=hidden, norm=0.01)
    adam, spent, best = meta.adam(1e-4, 1e-3), {}, None
    stages = [(Unroll, "local_update"), (Unroll, "teleport"), (Unroll, "meta_gradient"), (adam, "step")]
    with mock.patch.multiple(Unroll, **{name: clocked(Unroll, name, spent) for owner, name in stages[:3]}):
        adam.step = clocked(adam, "step", spent)
        end = None
        while best is None or time.perf_counter() < end:
            spent.clear()
            _, run = meta_train(
                meta, adam, lambda n: regression(20, 2, [n * n * 12345 - 1]), runs=1, steps=steps, unroll=10
            )
            if end is None:  # the first run warms up
                end = time.perf_counter() + seconds
            elif best is None or run < best[0]:
                best = run, dict(spent)
    return best


def clocked(owner, name, spent):
    function = getattr(owner, name)

    def call(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        spent[name] = spent.get(name, 0) + time.perf_counter() - start
        return result

    return call


def in_the_graph():
    """Patches that put the weights into the graph: a plain affine map, and one backward pass that sums .grad."""

    def affine(self, bias, **inputs):
        z = getattr(self, bias)
        for weight, x in inputs.items():
            z = torch.baddbmm(z, x, getattr(self, weight).mT)
        return z

    def meta_gradient(self):
        self.meta.zero_grad()
        torch.autograd.backward(*zip(*[(W, G) for W, G in zip(self.visited, self.gradients) if W.requires_grad]))

    return mock.patch.object(Core, "_affine", affine), mock.patch.object(Unroll, "meta_gradient", meta_gradient)


def action(lean, E):
    """Seconds of one action on E members and its derivative."""
    torch.manual_seed(0)
    W, X, T = torch.rand(E, 1, 2, 20, 20), torch.rand(1, 20, 20), 1e-3 * torch.randn(E, 1, 1, 20, 20)
    W.requires_grad_(), T.requires_grad_()
    inverse, exact, eye = torch.linalg.inv(X), torch.zeros(E, dtype=torch.bool), torch.eye(20)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        if lean:
            moved = act(W, X, inverse, T, exact)
        else:
            moved = torch.stack(
                apply_to_layers(W.unbind(-3), X, (eye + T).unbind(-3), postactivation_action, leaky_relu()), -3
            )
        torch.autograd.grad(moved, (W, T), torch.ones_like(moved))
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    rows = []
    for name, (arms, count, hidden, steps, runs) in STACKS.items():
        run, spent = measure(arms, count, hidden, steps)
        graph, core = in_the_graph()
        with graph, core:
            plain, _ = measure(arms, count, hidden, steps)
        stages = [f"{1e3 * spent[k] / steps:.2f}" for k in ("local_update", "teleport", "meta_gradient", "step")]
        rows.append([name, f"{1e3 * run / steps:.2f}", *stages, f"{1e3 * plain / steps:.2f}", f"{run * runs:.0f} s"])
    header = [
        "ms per step",
        "all",
        "update",
        "teleport",
        "meta-gradient",
        "Adam",
        "weights in the graph",
        "meta-training",
    ]
    print(f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads\n\n" + table(header, rows))
    rows = [[f"{E} members", f"{1e3 * action(True, E):.2f}", f"{1e3 * action(False, E):.2f}"] for E in (1, 25)]
    print("\n" + table(["action, forward and backward, ms", "meta_optimizer.act", "teleport.py"], rows))


if __name__ == "__main__":
    main()
