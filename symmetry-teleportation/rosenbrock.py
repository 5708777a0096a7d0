"""NeurIPS 2022, the Rosenbrock function: L = 100 (x² − y)² + (x − 1)², a teleport every hundred steps of descent.

u = 10 (x² − y), v = x − 1. The published ascent on the angle (lr_θ = 0.1) overshoots while the loss is large: in the
first teleports the angle jumps by many turns and a change of 1e-15 in w ends elsewhere on the orbit, so there it is
a random draw more than an ascent. Arm `random angle` is the control.
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

ROSENBROCK = TestFunction(
    loss=lambda x, y: 100 * (x**2 - y) ** 2 + (x - 1) ** 2,
    to_uv=lambda x, y: (10 * (x**2 - y), x - 1),
    from_uv=lambda u, v: (v + 1, (v + 1) ** 2 - u / 10),
    minimum=(1, 1),
    levels=(1, 1e1, 1e2, 1e3, 1e4),
    window=((-2, 2), (-2, 4)),
    floor=1e-20,
)
CLAIM = Claim(
    order=70,
    figure="Rosenbrock (NeurIPS 2022)",
    paper="NeurIPS 2022",
    section="",
    says="Teleporting accelerates gradient descent.",
    short="teleporting accelerates (Rosenbrock)",
    rule="holds if the published teleport's median final loss is at most a tenth of plain gradient descent's and "
    "of that after random angles; in part: of the former only.",
    dated="2026-11-22",
)

PAPER = so2.Settings(
    start=(-1.0, -1.0), steps=1000, teleports=tuple(range(99, 1000, 100)), lr=1e-3, lr_theta=0.1, adagrad_lr=3.0
)
PRESETS = {
    "tiny": replace(PAPER, steps=250, teleports=(99, 199), seeds=2, random_starts=20),
    "quick": PAPER,
    "paper": PAPER,
}
experiment, plot = partial(so2.experiment, function=ROSENBROCK), partial(so2.plot, function=ROSENBROCK)

# Recorded by running the authors' code: (arm, step) -> loss.
RECORDED = {("gd", 999): 0.11150085948870243, ("gd_published", 999): 6.361978802756049e-08}
judge, report = partial(so2.judge, recorded=RECORDED), so2.report

if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
