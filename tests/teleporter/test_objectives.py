"""Objectives of a teleport: their formulas by brute force, their derivatives, their costs, the Teleporter's use."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import close, normal
from scipy.optimize import minimize
from torch.utils.flop_counter import FlopCounterMode

from common.losses import batch_loss, cross_entropy
from teleport import leaky_relu, rescaling_action, squared_gradient_norm, teleport
from teleporter import objectives as aims

ACTIVATION = leaky_relu(0.1)
DIMS, N, E = (5, 4, 3, 3), 7, 2
X = normal(0, DIMS[0], N)
LABELS = torch.randint(DIMS[-1], (N,), generator=torch.Generator().manual_seed(1))
W = [normal(2 + m, E, o, i) for m, (i, o) in enumerate(zip(DIMS, DIMS[1:]))]


def logits(weights, x=X):
    for V in weights[:-1]:
        x = ACTIVATION.f(V @ x)
    return weights[-1] @ x


def criterion(outputs, labels=LABELS):
    return cross_entropy(outputs, labels)


def loss_fn(weights):
    return criterion(logits(weights))


BATCHES = [batch_loss(normal(10 + k, DIMS[0], N), LABELS.roll(k), ACTIVATION) for k in range(3)]
DECREASE = partial(aims.line_search_decrease, output_fn=logits, criterion=criterion)
AHEAD = partial(aims.look_ahead, losses=BATCHES[:2], held_out=BATCHES[2])
OBJECTIVES = {
    "decrease": DECREASE,
    "decrease_sign": partial(DECREASE, direction=aims.sign),
    "true_decrease": partial(aims.true_decrease, loss_fn=loss_fn, steps=[0.3]),
    "look_ahead": partial(AHEAD, rule=aims.descent(0.1, momentum=0.9)),
    "look_ahead_adam": partial(AHEAD, rule=aims.adam(torch.tensor([0.01, 0.03]).double())),
}


def member(e):
    return [V[e] for V in W]


@pytest.mark.parametrize("direction", [None, aims.sign])
def test_the_decrease_is_that_of_the_gauss_newton_parabola(direction):
    """By the whole Jacobian and the logits' whole Hessian."""
    for e in range(E):
        flat = torch.cat([V.flatten() for V in member(e)])

        def unflat(w):
            parts = w.split([o * i for i, o in zip(DIMS, DIMS[1:])])
            return [p.view(o, i) for p, i, o in zip(parts, DIMS, DIMS[1:])]

        J = torch.autograd.functional.jacobian(lambda w, u=unflat: logits(u(w)).flatten(), flat)
        z = logits(member(e)).flatten()
        H = torch.autograd.functional.hessian(lambda z: criterion(z.view(DIMS[-1], N)), z)
        g = torch.autograd.functional.jacobian(lambda w, u=unflat: loss_fn(u(w)), flat)
        u = g if direction is None else direction(g)
        wanted = (g @ u) ** 2 / (2 * (J @ u) @ H @ (J @ u))
        close(aims.line_search_decrease(W, logits, criterion, direction)[e], wanted)
        close(aims.line_search_decrease(member(e), logits, criterion, direction), wanted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_derivatives_in_the_log_scales_are_finite_differences(name):
    objective, zero = OBJECTIVES[name], [torch.zeros(E, d).double() for d in DIMS[1:-1]]
    _, slopes = aims._slopes(objective, W, zero)
    for m, t in enumerate(zero):
        for i in range(t.shape[1]):
            values = []
            for h in (1e-5, -1e-5):
                moved = [t.clone() for t in zero]
                moved[m][:, i] = h
                values.append(objective(aims.rescaled(W, moved)))
            close(slopes[m][:, i], (values[0] - values[1]) / 2e-5, 1e-6)


def test_the_true_decrease_is_the_best_of_the_line():
    grid = [0.01, 0.1, 0.5, 1e6]
    for direction in (None, aims.sign):
        found = aims.true_decrease(W, loss_fn, direction, grid)
        for e in range(E):
            V = [v.clone().requires_grad_() for v in member(e)]
            loss = loss_fn(V)
            u = torch.autograd.grad(loss, V)
            u = u if direction is None else [direction(g) for g in u]
            wanted = max((loss - loss_fn([v - eta * d for v, d in zip(V, u)])).item() for eta in grid)
            close(found[e], max(wanted, 0.0))
    uphill = aims.true_decrease(W, loss_fn, lambda g: -g, [0.01])
    assert torch.equal(uphill, torch.zeros(E).double())


@pytest.mark.parametrize(
    "rule, optimizer, options",
    [
        (aims.descent, torch.optim.SGD, {}),
        (aims.descent, torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.1}),
        (aims.descent, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        (aims.adam, torch.optim.Adam, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
        (aims.adam, torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.1}),
    ],
)
def test_look_ahead_takes_the_steps_of_torch_optim(rule, optimizer, options):
    lr = torch.tensor([0.02, 0.1]).double()
    ours = dict(options, decoupled=True) if optimizer is torch.optim.AdamW else options
    found = AHEAD(W, rule=rule(lr, **ours))
    for e in range(E):
        V = [v.clone().requires_grad_() for v in member(e)]
        theirs = optimizer(V, lr=lr[e].item(), **options)
        for loss in BATCHES[:2]:
            theirs.zero_grad()
            loss(V).backward()
            theirs.step()
        close(found[e], -BATCHES[2](V).detach())


def test_adams_derivative_is_finite_where_gradients_are_zero():
    V = [torch.cat([W[0], torch.zeros(E, 4, 1).double()], -1), *W[1:]]
    loss = batch_loss(torch.cat([X, torch.zeros(1, N).double()]), LABELS, ACTIVATION)
    zero = [torch.zeros(E, d).double() for d in DIMS[1:-1]]
    objective = partial(aims.look_ahead, losses=[loss] * 2, held_out=loss, rule=aims.adam(0.01))
    assert all(g.isfinite().all() for g in aims._slopes(objective, V, zero)[1])


def test_costs_in_gradients():
    """Multiplications that torch counts, in units of one gradient's: D at most 3, look-ahead at most 4k + 4."""
    x, dims = normal(0, 60, 40), (60, 50, 40, 30)
    labels = torch.zeros(40, dtype=torch.long)
    V = [normal(m, o, i).requires_grad_() for m, (i, o) in enumerate(zip(dims, dims[1:]))]
    loss, out = batch_loss(x, labels, ACTIVATION), partial(logits, x=x)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def along_the_orbit():
        outputs = out(V)
        found = aims.parabola(criterion(outputs, labels), [outputs], V)
        return aims.covectors(found, [outputs], V)

    one = count(lambda: torch.autograd.grad(loss(V), V))
    fixed = [v.detach() for v in V]
    assert count(lambda: aims.line_search_decrease(fixed, out, partial(criterion, labels=labels))) <= 3 * one
    assert count(along_the_orbit) <= 3 * one
    for k in (1, 4, 10):
        objective = partial(aims.look_ahead, losses=[loss] * k, held_out=loss, rule=aims.descent(0.1))
        assert count(lambda objective=objective: torch.autograd.grad(objective(V), V)) <= (4 * k + 4) * one


def test_covectors_are_the_derivative_along_the_orbit():
    """Of a rescaling by exp(t): D moves as its direction does, −2t u on incoming rows and 2t u on outgoing columns."""
    for direction, power in ((None, 2), (aims.sign, 1)):
        V = [v.clone().requires_grad_() for v in member(0)]
        outputs = logits(V)
        found = aims.parabola(criterion(outputs), [outputs], V, direction)
        C, u = aims.covectors(found, [outputs], V), found.direction
        zero = [torch.zeros(d).double() for d in DIMS[1:-1]]
        _, slopes = aims._slopes(partial(DECREASE, direction=direction), member(0), zero)
        for m, slope in enumerate(slopes):
            out_, in_ = (C[m + 1] * u[m + 1]).sum(0), (C[m] * u[m]).sum(1)
            torch.testing.assert_close(power * (out_ - in_), slope, rtol=1e-5, atol=1e-6)  # ε does not move along


def test_balance_is_what_a_numerical_minimizer_finds():
    found = aims.balance(W)
    moved = aims.rescaled(W, found)
    for V, U in zip(moved, moved[1:]):
        close(V.square().sum(-1), U.square().sum(-2))
    close(loss_fn(moved), loss_fn(W), 1e-12)
    for e in range(E):

        def size(t, e=e):
            scales = torch.tensor(t).split(DIMS[1:-1])
            return sum(V.square().sum() for V in aims.rescaled(member(e), scales)).item()

        best = minimize(size, np.zeros(sum(DIMS[1:-1])), method="BFGS", options={"gtol": 1e-10})
        assert sum(V[e].square().sum() for V in moved).item() <= best.fun + 1e-9
        close(torch.cat([t[e] for t in found]), torch.tensor(best.x), 1e-4)


def test_balance_leaves_a_unit_that_nothing_reads():
    V = [v.clone() for v in W]
    V[1][:, :, 0] = 0
    found = aims.balance(V)
    assert (found[0][:, 0] == 0).all() and all(t.isfinite().all() for t in found)


def test_balancing_by_matrices_is_the_minimum_over_the_group():
    A, B = normal(0, 3, 4), normal(1, 5, 3)
    T = aims.balancing_matrix(A @ A.T, B.T @ B)
    assert torch.equal(T, T.mT) or (T - T.mT).abs().max() < 1e-12

    def size(t):
        M = torch.linalg.matrix_exp(torch.as_tensor(t).view(3, 3))
        return ((M @ A).square().sum() + (B @ torch.linalg.inv(M)).square().sum()).item()

    best = minimize(size, np.zeros(9), method="BFGS", options={"gtol": 1e-9})
    assert abs(size(T.flatten().numpy()) - best.fun) < 1e-8 < size(np.zeros(9)) - best.fun
    assert torch.equal(aims.balancing_matrix(A @ A.T, torch.zeros(3, 3).double()), torch.zeros(3, 3).double())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_fits_teleport_and_grows(name):
    options = dict(objective=OBJECTIVES[name], action=rescaling_action, activation=ACTIVATION, lr=0.1, steps=3)
    moved = teleport(W, X, loss_fn, retraction="exp", bound=4.0, backtracking=True, **options)
    assert (moved.objective_after > moved.objective_before).all() and (moved.drift.abs() < 1e-12).all()


def test_rescale_grows_within_its_bound_and_members_do_not_mix():
    scales, before, after = aims.rescale(W, squared_gradient_norm, loss_fn, bound=2.0)
    close(squared_gradient_norm(W, loss_fn), before)
    moved = aims.rescaled(W, scales)
    close(squared_gradient_norm(moved, loss_fn), after, 1e-8)
    close(logits(moved), logits(W), 1e-12)
    assert (after > 1.5 * before).all() and max(t.abs().max() for t in scales) <= math.log(2)
    for e in range(E):
        alone, _, _ = aims.rescale(member(e), squared_gradient_norm, loss_fn, bound=2.0)
        for a, t in zip(alone, scales):
            close(a, t[e], 1e-8)
    cap = 1.1 * before
    _, _, capped = aims.rescale(W, squared_gradient_norm, loss_fn, cap=cap, steps=40)
    assert (capped > cap).all() and (capped < 50 * before).all()


@pytest.mark.parametrize("objective", [squared_gradient_norm, aims.true_decrease, DECREASE])
def test_an_objective_without_a_maximum_needs_a_bound_or_a_cap(objective):
    with pytest.raises(ValueError, match="no maximum on the orbit: give a bound"):
        aims.rescale(W, objective, loss_fn)


def test_look_ahead_needs_no_bound():
    _, before, after = aims.rescale(W, OBJECTIVES["look_ahead"])
    assert (after > before).all()


def test_errors():
    with pytest.raises(ValueError, match="bound must be"):
        aims.rescale(W, squared_gradient_norm, loss_fn, bound=1.0)
    with pytest.raises(ValueError, match="finite"):
        aims.rescale([V * torch.nan for V in W], squared_gradient_norm, loss_fn, bound=2.0)
    with pytest.raises(ValueError, match="linear in the outputs"):
        aims.line_search_decrease(W, logits, lambda outputs: outputs.sum((-2, -1)))
    with pytest.raises(ValueError, match="at least two"):
        aims.balance(W[:1])


def test_dtypes_are_those_of_the_weights():
    V, x = [v.float() for v in W], X.float()
    loss = batch_loss(x, LABELS, ACTIVATION)
    for objective in (
        partial(aims.line_search_decrease, output_fn=partial(logits, x=x), criterion=criterion),
        partial(aims.true_decrease, loss_fn=loss),
        partial(aims.look_ahead, losses=[loss], held_out=loss, rule=aims.adam(0.01)),
    ):
        scales, before, after = aims.rescale(V, objective, bound=2.0, steps=2)
        assert {t.dtype for t in (*scales, before, after)} == {torch.float32}
