"""A rescaled run and its untouched twin: the identity for every optimizer, and that no other exponent will do."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "beyond-the-papers"))

import twins  # noqa: E402

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
