"""Biases as a column, random elements, random search, and what the script records."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import close, load_script, normal, run_inside

from common.losses import batch_loss, cross_entropy
from common.mlp import StackedMLP
from common.published import approximate_score
from teleport import (
    IDENTITY,
    apply_to_layers,
    forward,
    leaky_relu,
    postactivation_action,
    preactivation_action,
    random_search,
    rescaling_action,
    squared_gradient_norm,
)

sampling = load_script("symmetry-teleportation/random_search.py")
biases, variant, sampled = sampling.sys.modules["biases"], sampling.variant, sampling.sampled
LEAKY = leaky_relu(0.1)


# ------------------------------------------------------------------------------------- random search in the library


@pytest.mark.parametrize("action", [preactivation_action, postactivation_action, rescaling_action])
@pytest.mark.parametrize("members", [(), (2,)])
def test_random_search_is_a_loop_over_candidates(action, members):
    weights = tuple(0.3 * normal(i, *members, o, d) for i, (d, o) in enumerate(((7, 6), (6, 5), (5, 10))))
    x, y = normal(5, 7, 4), torch.arange(4)
    vector = action is rescaling_action
    drawn = []

    def draw(identity, candidates, scale, generator):
        drawn.append(identity + scale * normal(len(drawn), candidates, *identity.shape).abs())
        return drawn[-1]

    def loss_fn(W):
        return cross_entropy(forward(W, x, LEAKY), y)

    options = dict(action=action, activation=LEAKY, candidates=10, scale=0.3, objective=squared_gradient_norm)
    found = random_search(weights, x, loss_fn, generator=torch.Generator(), draw=draw, **options)
    assert [d.shape[1:] for d in drawn] == [(6,), (5,)] if vector else [(6, 6), (5, 5)]
    one_by_one = torch.stack(
        [
            squared_gradient_norm(apply_to_layers(weights, x, [d[k] for d in drawn], action, LEAKY), loss_fn)
            for k in range(10)
        ]
    )
    close(found.objective_after, one_by_one.max(0).values)
    assert (found.objective_after > found.objective_before).all()
    assert (found.drift.abs() <= 1e-9).all()


def test_as_many_candidates_as_rows():
    """A stack of 10 elements and U with 10 rows: not 10 vectors to solve for."""
    U, V, h, g = normal(0, 10, 6), normal(1, 6, 4), normal(2, 4, 3), normal(3, 10, 6, 6)
    stack = postactivation_action(U, V, h, g, LEAKY)
    for k in range(10):
        for mine, alone in zip(stack, postactivation_action(U, V, h, g[k], LEAKY)):
            close(mine[k], alone)


def test_random_search_names_bad_layers():
    weights, x = (normal(0, 5, 4), normal(1, 3, 5)), normal(2, 4, 2)
    options = dict(action=preactivation_action, activation=LEAKY, candidates=2, scale=0.1, generator=torch.Generator())
    with pytest.raises(ValueError, match="layers"):
        random_search(weights, x, lambda W: W[0].sum(), objective=squared_gradient_norm, layers=[1], **options)


# ------------------------------------------------------------------------------------------- biases and sampling


@pytest.fixture(scope="module")
def biased():
    """A 9-8-7-4 network with biases, 6 samples: parameters, homogeneous weights, X with its row of ones, loss_fn."""
    parameters = tuple(0.5 * normal(i, o, d) for i, (d, o) in enumerate(((10, 8), (9, 7), (8, 4))))
    X, labels = torch.cat([normal(7, 9, 6), torch.ones(1, 6)]), torch.arange(6) % 4

    def loss_fn(weights):
        return cross_entropy(forward(weights, X, sampling.ACTIVATION), labels)

    return parameters, biases.homogeneous(parameters), X, labels, loss_fn


def with_biases(parameters, X):
    h = X[:-1]
    for m, W in enumerate(parameters):
        z = W[:, :-1] @ h + W[:, -1:]
        h = sampling.ACTIVATION.f(z) if m < len(parameters) - 1 else z
    return h


def test_homogeneous_coordinates_are_biases(biased):
    parameters, weights, X, labels, loss_fn = biased
    close(forward(weights, X, sampling.ACTIVATION), with_biases(parameters, X), 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(sampling.parameters(weights), parameters))
    expected = squared_gradient_norm(parameters, lambda P: cross_entropy(with_biases(P, X), labels))
    close(sampling.gradient_norm(weights, loss_fn), expected, 1e-12)


def test_affine_action_keeps_outputs_and_the_constant_unit(biased):
    _, weights, X, _, _ = biased
    moved = apply_to_layers(weights, X, [normal(1, 9, 9), normal(2, 8, 8)], biases.affine_action, sampling.ACTIVATION)
    assert all(torch.equal(M[-1], W[-1]) for M, W in zip(moved[:-1], weights))
    assert not torch.equal(moved[1][:-1, -1], weights[1][:-1, -1])  # the next layer's biases take part
    close(forward(moved, X, sampling.ACTIVATION), forward(weights, X, sampling.ACTIVATION))


def test_diagonally_dominant_elements():
    identity, generator = torch.eye(6, dtype=torch.float64), torch.Generator().manual_seed(1)
    g = biases.diagonally_dominant(identity, 20, 2.0, generator)
    block = g[:, :-1, :-1]
    diagonal = block.diagonal(dim1=-2, dim2=-1)
    close(block.norm(dim=(-2, -1)), torch.full((20,), 2.0), 1e-6)
    assert (2 * diagonal > block.sum(-1)).all() and (block >= 0).all()
    assert (g[:, -1, :-1] == 0).all() and (g[:, :-1, -1] == 0).all() and (g[:, -1, -1] == 1).all()


def test_approximate_score_is_exact_for_linear_networks():
    """‖∂L/∂W_m‖ of the moved network, with g on the output of W_m and its inverse on the input of W_{m+1}."""
    weights = tuple(0.5 * normal(i, 2, o, d) for i, (d, o) in enumerate(((5, 6), (6, 4), (4, 3))))
    x, y, g = normal(4, 5, 6), torch.arange(6) % 3, normal(5, 3, 1, 4, 4)

    def loss_fn(W):
        return cross_entropy(forward(W, x, IDENTITY), y)

    moved = (weights[0], g @ weights[1], weights[2] @ torch.linalg.inv(g))
    gradients = torch.func.grad(lambda W: loss_fn((weights[0].expand(3, -1, -1, -1), *W)).sum())(moved[1:])
    close(approximate_score(weights, loss_fn, 1, g), gradients[0].norm(dim=(-2, -1)))


def test_training_keeps_the_constants_and_trains_biases(biased):
    parameters, weights, *_ = biased
    x = torch.cat([normal(8, 30, 9), torch.ones(30, 1)], 1).float()
    y = torch.arange(30) % 4
    net = StackedMLP(tuple(W.float()[None] for W in weights), "SGD", 0.1, sampled.SLOPE)
    sampling.train_epoch(net, x, y, 10)
    mine = [W.float().requires_grad_() for W in parameters]
    for batch, labels in zip(x.split(10), y.split(10)):
        gradients = torch.autograd.grad(cross_entropy(with_biases(mine, batch.T), labels), mine)
        mine = [(W - 0.1 * G).detach().requires_grad_() for W, G in zip(mine, gradients)]
    for W, P in zip(sampling.parameters(net.weights), mine):
        close(W[0], P.detach(), 1e-5)
    for W in net.weights[:-1]:
        assert W[0, -1, :-1].eq(0).all() and W[0, -1, -1] == 1


def test_ascent_and_rescaling_stop_at_the_target(biased):
    _, weights, X, _, loss_fn = biased
    start = sampling.gradient_norm(weights, loss_fn)
    limits = dict(rate=1e-3, steps=60, cap=1e4)
    climbed, evaluations, curve = biases.ascend(weights, X, loss_fn, 2 * start, sampling.ACTIVATION, **limits)
    close(sampling.gradient_norm(climbed, loss_fn) / start, 2.0, 1e-2)
    steps = int((curve >= 2 * start).nonzero()[0])
    assert evaluations == biases.COST * steps + biases.BISECTIONS and len(curve) == 61
    close(loss_fn(climbed), loss_fn(weights))
    for layers in ([0], [1], [0, 1]):
        rescaled = biases.rescale(weights, layers, 5 * start, loss_fn, sampling.ACTIVATION)
        close(sampling.gradient_norm(rescaled, loss_fn) / start, 5.0, 1e-6)
        assert all(torch.equal(R[-1], W[-1]) for R, W in zip(rescaled[:-1], weights))  # the constants
        other = torch.cat([normal(9, 9, 20), torch.ones(1, 20)])
        close(forward(rescaled, other, sampling.ACTIVATION), forward(weights, other, sampling.ACTIVATION), 1e-12)


def test_move_compares_like_with_like(biased):
    """random, published and search choose among the same candidates, on the same layer, all on the same level set."""
    _, weights, X, labels, _ = biased
    s = replace(sampling.PRESETS["tiny"], widths=(8, 7), candidates=30, budgets=(1, 30), ascent_steps=3)
    out = sampling.move(s, weights, X, labels, seed=3)
    after = {arm: out[f"{arm}/gradient"][1] for arm in sampling.MOVES}
    assert after["random"] <= after["search"] and after["published"] <= after["search"]
    close(out["search_curve"], torch.stack([out["search_curve"][0], after["search"], after["search"]]), 1e-12)
    for arm in sampling.MOVES:
        loss = out[f"{arm}/loss"]
        close(loss[1], loss[0])
    for arm in ("random", "published", "search", "rescaling"):  # a move of hidden layer m leaves the third matrix alone
        untouched = 2 - 2 * out["layer"]
        assert torch.equal(out[f"{arm}/W_{untouched + 1}"], weights[untouched])


def test_the_variant_s_loss_takes_two_softmaxes_and_an_activated_output(biased):
    _, weights, X, labels, _ = biased
    out = forward(weights, X, sampling.ACTIVATION)
    once = torch.where(out > 0, out, 0.01 * out).exp()
    once = once / once.sum(0)
    twice = once.exp() / once.exp().sum(0)
    by_hand = -twice[labels, torch.arange(len(labels))].log().mean()
    close(variant.doubled_softmax(X, labels, sampling.ACTIVATION)(weights), by_hand, 1e-12)


def test_the_variant_s_teleport_keeps_its_batch_and_changes_one_layer(biased):
    _, weights, X, labels, _ = biased
    s = replace(sampling.PRESETS["tiny"], candidates=30)
    moved = variant.teleport(s, weights, X, labels, 3, sampling.ACTIVATION)
    close(forward(moved, X, sampling.ACTIVATION), forward(weights, X, sampling.ACTIVATION), 1e-9)
    assert [torch.equal(a, b) for a, b in zip(moved, weights)].count(False) == 2


def test_the_variant_s_arms_part_at_the_teleport(tiny):
    (arrays,) = tiny("symmetry-teleportation/random_search.py")[0].arrays.values()
    accuracy = arrays["variant/accuracy"]
    assert accuracy.shape == (2, 2, 2) and (accuracy[0, :, 0] == accuracy[1, :, 0]).all()
    assert (accuracy[0, :, 1] != accuracy[1, :, 1]).any() and (0 < accuracy).all() and (accuracy < 1).all()


def test_elements_keep_their_batch_s_loss_and_rescalings_every_loss(tiny):
    for record in tiny("symmetry-teleportation/random_search.py")[0].records.values():
        assert all(record["metrics"][arm]["largest_relative_drift"] <= 1e-9 for arm in sampling.MOVES)
        assert np.abs(record["metrics"]["rescaling"]["whole_loss_drift"]).max() < 1e-5


def test_curves_have_a_value_for_every_run_and_epoch(tiny):
    (arrays,) = tiny("symmetry-teleportation/random_search.py")[0].arrays.values()
    assert arrays["start/train_loss"].shape == (2, 1) and arrays["search/train_loss"].shape == (2, 2)


def test_an_arm_in_the_tuned_stack_is_trained_and_moved_as_alone():
    """Every arm, rate and run of the stack against one network by itself; a run that diverges stops nobody."""
    s = replace(sampling.PRESETS["tiny"], widths=(8, 7), candidates=20, tuned_epochs=3, lr=0.05)
    x = torch.cat([normal(1, 60, 9).float(), torch.ones(60, 1)], 1)
    data, seeds, factors = SimpleNamespace(y=torch.arange(60) % 10), [3, 4], np.tile([[1.0, 2.0, 1e12]], (5, 1))
    losses = sampled.train(s, sampled.ARMS, factors, seeds, x, data)["train_loss"]
    assert losses.shape == (5, 3, 2, 3) and not losses[:, 2].isfinite().all()
    X = x[: s.batch].T.double()
    loss_fn = batch_loss(X, data.y[: s.batch], sampled.ACTIVATION)
    for a, arm in enumerate(sampled.ARMS):
        for f, k in ((0, 0), (1, 1)):
            net = sampled.new_net(sampled.start_weights(s, x, seeds[k : k + 1]), s.lr * factors[a, f])
            alone = [sampled.train_epoch(net, x, data.y, s.batch)]
            if arm == "lr x10":
                net.lr *= 10
            elif arm != "baseline":
                W = sampled.moved(s, arm, tuple(V[0].double() for V in net.weights), X, loss_fn, seeds[k])
                net.set(slice(None), [V[None].float() for V in W])
            alone += [sampled.train_epoch(net, x, data.y, s.batch) for _ in range(2)]
            close(losses[a, f, k], torch.stack(alone)[:, 0], 1e-4)
    assert (losses[:, 0, :, 0] == losses[:1, 0, :, 0]).all() and (losses[1:, 0, :, 1] != losses[0, 0, :, 1]).all()


def test_best_rates_are_compared_on_other_runs(tiny):
    (arrays,) = tiny("symmetry-teleportation/random_search.py")[0].arrays.values()
    assert arrays["tuned/train_loss"].shape == (5, 2, 2) and arrays["tuning/scores"].shape[::2] == (5, 2)
    assert sampled.numbers(sampling.PRESETS["tiny"], np.array([[1.0, 2.0]])) == np.log(2.0)  # from the teleport on


def test_a_missing_dataset_is_one_line(tmp_path):
    options = ("--preset", "tiny", "--dataset", "FashionMNIST")
    status, _, error = run_inside(
        "symmetry-teleportation/random_search.py", *options, output=tmp_path, data_dir=tmp_path
    )
    assert status == 2 and error.startswith("error: ") and "mnist-mini" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))
