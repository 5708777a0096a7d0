"""What the theory says, in numbers: seven checks of the papers' statements and of ours. Not in the papers.

  flow          is one teleport enough? The share of ‖∇L‖² in its largest on the level set, along gradient flow
                (Proposition 3.3 of ICLR 2024): it stays 1 where P⊥ D³L[g]g = 0, on Booth's function, not Rosenbrock's
  newton        Newton's direction at the maximum of ‖∇L‖ (Proposition 3.2): at the minimum as well
  bound         Theorem 3.1 on least squares, both sides exactly; plain SGD; a smaller constant; orbits without argmax
  displacement  both curves of Figure 7 turn
  conservation  what Q loses to descent: ΔQ_i = η²(‖∂V_i‖² − ‖∂U_i‖²) = −η² ∂(½‖∇L‖²)/∂log s_i, so that descent moves
                along the orbit towards smaller ‖∇L‖, the opposite of a teleport
  tuned_step    a teleport is a preconditioner; what the best step gains after the rescaling of largest ‖∇L‖, and others
  group_laws    the minimal-change actions: g₁·(g₂·w) = (g₁g₂)·w, and where not

Every number stands beside an independent prototype's with its tolerance. Where the prototype's inputs are not stated,
ours are: H = AAᵀ/2d for `newton`; for `bound` samples for which λ₁/β is near 0.12, which its numbers imply; for
`tuned_step` three published initializations and the first 200 samples.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import theorems_figure  # noqa: E402
import theorems_networks as networks  # noqa: E402
import theorems_plane as plane  # noqa: E402
import theorems_quadratics as quadratics  # noqa: E402
from theorems_numbers import NUMBERS  # noqa: E402

from common import cli  # noqa: E402
from common.claims import Claim, Published, Verdict, grade, listed, table  # noqa: E402
from common.mlp import published_seeds  # noqa: E402
from common.run import Outcome  # noqa: E402

CLAIM = Claim(
    order=210,
    figure="Theorems",
    paper="beyond the papers",
    section="",
    says="Seven checks of what the papers' theorems and a teleport's own theory say give an independent prototype's "
    "numbers.",
    short="the theory's numbers come out",
    rule="holds if every number of the seven checks agrees with the prototype's, or with what the statement demands, "
    "within the tolerance beside it (a distance, a factor or a bound; NaN does not agree); in part: if every number of "
    "more than half of the checks does. A number whose setting is not stated is shown and decides nothing.",
    dated="2026-11-30",
    source="Ours",
)


@dataclass(frozen=True)
class Settings:
    seeds: int = 3  # of the tuned step's networks
    points: int = 120  # of curves
    grid: int = 6  # starts on Rosenbrock's function, a side
    quadratics: int = 100
    draws: int = 100  # of least squares
    runs: int = 20000  # simulated
    networks: int = 20
    descent: int = 200  # steps
    rate: float = 1e-3  # of that descent
    batch: int = 200  # of the tuned step
    bounds: tuple = (2.0, 10.0)  # on a unit's rescaling, and its inverse
    starts: int = 5  # of an ascent
    steps: int = 200  # of training after it


PAPER = Settings()
QUICK = replace(PAPER, grid=4, starts=1)
TINY = replace(PAPER, seeds=1, points=20, grid=1, draws=20, networks=5, descent=20, bounds=(2.0,), starts=1, batch=50)
PRESETS = {"tiny": replace(TINY, steps=20), "quick": QUICK, "paper": PAPER}


def experiment(run):
    s, data = run.settings, run.data("mnist-mini")
    data = data._replace(x=data.x.cpu(), y=data.y.cpu())  # small checks, in double precision
    checks = {
        "flow": lambda: plane.one_teleport(s),
        "newton": lambda: quadratics.newton(s) | networks.on_an_orbit(s),
        "bound": lambda: quadratics.bound(s) | networks.no_maximum(),
        "displacement": lambda: plane.displacement(s),
        "conservation": lambda: networks.conservation(s),
        "tuned_step": lambda: networks.twins() | networks.tuned_step(s, data),
        "group_laws": lambda: networks.group_laws(s),
    }
    parts, seconds = run.parts(lambda check: checks[check](), {name: name for name in checks})
    metrics = {check: {k: float(v) for k, v in found.items() if not v.ndim} for check, found in parts.items()}
    arrays = {f"{check}/{k}": v for check, found in parts.items() for k, v in found.items() if v.ndim}
    return Outcome(metrics, arrays, published_seeds(s.seeds), seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def rows(metrics):
    """(check, key, Number, ours, does it agree) of every number that was measured."""
    return [
        (check, key, number, metrics[check][key], number.agrees(metrics[check][key]))
        for check, numbers in NUMBERS.items()
        for key, number in numbers.items()
        if key in metrics[check]
    ]


def judge(outcome):
    m, found = outcome.metrics, rows(outcome.metrics)
    odd = [row for row in found if row[-1] is False]
    whole = [check for check in NUMBERS if check not in [name for name, *_ in odd]]
    decided = sum(agrees is not None for *_, agrees in found)
    limits = f"{listed([check for check in NUMBERS if check not in whole])} not in every number"
    sentence = f"{decided - len(odd)} of {decided} numbers agree, all of {listed(whole)}."
    details = [f"{n.what}: {ours:.4g}{spread(outcome, c, key)}, not {n.text()}." for c, key, n, ours, _ in odd]
    published = [
        Published(number.what, number.text(), f"{ours:.7g}", "a prototype", setting(check, number), agrees)
        for check, _, number, ours, agrees in found
    ]
    word = grade(not odd, 2 * len(whole) > len(NUMBERS))
    return Verdict(word, limits, sentence, [*details, *false(m)], published=published, surprise=slower(m["flow"]))


def spread(outcome, check, key):
    """The same for each initialization, where there are several."""
    values = outcome.arrays.get(f"{check}/seeds_{key}", ())
    return f" ({listed([f'{v:.3g}' for v in values])} by initialization)" if len(values) > 1 else ""


def setting(check, number):
    """What is known to differ from the prototype's inputs."""
    if number.how == "shown":
        return "mini-batches of 20; the prototype's are not stated"
    return {"newton": "other draws", "bound": "other draws", "tuned_step": "other seeds and batch"}.get(check, "none")


def false(m):
    """Statements that are false as printed, or say less than they seem to, each with its smallest counterexample."""
    flow, bound, turns = m["flow"], m["bound"], m["displacement"]
    return [
        "Proposition 3.2 does not single the maximum out: on L = ½(w₁² + 2w₂²) at (1, 0), where ‖∇L‖ is least on its "
        f"level set, the gradient is Newton's direction too (|R − 1| ≤ {m['newton']['R_off_minimum']:.0e} at minima).",
        f"The teleport to the largest ‖∇L‖ may slow gradient flow: Rosenbrock's function from (−1, −1) takes "
        f"{flow['rosenbrock_teleported_time']:.1f} to L = 1e-6, not {flow['rosenbrock_untouched_time']:.2f}.",
        f"Theorem 3.1's bound on the largest ‖∇L‖² of the orbit needs the teleports: plain SGD passes it from T = "
        f"{bound['counterexample_T']:.0f} on, on the samples (1, 0) and (0, 0.1) with targets 0, from (0, 1).",
        "Theorem 3.1's argmax does not exist on rescaling orbits: L = ½(uσ(v))² has ‖∇L‖² = s² + 1/s² from (1, 1), "
        f"and λ_max grows {bound['orbit_beta_growth']:.0e}-fold to s = 1000, so that there is no β.",
        f"Figure 7's circle turns too, at κr = {turns['circle_turn']:.6f} ({turns['circle_value']:.6f} r), beyond the "
        "figure's end.",
    ]


def slower(flow):
    text = (
        f"The teleport to the largest ‖∇L‖ slows Rosenbrock's flow: to L = 1e-6 it takes "
        f"{flow['rosenbrock_teleported_time']:.0f} instead of {flow['rosenbrock_untouched_time']:.0f}"
    )
    return text + (f", and longer from {flow['slower_of_36']:.0f} of 36 starts." if "slower_of_36" in flow else ".")


# ---------------------------------------------------------------------------------------------------------------------
# Figure and table


def plot(outcome, s, save):
    save(theorems_figure.draw(outcome))


def report(outcome, s):
    words = {True: "agrees", False: "differs", None: ""}
    cells = [
        [check, number.what, number.text(), f"{ours:.7g}", words[agrees]]
        for check, _, number, ours, agrees in rows(outcome.metrics)
    ]
    times = ", ".join(f"{check} {seconds:.1f} s" for check, seconds in outcome.timings.items())
    return f"{table(['check', 'number', 'prototype', 'ours', ''], cells)}\n\n{times}"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
