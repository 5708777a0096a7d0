"""Figure 4's script: its moves go where they are sent, at the size that was asked for; its runs continue."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import read_results, run_inside
from torch.testing import assert_close

import teleport_sharpness_curvature as figure4
from common import cli, moves, ways
from common.arms import draw_batches
from common.data import load
from common.mlp import StackedMLP, initial_weights
from common.run import Run
from teleport import forward, leaky_relu, preactivation_action, teleport

LEAKY = leaky_relu(0.1)
DIMS = (784, 16, 10, 10)
PAPER = figure4.PRESETS["paper"]
EXACT = [way for way in figure4.WAYS if way.action == "preactivation"]


# ---------------------------------------------------------------------------------------------------------------------
# The moves, on a network trained as Figure 4's


@pytest.fixture(scope="module")
def trained():
    """Weights (784-16-10-10), and ten draws: batch, φ with new directions, M."""
    data = load("mnist-mini")
    net = StackedMLP(initial_weights(DIMS, [54321]), lr=1e-2)
    for _ in range(8):
        net.train_epoch(data.x, data.y, 20)
    generators = [torch.Generator().manual_seed(seed) for seed in range(10)]
    batches = zip(*draw_batches(data.x, data.y, 500, generators))
    draws = [moves.Draws.of(x, labels, DIMS, 5, g) for (x, labels), g in zip(batches, generators)]
    return tuple(W[0] for W in net.weights), draws


@pytest.mark.parametrize("maximize", (True, False), ids=("up", "down"))
@pytest.mark.parametrize("backtracking", (False, True))
def test_sharpness_goes_where_it_is_sent(trained, maximize, backtracking):
    """At the published step size 9 of 10 times, with backtracking always, and then the loss stays within 1e-3."""
    weights, draws = trained
    moved = 0
    for d in draws:
        result = teleport(
            weights, d.x, d.loss_fn, objective=d.phi, action=preactivation_action, activation=LEAKY,
            lr=5e-2, steps=3 if backtracking else 10, maximize=maximize, backtracking=backtracking,
        )  # fmt: skip
        moved += bool((result.objective_after > result.objective_before) == maximize)
        if backtracking:
            assert result.drift.abs() <= 1.001e-3 * result.loss_before
    assert moved >= (10 if backtracking else 9)


@pytest.mark.parametrize("maximize", (True, False), ids=("up", "down"))
def test_curvature_goes_where_it_is_sent(trained, maximize):
    weights, draws = trained
    for d in draws:
        lr = 2e-1 if maximize else -5e-2
        result = moves.curvature_teleport(weights, d.x, d.loss_fn, d.M, lr, tolerance=0.01)
        before, after = (moves.kappa_along(d.M, W, d.x) for W in (weights, result.weights))
        assert result.size > 0 and (after > before) == maximize
        assert_close((result.objective_before, result.objective_after), (before, after))
        assert abs(d.loss_fn(result.weights) / d.loss_fn(weights) - 1) <= 0.01
        assert torch.equal(result.weights[0], weights[0])


def test_every_arm_moves_and_rescaling_keeps_the_outputs(trained):
    weights, draws = trained
    before, stack, made = forward(weights, draws[0].x, LEAKY), tuple(W[None] for W in weights), {}
    for arm in figure4.arms(replace(figure4.PRESETS["quick"], directions=5))[1:]:
        made[arm.name] = moved = arm.move(stack, draws[0], *([made[arm.follows]] if arm.follows else []))
        assert moves.distance(moved.weights, stack) > 0 and torch.stack(moved[1:]).isfinite().all()
        if arm.name.endswith("rescaling"):
            assert_close(forward(moved.weights, draws[0].x, LEAKY)[0], before, rtol=1e-5, atol=1e-5)
        if arm.follows:
            assert_close(moves.distance(moved.weights, stack), made[arm.follows].size, rtol=0.05, atol=0)


@pytest.mark.parametrize("length", (0.0, 0.3, 3.0))
def test_the_random_control_moves_as_far_as_asked(trained, length):
    weights, draws = trained
    lengths = torch.full((10,), length)
    ensemble, x = tuple(W.expand(10, *W.shape) for W in weights), torch.stack([d.x for d in draws])
    moved = moves.random_move(ensemble, x, lengths, LEAKY, torch.Generator().manual_seed(0))
    assert_close(moves.distance(moved, ensemble), lengths, rtol=0.02, atol=0)
    if length:
        assert len({W[0, 0].item() for W in moved[1]}) == 10  # every member its own element


def test_a_diverged_run_stays_where_it_is(trained):
    weights, draws = trained
    for arm in figure4.arms(figure4.PRESETS["tiny"])[1:]:
        if not arm.follows:
            moved = arm.move(tuple(W[None] * torch.nan for W in weights), draws[0])
            assert moved.objective_after.isnan().all() and moved.size == 0


def test_a_diverged_member_is_reported_as_such(trained):
    weights, draws = trained
    meter = moves.Meter(draws[0].x, torch.arange(500) % 10, DIMS, 1, 2, torch.Generator())
    stack = tuple(torch.stack([W, W * torch.nan]) for W in weights)
    values = meter(stack)
    assert values[0].isfinite().all() and values[1].isnan().all()
    assert_close(values[0, 2], meter.loss_fn(weights))
    assert_close(values[0, 0], meter.phi(weights))


def test_a_member_that_explodes_is_measured_and_stops_nobody(trained):
    weights, draws = trained
    meter = moves.Meter(draws[0].x, torch.arange(500) % 10, DIMS, 1, 2, torch.Generator())
    huge = [W * scale for W, scale in zip(weights, (1e17, 1e24, 1e27))]
    values = meter(tuple(torch.stack(pair) for pair in zip(weights, huge)))
    assert_close(values[:1], meter(tuple(W[None] for W in weights)))
    assert (values[1, [1, 4]] >= 0).all(), "both ψ"


# ---------------------------------------------------------------------------------------------------------------------
# The script


def run_tiny(output, *options):
    functions = (figure4.experiment, lambda *_: None, figure4.report, figure4.judge)
    script = (figure4.__file__, figure4.__doc__, figure4.PRESETS, *functions)
    one_process = ("--jobs", "1")  # so that a test sees the parts that it computes
    cli.main(*script, argv=["--preset", "tiny", "--output", str(output), "--quiet", *one_process, *options])


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    teleporter, seeds = figure4.teleporter, []

    def counting(stack, data, dims, seed, s):
        seeds.append(seed)
        if len(seeds) == 2:  # Ctrl-C in the second run's teleports
            raise KeyboardInterrupt
        return teleporter(stack, data, dims, seed, s)

    monkeypatch.setattr(figure4, "teleporter", counting)
    with pytest.raises(SystemExit) as stop:
        run_tiny(tmp_path / "a")
    assert stop.value.code == 130 and not list((tmp_path / "a" / "results" / "tiny").glob("*.npz"))
    run_tiny(tmp_path / "a")
    assert seeds == [54321, 108642, 108642]
    run_tiny(tmp_path / "b")
    resumed, straight = (read_results(tmp_path / k / "results" / "tiny") for k in "ab")
    for name, arrays in straight[1].items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, resumed[1][name][key], err_msg=key)
        assert resumed[0][name]["metrics"] == straight[0][name]["metrics"]


def test_a_step_too_long_to_be_made_is_not_made(tmp_path, monkeypatch):
    """At an absurd step size the group element is singular: the arm stays, the others go on, the table says 0 moved."""
    monkeypatch.setitem(figure4.RATES, "mnist-mini", (1e-2, {"sharpness": (1e30, 1e30), "curvature": (2e-1, 5e-2)}))
    run_tiny(tmp_path)
    name = "teleport_sharpness_curvature_mnist-mini"
    arrays = np.load(tmp_path / "results/tiny" / f"{name}.npz")
    metrics = json.loads((tmp_path / "results/tiny" / f"{name}.json").read_text())["metrics"]
    for a, way in enumerate(figure4.WAYS, start=1):
        if way.objective == "sharpness" and way.action == "preactivation":
            assert metrics[way.key]["moved_as_asked"] == 0 and metrics[way.key]["largest_drift"] == [0, 0]
            assert np.array_equal(arrays["train_loss"][a], arrays["train_loss"][0])
        if way.objective == "curvature" and way.action == "preactivation":
            assert metrics[way.key]["moved_as_asked"] == metrics[way.key]["teleports"]


def test_a_teleport_batch_larger_than_the_dataset_is_one_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(figure4.PRESETS, "tiny", replace(figure4.PRESETS["tiny"], teleport_batch=401))
    with pytest.raises(SystemExit) as stop:
        run_tiny(tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "401" in error and "400 training" in error


def test_wrong_options_are_one_line(tmp_path):
    for options in (("--dataset", "letters"), ("--seeds", "0"), ("--preset", "huge")):
        status, _, error = run_inside("teleport_sharpness_curvature.py", *options, output=tmp_path)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_table_says_what_the_arrays_say(tiny):
    run = tiny("teleport_sharpness_curvature.py")[0]
    (name,) = run.arrays
    arrays, metrics = run.arrays[name], run.records[name]["metrics"]
    assert arrays["test_loss"].shape == (21, 2, 4) and arrays["loss"].shape == (21, 2, 2, 2, 2)
    assert np.array_equal(arrays["loss"][0, :, :, 0], arrays["loss"][0, :, :, 1])  # no teleport: before is after
    shared = arrays["test_loss"][:, :, :2]
    assert np.array_equal(shared, np.broadcast_to(shared[:1], shared.shape))  # the first epochs are shared
    for a, way in enumerate(figure4.WAYS, start=1):
        m, k = metrics[way.key], figure4.teleports(way, figure4.PRESETS["tiny"])
        before, after = arrays["objective"][a, :, :k, 0], arrays["objective"][a, :, :k, 1]
        assert m["teleports"] == 2 * k and m["moved_as_asked"] == ((after > before) == way.maximize).sum()
        drift = abs(arrays["loss"][a, :, :k, 1] / arrays["loss"][a, :, :k, 0] - 1).max((0, 1))
        if way.action == "rescaling":
            assert drift.max() < 1e-6
        if way.action == "backtracking":
            assert drift[0] < 1.01e-3  # on the teleport's batch
        if way.action == "preactivation":
            np.testing.assert_allclose(m["largest_drift"], drift, atol=1e-6)
    tuned = {key: arrays[f"tuned/{key}"] for key in ("test_loss", "phi", "psi")}
    assert tuned["test_loss"].shape == (5, 2, 2, 4) and tuned["phi"].shape == tuned["psi"].shape == (5, 2, 2, 2, 2)
    assert np.array_equal(tuned["phi"][0, ..., 0], tuned["phi"][0, ..., 1])  # the baseline is not moved
    for a, key, up in ((1, "psi", True), (4, "phi", False)):  # backtracking, rescaling
        assert ((tuned[key][a, ..., 1] > tuned[key][a, ..., 0]) == up).mean() > 0.7, key
    for key in ("phi", "psi", "psi_table", "loss"):  # at the end of training
        assert arrays[f"{key}_end"].shape == (21, 2) and not np.array_equal(
            arrays[f"{key}_end"][0], arrays[key][0, :, -1, 1, 1]
        )


def test_a_stack_with_rates_is_moved_member_by_member(trained):
    """Each at its own rate goes where it would have gone alone; one that diverged stays where it is."""
    weights, draws = trained
    arm = next(arm for arm in figure4.arms(PAPER) if arm.name == "curvature_up_backtracking")
    lame = [W * torch.nan for W in weights]
    moved = arm.move([torch.stack([W, V, 1.1 * W])[:, None] for W, V in zip(weights, lame)], draws[0])
    alone = [arm.move([f * W[None] for W in weights], draws[0]) for f in (1.0, 1.1)]
    assert moved.size.shape == (3, 1) and moved.size[1] == 0 and moved.objective_after[1].isnan()
    for W, first, last in zip(moved.weights, *(each.weights for each in alone)):
        assert_close(W[[0, 2], 0], torch.stack([first[0], last[0]]))


def test_an_arm_is_trained_as_if_alone(tmp_path):
    """Whoever is tuned beside it, and at whichever rates: random elements are as large as at its own."""
    s, data = figure4.PRESETS["tiny"], load("mnist-mini")
    data = data._replace(x=data.x[:400], y=data.y[:400])
    run = Run("experiment", s, torch.device("cpu"), tmp_path, quiet=True)
    factors = np.array([[1.0, 3.0], [9.0, 0.3], [2.0, 5.0], [1.0, 3.0], [1.0, 7.0]])
    everyone = ways.one_run(run, data, DIMS, range(5), factors, 54321, s)
    for a in range(5):
        alone = ways.one_run(run, data, DIMS, [a], factors[[a]], 54321, s)
        for key in ("test_loss", "phi", "psi"):
            assert_close(alone[key][0], everyone[key][a], rtol=1e-4, atol=0, equal_nan=True, msg=f"{a} {key}")


def test_as_many_teleports_as_published():
    """On MNIST and Fashion-MNIST up to 5, on CIFAR-10 up to 10, after 21 of 41 epochs; tiny has its own."""
    numbers = {d: [figure4.teleports(way, replace(PAPER, dataset=d)) for way in EXACT] for d in ("MNIST", "CIFAR10")}
    assert numbers == {"MNIST": [2, 5, 5, 5], "CIFAR10": [2, 10, 10, 5]}
    assert (PAPER.epochs, PAPER.teleport_epoch) == (41, 21)
    assert [figure4.teleports(way, figure4.PRESETS["tiny"]) for way in EXACT] == [1, 2, 2, 1]
