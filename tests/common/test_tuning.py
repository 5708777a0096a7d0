"""Tuning with planted best rates, the number of runs that follows, chunks, and words where there is no best rate."""

import numpy as np
import pytest
import torch

from common.mlp import published_seeds
from common.statistics import runs_needed
from common.tuning import GRID, Tuned, compared, disjoint_seeds, in_chunks, rung, runs, tune


def planted(optima, seeds=4, noise=0.0, diverges=np.inf, asked=None):
    """scores of arms whose best factors are known; above `diverges` one seed is NaN."""
    generator = np.random.default_rng(0)

    def scores(which, factors):
        if asked is not None:
            asked.append((tuple(which), factors))
        x = np.log(factors)[..., None] - np.log([optima[a] for a in which])[:, None, None]
        y = x**2 + noise * generator.normal(size=(*factors.shape, seeds))
        y[..., 0] = np.where(factors > diverges, np.nan, y[..., 0])
        return y

    return scores


def test_the_rungs_go_on_by_the_same_ratios():
    assert [rung(i) for i in range(len(GRID))] == pytest.approx(GRID)
    assert rung(13) == pytest.approx(55) and rung(24) == pytest.approx(2500) and rung(-4) == pytest.approx(1 / 2)
    ladder = [rung(i, (1, 2, 5, 10)) for i in range(-7, 8)]
    assert (np.diff(ladder) > 0).all() and ladder == pytest.approx([1 / x for x in reversed(ladder)])


@pytest.mark.parametrize("best", [0.02, 1 / 3, 1, 3, 50, 400])
def test_the_grid_grows_until_the_best_is_inside(best):
    """Inside the grid, at either edge, and beyond."""
    asked = []
    tuned = tune(planted([3, best], asked=asked), 2)
    assert tuned.interior.all() and tuned.best_factors() == pytest.approx([3, best], rel=0.26)
    assert abs(np.log(tuned.best_factors()[1] / best)) == pytest.approx(abs(np.log(tuned.factors / best)).min())
    assert [which for which, _ in asked] == [(0, 1), *[(1,)] * (len(asked) - 1)]  # only the arm at an edge goes on
    assert not tuned.tried[0, tuned.factors < 1].any() and np.isnan(tuned.scores[~tuned.tried]).all()
    tried = np.concatenate([factors[list(which).index(1)] for which, factors in asked])
    assert len(set(tried)) == len(tried) == tuned.tried[1].sum()


def test_a_best_that_is_never_inside_is_given_up():
    tuned = tune(lambda which, factors: -np.log(factors)[..., None].repeat(2, -1), 2)
    assert not tuned.interior.any() and tuned.factors[-1] == pytest.approx(2500)
    down = tune(lambda which, factors: np.log(factors)[..., None].repeat(2, -1), 1, bound=5)
    assert not down.interior.any() and down.factors[0] == pytest.approx(rung(-6))


def test_arms_at_both_edges_try_as_many_factors():
    tuned = tune(planted([100, 1e-3]), 2, grid=(1, 3))
    assert tuned.tried.shape[0] == 2 and not tuned.interior[1]


def test_a_factor_at_which_a_run_diverged_never_wins_and_counts_as_an_edge():
    tuned = tune(planted([20], diverges=6), 1)
    assert tuned.best_factors() == [5] and tuned.interior.all()
    nothing = tune(planted([20], diverges=0), 1)
    assert not nothing.interior.any()


def test_the_grid_must_ascend_from_one():
    for grid in ((1,), (2, 3), (1, 3, 2)):
        with pytest.raises(ValueError, match="grid"):
            tune(planted([1]), 1, grid)


def test_tuned_is_saved_and_read():
    tuned = tune(planted([2, 5], noise=0.1), 2)
    again = Tuned.load(tuned.save("Adam/tuning_"), "Adam/tuning_")
    for mine, theirs in zip(tuned, again):
        np.testing.assert_array_equal(mine, theirs)
    assert tuned.at_best().shape == (2, 4)


def test_the_noisiest_claimed_arm_decides_the_number_of_runs():
    scores = np.random.default_rng(1).normal(size=(3, 1, 10)) * np.array([0, 0.05, 0.9])[:, None, None]
    tuned = Tuned(np.ones(1), scores, np.ones((3, 1), bool), np.zeros(3, int), np.ones(3, bool))
    sd = scores[1, 0].std(ddof=1)
    assert runs(tuned, [1], (20, 200)) == runs_needed(sd) and runs_needed(sd).n > 20
    assert runs(tuned, [1, 2], (20, 200)).n == 200 and runs(tuned, [1, 2], (20, 200)).margin > 0.01
    one = tuned._replace(scores=scores[..., :1])
    assert runs(one, [1], (2, 8)).n == 8  # no spread is known


def test_seeds_are_the_published_ones_and_disjoint():
    tuning, fresh = disjoint_seeds(10, 20)
    assert tuning == published_seeds(10) and len(fresh) == 20 and not set(tuning) & set(fresh)


def test_chunks_are_joined_along_the_seeds():
    weights, sizes = [torch.zeros(1000, 784)], []

    def train(seeds):
        sizes.append(len(seeds))
        return {"loss": torch.tensor(seeds).expand(2, 3, -1)}

    for memory, largest in ((2**27, 3), (2**24, 1)):  # at least one seed a chunk
        sizes.clear()
        joined = in_chunks(train, list(range(9)), members=3, weights=weights, memory=memory)["loss"]
        assert max(sizes) == largest and len(sizes) == 9 // largest
    assert joined.shape == (2, 3, 9) and joined[0, 0].tolist() == list(range(9))


def test_without_a_best_rate_there_is_no_word():
    numbers = {"a": np.zeros(9) - 1 + 0.01 * np.arange(9), "b": np.zeros(9), "c": 0.001 * np.arange(9)}
    found = compared(numbers, [("a", "b"), ("c", "b")], {"a": True, "b": True, "c": False})
    assert [c.word for c in found.values()] == ["better", "undecided"]
    assert compared(numbers, [("a", "b"), ("c", "b")])["c", "b"].word == "equivalent"
    assert found["a", "b"].p_holm == pytest.approx(2 * found["a", "b"].p, rel=1e-6)


def test_copies_of_the_baseline_are_better_or_worse_in_six_per_cent_of_the_families_at_most():
    """From the tuning to the words: 200 families of 3 arms that differ from the baseline by their seeds only."""
    wrong = 0
    for family in range(200):
        generator = np.random.default_rng(family)

        def scores(which, factors, generator=generator):
            return 0.002 * np.log(factors / 4)[..., None] ** 2 + 0.03 * generator.normal(size=(*factors.shape, 10))

        tuned = tune(scores, 4)
        fresh = scores(range(4), tuned.best_factors()[:, None])[:, 0]
        found = compared(dict(enumerate(fresh)), [(a, 0) for a in (1, 2, 3)], dict(enumerate(tuned.interior)))
        wrong += bool({"better", "worse"} & {c.word for c in found.values()})
    assert wrong <= 12
