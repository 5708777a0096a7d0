"""The ascent to a fourfold gradient, and what the script records."""

import pytest
import torch
from conftest import load_script, normal, run_inside

from common.mlp import published_seeds

mnist = load_script("symmetry-teleportation/mnist_classification.py")


@pytest.mark.parametrize("arm", mnist.TELEPORTING)
def test_climb_raises_the_norm_fourfold(arm):
    weights = tuple(normal(i, 2, o, d) / d**0.5 for i, (d, o) in enumerate(((20, 12), (12, 10), (10, 5))))
    X, labels = normal(6, 2, 20, 10), torch.arange(10).expand(2, 10) % 5
    s = mnist.PRESETS["quick"]
    moved = mnist.climb(s, arm, weights, X, labels)
    growth = moved.objective_after / moved.objective_before
    assert (growth >= s.growth).all() and (growth < 1.5 * s.growth).all()
    drift = (moved.drift / moved.loss_before).abs()
    assert (drift > 1e-6).all() if arm == "published" else (drift <= 1e-9).all()


def test_only_exact_teleports_keep_their_batch_s_loss(tiny):
    for record in tiny("symmetry-teleportation/mnist_classification.py")[0].records.values():
        assert record["seeds"] == published_seeds(2)
        for metrics in record["metrics"].values():
            assert metrics["postactivation"]["largest_relative_drift"] <= 1e-9
            assert metrics["rescaling"]["largest_relative_drift"] <= 1e-9
            assert metrics["published"]["largest_relative_drift"] > 1e-9


def test_curves_have_a_value_for_every_arm_run_and_epoch(tiny):
    (arrays,) = tiny("symmetry-teleportation/mnist_classification.py")[0].arrays.values()
    assert arrays["narrow_SGD/train_loss"].shape == (5, 2, 2)


def test_a_missing_dataset_is_one_line(tmp_path):
    options = ("--preset", "tiny", "--dataset", "FashionMNIST")
    status, _, error = run_inside(
        "symmetry-teleportation/mnist_classification.py", *options, output=tmp_path, data_dir=tmp_path
    )
    assert status == 2 and error.startswith("error: ") and "mnist-mini" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))
