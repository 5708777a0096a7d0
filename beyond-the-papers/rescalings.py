"""What objectives.py trains: initializations, one rescaling towards an objective, runs whose rates differ by layer.

Weights are those of common/mlp.py: W_m (*E, d_m, d_{m-1}) without biases, leaky ReLU. A rescaling is log s of every
hidden layer, (*E, d_m): incoming rows times s, outgoing columns divided by it, exact for every input.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.arms import draw_batches
from common.losses import batch_loss, cross_entropy
from common.mlp import StackedMLP, initial_weights
from common.protocol import number
from common.run import to_array
from common.tuning import Tuned, tune
from teleport import forward, leaky_relu, squared_gradient_norm
from teleporter.objectives import (
    adam,
    balance,
    descent,
    line_search_decrease,
    look_ahead,
    rescale,
    rescaled,
    sign,
    true_decrease,
)

ACTIVATION = leaky_relu(0.1)
LAYER, UNIT = 16.0, 4.0  # factors of the badly scaled initializations
BOUND, FAR = 2.0, 10.0  # within which the scales of an ascent without a maximum stay; of the look-ahead
STEPS = [2.0**k for k in range(-12, 5)]  # along which the true decrease looks for its best
BALANCED = "balance"  # the one that has a closed form
DIVERGED = 1e30  # the loss of a look-ahead that left the numbers: any other is better
CHUNK = 20  # members trained at once
OBJECTIVES = ("gradient_norm", "line_search_decrease", "true_decrease", "look_ahead", BALANCED)
NETWORKS = {"784-16-10-10": (16, 10), "784-32-32-32-32-10": (32, 32, 32, 32)}
RATES = {"SGD": 0.08, "momentum": 0.008, "Adam": 0.002}  # × 1 of the grid
RUNGS = 16  # of the grid on either side of × 1, after which the tuning gives up
STRIDES = (4, 2, 1)  # of the search for per-layer rates, in powers of 2
ARMS = ("baseline", *OBJECTIVES, "random", "per_layer")
RULES = {"SGD": descent, "momentum": partial(descent, momentum=0.9), "Adam": adam}


def start(init: str, dims: Sequence[int], seeds: Sequence[int]) -> list[Tensor]:
    """Initial weights (S, d_m, d_{m-1}): published; He (uniform, of variance 2/d_{m-1}); layer, units: He's function in
    bad scales, the first hidden layer × LAYER, every hidden unit × UNIT or ÷ UNIT by a coin."""
    W = list(initial_weights(dims, seeds))
    if init != "published":
        W = [6**0.5 * V for V in W]
    t = [torch.zeros_like(V[..., 0]) for V in W[:-1]]
    if init == "layer":
        t[0] += math.log(LAYER)
    if init == "units":
        for e, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed + 1)  # not that of the weights
            for layer in t:
                coins = torch.randint(2, layer.shape[1:], generator=generator)
                layer[e] = math.log(UNIT) * (2 * coins - 1)
    return rescaled(W, t)


def towards(objective: str, W: Sequence[Tensor], data: Any, seeds: Sequence[int], s: Any, rates: Any, optimizer: str):
    """log s, (*E, d_m) of every hidden layer, that an objective asks for at W (S, …), on batches that each run draws.

    rates: (F,) learning rates, which the look-ahead takes its steps with: *E = F, S; for the others S.
    """
    if objective == BALANCED:
        return balance([V.double() for V in W])
    generators = [torch.Generator().manual_seed(seed + 2) for seed in seeds]
    if objective == "random":  # as large as that of the best step's decrease
        size = [t.square().sum(-1) for t in towards("line_search_decrease", W, data, seeds, s, rates, optimizer)]
        T = [torch.stack([torch.randn(V.shape[1], generator=g) for g in generators]).to(V) for V in W[:-1]]
        ratio = (sum(size) / sum(t.square().sum(-1) for t in T)).sqrt()
        return [t * ratio[:, None] for t in T]
    X, labels = draw_batches(data.x, data.y, s.teleport_batch, generators)
    loss_fn, direction = batch_loss(X, labels, ACTIVATION), sign if optimizer == "Adam" else None
    aims = {
        "gradient_norm": squared_gradient_norm,
        "line_search_decrease": partial(
            line_search_decrease,
            output_fn=lambda V: forward(V, X, ACTIVATION),
            criterion=lambda out: cross_entropy(out, labels),
            direction=direction,
        ),
        "true_decrease": partial(true_decrease, direction=direction, steps=STEPS),
    }
    options = dict(bound=FAR if objective == "look_ahead" else BOUND, steps=s.ascent_steps)
    if objective == "line_search_decrease":
        return rescale(W, aims[objective], **options)[0]
    if objective == "look_ahead":
        lr = torch.as_tensor(rates).to(W[0])[:, None].expand(-1, len(seeds))
        W = [V.expand(len(lr), *V.shape) for V in W]
        losses = [batch_loss(*draw_batches(data.x, data.y, s.batch, generators), ACTIVATION) for _ in range(s.ahead)]
        ahead = partial(look_ahead, losses=losses, held_out=loss_fn, rule=RULES[optimizer](lr))
        return rescale(W, lambda V: ahead(V).nan_to_num(-DIVERGED, DIVERGED, -DIVERGED), **options)[0]
    return rescale(W, aims[objective], loss_fn, **options)[0]


class Rated(StackedMLP):
    """A stack whose step on W_m counts `factors[m]` times: (E, 1, 1), (E, d_m, 1), …, or None for once.

    Of Adam's the ε is left as it is.
    """

    def __init__(self, *arguments: Any, factors: Sequence[Tensor | None], **options: Any) -> None:
        """As StackedMLP, and the factors."""
        super().__init__(*arguments, **options)
        self.factors = list(factors)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; what the optimizer changed is then multiplied."""
        rated = [(W, W.clone(), f) for W, f in zip(self.weights, self.factors) if f is not None]
        loss = super().step(x, y)
        for W, before, f in rated:
            W.sub_(before).mul_(f).add_(before)
        return loss


def loss(W: Sequence[Tensor], data: Any) -> Tensor:
    """On the test set, (E,)."""
    return StackedMLP(W).evaluate(data.x_test, data.y_test)[0]


def costs(dims: Sequence[int], data: Any, s: Any) -> dict[str, float]:
    """What each teleport takes, in gradients of a mini-batch, by the multiplications that torch counts."""
    W = [V.to(data.x) for V in start("He", dims, [0])]

    def count(function: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def gradient() -> None:
        V = [U[0].requires_grad_() for U in W]
        torch.autograd.grad(batch_loss(data.x[: s.batch].T, data.y[: s.batch], ACTIVATION)(V), V)

    return {o: count(lambda o=o: towards(o, W, data, [0], s, [0.1], "SGD")) / count(gradient) for o in OBJECTIVES}


def unit_factors(T: Sequence[Tensor]) -> list[Tensor]:
    """The rates of every weight (E, d_m, d_{m-1}) by which SGD and momentum are the run after a teleport by T, pulled
    back: 1/s² on incoming rows, s² on outgoing columns."""
    rows = [*(-2 * t for t in T), None]
    columns = [None, *(2 * t for t in T)]
    into = [r.exp()[..., None] if r is not None else 1 for r in rows]
    return [into[m] * (1 if c is None else c.exp()[..., None, :]) for m, c in enumerate(columns)]


def trained(
    W: Sequence[Tensor],
    rates: Tensor,
    optimizer: str,
    data: Any,
    s: Any,
    factors: Sequence[Tensor | None] | None = None,
    test: bool = False,
) -> dict[str, Tensor]:
    """Train the members W (E, …) at their rates (E,): train, the mean batch loss of every epoch, (E, epochs), and test,
    the loss on the test set after the last, (E,). factors: of every layer, as in Rated. In chunks that fit a cache."""
    found, factors = [], factors or [None] * len(W)
    for part in torch.arange(len(rates)).split(CHUNK):
        own = [f if f is None else f[part] for f in factors]
        net = Rated([V[part] for V in W], optimizer, rates[part], factors=own)
        losses = [net.train_epoch(data.x, data.y, s.batch) for _ in range(s.epochs)]
        found.append({"train": torch.stack(losses, -1)} | ({"test": loss(net.weights, data)} if test else {}))
    return {key: torch.cat([part[key] for part in found]) for key in found[0]}


def layer_rates(score: Callable, layers: int, strides: Sequence[int]) -> tuple[list[int], int]:
    """Powers of 2 by which the rate of every layer differs from the start's, found by a pattern search, and the number
    of points tried. score(points) -> the mean of each, smaller is better, NaN never is.

    For each stride: every layer up and down by itself; then all the layers that were better, each its better way, at
    once. The best of all these is the next start.
    """
    here, tried = (0,) * layers, {}

    def best(points: list[tuple]) -> tuple:
        new = [p for p in dict.fromkeys(points) if p not in tried]
        tried.update(zip(new, score(new) if new else ()))
        return min(points, key=lambda p: tried[p] if tried[p] == tried[p] else math.inf)

    for stride in strides:
        poll = [
            tuple(x + way * (i == m) for i, x in enumerate(here)) for m in range(layers) for way in (-stride, stride)
        ]
        best([here, *poll])
        ways = [best([here, *poll[2 * m : 2 * m + 2]])[m] for m in range(layers)]
        here = best([here, *poll, tuple(ways)])
    return list(here), len(tried)


# ---------------------------------------------------------------------------------------------------------------------
# Runs of an arm, and its best rate


def members(cell, arm, factors, seeds, data, s, layers=None, test=False):
    """Train an arm of a cell at all factors (F,) of its rate and seeds (S): train (F, S, epochs); if asked for, test
    (F, S), and the loss on the test set before and after the teleport, drift (F, S, 2). layers: rates over the first
    layer's, (F, L) or (L,)."""
    network, init, optimizer = cell
    rates = torch.as_tensor(RATES[optimizer] * np.asarray(factors)).to(data.x)
    W = V = [U.to(data.x) for U in start(init, (data.features, *NETWORKS[network], 10), seeds)]
    if arm in (*OBJECTIVES, "random"):
        T = towards(arm, W, data, seeds, s, rates, optimizer)
        V = [U.float() for U in rescaled([U.double() for U in W], T)]
    shape = len(rates), len(seeds)
    W, V = ([U.expand(*shape, *U.shape[-2:]).flatten(0, 1) for U in each] for each in (W, V))
    if layers is not None:
        ratios = torch.as_tensor(layers).to(data.x).expand(shape[0], len(W)).repeat_interleave(shape[1], 0)
        layers = [None, *ratios.T[1:, :, None, None]]
    found = trained(V, rates.repeat_interleave(shape[1]), optimizer, data, s, layers, test)
    if test:
        found["drift"] = torch.stack([loss(U, data) for U in (W, V)], -1)
    return {key: to_array(value.unflatten(0, shape)) for key, value in found.items()}


def tuned_arm(arm, cell, data, s, seeds, layers=None, anchor=1.0):
    """The arm's Tuned; its factors are multiples of anchor × the grid's."""

    def scores(_, factors):
        return number(members(cell, arm, anchor * factors[0], seeds, data, s, layers)["train"])[None]

    found = tune(scores, 1, s.grid, RUNGS)
    return found._replace(factors=anchor * found.factors)


def tuned_layers(cell, baseline, data, s, seeds):
    """per_layer's Tuned, its layers' rates over the first's (L,), and how many points the search for them tried."""
    best, few = float(baseline.best_factors()[0]), seeds[: s.search_seeds]

    def score(points):
        steps = np.array(points, float)
        found = members(cell, "per_layer", best * 2 ** steps[:, 0], few, data, s, 2 ** (steps - steps[:, :1]))
        return number(found["train"]).mean(-1)

    powers, tried = layer_rates(score, len(NETWORKS[cell[0]]) + 1, STRIDES)
    layers = 2.0 ** (np.array(powers) - powers[0])
    anchor = best * 2.0 ** powers[0] / s.grid[len(s.grid) // 2]  # the search's best in the middle of the grid
    return tuned_arm("per_layer", cell, data, s, seeds, layers, anchor), layers, tried


def at_best(cell, arm, tuned, layers, data, s, seeds):
    """The arm's runs (S, …) at its best rate."""
    layers = layers if arm == "per_layer" else None
    found = members(cell, arm, tuned.best_factors(), seeds, data, s, layers, test=True)
    return {key: value[0] for key, value in found.items()}


def joined(each):
    """Arms that were tuned apart as one Tuned, over all their factors."""
    factors = np.unique(np.concatenate([t.factors for t in each]))
    places = [np.searchsorted(factors, t.factors) for t in each]
    scores = np.full((len(each), len(factors), each[0].scores.shape[-1]), np.nan)
    tried = np.zeros(scores.shape[:2], bool)
    for a, (t, place) in enumerate(zip(each, places)):
        scores[a, place], tried[a, place] = t.scores[0], t.tried[0]
    best = np.array([place[t.best[0]] for t, place in zip(each, places)])
    return Tuned(factors, scores, tried, best, np.array([t.interior[0] for t in each]))


def tune_and_compare(cell, data, s, tuning, fresh):
    """Every arm's best rate on the tuning seeds, and its runs at it on fresh ones."""
    each = [tuned_arm(arm, cell, data, s, tuning) for arm in ARMS[:-1]]
    last, layers, tried = tuned_layers(cell, each[0], data, s, tuning)
    each.append(last)
    runs = [at_best(cell, arm, t, layers, data, s, fresh) for arm, t in zip(ARMS, each)]
    counts = [t.tried.sum() * s.tuning_seeds for t in each]
    counts[-1] += tried * s.search_seeds
    compared = {key: np.stack([r[key] for r in runs]) for key in runs[0]}
    return {**compared, **joined(each).save("tuning."), "layers": layers, "counts": np.array(counts)}


def compare_again(cell, data, s, tuning, new, names, known):
    """Some arms against per_layer on new seeds: at the rates known, or, on other data, at those tuned there."""
    arms = (*names, "per_layer")
    if known is not None:
        all_, layers = Tuned.load(known, "tuning."), known["layers"]
        each = [Tuned(all_.factors, *(x[ARMS.index(arm)][None] for x in all_[1:])) for arm in arms]
    else:
        baseline = tuned_arm("baseline", cell, data, s, tuning)
        last, layers, _ = tuned_layers(cell, baseline, data, s, tuning)
        each = [*(tuned_arm(arm, cell, data, s, tuning) for arm in names), last]
    runs = [at_best(cell, arm, t, layers, data, s, new) for arm, t in zip(arms, each)]
    return {"train": np.stack([r["train"] for r in runs]), "interior": np.array([t.interior[0] for t in each])}


def twin(cell, data, s, seeds):
    """The teleport to line_search_decrease under SGD, in float64, and its twin: the untouched run with a rate for every
    unit. Training losses (2, S, epochs), which are the same to rounding."""
    W = [V.to(data.x.device).double() for V in start(cell[1], (data.features, *NETWORKS[cell[0]], 10), seeds)]
    data = data._replace(x=data.x.double(), x_test=data.x_test.double())
    T = towards("line_search_decrease", W, data, seeds, s, None, "SGD")
    rates = torch.full((len(seeds),), RATES["SGD"], dtype=torch.float64)
    runs = (rescaled(W, T), None), (W, unit_factors(T))
    return {"train": torch.stack([trained(V, rates, "SGD", data, s, f)["train"] for V, f in runs])}
