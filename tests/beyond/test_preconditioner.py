"""A rescaled run and its untouched twin: the identity for every optimizer, and that no other exponent will do; layer
rates; the judge, fed with planted truths."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_judges_optimizers import everywhere, planted

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "beyond-the-papers"))

import layer_rates  # noqa: E402
import preconditioner  # noqa: E402
import teleported  # noqa: E402
import twins  # noqa: E402

from common.data import Dataset  # noqa: E402
from common.run import Outcome  # noqa: E402
from teleport import apply_to_layers, rescaling_action  # noqa: E402

DIMS, MEMBERS, STEPS = (7, 6, 5, 4), 2, 12
CASES = [(o, decay) for o in twins.OPTIMIZERS for decay in twins.DECAYS[: 3 if o == "Adam" else 2]]
PLANTED = [
    (o, decay, field)
    for o, decay in CASES
    for field in ("rate", *(["eps"] if twins.OPTIMIZERS[o].eps else []), *([] if decay == "none" else [decay]))
]


def network(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(MEMBERS, o, i, generator=generator).double() / i**0.5 for i, o in zip(DIMS, DIMS[1:])]
    scales = [4 ** (2 * torch.rand(MEMBERS, d, generator=generator).double() - 1) for d in DIMS[1:-1]]
    return weights, scales


def batches(size=6, tiny=1.0):
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        X = tiny * torch.rand(DIMS[0], size, generator=generator).double()
        yield X, torch.randint(DIMS[-1], (size,), generator=generator)


@pytest.mark.parametrize("optimizer, decay", CASES)
def test_a_rescaled_run_is_its_untouched_twin(optimizer, decay):
    """Moved by torch.optim; the run without the twin's rates is another."""
    found = twins.race(*network(), optimizer, 0.01, batches(), decay, 0.1)
    assert found["run"].shape == (STEPS, MEMBERS) and found["run"].max() < 1e-11 and found["step"].max() < 1e-12
    assert (found["twin"] / found["moved"] - 1).abs().max() < 1e-12
    assert (found["untouched"] / found["moved"] - 1).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer, decay, field", PLANTED)
@pytest.mark.parametrize("shift", [-1, 1])
def test_no_other_exponent_will_do(optimizer, decay, field, shift):
    """ε matters where gradients are as small as it is: the inputs are."""
    right = twins.OPTIMIZERS[optimizer].exponents
    wrong = right._replace(**{field: getattr(right, field) + shift})
    weights, scales = network()
    every = list(batches(tiny=1e-9 if field == "eps" else 1.0))
    for exponents, same in ((None, True), (wrong, False)):
        found = twins.race(weights, scales, optimizer, 0.01, every[:2], decay, 0.1, exponents)
        assert (found["step"].max() < 1e-12) == same and (same or found["step"].max() > 1e-9)


def test_a_decay_that_is_added_turns_adam_s_first_step_round():
    """The smallest example against "its own term unchanged": w = 1, g = −2, λ = 1, a = 2."""
    one, steps = torch.ones(1, 1, 1).double(), {}
    for name, a, w, g, exponents in (
        ("moved", 1, 2, -1, None),
        ("twin", 2, 1, -2, None),
        ("unchanged", 2, 1, -2, twins.NORMALIZED._replace(added=0)),
    ):
        run = twins.twin([w * one], "Adam", [a * one], 0.1, "added", 1.0, exponents)
        run.step([g * one])
        steps[name] = run.weights[0].item() - w
    assert steps["twin"] == pytest.approx(steps["moved"] / 2) == pytest.approx(-0.05)
    assert steps["unchanged"] == pytest.approx(0.05)


def test_the_linear_part_of_a_rescaling_is_the_rescaling_and_no_other_is_nearer():
    weights, scales = network()
    moved = apply_to_layers(weights, None, scales, rescaling_action, twins.ACTIVATION)
    for found, wanted in zip(twins.best_rescaling(weights, moved, sweeps=100), scales):
        assert torch.allclose(found, wanted, rtol=1e-6)
    moved = [W + 0.1 * torch.randn(W.shape, generator=torch.Generator().manual_seed(3)).double() for W in weights]

    def distance(scales):
        fitted = apply_to_layers(weights, None, scales, rescaling_action, twins.ACTIVATION)
        return sum((A - B).square().sum((1, 2)) for A, B in zip(fitted, moved))

    best = twins.best_rescaling(weights, moved)
    for m in range(len(best)):
        for i in range(len(best[m][0])):
            for factor in (0.99, 1.01):
                other = [s.clone() for s in best]
                other[m][:, i] *= factor
                assert (distance(other) > distance(best)).all()


@pytest.mark.parametrize("optimizer", twins.OPTIMIZERS)
def test_a_teleport_in_the_middle_that_leaves_the_memory_where_it_is(optimizer):
    """The linear part of a teleport, after six steps: the twin's rates change, and its memory grows by a or a²."""
    weights, _ = network()
    plain = [torch.ones_like(W) for W in weights]
    moved, twin = (twins.twin(weights, optimizer, plain, 0.02) for _ in range(2))
    for t, (X, labels) in enumerate(batches()):
        if t == STEPS // 2:
            settings = replace(preconditioner.PAPER, ascent_steps=3)
            result = teleported.linear_part(settings, tuple(moved.weights), X, labels)
            assert torch.allclose(result.loss_after, result.loss_before, rtol=1e-12)
            a = [after / before for after, before in zip(result.weights, moved.weights)]
            assert max((f - 1).abs().max() for f in a) > 1e-3
            moved.weights = [W.clone() for W in result.weights]
            twin.state = [twins.memory(state, f) for state, f in zip(twin.state, a)]
            twin.entries = twins.twin(weights, optimizer, a, 0.02).entries
        for run in (moved, twin):
            run.step(twins.gradients(run.weights, X, labels)[1])
    assert twins.difference(twins.pulled_back(moved.weights, a), twin.weights).max() < 1e-11


@pytest.mark.parametrize("optimizer, kind", [("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam)])
def test_layer_rates_are_torch_s_parameter_groups(optimizer, kind):
    weights, _ = network()
    X, labels = (torch.cat(parts, -1) for parts in zip(*batches()))
    data = Dataset("", "", X.T, labels, X.T[:7], labels[:7], (), {})
    rates = torch.tensor([[0.1, 0.01, 0.03], [0.01, 0.2, 0.05]]).double()
    found = layer_rates.train(weights, optimizer, rates, data, 2, 6)
    for e in range(MEMBERS):
        mine = [W[e : e + 1].clone().requires_grad_() for W in weights]
        theirs = kind([{"params": [W], "lr": lr} for W, lr in zip(mine, rates[e].tolist())], lr=1.0)
        for epoch in range(2):
            losses = []
            for x, y in zip(X.T.split(6), labels.split(6)):
                loss, gradients = twins.gradients(mine, x.T, y)
                for W, G in zip(mine, gradients):
                    W.grad = G
                theirs.step()
                losses.append(loss)
            assert torch.allclose(torch.cat(losses).mean(), found["train_loss"][e, epoch], rtol=1e-9)
            test = twins.gradients(mine, data.x_test.T, data.y_test)[0]
            assert torch.allclose(test[0], found["test_loss"][e, epoch], rtol=1e-9)


def test_the_search_finds_rates_within_its_budget_and_says_where_it_does_not():
    spent = []

    def bowl(points, runs):
        spent.append(len(points) * runs)
        return [(p[0] - 9) ** 2 + (p[1] + 4) ** 2 + (p[2] - 3) ** 2 for p in points]

    best, found, trials = layer_rates.search(bowl, 3, 1000)
    assert best == (9, -4, 3) and found and sum(spent) == sum(t[-2] for t in trials)
    coarse = sum(runs for *_, step, runs, _ in trials if step > 1)
    best, found, _ = layer_rates.search(bowl, 3, coarse)
    assert found and max(abs(a - b) for a, b in zip(best, (9, -4, 3))) <= 2
    spent.clear()
    assert not layer_rates.search(bowl, 3, coarse - 1)[1] and sum(spent) <= coarse - 1
    assert not layer_rates.search(lambda points, runs: [np.nan] * len(points), 3, 1000)[1]
    assert layer_rates.factors((2, 0, -2)) == [2, 1, 0.5]


BOTH = ("SGD", "Adam")
BETTER = everywhere(BOTH, "layer rates", -0.05)


@pytest.mark.parametrize(
    "effects, n, sd, edge, largest, word",
    [
        (BETTER, 20, 0.01, (), {}, "holds"),
        ({}, 20, 0.005, (), {}, "holds"),  # equivalent
        (everywhere(BOTH[:1], "preactivation"), 20, 0.005, (), {}, "holds in part: the teleport is better for SGD"),
        (everywhere(BOTH, "preactivation"), 20, 0.005, (), {}, "holds in part: the teleport is better for SGD, Adam"),
        (
            everywhere(BOTH[:1], "preactivation"),
            20,
            0.005,
            [("Adam", "layer rates")],
            {},
            "holds in part: the teleport is better for SGD",
        ),
        ({}, 4, 0.1, (), {}, "undecided: for SGD, Adam"),  # too few runs
        (BETTER, 20, 0.01, [("Adam", "layer rates")], {}, "undecided: for Adam"),
        (BETTER | everywhere(BOTH, "preactivation", np.nan), 20, 0.01, (), {}, "undecided: for SGD, Adam"),
        (BETTER, 20, 0.01, (), {"run": 2e-10}, "does not hold: the twin is another run"),
        (BETTER, 20, 0.01, (), {"step": 2e-12}, "does not hold"),
        (BETTER, 20, 0.01, (), {"run": np.nan}, "does not hold"),
    ],
)
def test_the_verdict_follows_the_rule(effects, n, sd, edge, largest, word):
    arrays, metrics = planted(preconditioner.ARMS, BOTH, effects, n, sd, edge)
    for o, decay in preconditioner.cases():
        here = largest if (o, decay) == ("RMSprop", "none") else {}
        arrays |= {f"race.{o}.{decay}/{key}": np.full((3, 2), here.get(key, 1e-15)) for key in ("run", "step")}
    for o in BOTH:
        arrays |= {f"tuning.{o}/layers": np.ones(3), f"tuning.{o}/trials": np.ones((4, 6)), f"tuning.{o}/budget": 9}
        arrays |= {f"batch.{o}/{key}": np.ones(shape) for key, shape in
                   (("growth", (2, 3)), ("share", 3), ("decrease", (2, 3, 3)), ("drift", 3))}  # fmt: skip
    outcome = Outcome(metrics, arrays, list(range(n)), label="mnist-mini", settings=preconditioner.PAPER)
    verdict = preconditioner.judge(outcome)
    assert str(verdict).startswith(word) and (word != "holds" or str(verdict) == word)
    assert "SGD" in verdict.surprise and (sd < 0.1 or "would have shown" in verdict.sentence)
    assert verdict.again() == ("not reproduced" if "step" in largest else "reproduced")


def test_runs_that_diverge_are_undecided_and_those_that_do_not_stand_beside():
    arrays, metrics = planted(preconditioner.ARMS, ("SGD",), everywhere(BOTH, "layer rates", -0.05), 20, 0.005)
    arrays["compared.SGD/train_loss"][1, 1, :5] = np.nan
    outcome = Outcome(metrics, arrays, label="mnist-mini", settings=preconditioner.PAPER)
    (pair,) = preconditioner.pairs("SGD")
    c = preconditioner.protocol.findings(outcome, preconditioner.ARMS, preconditioner.pairs)[pair]
    assert c.word == "undecided" and c.diverged == (5, 0)
    said = preconditioner.finite_only(outcome, "SGD")
    assert "of the 15 runs" in said and "+5." in said
