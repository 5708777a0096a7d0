"""The meta-gradient against finite differences, the action against teleport.py, stacks, resuming, diverging."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "learn-to-teleport"))

import meta_optimizer
from meta_optimizer import (
    Diverged,
    Learner,
    MetaOptimizer,
    Problem,
    Unroll,
    act,
    gradient_descent,
    meta_test,
    meta_train,
    regression,
)

from teleport import apply_to_layers, forward, leaky_relu, postactivation_action, squared_gradient_norm

RATE = [
    Learner("teleport", "rate", "learned"),
    Learner("published", "rate", "learned", "first-order"),
    Learner("full", "rate", "learned", meta_gradient="full"),
    Learner("random", "rate", "random"),
    Learner("none", "rate", None),
]
UPDATE = [arm._replace(local="update") for arm in RATE]
D = 4


def stack(arms, seeds=(0,), layers=2, norm=0.3):
    """A float64 stack. The learning rates of the small problems lie well inside their bounds."""
    meta = MetaOptimizer(arms, seeds, width=D, layers=layers, hidden=3, norm=norm).double()
    if meta.learns_rate:
        meta.teleporter.b.data[..., -1] = 1e-3 + 0 * meta.teleporter.b.data[..., -1]
        meta.teleporter.head.data[:, -1] *= 1e-4
    return meta


def small(seeds, layers=2):
    W, X, Y = regression(D, layers, seeds)
    return Problem(W.double(), X.double() - 0.5, Y.double())


# ---------------------------------------------------------------------------------------------------------------------
# The optimizee


def test_gradient_descent_is_the_recorded_one(golden):
    g = golden("regression")
    W, X, Y = [g["W0"], g["W1"], g["W2"]], g["X"], g["Y"]
    loss, norm, seconds = gradient_descent(W, X, Y, [g["lr"].item()] * (len(g["gd_loss"]) - 1))
    torch.testing.assert_close(loss, g["gd_loss"], rtol=1e-9, atol=0)
    torch.testing.assert_close(norm, g["gd_grad_sq"], rtol=1e-7, atol=0)
    assert len(seconds) == len(loss) and sorted(seconds) == seconds


def test_gradient_descent_on_the_published_problems():
    W, X, Y = regression(20, 2, [n * n * 12345 for n in range(5)])
    loss = gradient_descent(W.unbind(1), X, Y, [3e-4] * 30)[0].mean(0)
    published = torch.tensor([477558, 68205, 38221, 2499, 48.8])
    torch.testing.assert_close(loss[[0, 1, 2, 10, 29]], published, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_the_action_is_the_library_s_and_keeps_the_output(layers):
    W, X, _ = small([1, 2], layers)
    W = (W - 0.5).expand(3, *W.shape)
    T = 0.1 * torch.randn(3, 2, layers - 1, D, D, generator=torch.Generator().manual_seed(0)).double()
    moved = act(W, X, torch.linalg.inv(X), T, torch.tensor([False, False, True]))
    sigma, eye = leaky_relu(), torch.eye(D, dtype=T.dtype)
    library = apply_to_layers(W.unbind(-3), X, (eye + T).unbind(-3), postactivation_action, sigma)
    torch.testing.assert_close(moved[:2], torch.stack(library, -3)[:2], rtol=1e-8, atol=1e-8)
    output, before = forward(moved.unbind(-3), X, sigma), forward(W.unbind(-3), X, sigma)
    torch.testing.assert_close(output[:2], before[:2], rtol=1e-8, atol=1e-8)
    assert (output[2] - before[2]).norm() > 1e-3 * before[2].norm()  # I − T is not the inverse


# ---------------------------------------------------------------------------------------------------------------------
# The meta-optimizers


def test_a_core_is_two_lstm_cells_and_a_linear_layer():
    core = meta_optimizer.Core(5, 3, 2, [torch.Generator().manual_seed(1)])

    def cell(x, h, b):
        order = [0, 1, 3, 2]  # torch: i, f, g, o; here i, f, o, g
        lstm = torch.nn.LSTMCell(x.shape[-1], 3)
        for mine, name in ((x[0], "weight_ih"), (h[0], "weight_hh"), (b[0, 0], "bias_ih")):
            getattr(lstm, name).data = torch.cat([mine.chunk(4)[i] for i in order]).detach()
        lstm.bias_hh.data.zero_()
        return lstm

    first, second = cell(core.x1, core.h1, core.b1), cell(core.x2, core.h2, core.b2)
    x = torch.randn(4, 1, 7, 5, generator=torch.Generator().manual_seed(2))
    state, one, two = core.start(7), None, None
    for step in x:
        out, state = core(step, state)
        one = first(step[0], one)
        two = second(one[0], two)
        torch.testing.assert_close(out[0], two[0] @ core.head[0].T + core.b[0])


def total_loss(meta, problem, steps):
    """The sum of the losses of one unroll of `steps` steps, for every member."""
    body = Unroll(meta, problem, torch.Generator().manual_seed(3))
    for _ in range(steps):
        body.local_update()
        body.teleport()
    return body, torch.stack(body.losses).sum((0, 2))


def finite_differences(meta, problem, steps, h=1e-6):
    """∂(sum of losses)/∂weights, one direction a core's weight tensor: the derivative along a random direction."""
    derivatives = {}
    for name, p in meta.named_parameters():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=p.dtype)
        sides = []
        for sign in (1, -1):
            p.data += sign * h * direction
            with torch.no_grad():
                sides.append(total_loss(meta, problem, steps)[1])
            p.data -= sign * h * direction
        derivatives[name] = (direction, (sides[0] - sides[1]).sum() / (2 * h))
    return derivatives


def check_meta_gradient(meta, problem, steps):
    body, _ = total_loss(meta, problem, steps)
    body.meta_gradient()
    for name, (direction, expected) in finite_differences(meta, problem, steps).items():
        mine = (meta.get_parameter(name).grad * direction).sum()
        assert abs(mine - expected) <= 2e-5 * abs(expected) + 1e-8, name
        assert mine != 0, name


@pytest.mark.parametrize("arms", [RATE, UPDATE], ids=["rate", "update"])
@pytest.mark.parametrize("layers, steps", [(2, 4), (3, 3)])
def test_full_meta_gradient_matches_finite_differences(arms, layers, steps):
    """One unroll, everything differentiated: elements, rates, updates, and the gradients that the cores read."""
    order = ("learned", "random", None)
    arms = sorted((arm._replace(meta_gradient="full") for arm in arms), key=lambda arm: order.index(arm.element))
    check_meta_gradient(stack(arms, layers=layers), small([5], layers), steps)


@pytest.mark.parametrize("arms", [RATE, UPDATE], ids=["rate", "update"])
def test_first_order_meta_gradient_is_that_at_recorded_gradients(arms, monkeypatch):
    """As published: ∂L/∂W counts as a constant. Finite differences with the recorded gradients put in their place."""
    arms = [arm for arm in arms if arm.meta_gradient == "first-order"]
    meta, problem, steps = stack(arms), small([6]), 4
    body, _ = total_loss(meta, problem, steps)
    recorded, true = body.gradients, meta_optimizer.loss_and_gradients
    calls = []

    def replay(weights, X, Y):
        calls.append(1)
        return true(weights, X, Y)[0], recorded[(len(calls) - 1) % steps].unbind(-3)

    monkeypatch.setattr(meta_optimizer, "loss_and_gradients", replay)
    check_meta_gradient(meta, problem, steps)
    assert len(calls) % steps == 0


def test_a_constant_gradient_halves_the_meta_gradient_of_an_element():
    """A teleport keeps L, so after a small step its effect is −η‖∂L/∂W‖². d/dT of that holds ∂L/∂W twice: as the point
    where the step starts, and as the step. Only the first is seen by the published, first-order meta-gradient."""
    gradients = []
    for arm in (RATE[0], RATE[2]):
        meta = stack([arm])
        meta.teleporter.b.data[..., -1] = 1e-5
        body, _ = total_loss(meta, small([5]), 3)
        body.meta_gradient()
        gradients.append(meta.teleporter.head.grad[0, : D * D])
    assert (2 * gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def train(meta, runs=3, steps=9, unroll=4, rates=(1e-3, 1e-3), **options):
    adam = meta.adam(*rates)
    problems = options.pop("problems", lambda n: small([n]))
    return meta_train(meta, adam, problems, runs=runs, steps=steps, unroll=unroll, **options)[0]


@pytest.mark.parametrize("arms", [RATE, UPDATE], ids=["rate", "update"])
def test_a_stack_is_its_members(arms):
    """Arms and meta-seeds trained side by side end where each ends alone; `member` takes one out."""
    together = stack(arms, (0, 1))
    curve = train(together)
    problem, options = small([7, 8]), {"steps": 3, "measure_drift": False}
    for e, (arm, seed) in enumerate(together.members):
        alone = stack([arm], (seed,))
        torch.testing.assert_close(train(alone)[0], curve[e], rtol=1e-9, atol=0)
        taken, mine = together.member(e).double(), {}
        for name, p in taken.named_parameters():
            torch.testing.assert_close(p, alone.get_parameter(name), rtol=1e-7, atol=1e-9)
        for meta in (taken, alone):
            mine[meta] = meta_test(meta, problem, generator=torch.Generator().manual_seed(0), **options)["loss"]
        torch.testing.assert_close(mine[taken], mine[alone])
    assert len({round(v, 12) for v in curve[:, -1].tolist()}) > 5  # the arms do differ


def test_only_steps_before_the_last_meta_update_count():
    curves = [train(stack(RATE), steps=steps) for steps in (9, 12)]  # meta-updates at steps 4 and 8
    torch.testing.assert_close(*curves, rtol=0, atol=0)
    assert (train(stack(RATE), steps=13) != curves[0]).any()


def test_cut_truncates():
    body, _ = total_loss(stack(UPDATE), small([1]), 3)
    assert body.W.requires_grad
    body.cut()
    tensors = [body.W, *(t for state in body.states.values() for t in state)]
    assert not any(t.requires_grad for t in tensors) and not body.visited
    assert not any(core.tape for core in body.meta.cores())


def test_elements_have_the_given_norm_and_rates_their_bounds(monkeypatch):
    seen = []
    monkeypatch.setattr(meta_optimizer, "act", lambda W, X, X_inverse, T, first_order: seen.append(T) or W)
    meta = stack(RATE, norm=0.01)
    meta.teleporter.b.data[..., -1] += torch.tensor([1.0, -1.0, 0, 0, 0]).view(-1, 1)
    meta_test(meta, small([1, 2, 3]), 3, torch.Generator().manual_seed(0), measure_drift=False)
    body, _ = total_loss(meta, small([1]), 1)
    torch.testing.assert_close(body.rate[:2].flatten(), torch.tensor([5e-3, 1e-7], dtype=torch.float64))
    assert len(seen) == 4 and seen[0].shape[0] == 4  # all but the arm without elements
    for T in seen:
        torch.testing.assert_close(torch.linalg.matrix_norm(T), torch.full(T.shape[:-2], 0.01, dtype=T.dtype))


def test_each_teleporter_reads_its_two_adjacent_layers(monkeypatch):
    read, meta = [], stack([RATE[0]], layers=3)
    forward_of_core = meta.teleporter.forward
    monkeypatch.setattr(meta.teleporter, "forward", lambda x, state: read.append(x) or forward_of_core(x, state))
    body, _ = total_loss(meta, small([1, 2], layers=3), 1)
    G = body.gradients[0][0]  # (S, L, d, d)
    for m in (0, 1):
        torch.testing.assert_close(read[0][m], torch.cat((G[:, m].flatten(1), G[:, m + 1].flatten(1)), 1))


def test_test_reports_what_happened():
    meta, problem = stack(RATE[:2] + RATE[4:], norm=0.01), small([1, 2, 3])
    result = meta_test(meta, problem, 4)
    assert result["loss"].shape == (3, 3, 5) and result["rate"].shape == result["drift"].shape == (3, 3, 4)
    exact, published, none = result["drift"].abs().amax((1, 2))
    assert exact < 1e-11 and published > 1e-7 and none == 0

    def loss_fn(weights):
        return meta_optimizer.loss_and_gradients(weights, problem.X, problem.Y)[0]

    torch.testing.assert_close(result["loss"][0, :, 0], loss_fn(problem.W.unbind(1)))
    torch.testing.assert_close(
        result["squared_gradient_norm"][0, :, 0], squared_gradient_norm(problem.W.unbind(1), loss_fn)
    )
    rates = [rate.view(-1, 1, 1) for rate in result["rate"][2].unbind(-1)]  # no element: gradient descent
    torch.testing.assert_close(result["loss"][2], gradient_descent(problem.W.unbind(1), problem.X, problem.Y, rates)[0])


def test_meta_training_learns():
    """From rates that are far too small, the learned rate grows and the losses on new problems fall."""
    losses = []
    meta = stack([RATE[4]])
    for runs in (0, 30):
        if runs:
            train(meta, runs=runs, steps=21, unroll=10, rates=(5e-3, 0))
        losses.append(meta_test(meta, small([100, 101, 102]), 20)["loss"][..., -1].log().mean())
    assert losses[1] < losses[0] - 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted, diverging, wrong


@pytest.mark.parametrize("arms", [RATE, UPDATE], ids=["rate", "update"])
def test_training_resumes_with_the_same_bits(arms, tmp_path):
    """Through a file, as the script does it."""
    saves = []

    def save(arrays):
        path = tmp_path / f"{len(saves)}.npz"
        np.savez(path, **arrays)
        saves.append(dict(np.load(path, allow_pickle=False)))

    whole, resumed = stack(arms), stack(arms)
    curve = train(whole, runs=5, save=save, save_every=2)
    assert [int(s["done"]) for s in saves] == [2, 4, 5]
    torch.testing.assert_close(train(resumed, runs=5, saved=saves[0]), curve, rtol=0, atol=0)
    for p, q in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_divergence_is_caught_before_it_reaches_the_weights():
    def problems(n):
        W, X, Y = small([n])
        return Problem(torch.full_like(W, torch.nan) if n == 2 else W, X, Y)

    saves, meta = [], stack(RATE)
    with pytest.raises(Diverged, match=r"run 2, step 4: teleport \(meta-seed 0\), published"):
        train(meta, runs=5, problems=problems, save=saves.append, save_every=1)
    assert len(saves) == 2 and all(p.isfinite().all() for p in meta.parameters())
    with pytest.raises(Diverged, match="times the first"):
        train(stack(UPDATE), rates=(1e3, 1e3))


def test_weights_that_are_not_finite_are_never_saved():
    meta, saves = stack(RATE), []
    adam = meta.adam(1e-3, 1e-3)
    step, count = adam.step, []

    def poisoned():  # the last meta-update of the second run
        step()
        count.append(1)
        if len(count) == 4:
            meta.teleporter.b.data[0] = torch.nan

    adam.step = poisoned
    with pytest.raises(Diverged, match="after run 1"):
        meta_train(meta, adam, lambda n: small([n]), runs=3, steps=9, unroll=4, save=saves.append, save_every=1)
    assert len(saves) == 1


def test_wrong_arms_and_unrolls_are_refused():
    with pytest.raises(ValueError, match="ordered|come as"):
        stack(RATE[::-1])
    with pytest.raises(ValueError, match="share"):
        stack([RATE[0], UPDATE[0]])
    for unroll in (1, 9):
        with pytest.raises(ValueError, match="unroll"):
            train(stack(RATE), steps=9, unroll=unroll)
