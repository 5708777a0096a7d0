"""teleport.py refuses what it cannot use, by name, and survives steps and candidates that go too far."""

import math

import pytest
import torch
from test_teleport import ACTIONS, LEAKY, data, losses, network

from teleport import (
    RELU,
    TANH,
    apply_to_layers,
    curvature,
    curve_curvature,
    forward,
    hidden_layers,
    leaky_relu,
    postactivation_action,
    preactivation_action,
    random_search,
    rescaling_action,
    sharpness,
    squared_gradient_norm,
    teleport,
)

pytestmark = pytest.mark.filterwarnings("error")

NOT_POSITIVE = (0.0, -1.0, math.nan, math.inf, -math.inf)
NOT_A_COUNT = (0, -1, 1.5)
DIMS = (8, 6, 5, 4)


def bad(message, function, *arguments, **options):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def ascend(weights, x, y, **options):
    kept = dict(objective=squared_gradient_norm, action=rescaling_action, activation=LEAKY, lr=1e-2, steps=2)
    return teleport(weights, x, losses(x, y), **{**kept, **options})


def search(weights, x, y, **options):
    kept = dict(objective=squared_gradient_norm, action=rescaling_action, activation=LEAKY, candidates=4, scale=0.1)
    return random_search(weights, x, losses(x, y), generator=torch.Generator().manual_seed(0), **{**kept, **options})


def perturbed(weights, x, y, directions=None, radii=None, **options):
    P = sum(W.shape[-2:].numel() for W in weights)
    directions = torch.ones(3, P, dtype=x.dtype) if directions is None else directions
    radii = torch.ones(3, dtype=x.dtype) if radii is None else radii
    return sharpness(weights, losses(x, y), directions, radii, **options)


def test_bad_input_is_named():
    weights = network(17, (8, 6, 5, 4))
    V, U = weights[0], weights[1]
    x, y = data(17, 8, 5, 4)
    nan = V.clone()
    nan[0, 0] = math.nan
    singular = torch.ones(6, 6).double()
    eye = torch.eye(6).double()
    bad("do not chain", forward, (V, weights[2]), x, LEAKY)
    bad("x 5×5 does not fit", forward, weights, x[:5], LEAKY)
    bad("W_1 has values that are not finite", forward, (nan, *weights[1:]), x, LEAKY)
    bad("x has values that are not finite", hidden_layers, weights, x / 0, LEAKY)
    for action in (preactivation_action, postactivation_action):
        bad("g is singular", action, U, V, x, singular, LEAKY)
        bad("g is singular", action, U, V, x, torch.zeros(6, 6).double(), LEAKY)
        bad("g is 5×5, expected 6×6", action, U, V, x, torch.eye(5).double(), LEAKY)
        bad("V has values that are not finite", action, U, nan, x, eye, LEAKY)
        bad("g has values that are not finite", action, U, V, x, eye * math.inf, LEAKY)
        bad("do not chain", action, weights[2], V, x, eye, LEAKY)
    bad("no inverse", postactivation_action, U, V, x, eye, RELU)
    bad("range of tanh", postactivation_action, U, V, x, 100 * eye, TANH)
    bad("not positively homogeneous", rescaling_action, U, V, torch.ones(6), TANH)
    bad("s must be positive", rescaling_action, U, V, -torch.ones(6).double(), LEAKY)
    bad("s must be positive", rescaling_action, U, V, torch.full((6,), math.nan).double(), LEAKY)
    bad("do not chain", rescaling_action, U, V, torch.ones(5).double(), LEAKY)
    bad("1 given, the network has 2 hidden layers", apply_to_layers, weights, x, [eye], preactivation_action, LEAKY)
    bad("slope", leaky_relu, -0.1)
    bad("retraction", ascend, weights, x, y, retraction="cayley")
    bad("bound", ascend, weights, x, y, action=preactivation_action, bound=2.0)
    bad("W_1 has values", ascend, (nan, *weights[1:]), x, y)
    bad("objective: its gradient", ascend, weights, x, y, objective=lambda w: w[0].sum() / 0)


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_a_number_that_is_not_positive_and_finite_is_named(value):
    weights, (x, y) = network(1, DIMS, (2,)), data(1, 8, 5, 4)
    for name in ("lr", "cap", "bound", "tolerance"):
        bad(f"^{name}", ascend, weights, x, y, **{name: value})
        bad(f"^{name}", ascend, weights, x, y, **{name: value}, backtracking=True)
    for name in ("lr", "cap"):
        each = torch.tensor([1.0, value or -1.0])  # 0 as one member's lr leaves that member alone
        bad(f"^{name}", ascend, weights, x, y, **{name: each})
    bad("^scale", search, weights, x, y, scale=value)
    bad("^radii", perturbed, weights, x, y, radii=torch.tensor([1.0, value, 1.0], dtype=x.dtype))


@pytest.mark.parametrize("value", NOT_A_COUNT)
def test_a_count_that_is_not_a_positive_whole_number_is_named(value):
    weights, (x, y) = network(2, DIMS), data(2, 8, 5, 4)
    bad("^steps", ascend, weights, x, y, steps=value)
    bad("^candidates", search, weights, x, y, candidates=value)
    bad("^chunk_size", search, weights, x, y, chunk_size=value)
    bad("^chunk_size", perturbed, weights, x, y, chunk_size=value)


def test_what_does_not_fit_the_ensemble_is_named():
    weights, (x, y) = network(3, DIMS, (2,)), data(3, 8, 5, 4)
    one = network(3, DIMS)
    for run in (ascend, search):
        bad("ensemble shapes differ", run, (one[0], *weights[1:]), x, y)
        bad(r"objective must return one number per member, .*\(2,\), returned \(\)", run, weights, x, y,
            objective=lambda w: w[0].square().sum())  # fmt: skip
        bad("objective must return .*returned float", run, weights, x, y, objective=lambda w: 1.0)
    bad("loss_fn must return", teleport, weights, x, lambda w: w[0].sum(), objective=squared_gradient_norm,
        action=rescaling_action, activation=LEAKY, lr=1.0, steps=1)  # fmt: skip
    for name in ("lr", "cap"):
        bad(f"^{name} must be a number or one per member", ascend, weights, x, y, **{name: torch.ones(3)})


def test_nothing_is_not_enough():
    """No samples, matrices, layers, directions or members' elements: an error, where NaN came out before."""
    weights, (x, y) = network(4, DIMS), data(4, 8, 5, 4)
    V, U, eye, none = weights[0], weights[1], torch.eye(6, dtype=torch.float64), x[:, :0]
    bad("x has no samples", forward, weights, none, LEAKY)
    bad("x has no samples", curvature, weights, none, [eye, eye[:5, :5]], LEAKY)
    for action in (preactivation_action, postactivation_action):
        bad("h has no samples", action, U, V, none, eye, LEAKY)
    bad("h has no samples", curve_curvature, U, V, none, eye, LEAKY)
    bad("weights: none given", squared_gradient_norm, (), losses(x, y))
    bad("directions 0×98", perturbed, weights, x, y, torch.ones(0, 98, dtype=x.dtype), torch.ones(0, dtype=x.dtype))
    bad("layers", search, weights, x, y, layers=[])
    bad("layers", search, weights, x, y, layers=[2])
    bad("draw must return 4 elements 6, returned 3×6", search, weights, x, y, draw=lambda i, n, *_: i.expand(n - 1, 6))
    bad("x: only rescaling_action", apply_to_layers, weights, None, [eye, None], preactivation_action, LEAKY)
    s = torch.full((6,), 2.0, dtype=torch.float64)
    with_x, without = (apply_to_layers(weights, X, [s, None], rescaling_action, LEAKY) for X in (x, None))
    assert all(torch.equal(a, b) for a, b in zip(with_x, without))


# ------------------------------------------------------------------------------- steps and candidates that go too far


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("lr", [1e200, 1e308])
def test_an_lr_that_no_step_survives_leaves_the_network_where_it_is(action, lr):
    """30 halvings of it are still too much for every action: an error of the code's own before."""
    weights, (x, y) = network(5, DIMS, (3,)), data(5, 8, 5, 4)
    stayed = ascend(weights, x, y, action=action, lr=lr, backtracking=True)
    assert all(torch.equal(a, b) for a, b in zip(stayed.weights, weights))
    assert not stayed.moved.any() and (stayed.drift == 0).all()
    assert torch.equal(stayed.objective_after, stayed.objective_before)
    went = ascend(weights, x, y, action=action, lr=1e-3, backtracking=True)
    assert went.moved.all() and not any(torch.equal(a, b) for a, b in zip(went.weights, weights))


@pytest.mark.parametrize("action", ACTIONS)
def test_a_member_that_goes_too_far_is_halved_alone(action):
    """The other members' steps, and so their results, are those they would have had without it."""
    weights, (x, y) = network(6, DIMS, (3,)), data(6, 8, 5, 4)
    rates = torch.tensor([1e-3, 1e305, 2e-3], dtype=torch.float64)
    moved = ascend(weights, x, y, action=action, lr=rates, steps=1, backtracking=True)
    assert moved.moved.tolist() == [True, False, True]
    for i in (0, 2):
        alone = ascend(tuple(W[i] for W in weights), x, y, action=action, lr=rates[i], steps=1, backtracking=True)
        for a, b in zip(moved.weights, alone.weights):
            torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-12)


def test_teleportation_is_its_five_fields():
    weights, (x, y) = network(7, DIMS), data(7, 8, 5, 4)
    for result in (ascend(weights, x, y), search(weights, x, y)):
        moved, loss_before, loss_after, objective_before, objective_after = result
        assert moved is result.weights and torch.equal(loss_after - loss_before, result.drift)
        assert result.moved == (objective_after != objective_before)
    assert not result._replace(objective_before=torch.tensor(math.nan), objective_after=torch.tensor(math.nan)).moved


def test_a_candidate_that_overflows_loses():
    """Its objective is NaN, and max() takes a NaN for the largest of all: members stayed where they were before."""
    weights, (x, y) = network(8, DIMS, (2,)), data(8, 8, 5, 4)
    first = weights[0].square().sum((-2, -1))

    def objective(w):
        growth = w[0].square().sum((-2, -1)) / first
        return torch.where(growth > 100, math.nan, growth)

    def draw(identity, candidates, scale, generator):
        return torch.tensor([1.1, 1e3, 2.0, 1.5], dtype=identity.dtype)[:, None] * identity

    best = search(weights, x, y, objective=objective, draw=draw, layers=[0])
    torch.testing.assert_close(best.objective_after, torch.full((2,), 4.0, dtype=x.dtype))
    assert best.moved.all()


# ------------------------------------------------------------------------------------------- tensors of another kind


@pytest.mark.parametrize("action", ACTIONS)
def test_tensors_that_are_not_alike_are_named(action):
    """Another dtype, integers, no tensors, another device, nothing at all: errors of torch's or of Python's before."""
    weights, (x, y) = network(9, DIMS), data(9, 8, 5, 4)
    for wrong, message in (
        (x.float(), "x is torch.float32 on cpu, weights: W_1 torch.float64 on cpu: the same dtype"),
        (x.to("meta"), "x is torch.float64 on meta.*same device"),
        (x.long(), "x must be a tensor of a floating-point dtype, got torch.int64"),
        (x.numpy(), "x must be .* got ndarray"),
        (None, "x must be .* got NoneType"),
    ):
        for run in (ascend, search):
            bad(message, run, weights, wrong, y, action=action)
        bad(message, forward, weights, wrong, LEAKY)
    for wrong in (weights[1].float(), weights[1].to("meta"), weights[1].long(), weights[1].to(torch.complex64), None):
        bad("weights: W_2 (is|must be)", ascend, (weights[0], wrong, weights[2]), x, y, action=action)
    V, U, h = weights[0], weights[1], () if action is rescaling_action else (x,)
    g = torch.ones(6, dtype=x.dtype) if action is rescaling_action else torch.eye(6, dtype=x.dtype)
    for wrong in (g.float(), g.to("meta"), g.long(), [1.0]):
        bad("^[gs] (is|must be)", action, U, V, *h, wrong, LEAKY)
    bad("U (is|must be)|same", action, U.float(), V, *h, g, LEAKY)
    bad("do not chain", action, U, V[0], *h, g, LEAKY)
    three = g.expand(3, *g.shape)
    bad("ensemble shapes do not fit: .*[gs] \\(3,\\)", action, U.expand(2, 5, 6), V, *h, three, LEAKY)


@pytest.mark.parametrize("action", ACTIONS)
def test_shapes_that_hold_nothing_or_too_many_are_named(action):
    weights, (x, y) = network(10, DIMS, (2,)), data(10, 8, 5, 4)
    bad(r"ensemble shapes do not fit: .*x \(3,\)", ascend, weights, x.expand(3, 8, 5), y, action=action)
    one = tuple(W[0] for W in weights)
    bad("x 3×8×5 is for more members", ascend, one, x.expand(3, 8, 5), y, action=action)
    for dims, m in (((8, 0, 5, 4), 1), ((8, 6, 5, 0), 3)):
        bad(f"W_{m} .* is empty", ascend, network(10, dims), x, y, action=action)
    nobody = ascend(network(10, DIMS, (0,)), x, y, action=action)  # no members are as good as any number
    assert nobody.moved.shape == (0,) and nobody.weights[0].shape == (0, 6, 8)


def test_objectives_refuse_what_does_not_fit():
    weights, (x, y) = network(11, DIMS, (2,)), data(11, 8, 5, 4)
    directions, radii = torch.ones(3, 98, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    bad("directions must be", perturbed, weights, x, y, directions.long(), radii)
    bad("on the weights' device", perturbed, weights, x, y, directions, radii.to("meta"))
    bad(r"loss_fn must return .* \(2,\), returned \(\)", sharpness, weights, lambda w: w[0].sum(), directions, radii)
    bad("loss_fn must be", squared_gradient_norm, weights, lambda w: 1.0)
    bad("W_1 must be", squared_gradient_norm, [W.long() for W in weights], losses(x, y))
    M = torch.eye(6, dtype=x.dtype)
    bad("ensemble shapes do not fit: t", curve_curvature, weights[1], weights[0], x, M, LEAKY, torch.zeros(3))
    bad("M must be", curve_curvature, weights[1], weights[0], x, M.long(), LEAKY)
    bad("lie_elements: M_1 is", curvature, weights, x, [M.float(), M[:5, :5]], LEAKY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("action", ACTIONS)
def test_half_precision_is_float64_rounded(action, dtype):
    """torch's linear algebra refuses half precision, so that nothing but rescalings worked before."""
    weights, (x, y) = network(12, DIMS, (2,), dtype), data(12, 8, 3, 4, dtype)
    wide, eps = tuple(W.double() for W in weights), torch.finfo(dtype).eps
    moved = [
        ascend(w, x.to(w[0].dtype), y, action=action, lr=1e-3, steps=1, retraction=retraction)
        for retraction in ("first_order", "exp")
        for w in (weights, wide)
    ]
    for half, exact in (moved[:2], moved[2:]):
        for W, V in zip(half.weights, exact.weights):
            assert W.dtype == dtype and (W.double() - V).norm() <= 20 * eps * V.norm()
    M = torch.eye(6, dtype=dtype) + torch.ones(6, 6, dtype=dtype).triu()
    curves = [curve_curvature(w[1], w[0], x.to(w[0].dtype), M.to(w[0].dtype), LEAKY) for w in (weights, wide)]
    for half, exact in zip(*curves):
        assert half.dtype == dtype
        torch.testing.assert_close(half.double(), exact, rtol=20 * eps, atol=0)
