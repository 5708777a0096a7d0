"""The ascent to a fourfold gradient, and what the script records."""

import numpy as np
import pytest
import torch
from conftest import load_script, normal, run_inside

mnist = load_script("symmetry-teleportation/mnist_classification.py")


@pytest.mark.parametrize("arm", ("published", "postactivation", "rescaling"))
def test_climb_raises_the_norm_fourfold(arm):
    """Members (2 rates, 2 runs), of which each run has its batch."""
    weights = tuple(normal(i, 2, 2, o, d) / d**0.5 for i, (d, o) in enumerate(((20, 12), (12, 10), (10, 5))))
    X, labels = normal(6, 2, 20, 10), torch.arange(10).expand(2, 10) % 5
    s = mnist.PAPER
    moved = mnist.climb(s, arm, weights, X, labels)
    growth = moved.objective_after / moved.objective_before
    assert growth.shape == (2, 2) and (growth >= s.growth).all() and (growth < 1.5 * s.growth).all()
    drift = (moved.drift / moved.loss_before).abs()
    assert (drift > 1e-6).all() if arm == "published" else (drift <= 1e-9).all()


def test_only_exact_teleports_keep_their_batch_s_loss(tiny):
    (run, *_) = tiny("symmetry-teleportation/mnist_classification.py")
    (arrays,) = run.arrays.values()
    for case in ("narrow SGD", "narrow AdaGrad"):
        losses = arrays[f"moves.{case}/losses"]  # (arms, rates, runs, teleports, [batch, training set], 2)
        assert losses.shape == (len(mnist.ARMS), 2, 2, 1, 2, 2)
        moved = losses[1:5]
        drift = dict(zip(mnist.TELEPORTING, np.abs(moved[..., 0, 1] / moved[..., 0, 0] - 1).max((1, 2, 3))))
        assert max(drift[arm] for arm in ("postactivation", "rescaling", "random")) <= 1e-9 < drift["published"]


def test_curves_have_a_value_for_every_arm_rate_run_and_epoch(tiny):
    (arrays,) = tiny("symmetry-teleportation/mnist_classification.py")[0].arrays.values()
    assert arrays["compared.narrow SGD/train_loss"].shape == (len(mnist.ARMS), 2, 2, 2)


def test_seconds_go_on_as_the_baseline_s():
    seconds = {"baseline": [1.0, 2.0, 3.0], "published": [4.0, 8.0, 12.0]}
    assert mnist.elapsed(seconds, "published", 5).tolist() == [4, 8, 12, 13, 14]


def test_a_missing_dataset_is_one_line(tmp_path):
    options = ("--preset", "tiny", "--dataset", "FashionMNIST")
    status, _, error = run_inside(
        "symmetry-teleportation/mnist_classification.py", *options, output=tmp_path, data_dir=tmp_path
    )
    assert status == 2 and error.startswith("error: ") and "mnist-mini" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))
