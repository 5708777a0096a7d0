"""The experiment behind Table 1 and Figures 9 and 10."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_teleport import LEAKY, losses
from test_teleport_objectives import random_network

import correlation
from common import UserError
from common.data import Dataset
from common.mlp import published_seeds
from teleport import curvature, curve_curvature, sharpness


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 9, generator=generator), torch.randint(3, (60,), generator=generator)
    return Dataset("random", "random", x, y, x, y, (1, 3, 3), {})


SETUP = correlation.SETUPS["MNIST"]._replace(dims=(9, 6, 5, 3))
SETTINGS = correlation.Settings(epochs=2, batches=5, samples=20)  # a pass over the data is 3 batches


def test_measures_are_sharpness_and_curvature_with_the_published_draws(data):
    weights = tuple(W.float() for W in random_network(SETUP.dims, 3)[0])
    phi, psi, psi_pair, loss = correlation.measure(weights, data, SETUP, SETTINGS)
    assert phi.shape == psi.shape == psi_pair.shape == loss.shape == (3, 5)
    for b, rows in enumerate(correlation.random_batches(60, 5, 20)):
        x, labels = data.x[rows].T, data.y[rows]
        torch.manual_seed(12345 * b)
        elements = [torch.rand(d, d) for d in (6, 5)]
        directions = torch.stack([torch.rand(9 * 6 + 6 * 5 + 5 * 3) for _ in range(20)])
        radii = torch.tensor(np.arange(0.001, 0.2, 0.01)).float()
        expected = sharpness(weights, losses(x, labels), directions, radii)
        torch.testing.assert_close(phi[:, b], expected, rtol=1e-6, atol=0)
        expected = curvature(weights, x, [M / M.square().sum().sqrt() for M in elements], LEAKY)
        torch.testing.assert_close(psi[:, b], expected, rtol=1e-5, atol=0)
        pair = (W.double() for W in (weights[2], weights[1], LEAKY.f(weights[0] @ x), elements[1]))
        torch.testing.assert_close(psi_pair[:, b], curve_curvature(*pair, LEAKY)[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(loss[:, b], losses(x, labels)(weights))


def test_batches_pass_over_the_data():
    batches = correlation.random_batches(65, 5, 20)
    assert [len(b) for b in batches] == [20] * 5
    assert len(set(torch.cat(batches[:3]).tolist())) == 60  # no sample twice in a pass
    assert torch.cat(batches[3:]).tolist() != torch.cat(batches[:2]).tolist()


def test_runs_do_not_depend_on_their_group(data):
    seeds = published_seeds(4)
    whole, loss = correlation.train(seeds, data, SETUP, SETTINGS)
    part, part_loss = correlation.train(seeds[2:], data, SETUP, SETTINGS)
    torch.testing.assert_close(part_loss, loss[2:])
    for W, V in zip(whole.weights, part.weights):
        torch.testing.assert_close(V, W[2:])


def test_controls_take_the_training_loss_out():
    """A φ that goes with the test loss only through the training loss is seen through; one that goes further is not."""
    generator = np.random.default_rng(0)
    train, psi, more = generator.normal(size=(3, 300))
    arrays = {"train_loss": train, "test_loss": train + 0.5 * more, "psi": psi}
    through = correlation.correlations(arrays | {"phi": (train + generator.normal(size=300)) / 200}, 200)
    assert through["phi"].r > 0.4 and abs(through["phi_given_train_loss"].r) < 0.15 and abs(through["excess"].r) < 0.15
    beyond = correlation.correlations(arrays | {"phi": (train + more) / 200}, 200)
    assert beyond["phi_given_train_loss"].r > 0.9 and beyond["excess"].r > 0.3
    # The loss on φ's own batches is what counts, where it was recorded.
    recorded = correlation.correlations(arrays | {"phi": (train + more) / 200, "loss": train + more}, 200)
    assert abs(recorded["phi_given_train_loss"].r) < 0.15 or np.isnan(recorded["phi_given_train_loss"].r)


def test_tiny_results_say_what_their_arrays_say(tiny):
    run = tiny("correlation.py")[0]
    (record,), (arrays,) = run.records.values(), run.arrays.values()
    assert len(record["seeds"]) == 12 and all(a.shape[0] == 12 for a in arrays.values())
    assert {"train_loss", "test_loss", "test_accuracy", "phi", "psi"} <= set(arrays)
    assert ((arrays["test_accuracy"] > 0.2) & (arrays["test_accuracy"] < 1)).all()
    correlations = record["metrics"]["correlations"]
    assert {"phi", "psi", "phi_psi", "psi_pair", "excess", "phi_rank", "phi_given_train_loss"} <= set(correlations)
    for name, x, y in (("phi", "phi", "test_loss"), ("psi", "psi", "test_loss"), ("phi_psi", "phi", "psi")):
        c = correlations[name]
        np.testing.assert_allclose(c["r"], np.corrcoef(arrays[x], arrays[y])[0, 1], rtol=1e-6)
        assert c["low"] < c["r"] < c["high"] and f"{c['r']:.3f}" in run.stdout


def test_too_few_runs_for_an_interval():
    with pytest.raises(UserError, match="at least 5 runs"):
        correlation.experiment(SimpleNamespace(settings=correlation.Settings(seeds=4)))
