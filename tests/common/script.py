"""A script in the house style that takes no time: what the tests of the command line run. Its parts grow tenfold."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import cli, plots  # noqa: E402
from common.claims import Verdict  # noqa: E402
from common.run import Outcome  # noqa: E402


@dataclass(frozen=True)
class Settings:
    sizes: tuple = (250, 2_500, 25_000)  # float64, not compressible: 2, 20 and 200 kB
    seeds: int = 1


def part(size):
    generator = torch.Generator().manual_seed(size)
    values = torch.rand(size, generator=generator, dtype=torch.float64)
    network = torch.ones(4, 4)  # of the default dtype, on the default device
    return {"values": values, "network": network @ network.T}


def experiment(run):
    parts, seconds = run.parts(part, {f"size{size}": size for size in run.settings.sizes})
    arrays = {f"{key}_{name}": array for key, part in parts.items() for name, array in part.items()}
    return Outcome({"last": arrays["size25000_values"][-1]}, arrays, timings=seconds)


def judge(outcome):
    return Verdict("holds", "± 0.5 ≤ φ", f"ψ is {outcome.metrics['last']:.2f}")


def plot(outcome, settings, save):
    figure, axes = plots.panels()
    noise = np.random.default_rng(0).random((500, 500))
    axes[0, 0].imshow(noise, interpolation="none")
    save(figure)


def report(outcome, settings):
    return f"κ ∂L/∂W ‖g‖² × {outcome.metrics['last']:.2f}\n---"


if __name__ == "__main__":
    PRESETS = dict.fromkeys(("tiny", "quick", "paper"), Settings())
    cli.main(__file__, f"{__doc__}\nSymbols: φ ψ κ ±", PRESETS, experiment, plot, report, judge)
