"""The published teleport against recorded runs, the exact ascent, AdaGrad, and what the script records."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, load_script

from common.arms import as_large, distance
from common.losses import half_squared_error
from common.published import teleport_postactivation
from teleport import (
    leaky_relu,
)

regression = load_script("symmetry-teleportation/multi_layer_regression.py")
LEAKY = leaky_relu(0.1)


@pytest.fixture(scope="module")
def recorded(golden):
    g = golden("regression")
    return {**g, "W": (g["W0"], g["W1"], g["W2"]), "loss_fn": half_squared_error(g["X"], g["Y"], regression.ACTIVATION)}


def test_gradient_descent_is_the_recorded_one(recorded):
    s = replace(regression.PRESETS["paper"], seeds=1)
    loss, gradient, path, seconds = regression.train(
        s, "GD", recorded["W"], recorded["loss_fn"], float(recorded["lr"]), lambda weights: weights
    )
    close(loss, recorded["gd_loss"])
    close(gradient / recorded["gd_grad_sq"], torch.ones(s.epochs))
    assert len(path) == len(seconds) == s.epochs


def test_published_teleport_is_the_recorded_one(recorded):
    """All three faults are needed for these numbers: I − T, stale hidden layers, the contaminated direction."""
    options = dict(activation=LEAKY, lr=float(recorded["lr_teleport"]), steps=int(recorded["steps"]))
    moved = teleport_postactivation(recorded["W"], recorded["X"], recorded["loss_fn"], **options)
    found = (moved.loss_before, moved.loss_after, moved.objective_before, moved.objective_after)
    keys = ("loss_before", "loss_after", "grad_sq_before", "grad_sq_after")
    for value, key in zip(found, keys):
        close(value / recorded[f"official_{key}"], 1.0, 1e-9)
    assert abs(moved.drift / moved.loss_before) > 0.9
    # An ensemble is a loop over members, with rates of their own; rate 0 at full rank stays.
    stack = tuple(torch.stack([W, W]) for W in recorded["W"])
    options["lr"] = options["lr"] * torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None]
    inverse = torch.linalg.pinv(recorded["X"])
    both = teleport_postactivation(stack, recorded["X"], recorded["loss_fn"], x_inverse=inverse, **options)
    close(both.loss_after, torch.stack([moved.loss_after, moved.loss_before]), 1e-8)


@pytest.fixture(scope="module")
def at_teleport():
    """The five published runs at epoch 5 of gradient descent: weights, X, loss_fn."""
    s = regression.PRESETS["paper"]
    *W, X, Y = regression.initial_values(s.dims, s.samples, [n * n * 12345 for n in range(5)])
    loss_fn = half_squared_error(X, Y, regression.ACTIVATION)
    *_, path, _ = regression.train(replace(s, epochs=6), "GD", tuple(W), loss_fn, 1e-4, lambda weights: weights)
    return path[5], X, loss_fn


def test_five_published_runs(at_teleport):
    weights, X, loss_fn = at_teleport
    moved = teleport_postactivation(weights, X, loss_fn, activation=LEAKY, lr=1e-7, steps=8)
    close(moved.loss_before, [595.7, 685.5, 614.2, 576.0, 575.1], 1e-4)
    close(moved.loss_after, [364.9, 90.6, 334.6, 347.3, 51.9], 1e-3)


@pytest.mark.parametrize("options", [dict(steps=150, growth=10.0), dict(steps=8)])
def test_exact_ascent_keeps_the_loss(at_teleport, options):
    weights, X, loss_fn = at_teleport
    moved = regression.ascend(weights, X, loss_fn, 5e-9 if "growth" in options else 4e-8, **options)
    growth = moved.objective_after / moved.objective_before
    assert (moved.drift.abs() <= 1e-9 * moved.loss_before).all()
    assert (growth > options.get("growth", 1)).all()
    assert "growth" not in options or (growth < 15).all()


def test_free_decrease():
    """On a known path: the loss is the squared weight, weights 8, 4, 2, 1 at epochs 0 to 3, in two layers alike."""
    path = [(torch.full((3, 1, 1), w, dtype=torch.float64),) * 2 for w in (8.0, 4.0, 2.0, 1.0)]
    losses = torch.tensor([64.0, 16, 4, 1], dtype=torch.float64).expand(3, 4)
    target = torch.tensor([9.0, 20.0, 0.5], dtype=torch.float64)  # between epochs 1 and 2; no decrease; out of reach
    first, second = regression.free_decrease(path, losses, target, 1, lambda W: W[0].square().sum((-2, -1)))
    close(first.flatten(), [3.0, 4.0, 1.0])
    assert torch.equal(first, second)


def test_epochs_to():
    loss = torch.tensor([[9.0, 3, 1], [9, 8, 7], [9, torch.nan, torch.nan]])
    assert regression.epochs_to(loss, torch.tensor([3.0, 5.0, 3.0])).tolist() == [1, 3, 3]


def test_adagrad_is_pytorchs(at_teleport):
    weights, _, loss_fn = at_teleport
    s = replace(regression.PRESETS["paper"], epochs=6)
    *_, path, _ = regression.train(s, "AdaGrad", weights, loss_fn, 0.1, lambda W: W)
    mine = [W.clone().requires_grad_() for W in weights]
    optimizer = torch.optim.Adagrad(mine, lr=0.1, eps=1e-10)
    for _ in range(5):
        optimizer.zero_grad()
        loss_fn(mine).sum().backward()
        optimizer.step()
    for a, b in zip(path[5], mine):
        close(a, b.detach(), 1e-10)


def test_only_exact_teleports_keep_their_batch_s_loss(tiny):
    for record in tiny("symmetry-teleportation/multi_layer_regression.py")[0].records.values():
        for optimizer in regression.OPTIMIZERS:
            drift = {arm: record["metrics"][optimizer][arm]["largest_relative_drift"] for arm in regression.ARMS}
            assert drift["baseline"] == 0
            assert max(drift[arm] for arm in ("postactivation", "postactivation, brief", "random")) <= 1e-9
            assert drift["lr raised"] == 0
            assert drift["published"] > 0.1 and drift["drift only"] > 0.1


def test_arms_are_one_until_the_teleport(tiny):
    run = tiny("symmetry-teleportation/multi_layer_regression.py")[0]
    (arrays,) = run.arrays.values()
    loss = arrays["GD_arms/loss"]
    assert (loss[:, :, :5] == loss[0, :, :5]).all() and (loss[6, :, 5] == loss[0, :, 5]).all()
    assert not any(np.array_equal(loss[a], loss[0]) for a in range(1, len(regression.ARMS)))
    assert "595.7 → 364.9" in run.stdout


def test_a_rate_at_which_a_teleport_overflows_is_no_number():
    """Rates far too large leave the weights of some problem beyond any teleport; the others are not lost."""
    s = replace(regression.PRESETS["paper"], epochs=8)
    *W, X, Y = regression.initial_values(s.dims, s.samples, regression.FIVE)
    losses, _, _ = regression.train_arm(s, "GD", "published", W, X, Y, [1.0, 2500.0])
    alone, _, _ = regression.train_arm(s, "GD", "published", W, X, Y, [1.0])
    assert torch.equal(losses[0], alone[0]) and losses[0].isfinite().all()
    assert not losses[1].isfinite().all()


def test_the_random_element_keeps_the_loss_and_is_of_the_ascent_s_order(at_teleport):
    weights, X, loss_fn = at_teleport

    def climb(W, X, _):
        return regression.ascend(W, X, loss_fn, 5e-9, 150, 10.0)

    move = as_large(climb, lambda X, Y: loss_fn, regression.postactivation_action, LEAKY, seed=0)
    moved, goal = move(weights, X, None), climb(weights, X, None)
    ratio = distance(moved.weights, weights) / distance(goal.weights, weights)
    assert (ratio > 1 / 8).all() and (ratio < 8).all()
    assert (moved.drift.abs() <= 1e-9 * moved.loss_before).all()
