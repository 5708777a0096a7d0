"""What the factors adapt: networks pretrained on one task, LoRA added to every layer, trained on another; stacked.

A stack trains S seeds × K settings of the optimizer, members ordered (S, K): the settings of one seed share its initial
factors and its mini-batches, which differ from seed to seed.
"""

import time

import factors
import numpy as np
import torch
from torch.nn.functional import avg_pool2d, leaky_relu_, log_softmax

from common.mlp import StackedMLP, initial_weights
from common.run import to_array

SLOPE = 0.1
WINDOW = 20  # steps: mini-batch losses are averaged over windows before the logarithm


def small_images(x: torch.Tensor, quarter_turns: int = 0) -> torch.Tensor:
    """Rows of 784 pixels -> rows of 196: 2 × 2 means, turned by quarter_turns · 90°."""
    return torch.rot90(avg_pool2d(x.view(-1, 1, 28, 28), 2), quarter_turns, (2, 3)).reshape(len(x), -1)


def pretrained(dims: tuple, x: torch.Tensor, y: torch.Tensor, steps: int, seed: int = 0) -> list:
    """Weights of an MLP trained by Adam (1e-3, batch 64) on rows x."""
    net = StackedMLP(initial_weights(dims, [seed], x.device), "Adam", 1e-3, slope=SLOPE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        net.step(x[rows], y[rows])
    return [W[0] for W in net.weights]


def initial_pairs(shapes: list, rank: int, init: str, seeds: list, copies: int) -> list:
    """[(A, B)] of every layer (d_out, d_in): init "zero" (A uniform in ±1/√d_in, B = 0, as peft's) or "gaussian"
    (A normal with variance 1/d_in, B with 1/r). Stacked (S · copies, …), the copies of one seed alike."""
    members = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        for o, i in shapes:
            if init == "zero":
                members.append(((2 * torch.rand(rank, i, generator=g) - 1) / i**0.5, torch.zeros(o, rank)))
            else:
                A, B = torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g)
                members.append((A / i**0.5, B / rank**0.5))
    stacked = [[torch.stack(factor) for factor in zip(*members[k :: len(shapes)])] for k in range(len(shapes))]
    return [tuple(factor.repeat_interleave(copies, 0) for factor in pair) for pair in stacked]


class Images:
    """A leaky ReLU network with frozen weights [W (d_out, d_in), …] and scale · BA beside each, cross-entropy.

    x, y and x_test, y_test: rows of the new task.
    """

    def __init__(self, weights, x, y, x_test, y_test, scale=1.0):
        self.weights, self.scale = weights, scale
        self.x, self.y, self.x_test, self.y_test = x, y, x_test, y_test
        self.shapes, self.device = [tuple(W.shape) for W in weights], x.device

    def batches(self, seeds: list, size: int, steps: int):
        """Yield `steps` mini-batches: x (S, d_0, size), y (S, size), drawn with replacement."""
        generators = [torch.Generator().manual_seed(1_000_000 + seed) for seed in seeds]
        rows = torch.stack([torch.randint(len(self.x), (steps, size), generator=g) for g in generators], 1)
        for row in rows:
            yield self.x[row].mT, self.y[row]

    def gradients(self, pairs: list, batch: tuple) -> tuple:
        """Losses (E,) and gradients [(E, r, d_in + d_out), …] of the pairs [(A, Bᵀ), …], E = S · K."""
        x, y = batch
        hidden, inner, z = self._forward(pairs, x)
        log_p = log_softmax(z, 1)
        index = y.repeat_interleave(len(z) // len(y), 0).unsqueeze(1)
        loss = -log_p.gather(1, index).mean((1, 2))
        delta = log_p.exp_().scatter_add_(1, index, log_p.new_full((1,), -1.0).expand_as(index)).div_(y.shape[1])
        gradients = [None] * len(pairs)
        for m in reversed(range(len(pairs))):
            A, Bt = pairs[m]
            back = torch.bmm(Bt, delta).mul_(self.scale)
            h = hidden[m]
            dA = (
                torch.bmm(back.view(len(x), -1, back.shape[-1]), h.mT).view(len(back), -1, h.shape[1])
                if m == 0
                else (torch.bmm(back, h.mT))
            )
            gradients[m] = torch.cat([dA, torch.bmm(inner[m], delta.mT)], -1)
            if m:
                behind = torch.matmul(self.weights[m].T, delta).baddbmm_(A.mT, back)
                delta = torch.ops.aten.leaky_relu_backward(behind, h, SLOPE, True)
        return loss, gradients

    def _forward(self, pairs, x):
        """Layers' inputs [x (S, d_0, n), h_1 (E, d_1, n), …], inner spaces [scale · A h (E, r, n), …] and logits."""
        hidden, inner = [x], []
        for m, (W, (A, Bt)) in enumerate(zip(self.weights, pairs)):
            h = hidden[-1]
            if m == 0:  # the settings of one seed share x
                K = len(A) // len(x)
                P = torch.bmm(A.reshape(len(x), -1, A.shape[-1]), h).view(len(A), A.shape[1], -1)
                base = torch.matmul(W, h).repeat_interleave(K, 0)
            else:
                P, base = torch.bmm(A, h), torch.matmul(W, h)
            inner.append(P.mul_(self.scale))
            z = base.baddbmm_(Bt.mT, P)
            if m < len(pairs) - 1:
                hidden.append(leaky_relu_(z, SLOPE))
        return hidden, inner, z

    def held_out(self, pairs: list) -> torch.Tensor:
        """Loss on the held-out rows, (E,)."""
        total = 0
        for x, y in zip(self.x_test.split(200), self.y_test.split(200)):
            z = self._forward(pairs, x.T.unsqueeze(0))[2]
            total = total - log_softmax(z, 1).gather(1, y.expand(len(z), 1, -1)).sum((1, 2))
        return total / len(self.x_test)


# ---------------------------------------------------------------------------------------------------------------------
# Training and tuning: points (i, j) of a grid of rates × ratios

MANTISSAS = (1, 1.5, 2, 3, 5, 7)


def point(ij):
    """(rate, ratio) of the grid's point: geometric mean of the two factors' rates, and B's over A's."""
    i, j = (int(x) for x in ij)
    return MANTISSAS[i % 6] * 10.0 ** (i // 6 - 3), 2.0**j


def search(score, start, strides, limit=60):
    """The point of the grid that no neighbour beats, by steps of each stride in turn, and {point: score} of all tried.

    score(points) -> their scores. The point is None if `limit` scores did not suffice, or nothing was finite.
    """
    scores, centre = {}, start
    for di, dj in strides:
        while True:
            i, j = centre
            around = list(dict.fromkeys([(i, j), (i + di, j), (i - di, j), (i, j + dj), (i, j - dj)]))
            new = [p for p in around if p not in scores]
            scores.update(zip(new, score(new) if new else []))
            best = min(around, key=scores.get)
            if len(scores) > limit:
                return None, scores
            if scores[best] >= scores[centre]:
                break
            centre = best
    return (centre if np.isfinite(scores[centre]) else None), scores


def train(task, setting, arm, points, seeds, held_out=False):
    """All points (K) and seeds (S) of an arm as one stack, in a setting (both as rotation.py defines them).

    Returns train_loss (S, K, windows), memory, and held_out (S, K, 4), over the last quarter, if asked for.
    """
    steps, S, K = setting.steps, len(seeds), len(points)
    task.scale = arm.scale
    rate, ratio = torch.tensor([point(p) for p in points], dtype=torch.float32).repeat(S, 1).T.to(task.device)
    pairs = initial_pairs(task.shapes, setting.rank, setting.init, seeds, K)
    pairs = [tuple(factor.to(task.device) for factor in pair) for pair in pairs]
    options = dict(arm.options, betas=(0.9, setting.beta2), weight_decay=setting.weight_decay)
    optimizer = arm.kind(pairs, rate, ratio, **options)
    generator = torch.Generator().manual_seed(seeds[0])
    losses, held = [], []
    looks = [round(steps * x) for x in (0.75, 5 / 6, 11 / 12, 1)]
    early = setting.init == "gaussian" and arm.element in ("balance", "singular_basis")
    if early:
        teleport(optimizer, arm.element, generator)
    for t, batch in enumerate(task.batches(seeds, setting.batch, steps), 1):
        loss, gradients = task.gradients(optimizer.pairs(), batch)
        losses.append(loss)
        optimizer.step(gradients)
        if t == arm.at and not early or arm.every and t % arm.every == 0:
            teleport(optimizer, arm.element, generator)
        if held_out and t in looks:
            held.append(task.held_out(optimizer.pairs()))
    windows = torch.stack(losses, -1).view(S, K, -1, min(WINDOW, steps)).mean(-1)
    result = {"train_loss": to_array(windows), "memory": optimizer.memory()}
    return result | {"held_out": to_array(torch.stack(held, -1).view(S, K, -1))} if held_out else result


def teleport(optimizer, element, generator):
    if element == "reset":
        optimizer.reset()
    elif element == "random":
        optimizer.rotate(factors.random_rotations(optimizer, generator))
    elif element == "eigenbasis":
        optimizer.rotate(factors.eigenbasis(optimizer))
    else:
        optimizer.move(getattr(factors, element)(optimizer))


def tune_and_compare(task, setting, arm, tuning, fresh, plain):
    """Tune one arm in one setting, with the ratio free ("tuned"), before it at ratio 1 ("plain") if asked for; then
    run it at its best on the fresh seeds.

    Returns the grid's points tried and their scores; of each tuned thing its best point, whether that is interior, and
    what `train` returns; the CPU seconds of one run alone.
    """

    def score(points):
        loss = train(task, setting, arm, points, tuning)["train_loss"]
        return torch.from_numpy(loss).log().mean((-1, 0)).nan_to_num(torch.inf).tolist()

    best, scores = {}, {}
    if plain:
        best["plain"], scores = search(score, (6, 0), ((2, 0), (1, 0)))
    best["tuned"], more = search(score, best.get("plain") or (6, 3), ((2, 4), (1, 2), (1, 1)))
    scores |= more
    result = {"points": np.array(list(scores)), "scores": np.array(list(scores.values()))}
    for name in best:
        result[f"{name}_interior"] = best[name] is not None
        result[f"{name}_best"] = np.array(best[name] or min(scores, key=scores.get))
    curves = train(task, setting, arm, [tuple(result[f"{name}_best"]) for name in best], fresh, held_out=True)
    for k, name in enumerate(best):
        result |= {f"{name}_{key}": curves[key][:, k] for key in ("train_loss", "held_out")}
    start = time.process_time()
    train(task, setting, arm, [tuple(result["tuned_best"])], fresh[:1])
    return result | {"seconds_alone": time.process_time() - start, "memory": curves["memory"]}
