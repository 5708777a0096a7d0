"""Figure 4's parts: the curvature of the pre-activation curve, the fast sharpness objective, and the script's moves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import read_results, run_inside
from torch.testing import assert_close

import teleport as tp
import teleport_sharpness_curvature as figure4
from common import cli, published
from common.data import load
from common.mlp import StackedMLP, cross_entropy, initial_weights
from common.sharpness import Sharpness
from teleport import (
    IDENTITY,
    RELU,
    SIGMOID,
    TANH,
    curve_curvature,
    forward,
    hidden_layers,
    leaky_relu,
    preactivation_action,
    sharpness,
    teleport,
)

LEAKY = leaky_relu(0.1)


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def pair(units=5, inputs=6, n=12, outputs=4, E=()):
    return uniform(*E, outputs, units), uniform(*E, units, inputs, seed=1), uniform(*E, inputs, n, seed=2)


def golden_pair(golden):
    c = golden("curvature")
    weights = (c["W0"], c["W1"], c["W2"])
    h = hidden_layers(weights, c["X"], LEAKY)
    return c, weights[2], weights[1], h[1]


# ---------------------------------------------------------------------------------------------------------------------
# curve_curvature


def test_curve_curvature_is_the_published_one(golden):
    c, U, V, h = golden_pair(golden)
    kappa, slope = curve_curvature(U, V, h, c["curve_M"], LEAKY)
    assert_close(kappa, c["curve_kappa"], rtol=1e-9, atol=0)
    assert_close(slope, c["curve_dkappa"], rtol=1e-9, atol=0)


def test_published_and_minimal_change_curves_coincide_at_full_row_rank(golden):
    """So the curvature teleport needs no published arm; with fewer samples than units they differ."""
    c, U, V, h = golden_pair(golden)
    for t in (-0.3, 0.0, 0.2):
        g = torch.linalg.matrix_exp(t * c["curve_M"])
        ours, theirs = preactivation_action(U, V, h, g, LEAKY), published.preactivation_action(U, V, h, g, LEAKY)
        assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-10)
    few = h[:, :3]
    g = torch.linalg.matrix_exp(0.2 * c["curve_M"])
    ours = preactivation_action(U, V, few, g, LEAKY)[0]
    assert (ours - published.preactivation_action(U, V, few, g, LEAKY)[0]).abs().max() > 0.01


@pytest.mark.parametrize("n", (3, 5, 12))  # fewer samples than units, as many, more
@pytest.mark.parametrize("activation", (LEAKY, IDENTITY, TANH), ids=lambda a: a.name)
@pytest.mark.parametrize("t", (0.0, 0.4))
def test_derivatives_of_the_action_curve_match_finite_differences(n, activation, t):
    U, V, h = pair(n=n)
    M = uniform(5, 5, seed=3) / 2
    derivatives = tp._action_curve(U, V, h, M, activation, torch.tensor(t, dtype=torch.float64))

    def curve(s):
        return preactivation_action(U, V, h, torch.linalg.matrix_exp((t + s) * M), activation)

    e = 1e-3
    points = [curve(k * e) for k in (-3, -2, -1, 0, 1, 2, 3)]
    stencils = ((0, 1, -8, 0, 8, -1, 0), (0, -1, 16, -30, 16, -1, 0), (1, -8, 13, 0, -13, 8, -1))
    for order, (stencil, divisor) in enumerate(zip(stencils, (12, 12, 8)), start=1):
        for i in (0, 1):
            expected = sum(w * p[i] for w, p in zip(stencil, points)) / divisor / e**order
            scale = expected.abs().max().item()
            assert_close(derivatives[order - 1][i], expected, rtol=0, atol=1e-5 * scale + 1e-8)


@pytest.mark.parametrize("n", (3, 12))
@pytest.mark.parametrize("activation", (LEAKY, RELU, SIGMOID), ids=lambda a: a.name)
def test_slope_of_the_curvature_matches_finite_differences(n, activation):
    U, V, h = pair(n=n)
    M = uniform(5, 5, seed=3) / 2

    def kappa(t):
        return curve_curvature(U, V, h, M, activation, t)[0]

    e = 1e-5
    expected = (kappa(0.2 + e) - kappa(0.2 - e)) / (2 * e)
    assert_close(curve_curvature(U, V, h, M, activation, 0.2)[1], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", (3, 12))
def test_closed_form_equals_nested_forward_mode(n):
    U, V, h = pair(n=n, E=(2,))
    M, t = uniform(5, 5, seed=3), torch.tensor([0.0, 0.3], dtype=torch.float64)
    closed = tp._action_curve(U, V, h, M, LEAKY, t)
    g = torch.linalg.matrix_exp(t[:, None, None] * M)
    for mine, reference in zip(closed, tp._action_curve_forward_mode(U, V, h, M, LEAKY, g)):
        for a, b in zip(mine, reference):
            assert_close(a, b, rtol=1e-8, atol=1e-9 * b.abs().max().item())


def test_a_dead_unit_takes_the_forward_mode_and_stays_dead():
    U, V, h = pair()
    V[2], h = -1.0, h.abs()  # unit 2 is off for every sample: a row of zeros, no full rank
    M = uniform(5, 5, seed=3) / 2
    M[2] = 0
    M[2, 2] = 0.3
    kappa, slope = curve_curvature(U, V, h, M, RELU)
    e = 1e-5
    near = [curve_curvature(U, V, h, M, RELU, s * e)[0] for s in (-1, 1)]
    assert kappa > 0
    assert_close(slope, (near[1] - near[0]) / (2 * e), rtol=1e-6, atol=1e-8)


def test_curvature_of_a_curve_worked_by_hand():
    """One unit, one weight each: the curve (U e^-tM, V e^tM), a hyperbola."""
    U, V, h, M = (torch.tensor([[v]], dtype=torch.float64) for v in (2.0, 3.0, 1.0, 0.7))
    t = torch.tensor(0.25, dtype=torch.float64)
    u, v = 2 * torch.exp(-0.7 * t), 3 * torch.exp(0.7 * t)
    kappa, slope = curve_curvature(U, V, h, M, LEAKY, t)
    assert_close(kappa, 2 * u * v / (u**2 + v**2) ** 1.5)
    assert_close(slope, -3 * kappa * 0.7 * (v**2 - u**2) / (u**2 + v**2))


def test_ensembles_give_each_member_its_own_curvature():
    U, V, h = pair(E=(2, 3))
    M, t = uniform(2, 3, 5, 5, seed=3), uniform(2, 3, seed=4)
    kappa, slope = curve_curvature(U, V, h, M, LEAKY, t)
    assert kappa.shape == slope.shape == (2, 3)
    for i, j in ((0, 0), (1, 2)):
        one = curve_curvature(U[i, j], V[i, j], h[i, j], M[i, j], LEAKY, t[i, j])
        assert_close(torch.stack(one), torch.stack((kappa[i, j], slope[i, j])), rtol=1e-8, atol=1e-9)


def test_curve_curvature_rejects_bad_input():
    U, V, h = pair()
    M = uniform(5, 5, seed=3)
    with pytest.raises(ValueError, match="M is 4×4, expected 5×5"):
        curve_curvature(U, V, h, M[:4, :4], LEAKY)
    with pytest.raises(ValueError, match="stands still"):
        curve_curvature(U, V, h, 0 * M, LEAKY)
    with pytest.raises(ValueError, match="M has values that are not finite"):
        curve_curvature(U, V, h, M * float("nan"), LEAKY)
    with pytest.raises(ValueError, match="t must be finite"):
        curve_curvature(U, V, h, M, LEAKY, float("inf"))
    with pytest.raises(ValueError, match="do not chain"):
        curve_curvature(U[:, :4], V, h, M, LEAKY)


# ---------------------------------------------------------------------------------------------------------------------
# Sharpness: the objective with its gradient written out


def batch(dims=(7, 6, 5, 4), n=11, k=9, E=()):
    weights = tuple(uniform(*E, o, i, seed=m) for m, (i, o) in enumerate(zip(dims, dims[1:])))
    x, labels = uniform(dims[0], n, seed=10), torch.arange(n) % dims[-1]
    directions = uniform(k, sum(o * i for i, o in zip(dims, dims[1:])), seed=11)
    return weights, x, labels, directions, torch.linspace(0.1, 0.9, k, dtype=torch.float64)


def loss_on(x, labels, activation=LEAKY):
    return lambda weights: cross_entropy(forward(weights, x, activation), labels)


@pytest.mark.parametrize("E", ((), (2, 1)))
@pytest.mark.parametrize("activation", (LEAKY, TANH), ids=lambda a: a.name)
@pytest.mark.parametrize("dims", ((7, 6, 5, 4), (7, 6, 4), (5, 6, 5, 6, 4)), ids=len)
def test_sharpness_objective_is_sharpness_and_so_is_its_gradient(E, activation, dims):
    weights, x, labels, directions, radii = batch(dims, E=E)
    objective = Sharpness(x, labels, directions, radii, dims, activation, chunk=4)  # 9 copies: a last chunk of one
    values, gradients = [], []
    for phi in (objective, lambda w: sharpness(w, loss_on(x, labels, activation), directions, radii)):
        independent = [W.clone().requires_grad_() for W in weights]
        values.append(phi(independent))
        gradients.append(torch.autograd.grad((values[-1] * 2).sum(), independent))
    assert values[0].shape == E
    assert_close(values[0], values[1], rtol=1e-12, atol=0)
    for mine, reference in zip(*gradients):
        assert_close(mine, reference, rtol=1e-10, atol=1e-14)


def test_sharpness_objective_reproduces_the_published_numbers(golden):
    s = golden("sharpness")
    dims = (8, 6, 5, 4)
    objective = Sharpness(s["X"], s["Y"], s["directions"], s["radii"], dims, LEAKY)
    assert_close(objective((s["W0"], s["W1"], s["W2"])), s["mean"], rtol=1e-12, atol=0)


def test_sharpness_objective_rejects_bad_input():
    weights, x, labels, directions, radii = batch()
    dims = (7, 6, 5, 4)
    with pytest.raises(ValueError, match="dims"):
        Sharpness(x, labels, directions[:, :-1], radii, dims, LEAKY)
    with pytest.raises(ValueError, match="dims"):
        Sharpness(x, labels, directions, radii[:-1], dims, LEAKY)
    with pytest.raises(ValueError, match="dims"):
        Sharpness(x[:-1], labels, directions, radii, dims, LEAKY)
    for bad in (0.0, float("nan")):
        spoilt = directions.clone()
        spoilt[3] = bad
        with pytest.raises(ValueError, match="directions"):
            Sharpness(x, labels, spoilt, radii, dims, LEAKY)
    with pytest.raises(ValueError, match="radii"):
        Sharpness(x, labels, directions, radii * float("inf"), dims, LEAKY)


# ---------------------------------------------------------------------------------------------------------------------
# The published teleports


def test_published_sharpness_teleport_is_the_published_recipe():
    """Redone step by step as published: two layers, directions new in every step, stale hidden layers, the sum / 10."""
    (W1, W2, W3), x, labels, _, radii = batch(n=30)
    draws = [uniform(9, W1.numel() + W2.numel() + W3.numel(), seed=20 + i) for i in range(3)]
    objectives = iter([Sharpness(x, labels, d, radii, (7, 6, 5, 4), LEAKY) for d in draws])
    loss_fn = loss_on(x, labels)
    result = published.teleport_sharpness(
        (W1, W2, W3), x, loss_fn, lambda: next(objectives), activation=LEAKY, lr=0.3, steps=3, maximize=False
    )

    def act(W, h, T):
        W = list(W)
        for m in (0, 1):
            V = W[m] + T[m] @ W[m]
            W[m + 1] = W[m + 1] @ LEAKY.f(W[m] @ h[m]) @ torch.linalg.pinv(LEAKY.f(V @ h[m]))
            W[m] = V
        return W

    W, h = [W1, W2, W3], hidden_layers((W1, W2, W3), x, LEAKY)
    for d in draws:
        T = [torch.zeros(6, 6).double().requires_grad_(), torch.zeros(5, 5).double().requires_grad_()]
        phi = sharpness(act(W, h, T), loss_fn, d, radii) * 9 / 10
        T = [-0.3 * G for G in torch.autograd.grad(phi, T)]
        W = act(W, h, T)
        h = [x, h[1] + T[0] @ h[1], h[2] + T[1] @ h[2]]
    for mine, theirs in zip(result.weights, W):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    phi = Sharpness(x, labels, draws[0], radii, (7, 6, 5, 4), LEAKY)
    assert_close(result.objective_before, phi((W1, W2, W3)))
    assert_close(result.objective_after, phi(W))


def test_published_sharpness_teleport_stops_above_the_cap_in_both_directions():
    weights, x, labels, directions, radii = batch(n=30)
    phi = Sharpness(x, labels, directions, radii, (7, 6, 5, 4), LEAKY)
    value, options = phi(weights).item(), dict(activation=LEAKY, lr=0.1, steps=2)
    for maximize in (True, False):
        for cap, moves in ((0.89 * value, False), (0.91 * value, True)):  # it sees 0.9 φ
            result = published.teleport_sharpness(
                weights, x, loss_on(x, labels), lambda: phi, maximize=maximize, cap=cap, **options
            )
            assert (result.objective_after != result.objective_before) == moves


def test_published_curvature_teleport_goes_along_the_curve(golden):
    c = golden("curvature")
    weights, M = (c["W0"], c["W1"], c["W2"]), c["curve_M"]
    h = hidden_layers(weights, c["X"], LEAKY)[1]
    up = published.teleport_curvature(weights, c["X"], M, activation=LEAKY, lr=0.1)
    t = 0.1 * c["curve_dkappa"]
    assert_close(up[1], torch.linalg.matrix_exp(t * M) @ c["W1"])
    assert_close(up[2], preactivation_action(c["W2"], c["W1"], h, torch.linalg.matrix_exp(t * M), LEAKY)[0])
    down = published.teleport_curvature(weights, c["X"], M, activation=LEAKY, lr=0.1, maximize=False)
    assert_close(down[1], torch.linalg.matrix_exp(-t * M) @ c["W1"])
    lost = published.teleport_curvature(weights, c["X"], M, activation=LEAKY, lr=-1e5)
    assert lost[1].isnan().all() and lost[2].isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# The script's moves, on a network trained as Figure 4's


@pytest.fixture(scope="module")
def trained():
    """Weights (784-16-10-10), data and ten draws: batch, φ with new directions, M."""
    data = load("mnist-mini")
    net = StackedMLP(initial_weights((784, 16, 10, 10), [54321]), lr=1e-2)
    for _ in range(8):
        net.train_epoch(data.x, data.y, 20)
    weights = tuple(W[0] for W in net.weights)
    settings = replace(figure4.PRESETS["quick"], directions=5)
    draws = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x, labels = figure4.random_batch(data.x, data.y, 500, generator)
        draws.append(figure4.Mover(x, labels, weights, generator, settings))
    return weights, draws


@pytest.mark.parametrize("maximize", (True, False), ids=("up", "down"))
@pytest.mark.parametrize("backtracking", (False, True))
def test_sharpness_goes_where_it_is_sent(trained, maximize, backtracking):
    """At the published step size 9 of 10 times, with backtracking always, and then the loss stays within 1e-3."""
    weights, draws = trained
    moved = 0
    for d in draws:
        result = teleport(
            weights, d.x, d.loss_fn, objective=d.phi, action=preactivation_action, activation=figure4.ACTIVATION,
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
        moved, t = figure4.curvature_teleport(weights, d.x, d.loss_fn, d.M, lr, tolerance=0.01)
        before, after = (figure4.kappa_along(d.M, W, d.x) for W in (weights, moved))
        assert t != 0 and (after > before) == maximize
        assert abs(d.loss_fn(moved) / d.loss_fn(weights) - 1) <= 0.01
        assert torch.equal(moved[0], weights[0])


def test_every_arm_moves_and_rescaling_keeps_the_outputs(trained):
    weights, draws = trained
    d = mover = draws[0]
    before = forward(weights, d.x, LEAKY)
    for arm in figure4.ARMS:
        moved, objective = mover(arm, weights)
        assert figure4.distance(moved, weights) > 0 and objective.shape == (2,) and objective.isfinite().all()
        if arm.kind == "rescaling":
            assert_close(forward(moved, d.x, LEAKY), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", (0.0, 0.3, 3.0))
def test_the_random_control_moves_as_far_as_asked(trained, length):
    weights, draws = trained
    moved = [figure4.random_move(weights, d.x, torch.tensor(length), torch.Generator().manual_seed(0)) for d in draws]
    gone = torch.stack([figure4.distance(m, weights) for m in moved])
    assert_close(gone, torch.full((10,), length), rtol=0.02, atol=0)


def test_a_diverged_member_is_reported_as_such(trained):
    weights, draws = trained
    meter = figure4.Meter(draws[0].x, torch.arange(500) % 10, weights, torch.Generator(), figure4.PRESETS["tiny"])
    stack = tuple(torch.stack([W, W * torch.nan]) for W in weights)
    values = meter(stack)
    assert values[0].isfinite().all() and values[1].isnan().all()
    assert_close(values[0, 2], meter.loss_fn(weights))
    assert_close(values[0, 0], meter.phi(weights))


# ---------------------------------------------------------------------------------------------------------------------
# The script


def run_tiny(output, *options):
    functions = (figure4.experiment, lambda *_: None, figure4.report, figure4.judge)
    script = (figure4.__file__, figure4.__doc__, figure4.PRESETS, *functions)
    cli.main(*script, argv=["--preset", "tiny", "--output", str(output), "--quiet", *options])


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    teleporter, seeds = figure4.teleporter, []

    def counting(run, net, data, seed):
        seeds.append(seed)
        if len(seeds) == 2:  # Ctrl-C in the second run's teleports
            raise KeyboardInterrupt
        return teleporter(run, net, data, seed)

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
    monkeypatch.setitem(figure4.RATES, "MNIST", (1e-2, {"sharpness": (1e30, 1e30), "curvature": (2e-1, 5e-2)}))
    run_tiny(tmp_path)
    name = "teleport_sharpness_curvature_mnist-mini"
    arrays = np.load(tmp_path / "results/tiny" / f"{name}.npz")
    metrics = json.loads((tmp_path / "results/tiny" / f"{name}.json").read_text())["metrics"]
    for a, arm in enumerate(figure4.ARMS, start=1):
        if arm.objective == "sharpness" and arm.kind in ("teleport", "random"):
            assert metrics[arm.key]["moved_as_asked"] == 0 and metrics[arm.key]["largest_drift"] == [0, 0]
            assert np.array_equal(arrays["train_loss"][a], arrays["train_loss"][0])
        if arm.objective == "curvature" and arm.kind == "teleport":
            assert metrics[arm.key]["moved_as_asked"] == metrics[arm.key]["teleports"]


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
    assert arrays["test_loss"].shape == (17, 2, 4) and arrays["loss"].shape == (17, 2, 2, 2, 2)
    assert np.array_equal(arrays["loss"][0, :, :, 0], arrays["loss"][0, :, :, 1])  # no teleport: before is after
    shared = arrays["test_loss"][:, :, :2]
    assert np.array_equal(shared, np.broadcast_to(shared[:1], shared.shape))  # the first epochs are shared
    for a, arm in enumerate(figure4.ARMS, start=1):
        m, k = metrics[arm.key], figure4.teleports(arm, figure4.PRESETS["tiny"])
        before, after = arrays["objective"][a, :, :k, 0], arrays["objective"][a, :, :k, 1]
        assert m["teleports"] == 2 * k and m["moved_as_asked"] == ((after > before) == arm.maximize).sum()
        drift = abs(arrays["loss"][a, :, :k, 1] / arrays["loss"][a, :, :k, 0] - 1).max((0, 1))
        if arm.kind == "rescaling":
            assert drift.max() < 1e-6
        if arm.kind == "teleport":
            np.testing.assert_allclose(m["largest_drift"], drift, atol=1e-6)
