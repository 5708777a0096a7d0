"""NeurIPS 2022, the Booth function: L = (x + 2y − 7)² + (2x + y − 5)², one teleport in ten steps of gradient descent.

u = x + 2y − 7 and v = 2x + y − 5 are linear, so L is a quadratic form, an orbit of SO(2) an ellipse, and the maximum of
‖∂L/∂w‖² on it the eigenvector of the largest curvature: from there the negative gradient points at the minimum, as
Newton's direction does.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import so2
from orbits import TestFunction

from common import cli
from common.claims import Claim

BOOTH = TestFunction(
    loss=lambda x, y: (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2,
    to_uv=lambda x, y: (x + 2 * y - 7, 2 * x + y - 5),
    from_uv=lambda u, v: (-u / 3 + 2 * v / 3 + 1, 2 * u / 3 - v / 3 + 3),
    minimum=(1, 3),
    levels=tuple(10 ** (k / 2) for k in range(9)),
    window=((-10, 10), (-10, 10)),
    floor=1e-5,
)
CLAIM = Claim(
    order=60,
    figure="Booth (NeurIPS 2022)",
    paper="NeurIPS 2022",
    section="",
    says="Teleporting accelerates gradient descent.",
    short="teleporting accelerates (Booth)",
    rule="holds if the published teleport's median final loss is at most a tenth of plain gradient descent's and "
    "of that after random angles; in part: of the former only.",
    dated="2026-11-22",
)

PAPER = so2.Settings(start=(5.0, -5.0), steps=10, teleports=(4,), lr=0.08, lr_theta=1e-3, adagrad_lr=3.0)
PRESETS = {"tiny": replace(PAPER, seeds=2, random_starts=20), "quick": PAPER, "paper": PAPER}
experiment, plot = partial(so2.experiment, function=BOOTH), partial(so2.plot, function=BOOTH)

# Recorded by running the authors' code: (arm, step) -> loss.
RECORDED = {("gd", 9): 3.1215009607850766, ("gd_published", 9): 0.004881439828260797}
judge, report = partial(so2.judge, recorded=RECORDED), so2.report

if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
