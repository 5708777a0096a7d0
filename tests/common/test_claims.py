"""The words of a claim about several cases, and a comparison as text."""

import math

import numpy as np
import pytest

from common.claims import change, graded, settle
from common.statistics import compare


@pytest.mark.parametrize(
    "words, settled",
    [
        (["better", "better"], True),
        (["better", "undecided"], None),
        (["undecided", "equivalent"], False),
        (["better", "worse"], False),
    ],
)
def test_all_comparisons_must_be_better(words, settled):
    assert settle(words) is settled


@pytest.mark.parametrize(
    "settled, word",
    [
        ([True, True], "holds"),
        ([True, None], "holds in part"),
        ([True, False], "holds in part"),
        ([False, None], "undecided"),
        ([False, False], "does not hold"),
    ],
)
def test_a_claim_about_several_cases(settled, word):
    assert graded(settled) == word


def test_a_comparison_says_its_word_and_what_would_have_shown():
    values = 0.1 + 0.001 * np.arange(10)
    assert change(compare(values, np.zeros(10), relative=False)).startswith("+11.02 [")
    assert change(compare(values, np.zeros(10), relative=False)).endswith("] % (worse)")
    noisy = np.array([-1, 1, -1, 1.5]) * 0.1
    assert "% would have shown)" in change(compare(noisy, np.zeros(4), relative=False))
    assert change(compare([math.nan, 1], [1, 1])) == "diverged in 1 and 0 of 2 (undecided)"
