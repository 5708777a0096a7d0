"""teleport.py: golden numbers, exactness, group laws, ensembles, ascent directions, bad input. All in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import teleport as tp
from common import published
from common.losses import cross_entropy
from teleport import (
    IDENTITY,
    RELU,
    SIGMOID,
    TANH,
    apply_to_layers,
    forward,
    hidden_layers,
    leaky_relu,
    postactivation_action,
    preactivation_action,
    random_search,
    rescaling_action,
    squared_gradient_norm,
    teleport,
)

LEAKY = leaky_relu(0.1)
ACTIONS = (preactivation_action, postactivation_action, rescaling_action)
pytestmark = pytest.mark.filterwarnings("error")


def network(seed, dims, ensemble=(), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*ensemble, o, i, generator=generator, dtype=dtype) / math.sqrt(i) for i, o in zip(dims, dims[1:])
    )


def data(seed, features, samples, classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(features, samples, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (samples,), generator=generator)


def random_elements(seed, weights, action, size=0.3, ensemble=()):
    generator = torch.Generator().manual_seed(seed + 2000)
    widths = [W.shape[-2] for W in weights[:-1]]
    if action is rescaling_action:
        return [torch.randn(*ensemble, d, generator=generator, dtype=torch.float64).exp() for d in widths]
    noise = [torch.randn(*ensemble, d, d, generator=generator, dtype=torch.float64) for d in widths]
    return [torch.eye(d).double() + size * N / math.sqrt(d) for d, N in zip(widths, noise)]


def losses(x, y, activation=LEAKY):
    return lambda weights: cross_entropy(forward(weights, x, activation), y)


def close(a, b, tolerance):
    a, b = a.detach(), b.detach()
    scale = max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= tolerance * scale


# ------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("name, action", [("pre_T", preactivation_action), ("pre_g", preactivation_action)])
def test_golden_actions(golden, name, action):
    a = golden("actions")
    g = torch.eye(6).double() + a["T"] if name == "pre_T" else a["g"]
    U, V = action(a["U"], a["V"], a["X"], g, LEAKY)
    close(U, a[f"{name}_U"], 1e-9)
    close(V, a[f"{name}_V"], 1e-9)


def test_golden_exponential_and_postactivation(golden):
    a = golden("actions")
    U, V = preactivation_action(a["U"], a["V"], a["X"], torch.linalg.matrix_exp(a["t"] * a["M"]), LEAKY)
    close(U, a["pre_exp_U"], 1e-9)
    close(V, a["pre_exp_V"], 1e-9)
    U, V = postactivation_action(a["U"], a["V"], a["X"], a["g"], LEAKY)
    close(U, a["post_g_U"], 1e-9)
    close(V, a["post_g_V"], 1e-9)


@pytest.mark.parametrize("kind, action", [("ce_dT_pre", preactivation_action), ("sq_dT_post", postactivation_action)])
def test_golden_ascent_directions(golden, kind, action):
    d = golden("teleport_direction")
    weights = (d["W0"], d["W1"], d["W2"])
    if kind == "ce_dT_pre":
        x, loss_fn, loss, norm = d["X"], losses(d["X"], d["labels"]), d["ce_loss"], d["ce_grad_sq"]
    else:
        x, loss, norm = d["X2"], d["sq_loss"], d["sq_grad_sq"]

        def loss_fn(w):
            return 0.5 * (forward(w, x, LEAKY) - d["Y2"]).square().sum((-2, -1))

    close(loss_fn(weights), loss, 1e-12)
    close(squared_gradient_norm(weights, loss_fn), norm, 1e-9)
    # One ascent step reveals the direction: g = I + lr ∂/∂T, and V' = gV for the pre-activation action.
    gradients = tp._value_and_gradient(lambda w: squared_gradient_norm(w, loss_fn), weights)[1]
    identity = [torch.eye(6).double(), torch.eye(5).double()]
    for m, T in enumerate(tp._pull_back(weights, x, gradients, identity, action, LEAKY)):
        close(T, d[f"{kind}{m}"], 1e-9)


# ----------------------------------------------------------------------------------------------- exactness and laws


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 4), samples=st.integers(1, 6), slope=st.floats(0.01, 1))
def test_actions_leave_outputs_alone(seed, depth, samples, slope):
    """Exact with at most as many samples as units (pre-activation) or as rows of V's input (post-activation)."""
    activation = leaky_relu(slope)
    weights = network(seed, (8, *[6 + m % 2 for m in range(depth)], 4))
    x, _ = data(seed, 8, samples, 4)
    before = forward(weights, x, activation)
    for action, tolerance in ((preactivation_action, 1e-9), (postactivation_action, 1e-9), (rescaling_action, 1e-12)):
        elements = random_elements(seed, weights, action, size=0.2)
        h = hidden_layers(apply_to_layers(weights, x, elements, action, activation), x, activation)
        condition = max(float(torch.linalg.cond(layer)) for layer in h)
        after = forward(apply_to_layers(weights, x, elements, action, activation), x, activation)
        if action is rescaling_action or condition < 1e5:  # a least-squares fit is as accurate as its condition
            close(after, before, tolerance)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(1, 40))
def test_rescaling_is_exact_on_inputs_it_never_saw(seed, samples):
    weights = network(seed, (5, 7, 6, 3))
    seen, _ = data(seed, 5, 3, 3)
    unseen, _ = data(seed + 1, 5, samples, 3)
    for activation in (LEAKY, RELU, IDENTITY):
        moved = apply_to_layers(
            weights, seen, random_elements(seed, weights, rescaling_action), rescaling_action, activation
        )
        close(forward(moved, unseen, activation), forward(weights, unseen, activation), 1e-12)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("samples", [3, 20])  # fewer samples than units (rank-deficient hidden layers), and more
def test_identity_element_changes_nothing(action, samples):
    weights = network(1, (8, 6, 5, 4))
    x, _ = data(1, 8, samples, 4)
    identity = [tp._identity(action, W) for W in weights[:-1]]
    for W, moved in zip(weights, apply_to_layers(weights, x, identity, action, LEAKY)):
        close(moved, W, 1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_group_law(seed):
    """g·(h·w) = (gh)·w: on V (and its outputs) always for pre-activation; for both actions where they are exact."""
    U, V = network(seed, (8, 6, 4))[::-1]
    x, _ = data(seed, 8, 6, 4)  # six samples on six units, eight inputs: both actions exact, h of full column rank
    g, k = (random_elements(seed + i, (V, U), preactivation_action, size=0.1)[0] for i in (0, 1))
    if max(torch.linalg.cond(LEAKY.f(e @ V @ x)) for e in (torch.eye(6).double(), k, g @ k)) > 1e4:
        return
    for action in (preactivation_action, postactivation_action):
        twice = action(*action(U, V, x, k, LEAKY), x, g, LEAKY)
        once = action(U, V, x, g @ k, LEAKY)
        for a, b in zip(twice, once):
            close(a, b, 1e-8)
        undone = action(*action(U, V, x, g, LEAKY), x, torch.linalg.inv(g), LEAKY)
        for a, b in zip(undone, (U, V)):
            close(a, b, 1e-8)
    s, r = torch.rand(2, 6, dtype=torch.float64) + 0.5
    for a, b in zip(
        rescaling_action(*rescaling_action(U, V, r, LEAKY), s, LEAKY), rescaling_action(U, V, s * r, LEAKY)
    ):
        close(a, b, 1e-12)


def test_postactivation_with_bijective_activations():
    weights = network(3, (8, 5, 4))
    x, _ = data(3, 8, 6, 4)
    elements = random_elements(3, weights, postactivation_action, size=0.02)
    for activation in (TANH, LEAKY, IDENTITY):
        moved = apply_to_layers(weights, x, elements, postactivation_action, activation)
        close(forward(moved, x, activation), forward(weights, x, activation), 1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (6, 6)])
def test_least_squares_agrees_with_pseudoinverse(condition, shape):
    generator = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False)
    A = U * torch.logspace(0, -math.log10(condition), 6, dtype=torch.float64) @ V
    B = torch.randn(4, shape[1], generator=generator, dtype=torch.float64)
    expected = B @ torch.linalg.pinv(A)
    assert (tp._times_pinv(B, A) - expected).norm() <= 1e-15 * condition * 100 * expected.norm()


def test_rank_deficient_hidden_layer_falls_back_to_the_pseudoinverse():
    """Dead ReLU units and repeated samples: finite weights, the same answer as pinv, outputs kept where they can be."""
    U, V = network(4, (8, 6, 4))[::-1]
    x, _ = data(4, 8, 4, 4)
    x = x[:, [0, 1, 2, 2]]
    U2, V2 = preactivation_action(U, V, x, random_elements(4, (V, U), preactivation_action)[0], LEAKY)
    close(U2 @ LEAKY.f(V2 @ x), U @ LEAKY.f(V @ x), 1e-9)
    dead = V.clone()
    dead[2] = -x.mean(1) * 100
    U3, V3 = preactivation_action(U, dead, x, torch.eye(6).double() * 1.5, RELU)
    close(U3 @ RELU.f(V3 @ x), U @ RELU.f(dead @ x), 1e-9)


# ------------------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("ensemble", [(3,), (2, 3)])
def test_ensemble_equals_loop_over_members(action, ensemble):
    weights = network(5, (8, 6, 5, 4), ensemble)
    x, y = data(5, 8, 5, 4)
    elements = random_elements(5, weights, action, ensemble=ensemble)
    loss_fn = losses(x, y)
    options = dict(objective=squared_gradient_norm, action=action, activation=LEAKY, lr=1e-2, steps=3)
    moved = apply_to_layers(weights, x, elements, action, LEAKY)
    teleported = teleport(weights, x, loss_fn, **options)
    norms = squared_gradient_norm(weights, loss_fn)
    assert norms.shape == teleported.loss_after.shape == ensemble
    for index in torch.cartesian_prod(*[torch.arange(n) for n in ensemble]).reshape(-1, len(ensemble)).tolist():
        index = tuple(index)
        member = tuple(W[index] for W in weights)
        for a, b in zip(moved, apply_to_layers(member, x, [g[index] for g in elements], action, LEAKY)):
            close(a[index], b, 1e-9)
        alone = teleport(member, x, loss_fn, **options)
        for a, b in zip(teleported.weights, alone.weights):
            close(a[index], b, 1e-9)
        for field in ("loss_before", "loss_after", "objective_before", "objective_after", "drift"):
            close(getattr(teleported, field)[index], getattr(alone, field), 1e-9)
        close(norms[index], squared_gradient_norm(member, loss_fn), 1e-12)


def test_float32_and_inputs_untouched():
    weights = network(6, (8, 6, 4), (2,), torch.float32)
    x, y = data(6, 8, 5, 4, torch.float32)
    copies = [W.clone() for W in weights]
    moved = teleport(
        weights, x, losses(x, y), objective=squared_gradient_norm, action=preactivation_action, activation=LEAKY,
        lr=1e-2, steps=2,
    )  # fmt: skip
    assert all(W.dtype == torch.float32 and not W.requires_grad for W in moved.weights)
    assert all(torch.equal(W, copy) for W, copy in zip(weights, copies))
    assert (moved.drift.abs() < 1e-5).all()


# --------------------------------------------------------------------------------------------- objectives and ascent


def test_squared_gradient_norm_takes_moved_weights_as_independent():
    """The trap: W_2' depends on W_1' through the hidden layer, and that path must not enter ∂L/∂W."""
    weights = network(7, (8, 6, 5, 4))
    x, y = data(7, 8, 12, 4)
    elements = random_elements(7, weights, preactivation_action)
    for g in elements:
        g.requires_grad_()
    moved = apply_to_layers(weights, x, elements, preactivation_action, LEAKY)
    independent = tuple(W.detach() for W in moved)
    close(squared_gradient_norm(moved, losses(x, y)), squared_gradient_norm(independent, losses(x, y)), 1e-12)
    entangled = torch.autograd.grad(losses(x, y)(moved), moved, retain_graph=True)
    wrong = sum(g.square().sum() for g in entangled)
    right = squared_gradient_norm(independent, losses(x, y))
    assert abs(wrong - right) > 0.01 * right  # the two really differ here


@pytest.mark.parametrize("action", ACTIONS)
def test_ascent_direction_against_finite_differences(action):
    """d‖∂L/∂W‖²/dT of the network as moved by I + T (or 1 + t), each weight an independent variable."""
    weights = network(8, (8, 6, 5, 4))
    x, y = data(8, 8, 12 if action is preactivation_action else 7, 4)
    identity = [tp._identity(action, W) for W in weights[:-1]]
    loss_fn = losses(x, y)
    gradients = tp._value_and_gradient(lambda w: squared_gradient_norm(w, loss_fn), weights)[1]
    tangents = tp._pull_back(weights, x, gradients, identity, action, LEAKY)
    generator = torch.Generator().manual_seed(9)
    directions = [torch.randn(i.shape, generator=generator, dtype=torch.float64) for i in identity]

    def objective(t):
        moved = apply_to_layers(weights, x, [i + t * D for i, D in zip(identity, directions)], action, LEAKY)
        return squared_gradient_norm(tuple(W.detach() for W in moved), loss_fn)

    step = 1e-5
    slope = (objective(step) - objective(-step)) / (2 * step)
    assert math.isclose(sum((T * D).sum() for T, D in zip(tangents, directions)), slope, rel_tol=1e-6)


@pytest.mark.parametrize("action", [preactivation_action, postactivation_action])
@pytest.mark.parametrize("samples", [3, 12])
def test_an_action_of_ones_own_goes_through_autograd(action, samples):
    """…and gives what the closed form of the same action gives, also where hidden layers are rank-deficient."""
    weights = network(20, (8, 6, 5, 4), (2,))
    x, y = data(20, 8, samples, 4)
    options = dict(objective=squared_gradient_norm, activation=LEAKY, lr=1e-3, steps=2)
    own = teleport(weights, x, losses(x, y), action=lambda *arguments: action(*arguments), **options)
    for a, b in zip(own.weights, teleport(weights, x, losses(x, y), action=action, **options).weights):
        close(a, b, 1e-9)


def test_actions_are_differentiable_in_g():
    weights = network(10, (6, 5, 3))
    x, _ = data(10, 6, 8, 3)
    for action in (preactivation_action, postactivation_action):
        g = random_elements(10, weights, action)[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda g: action(weights[1], weights[0], x, g, LEAKY), (g,))  # noqa: B023


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("retraction", ["first_order", "exp"])
@pytest.mark.parametrize("maximize", [True, False])
def test_teleport_moves_its_objective_and_not_the_loss(action, retraction, maximize):
    weights = network(11, (8, 6, 5, 4), (3,))
    x, y = data(11, 8, 3, 4)
    moved = teleport(
        weights, x, losses(x, y), objective=squared_gradient_norm, action=action, activation=LEAKY, lr=1e-3, steps=5,
        maximize=maximize, retraction=retraction,
    )  # fmt: skip
    change = moved.objective_after - moved.objective_before
    assert ((change > 0) if maximize else (change < 0)).all()
    assert (moved.drift.abs() <= 1e-9 * moved.loss_before.abs()).all()
    close(moved.loss_after, losses(x, y)(moved.weights), 1e-12)
    close(moved.objective_after, squared_gradient_norm(moved.weights, losses(x, y)), 1e-12)


def test_objective_may_take_the_weights_alone():
    weights = network(12, (8, 6, 4))
    x, y = data(12, 8, 5, 4)
    loss_fn = losses(x, y)
    options = dict(action=rescaling_action, activation=LEAKY, lr=1e-2, steps=2)
    one = teleport(weights, x, loss_fn, objective=lambda w: squared_gradient_norm(w, loss_fn), **options)
    two = teleport(weights, x, loss_fn, objective=squared_gradient_norm, **options)
    assert all(torch.equal(a, b) for a, b in zip(one.weights, two.weights))


def test_cap_stops_each_member_by_itself():
    weights = network(13, (8, 6, 4), (4,))
    x, y = data(13, 8, 5, 4)
    norms = squared_gradient_norm(weights, losses(x, y))
    cap = float(norms.sort().values[1:3].mean())  # two members are beyond it from the start
    moved = teleport(
        weights, x, losses(x, y), objective=squared_gradient_norm, action=preactivation_action, activation=LEAKY,
        lr=1e-2, steps=3, cap=cap,
    )  # fmt: skip
    still = [all(torch.equal(a[i], b[i]) for a, b in zip(weights, moved.weights)) for i in range(4)]
    assert still == (norms > cap).tolist() and any(still) and not all(still)


def test_learning_rate_per_member_and_bound():
    weights = tuple(W.expand(2, *W.shape) for W in network(14, (8, 6, 4)))
    x, y = data(14, 8, 5, 4)
    options = dict(objective=squared_gradient_norm, action=rescaling_action, activation=LEAKY, steps=50)
    moved = teleport(weights, x, losses(x, y), lr=torch.tensor([0.0, 0.5]), bound=1.5, **options)
    assert torch.equal(moved.weights[0][0], weights[0][0])
    ratio = moved.weights[0][1] / weights[0][1]
    assert ratio.min() >= 1 / 1.5 - 1e-12 and ratio.max() <= 1.5 + 1e-12 and ratio.max() > 1.4


@pytest.mark.parametrize("maximize", [True, False])
def test_backtracking_always_improves_and_keeps_the_loss(maximize):
    """A step far too large: without backtracking it overshoots, with it every member improves within the tolerance."""
    weights = network(15, (8, 6, 5, 4), (10,))
    x, y = data(15, 8, 40, 4)  # more samples than units: the action is a least-squares fit and would drift
    moved = teleport(
        weights, x, losses(x, y), objective=squared_gradient_norm, action=preactivation_action, activation=LEAKY,
        lr=100.0, steps=3, backtracking=True, tolerance=1e-3, maximize=maximize,
    )  # fmt: skip
    change = moved.objective_after - moved.objective_before
    assert ((change > 0) if maximize else (change < 0)).all()
    assert (moved.drift.abs() <= 1e-3 * moved.loss_before).all()


@pytest.mark.parametrize("action", ACTIONS)
def test_random_search_finds_the_best_candidate(action):
    weights = network(16, (8, 6, 5, 4), (3,))
    x, y = data(16, 8, 5, 4)
    options = dict(action=action, activation=LEAKY, scale=0.5, objective=squared_gradient_norm)

    def search(weights, **more):
        return random_search(
            weights,
            x,
            losses(x, y),
            generator=torch.Generator().manual_seed(1),
            **{"candidates": 30, **options, **more},
        )

    moved = search(weights)
    assert (moved.objective_after > moved.objective_before).all()
    assert (moved.drift.abs() <= 1e-8 * moved.loss_before).all()
    close(moved.objective_after, squared_gradient_norm(moved.weights, losses(x, y)), 1e-9)
    for i in range(3):  # an ensemble is a loop over members: they share the candidates
        alone = search(tuple(W[i] for W in weights))
        close(alone.objective_after, moved.objective_after[i], 1e-9)
    one_layer = search(weights, layers=[1])
    assert torch.equal(one_layer.weights[0], weights[0]) and not torch.equal(one_layer.weights[1], weights[1])
    for a, b in zip(search(weights, chunk_size=7).weights, moved.weights):
        close(a, b, 1e-12)


@pytest.mark.parametrize("activation", [LEAKY, TANH, SIGMOID, IDENTITY, RELU])
def test_activations_are_consistent(activation):
    z = torch.linspace(-2, 2, 40, dtype=torch.float64, requires_grad=True)  # 0 is not among them
    (slope,) = torch.autograd.grad(activation.f(z).sum(), z)
    close(activation.derivative(z.detach()), slope, 1e-12)
    assert activation.derivative(z.detach().float()).dtype == torch.float32
    if activation.inverse:
        close(activation.inverse(activation.f(z)), z, 1e-9)
    if activation.homogeneous:
        close(activation.f(3 * z), 3 * activation.f(z), 1e-12)


# ---------------------------------------------------------------------------------------------------- published arms


def test_published_teleport_drifts_and_minimal_change_does_not():
    """With fewer samples than units the published action discards what the batch does not show."""
    weights = network(18, (8, 6, 5, 4))
    x, y = data(18, 8, 4, 4)
    loss_fn = losses(x, y)
    ours = teleport(
        weights, x, loss_fn, objective=squared_gradient_norm, action=preactivation_action, activation=LEAKY, lr=0.1,
        steps=5, cap=100.0,
    )  # fmt: skip
    theirs = published.teleport_gradient_norm(weights, x, loss_fn, activation=LEAKY, lr=0.1, steps=5)
    assert ours.drift.abs() < 1e-9 < theirs.drift.abs()
    close(theirs.objective_before, ours.objective_before, 1e-12)


def test_published_first_step_is_the_golden_direction(golden):
    d = golden("teleport_direction")
    weights = (d["W0"], d["W1"], d["W2"])
    moved = published.teleport_gradient_norm(
        weights, d["X"], losses(d["X"], d["labels"]), activation=LEAKY, lr=1e-3, steps=1
    )
    g = torch.eye(6).double() + 1e-3 * d["ce_dT_pre0"]
    close(moved.weights[0], g @ weights[0], 1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("action", ACTIONS)
def test_cuda_agrees_with_cpu(action):
    weights = network(19, (8, 6, 5, 4), (3,))
    x, y = data(19, 8, 5, 4)
    options = dict(objective=squared_gradient_norm, action=action, activation=LEAKY, lr=1e-3, steps=3)
    cpu = teleport(weights, x, losses(x, y), **options)
    gpu = teleport(tuple(W.cuda() for W in weights), x.cuda(), losses(x.cuda(), y.cuda()), **options)
    for a, b in zip(gpu.weights, cpu.weights):
        close(a.cpu(), b, 1e-9)
