"""The library's tests once more, on a second device (see second_device.py), and bugs planted to be found there."""

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch
from second_device import DEVICE, put, second_device

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("test_teleport", "test_teleport_objectives", "common/test_mlp", "common/test_sharpness",
          "teleporter/test_teleporter")  # fmt: skip
LEFT_OUT = {  # what takes seconds and comes by no line that others do not come by; what uses devices of its own
    "test_ensemble_equals_loop_over_members",
    "test_derivatives_of_the_action_curve_match_finite_differences",
    "test_slope_of_the_curvature_matches_finite_differences",
    "test_random_transformers",
    "test_the_gradient_norm_as_any_other_objective",
    "test_the_example_runs",
    "test_parameters_on_two_devices",
}


@pytest.fixture(autouse=True)
def on_the_second_device(request):
    torch.manual_seed(0)
    with nullcontext() if request.module.__name__ == request.function.__module__ else second_device():
        yield


@pytest.fixture
def golden(golden):
    return lambda name: {k: put(v, DEVICE) for k, v in golden(name).items()}


def few(max_examples=1, **options):
    return SETTINGS(max_examples=min(max_examples, 2), **options)


SETTINGS, hypothesis.settings = hypothesis.settings, few  # what the suites import
for suite in SUITES:
    spec = importlib.util.spec_from_file_location(f"second_{Path(suite).name[5:]}", ROOT / "tests" / f"{suite}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {k: v for k, v in vars(module).items() if k.startswith("test_") and k not in LEFT_OUT}
    globals().update({f"test_{spec.name}_{k[5:]}": v for k, v in found.items()})
hypothesis.settings = SETTINGS


# ---------------------------------------------------------------------------------------------------------------------
# What the harness is for: bugs that no CPU shows, planted in the library itself

EYE, FLAG = "g.shape[-1], dtype=g.dtype, device=g.device", "torch.zeros(E, dtype=torch.bool, device=x.device)"
MOVED, RETURNED = "moved = activation.f(gz)", "return value.detach(), gradients"
PLANTED = {
    "a matrix made without device=": (EYE, "g.shape[-1], dtype=g.dtype"),
    "a vector made without device=": ("W.new_ones(W.shape[-2])", "torch.ones(W.shape[-2], dtype=W.dtype)"),
    "a flag made without device=": (FLAG, FLAG.replace(", device=x.device", "")),
    "cpu() mixed back": (MOVED, f"{MOVED}.cpu()"),
    "to() mixed back": (MOVED, f'{MOVED}.to("cpu")'),
    "cpu() of gradients": (RETURNED, "return value.detach(), [G.cpu() for G in gradients]"),
    "numpy() and back": (MOVED, "moved = torch.from_numpy(activation.f(gz).detach().numpy())"),
    "the result left on the CPU": ("weights, scales = trial(step)", "weights = [W.cpu() for W in trial(step)[0]]"),
}


def teleport_source(old="", new=""):
    """teleport.py with one line changed, as a module that is not a test."""
    source = (ROOT / "teleport.py").read_text()
    assert old in source
    module = ModuleType("planted")
    exec(compile(source.replace(old, new), "planted.py", "exec"), module.__dict__)
    return module


def teleported(library):
    """A step of `library`, compared with where it began as a test would."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, o, i, generator=generator, dtype=torch.float64) for o, i in ((5, 6), (4, 5))]
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    moved = library.teleport(
        weights, x, lambda w: library.forward(w, x, library.TANH).square().sum((-2, -1)), lr=1e-3, steps=1,
        objective=library.squared_gradient_norm, action=library.preactivation_action, activation=library.TANH,
    )  # fmt: skip
    assert all((W - V).abs().max() > 0 for W, V in zip(weights, moved.weights))
    return moved.weights


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_found(plant):
    with second_device(), pytest.raises((RuntimeError, TypeError, ValueError), match="same device|to numpy"):
        teleported(teleport_source(*PLANTED[plant]))


def test_without_a_bug_the_result_is_that_of_the_cpu_to_the_bit():
    here = teleported(teleport_source())
    with second_device():
        there = teleported(teleport_source())
        assert all(W.device == DEVICE for W in there)
    assert all(torch.equal(W, V) for W, V in zip(here, there))
