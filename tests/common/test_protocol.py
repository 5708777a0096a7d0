"""Tuning and comparison on disk: a part for each chunk of seeds, the same numbers however they are divided."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from common import protocol, tuning
from common.run import Run

NAMES, BEST = ("baseline", "faster"), {"easy": (3.0, 3.0), "hard": (30.0, 3.0)}  # the second is beyond the grid


@dataclass(frozen=True)
class Settings:
    seeds: int = 7
    least: int = 5
    tuning_seeds: int = 3
    grid: tuple = (1, 3, 10)


def train(case, which, factors, seeds):
    """Curves whose level grows with the distance from an arm's best factor, and differs by seed."""
    far = np.log(factors / np.array(BEST[case])[list(which), None]) ** 2
    level = torch.tensor(far)[..., None] + torch.tensor([float(seed % 97) for seed in seeds]) / 1000
    curve = level.exp()[..., None] * torch.linspace(1, 0.5, 4, dtype=torch.float64)
    return {"train_loss": curve, "test_loss": 2 * curve}


def stages(folder, monkeypatch, memory, calls=None, jobs=1):
    run = Run("experiment", Settings(), torch.device("cpu"), folder, quiet=True, jobs=jobs)
    run.open_parts()
    monkeypatch.setattr(protocol, "room", lambda device: memory)

    def counted(*of):
        if calls is not None:
            calls.append(of)
        return train(*of)

    return protocol.stages(run, tuple(BEST), NAMES, counted, ["faster"], member=[torch.zeros(1, 4, 4)])


def test_however_the_seeds_are_divided_the_numbers_are_the_same(tmp_path, monkeypatch):
    whole, tuned, seeds, metrics = stages(tmp_path / "whole", monkeypatch, 2**20)
    calls = []
    divided = stages(tmp_path / "divided", monkeypatch, 1, calls)  # a chunk holds one seed at least
    assert all(len(seeds) == 1 for *_, seeds in calls)
    for key, values in whole.items():
        np.testing.assert_array_equal(divided[0][key], values, err_msg=key)
    assert divided[2] == seeds and divided[3] == metrics
    assert tuned["hard"].best_factors().tolist() == [30, 3] and tuned["hard"].interior.all()
    assert list(whole)[0].startswith("tuning.easy/") and whole["compared.hard/test_loss"].shape[:2] == (2, 2)
    assert not set(seeds["easy"]) & {seed for *_, factors, some in calls if factors.shape[1] > 2 for seed in some}


def test_what_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    """Interrupted after each part in turn: every part is computed once, and the end is the same."""
    calls, straight = [], stages(tmp_path / "straight", monkeypatch, 1)[0]
    for turn in range(1, 100):

        def dies(*of, allowed=turn):
            if len(calls) == allowed:
                raise KeyboardInterrupt
            calls.append(of)
            return train(*of)

        run = Run("experiment", Settings(), torch.device("cpu"), tmp_path / "resumed", quiet=True)
        run.open_parts()
        try:
            arrays = protocol.stages(run, tuple(BEST), NAMES, dies, ["faster"], member=[torch.zeros(1, 4, 4)])[0]
            break
        except KeyboardInterrupt:
            pass
    for key, values in straight.items():
        np.testing.assert_array_equal(arrays[key], values, err_msg=key)
    asked = [(case, tuple(which), factors.tobytes(), tuple(seeds)) for case, which, factors, seeds in calls]
    assert len(asked) == len(set(asked)) == turn > 10


@pytest.mark.parametrize("measure", [protocol.number, protocol.final])
def test_one_number_a_run_of_a_tensor_or_an_array(measure):
    loss = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(measure(loss), measure(loss.numpy()))
    assert measure(loss).shape == (2, 3) and measure(loss).dtype == np.float64
    assert tuning.chunks(range(5), 2, [torch.zeros(1, 4, 4)], 2 * 2 * 4 * 64) == [range(0, 2), range(2, 4), range(4, 5)]
