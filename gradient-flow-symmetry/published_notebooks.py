"""What the authors' two notebooks for ICLR 2023, Figures 10 and 11, printed: accuracies, in thousandths.

Every line is one newly trained network and 1,000 images, so one standard error is up to 16. Both notebooks train and
attack through a softmax followed by a cross-entropy that takes another; the attacks are aimed at the network alone and
applied twice in a row. Their `permuted_g` is our `interpolated_permutation`.
"""

import numpy as np
from scipy import special

from common.claims import Published

IMAGES = 1000

# Figure 11: accuracies under the attacks by strength, 200 elements, ε = 10.
STRENGTHS = {"FGSM": (0.0, 0.003, 0.006, 0.009, 0.012), "PGD": (0, 1, 2, 3)}
ATTACKS = {
    "FGSM": {
        "original": (598, 210, 133, 66, 28),
        "group": (538, 223, 158, 109, 83),
        "interpolated_permutation": (556, 225, 132, 78, 36),
        "inverse": (89, 115, 101, 106, 100),
        "random": (95, 99, 111, 82, 82),
        "shuffled": (102, 89, 114, 98, 109),
    },
    "PGD": {
        "original": (576, 6, 0, 0),
        "group": (460, 38, 2, 26),
        "interpolated_permutation": (557, 13, 0, 0),
        "inverse": (111, 95, 110, 90),
        "random": (99, 101, 87, 102),
        "shuffled": (79, 94, 119, 105),
    },
}

# Figure 10: a row for each ε, a column for each number of elements.
EPSILONS = (20.0, 10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)
ELEMENTS = (10, 20, 40, 60, 80, 100, 120)
ENSEMBLES = {
    "original": (
        (560, 473, 527, 520, 521, 492, 570),
        (568, 586, 582, 594, 538, 534, 483),
        (539, 551, 580, 529, 527, 559, 577),
        (520, 519, 551, 521, 484, 587, 530),
        (499, 456, 491, 461, 590, 565, 509),
        (568, 583, 494, 521, 543, 526, 554),
        (576, 486, 558, 536, 529, 501, 442),
    ),
    "group": (
        (189, 99, 97, 107, 108, 112, 110),
        (219, 216, 295, 377, 205, 292, 280),
        (249, 304, 355, 345, 365, 432, 364),
        (503, 524, 547, 518, 485, 588, 533),
        (503, 456, 488, 460, 592, 562, 510),
        (565, 582, 494, 521, 544, 525, 554),
        (575, 486, 558, 536, 529, 501, 442),
    ),
    "interpolated_permutation": (
        (228, 228, 432, 452, 484, 279, 500),
        (283, 376, 303, 391, 369, 351, 343),
        (392, 513, 524, 405, 366, 508, 410),
        (510, 514, 550, 524, 485, 585, 518),
        (498, 456, 490, 460, 589, 565, 509),
        (568, 583, 494, 521, 543, 526, 554),
        (576, 486, 558, 536, 529, 501, 442),
    ),
    "inverse": (
        (86, 108, 135, 75, 98, 57, 79),
        (69, 112, 98, 82, 111, 92, 94),
        (88, 151, 78, 73, 97, 129, 112),
        (507, 509, 545, 527, 477, 592, 525),
        (505, 455, 489, 462, 590, 566, 511),
        (568, 582, 494, 521, 543, 526, 554),
        (576, 486, 558, 536, 529, 501, 442),
    ),
    "random": (
        (99, 102, 97, 100, 109, 105, 99),
        (111, 62, 96, 103, 108, 112, 110),
        (126, 99, 106, 107, 99, 90, 96),
        (447, 460, 477, 472, 468, 552, 438),
        (491, 455, 489, 453, 595, 567, 512),
        (567, 582, 495, 521, 545, 524, 554),
        (576, 486, 558, 537, 529, 501, 442),
    ),
    "shuffled": (
        (94, 99, 97, 107, 108, 112, 110),
        (113, 77, 55, 104, 116, 103, 108),
        (103, 76, 106, 103, 76, 106, 91),
        (121, 181, 41, 150, 127, 43, 97),
        (25, 105, 107, 170, 95, 78, 59),
        (33, 105, 77, 103, 29, 69, 87),
        (134, 103, 83, 39, 167, 180, 67),
    ),
}


def error(ours: np.ndarray, theirs: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Standard error of our mean minus theirs: ours (networks, …), theirs and others (…), in per cent.

    Theirs is one more network, on 1,000 images: hence the spread over networks twice, the binomial variance of theirs,
    and that of the others, accuracies on 1,000 images that enter too (as if independent).
    """
    sampling = sum(p * (100 - p) / IMAGES for p in (theirs, *others))
    return np.sqrt(ours.var(0, ddof=1) * (1 + 1 / len(ours)) + sampling)


def row(what: str, ours: np.ndarray, theirs: np.ndarray, errors: np.ndarray, setting: str) -> Published:
    """Printed numbers (cells,) beside the means of ours (networks, cells), with their errors (cells,).

    The row agrees if every printed number lies in its 95 % t prediction interval, Bonferroni over the cells.
    """
    n, mean = len(ours), ours.mean(0)
    bound = special.stdtrit(n - 1, 1 - 0.025 / len(theirs)) * errors
    agrees = bool((np.abs(mean - theirs) <= bound).all())
    texts = (", ".join(f"{round(x, 1) + 0.0:.1f}" for x in values) for values in (theirs, mean))
    return Published(what, *texts, "the notebook's output", setting, agrees)
