"""The map of objectives: its starts, teleports and per-layer rates, the twin, and the judge on planted truths."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "beyond-the-papers"))

import objectives  # noqa: E402
import rescalings  # noqa: E402

from common.data import Dataset  # noqa: E402
from common.run import Outcome  # noqa: E402
from common.tuning import Tuned  # noqa: E402
from teleporter.objectives import balance, rescaled  # noqa: E402

DIMS, SEEDS = (9, 6, 5, 4), [1, 2, 3]
SETTINGS = replace(objectives.PAPER, samples=60, batch=5, teleport_batch=20, ascent_steps=3, ahead=2)


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, DIMS[0], generator=generator), torch.randint(DIMS[-1], (60,), generator=generator)
    return Dataset("planted", "planted", x, y, x, y, (1, 3, 3), {})


def double(weights):
    return [W.double() for W in weights]


def test_bad_scales_are_those_of_he_s_function_and_balance_takes_them_back():
    he, published = (double(rescalings.start(init, DIMS, SEEDS)) for init in ("He", "published"))
    assert all(torch.allclose(W, 6**0.5 * V) for W, V in zip(he, published))
    wanted = rescaled(he, balance(he))
    for init, factor in (("layer", 16.0), ("units", 4.0)):
        W = double(rescalings.start(init, DIMS, SEEDS))
        ratio = W[0].norm(dim=-1) / he[0].norm(dim=-1)
        assert torch.allclose(ratio.log().abs(), torch.tensor(factor).double().log(), rtol=1e-5)
        assert torch.allclose(rescalings.loss(W, double_data()), rescalings.loss(he, double_data()), rtol=1e-5)
        for mine, theirs in zip(rescaled(W, balance(W)), wanted):
            assert torch.allclose(mine, theirs, rtol=1e-5)
    units = rescalings.start("units", DIMS, SEEDS)[0].norm(dim=-1) / rescalings.start("He", DIMS, SEEDS)[0].norm(dim=-1)
    assert 0 < (units > 1).double().mean() < 1 and len({tuple(row.round().tolist()) for row in units}) > 1


def double_data():
    planted = data()
    return planted._replace(x=planted.x.double(), x_test=planted.x_test.double())


@pytest.mark.parametrize("optimizer", ["SGD", "momentum"])
def test_the_twin_is_the_teleported_run(optimizer):
    """By rates of every unit; without its factors it is another run."""
    W, planted = double(rescalings.start("units", DIMS, SEEDS)), double_data()
    T = rescalings.towards("line_search_decrease", W, planted, SEEDS, SETTINGS, None, optimizer)
    rates = torch.full((len(SEEDS),), 0.02).double()
    runs = ((rescaled(W, T), None), (W, rescalings.unit_factors(T)), (W, None))
    moved, twin, untouched = (rescalings.trained(V, rates, optimizer, planted, SETTINGS, f)["train"] for V, f in runs)
    assert (twin / moved - 1).abs().max() < 1e-11 < 1e-4 < (untouched / moved - 1).abs().max()


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "Adam"])
def test_rates_of_layers_are_those_of_torch_s_parameter_groups(optimizer):
    W, planted, ratios = double(rescalings.start("He", DIMS, SEEDS)), double_data(), (1.0, 4.0, 0.25)
    rates = torch.tensor([0.01, 0.02, 0.03]).double()
    factors = [None, *(torch.full((len(SEEDS), 1, 1), r).double() for r in ratios[1:])]
    found = rescalings.trained(W, rates, optimizer, planted, SETTINGS, factors)["train"]
    kinds = {"SGD": torch.optim.SGD, "momentum": torch.optim.SGD, "Adam": torch.optim.Adam}
    for e, rate in enumerate(rates.tolist()):
        V = [U[e].clone().requires_grad_() for U in W]
        options = {"momentum": 0.9} if optimizer == "momentum" else {}
        theirs = kinds[optimizer]([{"params": [U], "lr": rate * r} for U, r in zip(V, ratios)], lr=1.0, **options)
        losses = []
        for start in [*range(0, 60, 5)] * SETTINGS.epochs:
            X, labels = planted.x[start : start + 5].T, planted.y[start : start + 5]
            loss = rescalings.batch_loss(X, labels, rescalings.ACTIVATION)(V)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            losses.append(loss.item())
        wanted = torch.tensor(losses).double().view(SETTINGS.epochs, -1).mean(-1)
        assert torch.allclose(found[e], wanted, rtol=1e-6)


def test_teleports_stay_in_bounds_and_a_random_one_is_as_large():
    W, planted = rescalings.start("units", DIMS, SEEDS), data()

    def towards(objective, rates=(0.1, 0.2), optimizer="Adam"):
        return rescalings.towards(objective, W, planted, SEEDS, SETTINGS, list(rates), optimizer)

    size = {}
    for objective in (*rescalings.OBJECTIVES, "random"):
        T = towards(objective)
        size[objective] = sum(t.double().square().sum(-1) for t in T)
        assert T[0].shape == ((2, 3, 6) if objective == "look_ahead" else (3, 6))
        bound = {"look_ahead": rescalings.FAR, "balance": math.inf, "random": math.inf}.get(objective, rescalings.BOUND)
        assert 0.05 < max(t.abs().max() for t in T) <= math.log(bound) * (1 + 1e-6)
    assert torch.allclose(size["random"], size["line_search_decrease"], rtol=1e-5)
    ahead = towards("look_ahead")[0]
    assert not torch.allclose(ahead[0], ahead[1])  # each at its own rate
    assert torch.allclose(towards("look_ahead", [0.2])[0][0], ahead[1], rtol=1e-4)
    wild = towards("look_ahead", [0.1, 1e9], "momentum")
    assert all(t.isfinite().all() and not t[1].any() for t in wild)  # left the numbers: it stays


def test_search_for_layer_rates_finds_a_planted_best():
    goal = (3, -5, 6)

    def bowl(points):
        return [sum((x - g) ** 2 for x, g in zip(p, goal)) if p != (4, 0, 0) else math.nan for p in points]

    found, tried = rescalings.layer_rates(bowl, 3, (4, 2, 1))
    assert sum(abs(x - g) for x, g in zip(found, goal)) <= 1 and tried <= 3 * 7 + 1
    scores = {}

    def valley(points):  # two layers that want to move, but not both
        scores.update({(x, y): x + y + 10 * (x < 0 and y < 0) + 20 * (min(x, y) < -4) for x, y in points})
        return [scores[p] for p in points]

    assert scores[tuple(rescalings.layer_rates(valley, 2, (4, 2))[0])] == min(scores.values())
    assert rescalings.layer_rates(lambda points: [math.nan] * len(points), 3, (4,))[0] == [0, 0, 0]


def test_arms_tuned_apart_are_joined():
    def tuned(factors, best, interior):
        scores = np.arange(len(factors), dtype=float)[None, :, None]
        return Tuned(
            np.array(factors), scores, np.ones((1, len(factors)), bool), np.array([best]), np.array([interior])
        )

    both = rescalings.joined([tuned([1.0, 2.0, 4.0], 1, True), tuned([0.3, 2.0, 3.0], 2, False)])
    assert both.factors.tolist() == [0.3, 1, 2, 3, 4] and both.best_factors().tolist() == [2, 3]
    assert both.interior.tolist() == [True, False] and both.tried.sum(1).tolist() == [3, 3]
    assert both.at_best().tolist() == [[1.0], [2.0]] and np.isnan(both.scores[~both.tried]).all()


# ---------------------------------------------------------------------------------------------------------------------
# The judge

CELLS = [f"784-16-10-10.{init}.SGD" for init in objectives.INITS]
HELP = {c: {"balance": -0.1, "per_layer": -0.1} for c in CELLS[2:]}


def planted(effects, spread=0.005, again=0.0, edge=()):
    """An outcome in which arms have these effects on log losses in some cells, other arms none; on new seeds an
    objective that beat per_layer has the effect `again`."""
    generator, arrays = np.random.default_rng(0), {}
    for cell in CELLS:
        base = generator.normal(0, 0.1, (1, 30))
        mean = np.array([effects.get(cell, {}).get(arm, 0.0) for arm in objectives.ARMS])[:, None]
        logs = base + mean + generator.normal(0, spread, (len(mean), 30))
        inside = np.array([(cell, arm) not in edge for arm in objectives.ARMS])
        arrays |= {f"{cell}/train": np.exp(logs)[..., None].repeat(2, -1), f"{cell}/test": np.exp(logs)}
        tuned = Tuned(
            np.ones(2), np.zeros((len(mean), 2, 4)), np.ones((len(mean), 2)), np.zeros(len(mean), int), inside
        )
        arrays |= {f"{cell}/{k}": v for k, v in tuned.save("tuning.").items()} | {f"{cell}/counts": np.ones(len(mean))}
    arrays["twin/train"] = np.ones((2, 3, 2))
    metrics = {"cells": CELLS, "winners": {}, "costs": {}}
    first = Outcome(metrics, arrays, settings=objectives.PAPER)
    for cell, found in objectives.findings(first).items():
        if won := objectives.beating(found["train"]):
            metrics["winners"][cell] = won
            logs = generator.normal(0, spread, (len(won) + 1, 30)) + np.array([*[again] * len(won), 0.0])[:, None]
            arrays[f"again.{cell}/train"] = np.exp(logs)[..., None].repeat(2, -1)
            arrays[f"again.{cell}/interior"] = np.ones(len(won) + 1, bool)
    return first


@pytest.mark.parametrize(
    "outcome, expected",
    [
        (planted(HELP), "holds"),
        (planted({CELLS[2]: HELP[CELLS[2]]}), f"holds in part: balance does not help in {CELLS[3]}"),
        (planted({}), "does not hold"),
        (planted({c: {"balance": 0.1} for c in CELLS}), "does not hold"),
        (planted({c: {"balance": -0.01} for c in CELLS[2:]}, spread=0.1), "undecided"),
        (planted(HELP, edge=[(c, "balance") for c in CELLS[2:]]), "undecided"),
        (planted(HELP | {CELLS[1]: {"look_ahead": -0.05}}, again=-0.05), "holds in part: better than per-layer rates"),
        (planted(HELP | {CELLS[1]: {"look_ahead": -0.05}}, again=0.0), "holds"),  # not again: it was chance
        (planted(HELP | {CELLS[3]: {"balance": -0.2}}, again=-0.1), "holds"),  # units: rates of layers cannot
    ],
)
def test_the_judge_finds_what_was_planted(outcome, expected):
    verdict = objectives.judge(outcome)
    assert str(verdict) == expected if expected == "holds" else str(verdict).startswith(expected)
    assert "nan" not in verdict.sentence and verdict.details
