"""The statistics behind every verdict: paired comparisons with one of four words, families, power, pools, correlations.

    c = compare(losses, baseline_losses)          # one number a run, the same seeds in the same order
    c.effect, c.low, c.high                       # the mean log ratio with its 95 % interval; `percent` for per cent
    c.word                                        # better, worse, equivalent, undecided
    [c.word for c in family(comparisons)]         # the same after Holm's correction over a figure's comparisons

A word is decided in this order:
1. *equivalent*: the 90 % interval lies inside ± margin (two one-sided t tests at 5 %). It goes before 2, since a
   difference that is certain but smaller than the margin is negligible by the margin's own definition; its sign and
   interval stay in sight. Equivalence is not corrected over the family: Holm guards better and worse.
2. *better* or *worse*: the two-sided paired t test, p after Holm < 5 %, and the sign of the effect.
3. *undecided*, with the smallest effect that the design would have shown with 80 % power.

A run that is not finite is neither dropped nor replaced: the effect is NaN, the word is *undecided*, and `diverged`
counts such runs of each side. See `compare` for the one exception. One seed has no interval: NaN, and *undecided*.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import atanh, ceil, expm1, inf, isfinite, nan, sqrt, tanh
from typing import NamedTuple

import numpy as np
import scipy  # its stats and optimize, which few need, take a third of a second and wait until asked for
from scipy import special

POWER = 0.8
Row = Sequence[float] | np.ndarray  # (n,)


class Comparison(NamedTuple):
    """values − reference, paired by seed; in logarithms (so relative) if asked for. NaN: no such number."""

    effect: float  # mean of the differences: negative if the values are smaller
    low: float  # interval at `level`
    high: float
    low90: float  # interval at 2·level − 1, the one that equivalence looks at
    high90: float
    n: int  # pairs, those that diverged included
    sd: float  # standard deviation of the differences
    p: float  # two-sided paired t test
    p_holm: float  # the same, corrected over the family; p itself before `family`
    p_equivalence: float  # two one-sided paired t tests against the margin
    word: str  # better, worse, equivalent, undecided
    margin: float
    detectable: float  # the smallest effect found with 80 % power, at the first (strictest) step of Holm in a family
    diverged: tuple[int, int]  # runs that are not finite: of the values, of the reference
    smaller_is_better: bool
    level: float


class Runs(NamedTuple):
    """How many runs to make: n is `needed`, rounded up, within the limits; `margin` is what n runs can reach."""

    n: int
    margin: float
    needed: float


class Pooled(NamedTuple):
    """A random-effects mean with its interval; tau is the standard deviation of the true effects."""

    effect: float
    low: float
    high: float
    tau: float
    k: int  # comparisons


class Correlation(NamedTuple):
    """r with its interval, the p of r = 0, the number of points and of covariates that were taken out."""

    r: float
    low: float
    high: float
    p: float
    n: int
    covariates: int


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def compare(
    values: Row,
    reference: Row,
    margin: float = 0.01,
    relative: bool = True,
    smaller_is_better: bool = True,
    level: float = 0.95,
    divergence_decides: bool = False,
) -> Comparison:
    """Compare two arms, one number a run, paired by seed: values and reference are (n,) in the same order of seeds.

    relative: compare logarithms, so that effect, intervals, SD, margin and detectable effect are log ratios (0.01 is
    1 %: see `percent`); for numbers that are logarithms already (a mean log loss) or points, relative=False, and all of
    them, the margin too, are in the numbers' own unit. margin: above it a difference matters.
    divergence_decides: a rule may say beforehand that diverging is losing. Then, if every run of one side diverged and
    none of the other, p is that of the exact sign test, 2^(1 − n), and the word is worse or better once Holm leaves it
    under 1 − level (n ≥ 6 alone). Divergence of some runs decides nothing either way.
    Differences without any spread have no t: the exact sign test's 2^(1 − n) stands in, or 1 if all are zero.
    Raises ValueError for arrays not 1-d and paired, numbers not positive if relative, a margin or level out of range.
    """
    values, reference = _pairs(values, reference)
    if not (margin > 0 and 0.5 < level < 1):
        raise ValueError(f"margin must be positive and level in (0.5, 1), got {margin} and {level}")
    if relative:
        if (values <= 0).any() or (reference <= 0).any():
            name = "values" if (values <= 0).any() else "reference"
            raise ValueError(f"{name} must be positive for a relative comparison")
        values, reference = np.log(values), np.log(reference)
    n, diverged = len(values), tuple(int((~np.isfinite(side)).sum()) for side in (values, reference))
    d = values - reference if diverged == (0, 0) else np.full(n, nan)
    effect, sd = _mean_and_sd(d)
    p = _t_test(effect, sd, n)
    if divergence_decides and sorted(diverged) == [0, n]:
        p = 2.0 ** (1 - n)
    interval, interval90 = (_interval(effect, sd, n, at) for at in (level, 2 * level - 1))
    numbers = (effect, *interval, *interval90, n, sd, p, p, tost(effect, sd, n, margin))
    comparison = Comparison(*numbers, "undecided", margin, detectable(sd, n, level), diverged, smaller_is_better, level)
    return comparison._replace(word=_word(comparison))


def family(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with p_holm, word and detectable effect as members of one family (a figure's claims)."""
    adjusted = holm([c.p for c in comparisons])
    members = []
    for c, p in zip(comparisons, adjusted):
        strictest = 1 - (1 - c.level) / len(comparisons)
        member = c._replace(p_holm=float(p), detectable=detectable(c.sd, c.n, strictest))
        members.append(member._replace(word=_word(member)))
    return members


def holm(pvalues: Row) -> np.ndarray:
    """Holm's step-down adjustment of k p-values, (k,). A NaN stays NaN and still counts as a member of the family."""
    p = np.asarray(pvalues, float)
    order = np.argsort(p)  # NaN last
    steps = np.where(np.isnan(p), 1, p)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return np.where(np.isnan(p), nan, adjusted)


def tost(effect: float, sd: float, n: int, margin: float) -> float:
    """p of two one-sided paired t tests of −margin < effect < margin: the larger of the two (Schuirmann 1987)."""
    if not (n > 1 and isfinite(sd)):
        return nan
    if sd == 0:
        return float(abs(effect) >= margin)
    return float(special.stdtr(n - 1, (abs(effect) - margin) / (sd / sqrt(n))))


def sign_flip(differences: Row) -> float:
    """Exact two-sided p of a zero mean, if only the signs of the n paired differences are random: no normality.

    Enumerates the 2^n signs; the smallest p is 2^(1 − n). NaN if a difference is. Raises ValueError for n > 12 or 0.
    """
    d = np.asarray(differences, float)
    if d.ndim != 1 or not 1 <= len(d) <= 12:
        raise ValueError(f"differences must be 1 to 12 numbers, got shape {d.shape}")
    if not np.isfinite(d).all():
        return nan
    signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    sums = np.abs(signs @ d)
    return float((sums >= abs(d.sum()) - 1e-12 * np.abs(d).sum()).mean())


def percent(log_ratio: float) -> float:
    """A log ratio as a change in per cent: 100 (exp(log_ratio) − 1)."""
    return 100 * expm1(log_ratio)


def _word(c: Comparison) -> str:
    alpha = 1 - c.level
    if c.p_equivalence < alpha:
        return "equivalent"
    if not c.p_holm < alpha:  # NaN too
        return "undecided"
    if np.isnan(c.effect):  # one side diverged in every run, and the rule counts that
        return "worse" if c.diverged[0] else "better"
    return "better" if (c.effect < 0) == c.smaller_is_better else "worse"


def _pairs(values: Row, reference: Row) -> tuple[np.ndarray, np.ndarray]:
    values, reference = np.asarray(values, float), np.asarray(reference, float)
    if values.ndim != 1 or values.shape != reference.shape or not len(values):
        raise ValueError(f"values and reference must be paired 1-d arrays, got {values.shape} and {reference.shape}")
    return values, reference


def _mean_and_sd(d: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the differences; rounding around a constant is no spread."""
    mean = float(d.mean())
    if len(d) < 2 or not isfinite(mean):
        return mean, nan
    return mean, 0.0 if np.ptp(d) <= 1e-12 * abs(mean) else float(d.std(ddof=1))


def _interval(mean: float, sd: float, n: int, level: float) -> tuple[float, float]:
    """The t interval of a mean of n."""
    half = special.stdtrit(n - 1, (1 + level) / 2) * sd / sqrt(n) if n > 1 else nan
    return float(mean - half), float(mean + half)


def _t_test(effect: float, sd: float, n: int) -> float:
    if not isfinite(sd):
        return nan
    if sd == 0:
        return 2.0 ** (1 - n) if effect else 1.0
    return float(2 * special.stdtr(n - 1, -abs(effect) / (sd / sqrt(n))))


# ---------------------------------------------------------------------------------------------------------------------
# Power. Noncentral t by definition, a normal over an independent spread: scipy's is NaN for few runs or large effects.


@lru_cache(maxsize=1024)
def _spreads(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample over true standard deviation with df degrees of freedom: quadrature nodes and weights, (400,) each."""
    x, weights = special.roots_legendre(400)
    return np.sqrt(special.chdtri(df, (1 - x) / 2) / df), weights / 2


@lru_cache(maxsize=1024)
def _detectable(n: int, level: float) -> float:
    """The smallest effect over SD that n pairs find with power POWER."""
    highest = 10 * (1 + special.stdtrit(n - 1, (1 + level) / 2)) / sqrt(n)
    return scipy.optimize.brentq(lambda effect: power(effect, 1, n, level) - POWER, 0, highest, xtol=1e-9)


def power(effect: float, sd: float, n: int, level: float = 0.95) -> float:
    """Probability that the two-sided paired t test of n pairs finds a true effect, given the differences' true sd."""
    _check_design(sd, n)
    spread, weights = _spreads(n - 1)
    bound, shift = special.stdtrit(n - 1, (1 + level) / 2) * spread, effect * sqrt(n) / sd
    return float(weights @ (special.ndtr(shift - bound) + special.ndtr(-shift - bound)))


def power_equivalence(margin: float, sd: float, n: int, effect: float = 0.0, level: float = 0.95) -> float:
    """Probability that the two one-sided tests of n pairs, each at 1 − level, show |effect| < margin."""
    _check_design(sd, n)
    spread, weights = _spreads(n - 1)
    bound = special.stdtrit(n - 1, level) * spread
    above, below = (margin - effect) * sqrt(n) / sd - bound, (-margin - effect) * sqrt(n) / sd + bound
    return float(weights @ np.maximum(special.ndtr(above) - special.ndtr(below), 0))


def detectable(sd: float, n: int, level: float = 0.95) -> float:
    """The smallest effect that n pairs find with 80 % power, in the unit of sd. NaN for one pair or an sd of NaN."""
    return sd * _detectable(n, level) if n > 1 and isfinite(sd) else nan


def runs_needed(sd: float, margin: float = 0.01, limits: tuple[int, int] = (20, 200)) -> Runs:
    """Runs that show equivalence within the margin with 80 % power if the truth is 0: ((1.645 + 1.282) sd / margin)².

    sd: of the paired differences, from runs that are not compared. Within limits; at the upper one the reachable margin
    is larger than the one asked for. An sd of NaN (a run diverged) gives the upper limit and a margin of NaN.
    Raises ValueError for a margin that is not positive or a negative sd.
    """
    if not margin > 0 or sd < 0:
        raise ValueError(f"margin must be positive and sd not negative, got {margin} and {sd}")
    if not isfinite(sd):
        return Runs(limits[1], nan, nan)
    needed = ((1.645 + 1.282) * sd / margin) ** 2
    n = min(max(ceil(needed), limits[0]), limits[1])
    return Runs(n, max(margin, (1.645 + 1.282) * sd / sqrt(n)), needed)


def correlation_runs(r: float, level: float = 0.95, covariates: int = 0) -> int:
    """Points that find a (partial) correlation |r| with 80 % power, by Fisher's z. ValueError unless 0 < |r| < 1."""
    if not 0 < abs(r) < 1:
        raise ValueError(f"r must be in (−1, 1) and not 0, got {r}")
    return ceil(((special.ndtri((1 + level) / 2) + special.ndtri(POWER)) / atanh(r)) ** 2 + 3 + covariates)


def detectable_correlation(n: int, level: float = 0.95) -> float:
    """The smallest |r| that n points find with 80 % power, by Fisher's z. NaN for fewer than 4 points."""
    return tanh((special.ndtri((1 + level) / 2) + special.ndtri(POWER)) / sqrt(n - 3)) if n > 3 else nan


def _check_design(sd: float, n: int) -> None:
    if not (n > 1 and sd > 0):
        raise ValueError(f"n must be at least 2 and sd positive, got {n} and {sd}")


# ---------------------------------------------------------------------------------------------------------------------
# Pools, bootstrap, correlations


def pooled(comparisons: Sequence[Comparison], level: float = 0.95) -> Pooled:
    """The mean effect of a family whose true effects vary, and its t interval with k − 1 degrees of freedom.

    DerSimonian and Laird's variance between comparisons (1986), Hartung and Knapp's interval (2001), never narrower
    than the one without their factor. It takes the comparisons as independent, and each SD² / n as known. One
    comparison has no interval; one that diverged, or has no spread, makes the pool NaN. ValueError for none.
    """
    k = len(comparisons)
    if not k:
        raise ValueError("comparisons must not be empty")
    effects, variances = np.array([(c.effect, c.sd**2 / c.n) for c in comparisons]).T
    if k == 1 or not (np.isfinite(effects) & (variances > 0)).all():
        return Pooled(float(effects[0]) if k == 1 else nan, nan, nan, nan, k)
    weights = 1 / variances
    q = weights @ (effects - np.average(effects, weights=weights)) ** 2
    tau2 = max(0.0, (q - (k - 1)) / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (variances + tau2)
    mean = np.average(effects, weights=weights)
    factor = max(1.0, weights @ (effects - mean) ** 2 / (k - 1))
    half = special.stdtrit(k - 1, (1 + level) / 2) * sqrt(factor / weights.sum())
    return Pooled(float(mean), float(mean - half), float(mean + half), sqrt(tau2), k)


def bootstrap(
    statistic: Callable, samples: Sequence, generator: np.random.Generator, paired: bool = True, level: float = 0.95
) -> tuple[float, float, float]:
    """A statistic with its BCa bootstrap interval, where a t interval is not justified (ratios, medians).

    statistic(*samples, axis=-1) -> numbers, vectorized; samples: 1-d arrays, of one length if paired (resampled
    together). Returns (estimate, low, high). Not finite, a single member, or no spread: bounds of NaN.
    Raises ValueError for a generator that is not numpy's: the interval must come out again.
    """
    if not isinstance(generator, np.random.Generator):
        raise ValueError(f"generator must be a numpy.random.Generator, got {type(generator).__name__}")
    samples = [np.asarray(sample, float) for sample in samples]
    if not all(np.isfinite(sample).all() for sample in samples):
        return nan, nan, nan
    estimate = float(statistic(*samples, axis=-1))
    if min(map(len, samples)) < 2:
        return estimate, nan, nan
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap(samples, statistic, paired=paired, confidence_level=level, rng=generator)  # BCa
    return estimate, *map(float, result.confidence_interval)


def correlation(x: Row, y: Row, covariates: Sequence[Row] = (), rank: bool = False, level: float = 0.95) -> Correlation:
    """Pearson's correlation of x and y, (n,) each, or Spearman's (rank), given any covariates, (n,) each.

    Given covariates it is the partial correlation: of what least squares on them leaves over. Interval: Fisher's z with
    variance 1 / (n − 3 − covariates), for ranks times 1 + r² / 2 (Bonett and Wright 2000); p: t with n − 2 − covariates
    degrees of freedom. NaN if a value is not finite, if nothing varies, or for too few points.
    Raises ValueError for arrays of different lengths.
    """
    rows = [np.asarray(row, float) for row in (x, y, *covariates)]
    if any(row.shape != rows[0].shape or row.ndim != 1 for row in rows):
        raise ValueError(f"x, y and covariates must be 1-d and equally long, got {[row.shape for row in rows]}")
    n, k = len(rows[0]), len(covariates)
    r = _partial(rows, rank) if n > 1 and np.isfinite(rows).all() else nan
    low = high = p = nan
    if n - 2 - k > 0:
        t = r * sqrt((n - 2 - k) / max(1 - r * r, 1e-300))
        p = float(2 * special.stdtr(n - 2 - k, -abs(t)))
    if n - 3 - k > 0:
        half = special.ndtri((1 + level) / 2) * sqrt((1 + r * r / 2 if rank else 1) / (n - 3 - k))
        z = atanh(r) if abs(r) < 1 else r * inf
        low, high = tanh(z - half), tanh(z + half)
    return Correlation(r, low, high, p, n, k)


def _partial(rows: Sequence[np.ndarray], rank: bool) -> float:
    if rank:
        rows = [scipy.stats.rankdata(row) for row in rows]
    design = np.stack([np.ones(len(rows[0])), *rows[2:]], 1)
    left = []
    for row in rows[:2]:
        rest = row - design @ np.linalg.lstsq(design, row)[0]
        if np.linalg.norm(rest) <= 1e-10 * np.linalg.norm(row):  # rounding is no variation
            return nan
        left.append(rest / np.linalg.norm(rest))
    return min(1.0, max(-1.0, float(left[0] @ left[1])))


def mean_std(values: Row) -> str:
    """ "mean ± std" of a 1-d array, with two significant digits of the spread."""
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        return "diverged"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    spread = values.std(ddof=1)
    digits = max(0, 1 - int(np.floor(np.log10(spread)))) if spread > 0 else 4
    return f"{values.mean():.{min(digits, 6)}f} ± {spread:.{min(digits, 6)}f}"
