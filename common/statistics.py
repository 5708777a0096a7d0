"""The few statistics behind the tables: means with spread, differences with intervals and a word."""

import numpy as np
from scipy import stats


def mean_std(values):
    """ "mean ± std" of a 1-d array, with two significant digits of the spread."""
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        return "diverged"
    if len(values) == 1:
        return f"{values[0]:.4g}"
    spread = values.std(ddof=1)
    digits = max(0, 1 - int(np.floor(np.log10(spread)))) if spread > 0 else 4
    return f"{values.mean():.{min(digits, 6)}f} ± {spread:.{min(digits, 6)}f}"


def difference(values, reference, level=0.95):
    """Mean of values − reference, paired by seed, with its t interval: (mean, low, high). NaN bounds for one seed."""
    d = np.asarray(values, float) - np.asarray(reference, float)
    if len(d) < 2 or not np.isfinite(d).all():
        return float(d.mean()), float("nan"), float("nan")
    half = stats.t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def verdict(interval, smaller_is_better=True):
    """better, worse, or no difference: whether the 95 % interval (mean, low, high) excludes zero. "?" for one seed."""
    _, low, high = interval
    if low is None or np.isnan(low):
        return "?"
    if low <= 0 <= high:
        return "no difference"
    return "better" if (high < 0) == smaller_is_better else "worse"
