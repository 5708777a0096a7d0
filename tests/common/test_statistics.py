"""Statistics: the four words, families, power, pools and correlations, against other software, simulation, and the law.

Numbers called reference are statsmodels 0.15.0's (TTestPower, multipletests, ttost_paired, combine_effects, OLS).
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from common.statistics import (
    Comparison,
    bootstrap,
    compare,
    correlation,
    correlation_runs,
    detectable,
    family,
    holm,
    mean_std,
    percent,
    pooled,
    power,
    power_equivalence,
    runs_needed,
    sign_flip,
    tost,
)

X = np.array([0.021, -0.013, 0.008, 0.002, -0.004, 0.011, 0.017, -0.009])
Y = np.array([0.003, 0.001, 0.006, -0.007, 0.002, 0.004, -0.001, 0.005])
quick = settings(max_examples=60, deadline=None)
pairs = st.integers(2, 8).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(0.1, 10), min_size=n, max_size=n).map(np.array)] * 2)
)
OPPOSITE = {"better": "worse", "worse": "better", "equivalent": "equivalent", "undecided": "undecided"}


def shifted(effect, sd, n, seed=0):
    """(values, reference): losses whose log ratios have exactly this mean and standard deviation."""
    generator = np.random.default_rng(seed)
    reference, d = np.exp(generator.normal(size=n)), generator.normal(size=n)
    return reference * np.exp(effect + sd * (d - d.mean()) / d.std(ddof=1)), reference


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "effect, sd, n, word",
    [
        (-0.05, 0.03, 20, "better"),
        (0.05, 0.03, 20, "worse"),
        (0.0, 0.01, 20, "equivalent"),
        (0.0, 0.10, 20, "undecided"),  # no effect, underpowered
        (-0.02, 0.10, 20, "undecided"),  # an effect, underpowered
        (-0.003, 0.002, 20, "equivalent"),  # certain, but negligible
        (-0.012, 0.002, 20, "better"),  # certain, and past the margin
    ],
)
def test_word_of_a_planted_truth(effect, sd, n, word):
    values, reference = shifted(effect, sd, n)
    c = compare(values, reference)
    assert c.word == word and c.effect == pytest.approx(effect, abs=1e-12) and c.sd == pytest.approx(sd)
    assert c.low < effect < c.high and (c.n, c.diverged, c.margin) == (n, (0, 0), 0.01)
    assert compare(values, reference, smaller_is_better=False).word == OPPOSITE[word]
    assert compare(np.log(values), np.log(reference), relative=False) == pytest.approx(c, nan_ok=True)


def test_an_effect_the_size_of_the_detectable_one_is_found_in_four_of_five_designs():
    n, sd = 12, 0.05
    d = np.random.default_rng(3).normal(detectable(sd, n), sd, (2000, n))
    found = [compare(row, np.zeros(n), relative=False).word == "worse" for row in d]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_compare_agrees_with_scipy():
    c, test = compare(X, Y, relative=False), stats.ttest_rel(X, Y)
    assert c.p == pytest.approx(test.pvalue, rel=1e-12) and c.p_holm == c.p
    for low, high, level in ((c.low, c.high, 0.95), (c.low90, c.high90, 0.9)):
        assert (low, high) == pytest.approx(tuple(test.confidence_interval(level)), rel=1e-12)
    assert percent(math.log(1.03)) == pytest.approx(3) and percent(math.log(0.5)) == pytest.approx(-50)


def test_tost_reference():
    for margin, p in ((0.01, 0.07168392784383917), (0.02, 0.0031664287384510896)):
        c = compare(X, Y, margin=margin, relative=False)
        assert c.p_equivalence == pytest.approx(p, rel=1e-9)
        assert (c.word == "equivalent") == (p < 0.05) == (-margin < c.low90 and c.high90 < margin)


def test_no_spread():
    same = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.effect, same.low, same.high, same.p, same.word, same.detectable) == (0, 0, 0, 1, "equivalent", 0)
    for n, word in ((3, "undecided"), (6, "worse")):  # constant up to rounding: the sign test's p
        x = np.linspace(1, 2, n)
        c = compare(1.02 * x, x)
        assert (c.sd, c.p, c.word) == (0, 2.0 ** (1 - n), word)
    assert tost(0.01, 0, 5, 0.01) == 1


def test_not_finite():
    values, reference = shifted(-0.05, 0.001, 8)
    assert compare(values, reference).word == "better"
    for bad in (math.nan, math.inf):
        values[2] = bad
        for flag in (False, True):  # one of eight decides nothing
            c = compare(values, reference, divergence_decides=flag)
            numbers = (c.effect, c.low, c.high, c.low90, c.high90, c.sd, c.p, c.p_holm, c.p_equivalence, c.detectable)
            assert np.isnan(numbers).all() and (c.word, c.diverged, c.n) == ("undecided", (1, 0), 8)
            assert compare(reference, values, divergence_decides=flag).diverged == (0, 1)
    lost = np.full(8, math.nan)
    assert compare(lost, reference).word == "undecided"
    c = compare(lost, reference, divergence_decides=True)
    assert (c.word, c.p, c.diverged) == ("worse", 2**-7, (8, 0)) and math.isnan(c.effect)
    assert compare(reference, lost, divergence_decides=True).word == "better"
    assert compare(reference, lost, divergence_decides=True, smaller_is_better=False).word == "better"
    assert compare(lost, lost, divergence_decides=True).word == "undecided"
    assert compare(lost, values, divergence_decides=True).word == "undecided"  # the other diverged too, once
    assert compare(lost[:5], reference[:5], divergence_decides=True).word == "undecided"  # p = 1/16
    assert [m.word for m in family([c] * 7)] == ["undecided"] * 7  # 7 / 128 > 0.05


def test_one_seed_and_bad_input():
    c = compare([1.1], [1.0])
    assert c.word == "undecided" and c.effect == pytest.approx(math.log(1.1)) and np.isnan([c.low, c.high, c.p]).all()
    for values, reference in (([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]]), ([], [])):
        with pytest.raises(ValueError, match="values and reference"):
            compare(values, reference)
    with pytest.raises(ValueError, match="reference must be positive"):
        compare([1.0, 1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="margin"):
        compare(X, Y, margin=0, relative=False)


@quick
@given(pairs)
def test_swapping_the_sides_mirrors_everything(pair):
    a, b = pair
    c, mirrored = compare(a, b), compare(b, a)
    assert mirrored.word == OPPOSITE[c.word]
    assert (-mirrored.effect, -mirrored.high, -mirrored.low) == pytest.approx((c.effect, c.low, c.high), abs=1e-12)
    assert (mirrored.p, mirrored.p_equivalence) == pytest.approx((c.p, c.p_equivalence), rel=1e-6)


@quick
@given(pairs, st.floats(0.01, 100), st.floats(0.5, 2))
def test_relative_effects_have_no_unit(pair, unit, factor):
    a, b = pair
    c, same, moved = compare(a, b), compare(unit * a, unit * b), compare(factor * a, b)
    assert (same.effect, same.low, same.high) == pytest.approx((c.effect, c.low, c.high), abs=1e-9)
    assert moved.effect - c.effect == pytest.approx(math.log(factor), abs=1e-9)
    assert moved.sd == pytest.approx(c.sd, abs=1e-9)


@quick
@given(pairs, st.integers(2, 4), st.randoms(use_true_random=False))
def test_more_members_narrow_and_their_order_is_no_matter(pair, times, random):
    a, b = pair
    c, more = compare(a, b), compare(np.tile(a, times), np.tile(b, times))
    assume(c.sd > 1e-6)
    assert more.effect == pytest.approx(c.effect, abs=1e-12)
    assert more.high - more.low < c.high - c.low and more.detectable < c.detectable and more.p <= c.p
    order = random.sample(range(len(a)), len(a))
    assert compare(a[order], b[order])[:7] == pytest.approx(c[:7], abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Families


def test_holm_reference():
    reference = [0.0024, 0.09, 0.055, 0.09, 0.2, 0.055]
    assert holm([0.0004, 0.03, 0.011, 0.04, 0.2, 0.011]) == pytest.approx(reference)
    with_nan = holm([0.01, math.nan, 0.02])  # three members, not two
    assert with_nan[[0, 2]] == pytest.approx([0.03, 0.04]) and math.isnan(with_nan[1])
    assert len(holm([])) == 0


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_properties(p, random):
    p, adjusted, bonferroni = np.array(p), holm(p), np.minimum(np.array(p) * len(p), 1)
    assert (adjusted >= p).all() and (adjusted <= bonferroni).all() and adjusted[p.argmin()] == bonferroni.min()
    assert (np.diff(adjusted[p.argsort()]) >= 0).all()
    order = random.sample(range(len(p)), len(p))
    assert (holm(p[order]) == adjusted[order]).all()


def test_a_family_is_stricter_than_its_members():
    members = [compare(*shifted(effect, 0.05, 10, seed)) for seed, effect in enumerate((-0.2, -0.042, 0.0))]
    lost = compare([math.nan] * 10, np.ones(10))
    assert [m.word for m in members] == ["better", "better", "undecided"]
    inside = family([*members, lost])
    assert [m.word for m in inside] == ["better", "undecided", "undecided", "undecided"]
    assert inside[1].p == members[1].p < 0.05 < inside[1].p_holm and math.isnan(inside[3].p_holm)
    assert family(inside)[:3] == inside[:3]  # p is kept: correcting twice is correcting once
    for m, alone in zip(inside, members):
        assert m.detectable == pytest.approx(detectable(0.05, 10, 1 - 0.05 / 4)) and m.detectable > alone.detectable
        assert m[:8] == alone[:8]  # intervals are each comparison's own
    equivalent = compare(*shifted(0.001, 0.005, 20))
    assert family([equivalent] * 20)[0].word == "equivalent"  # not corrected


def test_null_families_are_better_or_worse_in_six_per_cent_at_most():
    """1,000 families of 5 arms that are the baseline with other seeds, sharing the baseline's 20 runs."""
    runs = np.exp(0.03 * np.random.default_rng(16).normal(size=(1000, 6, 20)))
    words = [[m.word for m in family([compare(arm, baseline) for arm in arms])] for baseline, *arms in runs]
    wrong = np.mean([bool({"better", "worse"} & set(members)) for members in words])
    assert 0.01 <= wrong <= 0.06, wrong
    single = np.mean([compare(baseline, arm).p < 0.05 for baseline, arm, *_ in runs])
    assert single == pytest.approx(0.05, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Power


@pytest.mark.parametrize(
    "effect, n, alpha, reference",
    [
        (0.5, 20, 0.05, 0.5645044184390203),
        (0.3, 50, 0.01, 0.2994694911461521),
        (1.2, 5, 0.05, 0.5302212511402787),
        (0.1, 200, 0.05, 0.29065761766148046),
        (2.0, 5, 0.01, 0.5471761892938509),
    ],
)
def test_power_reference(effect, n, alpha, reference):
    assert power(effect * 0.07, 0.07, n, 1 - alpha) == pytest.approx(reference, abs=1e-6)
    assert power(-effect, 1, n, 1 - alpha) == pytest.approx(reference, abs=1e-6)
    assert power(0, 1, n, 1 - alpha) == pytest.approx(alpha, abs=1e-5)


def test_detectable_reference():
    reference = {(20, 0.05): 0.6604416544380312, (20, 0.01): 0.8384472461638419, (5, 0.05): 1.6819970833232674}
    for (n, alpha), effect in reference.items():
        assert detectable(0.07, n, 1 - alpha) == pytest.approx(0.07 * effect, rel=1e-5)
    for n in (2, 3, 200):  # where scipy's noncentral t is NaN, too
        assert power(detectable(1, n, 0.999), 1, n, 0.999) == pytest.approx(0.8, abs=1e-6)
    assert math.isnan(detectable(1, 1)) and math.isnan(detectable(math.nan, 9)) and detectable(0, 9) == 0


@pytest.mark.parametrize("sd, n, effect", [(0.01, 8, 0.0), (0.01, 12, 0.004), (0.02, 40, -0.002), (0.02, 5, 0.0)])
def test_power_of_equivalence_is_that_of_a_simulation(sd, n, effect):
    generator = np.random.default_rng(n)
    means = generator.normal(effect, sd / math.sqrt(n), 400_000)
    sds = sd * np.sqrt(generator.chisquare(n - 1, 400_000) / (n - 1))
    shown = np.abs(means) + stats.t.ppf(0.95, n - 1) * sds / math.sqrt(n) < 0.01
    assert power_equivalence(0.01, sd, n, effect) == pytest.approx(shown.mean(), abs=0.004)


def test_equivalence_at_the_margin_is_shown_in_five_per_cent():
    assert power_equivalence(0.01, 0.002, 20, effect=0.01) == pytest.approx(0.05, abs=1e-3)
    for call in (lambda: power(1, 1, 1), lambda: power_equivalence(1, 0, 5)):
        with pytest.raises(ValueError, match="n must be at least 2"):
            call()


def test_runs_needed():
    assert runs_needed(0.001) == (20, 0.01, pytest.approx(0.0857, rel=1e-3))
    middle = runs_needed(0.03)  # (2.927 · 3)² = 77.1
    assert middle == (78, 0.01, pytest.approx(77.1, abs=0.05))
    assert power_equivalence(0.01, 0.03, middle.n) == pytest.approx(0.8, abs=0.01)
    capped = runs_needed(0.076)
    assert capped.n == 200 and capped.needed > 200 and capped.margin == pytest.approx(2.927 * 0.076 / math.sqrt(200))
    assert runs_needed(0.076, capped.margin).n == 200 and runs_needed(0.03, limits=(2, 50)).n == 50
    unknown = runs_needed(math.nan)
    assert unknown.n == 200 and math.isnan(unknown.margin)
    with pytest.raises(ValueError, match="margin must be positive"):
        runs_needed(0.01, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pools, bootstrap, correlations


def comparisons(effects, variances, n=10):
    return [Comparison(e, *[0.0] * 4, n, math.sqrt(v * n), *[0.0] * 9) for e, v in zip(effects, variances)]


def test_pooled_reference():
    p = pooled(comparisons((-0.02, 0.01, -0.045, 0.03, -0.01), (1e-4, 4e-4, 2.2e-4, 9e-4, 5e-5)))
    half = 0.010219277958177791 * stats.t.ppf(0.975, 4)
    assert (p.effect, p.tau**2, p.k) == pytest.approx((-0.013884205120915481, 0.0001906437125748502, 5), rel=1e-9)
    assert (p.low, p.high) == pytest.approx((p.effect - half, p.effect + half), rel=1e-9)


def test_pooled_without_variation_is_no_narrower_than_a_fixed_effect():
    variances = np.array([4e-4, 4e-4, 9e-4])
    p = pooled(comparisons((0.01, 0.011, 0.012), variances))
    assert p.tau == 0 and p.high - p.effect == pytest.approx(stats.t.ppf(0.975, 2) / math.sqrt((1 / variances).sum()))


def test_pooled_interval_holds_the_truth_where_effects_vary():
    generator = np.random.default_rng(2)
    effects = generator.normal(0.03, 0.02, (1000, 5)) + generator.normal(0, 0.01, (1000, 5))
    inside = [p.low < 0.03 < p.high for p in (pooled(comparisons(row, [1e-4] * 5)) for row in effects)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_pooled_edges():
    one = pooled(comparisons([0.02], [1e-4]))
    assert one.effect == 0.02 and math.isnan(one.low)
    for effects, variances in (((0.1, math.nan), (1, 1)), ((0.1, 0.2), (1, 0)), ((0.1, 0.2), (1, math.nan))):
        assert np.isnan(pooled(comparisons(effects, variances))[:4]).all()
    with pytest.raises(ValueError, match="comparisons"):
        pooled([])


def ratio(a, b, axis=-1):
    return a.mean(axis) / b.mean(axis)


def test_bootstrap_covers_a_ratio_and_repeats():
    generator, inside = np.random.default_rng(7), []
    for _ in range(60):
        b = generator.exponential(1, 40) + 1
        estimate, low, high = bootstrap(ratio, (b * 2 + generator.normal(0, 0.5, 40), b), generator)
        assert low < estimate < high
        inside.append(low < 2 < high)
    assert np.mean(inside) > 0.85
    again = [bootstrap(np.median, (X,), np.random.default_rng(0)) for _ in range(2)]
    assert again[0] == again[1] and again[0][0] == np.median(X)
    wide, narrow = (bootstrap(ratio, (b, b), np.random.default_rng(0), paired=p) for p in (False, True))
    assert wide[2] - wide[1] > 0.1 and not narrow[2] - narrow[1] > 1e-12


def test_bootstrap_edges():
    generator = np.random.default_rng(0)
    assert np.isnan(bootstrap(np.mean, ([1.0, math.nan],), generator)).all()
    estimate, *bounds = bootstrap(np.mean, ([1.0],), generator)
    assert estimate == 1 and np.isnan(bounds).all()
    with pytest.raises(ValueError, match="generator"):
        bootstrap(np.mean, (X,), 0)


def test_sign_flip():
    assert sign_flip([1.0, 2, 3, 4, 5]) == 2 / 32 and sign_flip([-1.0, -1, -1]) == 0.25  # every sign, the smallest p
    assert sign_flip([0.1, -0.1, 0.2, -0.2]) == 1 and math.isnan(sign_flip([1.0, math.nan]))
    exact = stats.permutation_test(
        (X - Y,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert sign_flip(X - Y) == exact.pvalue and abs(exact.pvalue - compare(X, Y, relative=False).p) < 0.05
    with pytest.raises(ValueError, match="differences"):
        sign_flip(np.ones(13))


def test_correlation_agrees_with_scipy():
    generator = np.random.default_rng(5)
    x = generator.normal(size=30)
    y = np.exp(x + generator.normal(size=30))
    c, pearson, spearman = correlation(x, y), stats.pearsonr(x, y), stats.spearmanr(x, y)
    assert (c.r, c.p) == pytest.approx((pearson.statistic, pearson.pvalue), rel=1e-9)
    assert (c.low, c.high) == pytest.approx(tuple(pearson.confidence_interval()), rel=1e-9)
    ranks = correlation(x, y, rank=True)
    assert (ranks.r, ranks.p) == pytest.approx((spearman.statistic, spearman.pvalue), rel=1e-9)
    assert ranks == pytest.approx(correlation(x**3, np.log(y), rank=True))  # ranks know no scale
    half = NormalDist().inv_cdf(0.975) * math.sqrt((1 + ranks.r**2 / 2) / 27)
    assert math.atanh(ranks.high) - math.atanh(ranks.r) == pytest.approx(half)


def test_partial_correlation_reference():
    x = [-0.39, 0.66, -0.15, -0.7, 0.95, 0.16, -1.32, 0.32, 0.37, 0.01, 1.32, 1.56]
    y = [-2.17, -1.4, 0.23, -1.37, 0.65, 0.59, 2.24, -0.69, -0.2, 2.33, 0.02, 0.43]
    z = [0.35, 0.82, 0.33, -1.3, 0.91, 0.45, -0.54, 0.58, 0.36, 0.29, 0.03, 0.55]
    c = correlation(x, y, [z])
    assert (c.r, c.p) == pytest.approx((-0.10576676161015115, 0.7569397522348655), rel=1e-9)
    half = NormalDist().inv_cdf(0.975) / math.sqrt(12 - 3 - 1)
    assert (math.atanh(c.low), math.atanh(c.high)) == pytest.approx((math.atanh(c.r) - half, math.atanh(c.r) + half))


@pytest.mark.parametrize("rank", [False, True])
def test_correlation_interval_holds_the_truth(rank):
    generator, inside = np.random.default_rng(11), []
    truth = 6 / math.pi * math.asin(0.25) if rank else 0.5  # Spearman's of a normal pair
    for _ in range(1000):
        z, a, b = generator.normal(size=(3, 30))
        c = correlation(a, 0.5 * a + math.sqrt(0.75) * b, [] if rank else [z], rank)
        inside.append(c.low < truth < c.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_correlation_edges():
    x = np.arange(6.0)
    assert correlation(x, 2 * x + 1)[:4] == pytest.approx((1, 1, 1, 0), abs=1e-12)
    assert correlation(x, -x)[:4] == pytest.approx((-1, -1, -1, 0), abs=1e-12)
    assert math.isnan(correlation(x[:3], x[:3] ** 2).low) and math.isnan(correlation(x[:2], x[:2]).p)
    for other in (np.ones(6), np.where(x == 2, math.nan, x)):
        assert np.isnan(correlation(x, other)[:4]).all()
    assert np.isnan(correlation(x, x**2, [2 * x])[:4]).all()  # nothing of x is left
    with pytest.raises(ValueError, match="equally long"):
        correlation(x, x[:5])


def test_runs_that_decide_a_correlation():
    assert correlation_runs(0.1) == correlation_runs(-0.1) == 783
    assert correlation_runs(0.1, level=1 - 0.05 / 6, covariates=1) == 1207
    n, generator = correlation_runs(0.4), np.random.default_rng(4)
    a, b = generator.normal(size=(2, 2000, n))
    found = [correlation(x, 0.4 * x + math.sqrt(1 - 0.16) * y).p < 0.05 for x, y in zip(a, b)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="r must be"):
        correlation_runs(0)


def test_mean_and_spread_as_text():
    assert mean_std([0.30, 0.31, 0.32]) == "0.310 ± 0.010" and mean_std([1.0, math.inf]) == "diverged"
    assert mean_std([0.25]) == "0.25"
