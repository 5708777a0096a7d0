"""The examples run, and what they say of themselves holds: outputs stay."""

import runpy
import sys

import pytest
from conftest import ROOT

from common import data


def test_quantization_runs_and_leaves_the_outputs_alone(capsys, monkeypatch):
    options = ["--samples", "100", "--epochs", "1", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["quantization.py", *options])
    runpy.run_path(str(ROOT / "examples" / "quantization.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "e-" in line or "e+" in line]
    assert len(lines) == 8 and all(float(line[-1]) < 1e-4 for line in lines)
    shares = [float(line[-2]) for line in lines]  # as trained, equalized, scaled apart, equalized again
    assert shares[3] > shares[2] and shares[7] > shares[6]


@pytest.mark.parametrize("make", ["cnn", "Transformer"])
def test_the_null_space_example_teleports_without_drift(make):
    example = runpy.run_path(str(ROOT / "examples" / "null_space.py"), run_name="example")
    mnist = data.load("mnist-mini")
    x, y = mnist.x[:220].view(-1, 28, 28), mnist.y[:220]
    for arm in ("symmetry", "null space"):
        loss, drift, growth = example["train"](example[make], arm, 0.02, 0, x, y)
        assert loss == loss and drift < 1e-4 and growth > 1
