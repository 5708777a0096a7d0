"""ICLR 2024, Section 4, Figure 7: how far a shifted minimum is from a curve of curvature κ through the origin.

The quantity is the mean distance to the curve from the circle of radius r around the origin, divided by r:

    1/r E_{S_r} dist(w, γ) = 1/(2πr) ∫ dist((r cos θ, r sin θ), γ) dθ

for γ_1 the parabola y = κx²/2 and for γ_2 the circle of radius 1/κ, both touching the x-axis at the origin. A straight
line (κ = 0) gives 2/π. Scaling the picture shows that it depends on κr alone.

Distances are exact: in closed form, or with --method shapely to a refined polyline, an independent check. Controls,
in a second figure: all radii against κr alone, drawn on beyond the paper's range (its circles end at κr = 1, before
they turn); and the arm `published`, a parabola with a vertex every 0.1 in x, which is coarse once r is near 0.1.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import shapely
from scipy.optimize import minimize_scalar

from common import cli, plots
from common.claims import Claim, Published, Verdict, grade, table
from common.run import Outcome

CLAIM = Claim(
    order=50,
    figure="Figure 7",
    paper="ICLR 2024",
    section="Section 4",
    says="How far a minimum is expected to move when the loss landscape shifts depends on its curvature.",
    short="displacement depends on curvature",
    rule="holds if the exact mean distance over r, at its smallest, is more than 1 % from that of a straight line; "
    "both curves.",
    dated="2026-11-22",
)


# What the published code gives at the largest κ of each radius, run in float64: (curve, κ): {r: 1/r E dist}.
PUBLISHED = {
    ("parabola", 79.8): {2.0: 0.778284734, 1.0: 0.765509726, 0.5: 0.750744962, 0.2: 0.749692585, 0.1: 0.749692583},
    ("circle", 10.0): {0.1: 0.598742718, 0.05: 0.629554482, 0.02: 0.635548583, 0.01: 0.6363539, 0.005: 0.6365508},
}
FLAT = 2 / math.pi  # the mean distance of a circle's points to a straight line through its centre, over the radius
TURN = "Curvature first brings a shifted minimum near, then away: least {:.3f} r (parabola), {:.3f} r (circle)."


@dataclass(frozen=True)
class Settings:
    parabola_radii: tuple = (2.0, 1.0, 0.5, 0.2, 0.1)
    circle_radii: tuple = (0.1, 0.05, 0.02, 0.01, 0.005)
    every: int = 1  # take every so many of the published curvatures
    step: float = 1 / 32  # of the trapezoid rule
    published_angles: int = 1024  # on the whole circle, for the published polyline
    segments: int = 1000  # of the refined polyline, with --method shapely
    method: str = "closed-form"


METHODS = ("closed-form", "shapely")
PAPER = Settings()
PRESETS = {"tiny": replace(PAPER, every=12), "quick": PAPER, "paper": PAPER}
SCALED = np.geomspace(0.02, 200, 400)  # κr of the controls' figure


# Distances in closed form


def parabola_distance(x, y, kappa):
    """Distance from (x, y) to the parabola y = κx²/2, any κ ≥ 0; arrays that broadcast.

    Written for the slope z = κX at the nearest point (X, κX²/2), the condition that the two are joined by a normal is
    z³ + 2(1 − κy) z = 2κ|x|, which does not degenerate at κ = 0. The nearest point is the root z ≥ 0: there is only one
    if x ≠ 0; on the axis beyond the centre of curvature (0, 1/κ), where z = 0 is a root too, it is the largest.
    """
    x, y, kappa = np.broadcast_arrays(np.abs(x), y, kappa)
    z = _largest_root(2 / 3 * (1 - kappa * y), kappa * x)
    with np.errstate(divide="ignore", invalid="ignore"):  # each form of X is used where its denominator is not small
        X = np.where(kappa * y < 0.5, x / (z**2 / 2 + 1 - kappa * y), z / kappa)
    return np.hypot(x - X, y - z * X / 2)


def _largest_root(p, q):
    """The largest real root of z³ + 3pz = 2q, q ≥ 0: Cardano's formula where it has one real root, else Viète's."""
    scale = np.maximum(np.sqrt(np.abs(p)), np.cbrt(q))
    scale = np.where(scale == 0, 1, scale)
    p, q = p / scale**2, q / scale / scale / scale  # keeps p³ from overflowing
    D = q**2 + p**3
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.cbrt(q + np.sqrt(D))
        one = s - p / s  # cancels where p > 0 and q is small; there the slope hardly matters
        three = 2 * np.sqrt(-p) * np.cos(np.arccos(q / np.sqrt(-p) ** 3) / 3)
    return scale * np.select([(p == 0) & (q == 0), D >= 0], [0, one], three)


def circle_distance(x, y, kappa):
    """Distance from (x, y) to the circle of radius 1/κ around (0, 1/κ), any κ ≥ 0 (κ = 0: the x-axis)."""
    # |ρ − 1/κ| with ρ the distance to the centre, multiplied by (ρ + 1/κ) / (ρ + 1/κ): no division by κ is left.
    return np.abs(kappa * (x**2 + y**2) - 2 * y) / (np.hypot(kappa * x, kappa * y - 1) + 1)


class Curve(NamedTuple):
    formula: str
    distance: Callable  # (x, y, kappa), in closed form
    crossing: Callable  # angle in [0, π/2] at which the curve crosses the circle S_r, a function of κr
    polyline: Callable  # (kappa, reach, segments): vertices (segments + 1, 2) of the part within reach of the origin


def _parabola_polyline(kappa, reach, segments):
    top = np.sqrt(2 * reach / kappa) if kappa > 0 else np.inf  # y <= reach
    x = np.linspace(-1, 1, segments + 1) * min(reach, top)
    return np.stack([x, kappa * x**2 / 2], axis=1)


def _circle_polyline(kappa, reach, segments):
    arc = np.pi * (min(reach / 2, 1 / kappa) if kappa > 0 else reach / 2)  # an arc is at most π/2 times its chord
    s = np.linspace(-arc, arc, segments + 1)
    return np.stack([s * np.sinc(kappa * s / np.pi), kappa * s**2 / 2 * np.sinc(kappa * s / 2 / np.pi) ** 2], axis=1)


CURVES = {
    "parabola": Curve(
        r"$\gamma_1$: $y = \kappa x^2/2$",
        parabola_distance,
        lambda a: np.arcsin(np.tan(np.arctan(a) / 2)),  # sin θ = (√(1 + a²) − 1)/a
        _parabola_polyline,
    ),
    "circle": Curve(
        r"$\gamma_2$: circle of radius $1/\kappa$",
        circle_distance,
        lambda a: np.arcsin(np.minimum(a / 2, 1)),
        _circle_polyline,
    ),
}


# The mean distance


def mean_distance(curve, kappa, r, step, distance=None):
    """1/r E_{S_r} dist(w, γ) and an estimate of its error: two (K, R) arrays for kappa (K,), r (R,).

    distance: a function of (x, y, kappa), default curve.distance. Raises ValueError for a κ that is negative or not
    finite and for an r that is not positive and finite.

    The distance has a kink where the circle crosses the curve and, by symmetry, on the axis: there the plain trapezoid
    rule would converge like step². So each half circle is cut at its crossing, and each piece transformed by
    θ = tanh(π/2 sinh t), which flattens the ends: the trapezoid rule in t converges geometrically. The error estimate
    is the difference from the rule with twice the step, whose error is about the square root of this one's.
    """
    kappa, r = np.atleast_1d(np.asarray(kappa, float)), np.atleast_1d(np.asarray(r, float))
    if not (np.isfinite(kappa).all() and (kappa >= 0).all()):
        raise ValueError("kappa: curvatures must be finite and not negative")
    if not (np.isfinite(r).all() and (r > 0).all()):
        raise ValueError("r: radii must be finite and positive")
    distance = distance or curve.distance
    kappa, r = kappa[:, None, None], r[:, None]
    n = int(3.2 / (2 * step)) * 2  # even; at |t| = 3.2 the weights are below 1e-15
    t = step * np.arange(-n, n + 1)
    position = np.tanh(np.pi / 2 * np.sinh(t))
    weight = step * np.pi / 2 * np.cosh(t) / np.cosh(np.pi / 2 * np.sinh(t)) ** 2
    crossing = curve.crossing(kappa * r)
    total = coarse = 0
    for start, end in ((-np.pi / 2, crossing), (crossing, np.pi / 2)):
        theta = (start + end) / 2 + (end - start) / 2 * position
        terms = (end - start) / 2 * weight * distance(r * np.cos(theta), r * np.sin(theta), kappa)
        total = total + terms.sum(-1)
        coarse = coarse + 2 * terms[..., ::2].sum(-1)
    scale = np.pi * r[:, 0]
    return total / scale, np.abs(total - coarse) / scale


def shapely_distance(curve, segments, progress=iter):
    """A drop-in for curve.distance in mean_distance: measured by shapely to a polyline of so many segments."""

    def distance(x, y, kappa):
        reach = 2 * np.hypot(x, y).max(-1)  # the origin is on the curve, so the nearest point is no farther away
        return _over_lines(lambda k, m: curve.polyline(kappa[k, 0, 0], reach[k, m], segments), x, y, progress)

    return distance


def published_mean_distance(kappa, r, angles):
    """As mean_distance, for the published polyline of the parabola, by the plain trapezoid rule (kinks everywhere)."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, angles // 2 + 1)  # half the circle: the polyline is symmetric
    vertices = np.arange(-10, 10, 0.1)

    def polyline(k, m):
        reached = vertices[np.abs(vertices) < 2 * r[m] + 0.1]
        return np.stack([reached, kappa[k] * reached**2 / 2], axis=1)

    x, y = (np.broadcast_to(r[:, None] * f(theta), (len(kappa), len(r), len(theta))) for f in (np.cos, np.sin))
    distances = _over_lines(polyline, x, y)
    means = [np.trapezoid(distances[..., ::k], dx=k / (len(theta) - 1)) / r for k in (1, 2)]
    return means[0], np.abs(means[0] - means[1])


def _over_lines(polyline, x, y, progress=iter):
    """Distances from the points (x, y)[k, m] to the line with vertices polyline(k, m)."""
    result = np.empty(x.shape)
    for k, m in progress(list(np.ndindex(x.shape[:2]))):
        result[k, m] = shapely.distance(shapely.points(x[k, m], y[k, m]), shapely.LineString(polyline(k, m)))
    return result


# The experiment


def published_curvatures(name, every):
    if name == "parabola":
        return 2 * np.arange(0, 40, 0.3)[::every]
    return 1 / np.concatenate([np.arange(0.1, 1, 0.01), np.arange(1, 10, 0.1)])[::every]


def experiment(run):
    s = run.settings
    metrics, arrays, timings = {}, {"scaled_kappa_r": SCALED}, {}
    for name, curve in CURVES.items():
        kappa, r = published_curvatures(name, s.every), np.array(getattr(s, f"{name}_radii"))
        distance = shapely_distance(curve, s.segments, run.progress) if s.method == "shapely" else curve.distance
        start = time.perf_counter()
        value, error = mean_distance(curve, kappa, r, s.step, distance)
        timings[name] = time.perf_counter() - start
        arrays |= {f"{name}_kappa": kappa, f"{name}_r": r, f"{name}_value": value, f"{name}_error_estimate": error}
        arrays[f"{name}_scaled"] = mean_distance(curve, SCALED, 1.0, s.step)[0][:, 0]
        metrics[name] = summary(curve, kappa, r, value, error, s.step)
    kappa, r, value = (arrays[f"parabola_{key}"] for key in ("kappa", "r", "value"))
    start = time.perf_counter()
    published, published_error = published_mean_distance(kappa, r, s.published_angles)
    timings["published_parabola"] = time.perf_counter() - start
    metrics["parabola"] |= {
        "published_relative_error": np.abs(published / value - 1).max(0),
        "published_quadrature_error": (published_error / published).max(),
    }
    arrays["parabola_published"] = published
    return Outcome(metrics, arrays, timings=timings)


def summary(curve, kappa, r, value, error, step):
    """Numbers of one curve; among them what the scaling argument promises, measured."""
    scaled, _ = mean_distance(curve, (kappa[:, None] * r).ravel(), 1.0, step)  # the same at radius 1 and curvature κr
    turn = minimize_scalar(
        lambda a: mean_distance(curve, a, 1.0, step)[0][0, 0], bounds=(0.1, 4), options={"xatol": 1e-8}
    )
    lowest = np.unravel_index(value.argmin(), value.shape)
    return {
        "relative_error_estimate": (error / value).max(0),
        "difference_from_radius_1": np.abs(scaled.reshape(value.shape) - value).max(),
        "smallest_value": value[lowest],
        "smallest_at_kappa_r": kappa[lowest[0]] * r[lowest[1]],
        "turn_at": turn.x,  # κr beyond which the mean distance rises, inside the paper's range or not
        "turn_value": turn.fun,
    }


def judge(outcome):
    parabola, circle = outcome.metrics["parabola"], outcome.metrics["circle"]
    depends = [abs(curve["smallest_value"] / FLAT - 1) > 0.01 for curve in (parabola, circle)]
    return Verdict(
        grade(all(depends), any(depends)),
        "one of the two curves only",
        f"It does, but not monotonically: the parabola's is {FLAT:.3f} r without curvature, least, "
        f"{parabola['turn_value']:.3f} r, at κr = {parabola['turn_at']:.3f}, and grows from there on; the circle's "
        f"turns at κr = {circle['turn_at']:.3f} ({circle['turn_value']:.3f} r), beyond the figure's end. Radii fall "
        f"on one curve of κr (to {parabola['difference_from_radius_1']:.0e}); the published polyline is off by up to "
        f"{max(parabola['published_relative_error']):.0%}.",
        number=f"least {parabola['turn_value']:.3f} r at κr = {parabola['turn_at']:.2f}, {FLAT:.3f} r when straight",
        published=published_rows(outcome.arrays),
        surprise=TURN.format(parabola["turn_value"], circle["turn_value"]),
    )


def published_rows(arrays):
    """The recorded values beside ours: the parabola's by the published polyline, whose exact values stand beside."""
    rows = []
    for (name, kappa), values in PUBLISHED.items():
        at = np.isclose(arrays[f"{name}_kappa"], kappa)
        for j, r in enumerate(arrays[f"{name}_r"] if at.any() else ()):
            exact = float(arrays[f"{name}_value"][at, j][0])
            ours = float(arrays["parabola_published"][at, j][0]) if name == "parabola" else exact
            source = "the published code, run in float64"
            setting = f"the published polyline; exact: {exact:.6f}" if name == "parabola" else "exact distances"
            what = f"{name}, κ = {kappa:g}, r = {r:g}: mean distance / r"
            rows.append(
                Published(what, values[float(r)], round(ours, 9), source, setting, abs(ours / values[r] - 1) < 1e-4)
            )
    return rows


def mean_label(number):
    return rf"$\frac{{1}}{{r}}\,\mathbb{{E}}_{{S_r}}\,\mathrm{{dist}}(w, \gamma_{number})$"


def plot(outcome, settings, save):
    """Figure 7: a panel a curve, a line a radius."""
    arrays = outcome.arrays
    figure, (axes,) = plots.panels(1, 2, width=3.9, height=3.3)
    for number, (ax, (name, curve)) in enumerate(zip(axes, CURVES.items()), 1):
        kappa, r, value = (arrays[f"{name}_{key}"] for key in ("kappa", "r", "value"))
        for i, radius in enumerate(r):
            ax.plot(kappa, value[:, i], label=f"$r = {radius:g}$", **plots.style(i))
        ax.set(xlabel=r"$\kappa$", ylabel=mean_label(number), title=curve.formula)
        ax.margins(y=0.12)
        ax.legend(fontsize=7, ncols=3, handlelength=2, loc="upper left" if name == "parabola" else "lower left")
    save(figure)
    save(plot_controls(arrays), "controls")


def plot_controls(arrays):
    """All radii against κr, on beyond the paper's range; how far the published polyline is off."""
    figure, ((parabola, circle, error),) = plots.panels(1, 3, width=3.9, height=3.3)
    for number, (ax, name) in enumerate(zip((parabola, circle), CURVES), 1):
        kappa, r, value = (arrays[f"{name}_{key}"] for key in ("kappa", "r", "value"))
        ax.plot(arrays["scaled_kappa_r"], arrays[f"{name}_scaled"], color="0.6", linewidth=3, label="any r")
        for i, radius in enumerate(r):
            marks = plots.style(i, marker=True) | {"markevery": (0.02 * i, 0.1), "linewidth": 0.8}  # side by side
            ax.plot((kappa * radius)[kappa > 0], value[kappa > 0, i], label=f"$r = {radius:g}$", **marks)
        ax.axhline(FLAT, color="#999999", linewidth=0.7, zorder=0, label=r"$2/\pi$: straight line")
        ax.set(xlabel=r"$\kappa r$", ylabel=mean_label(number), title=f"{name}, exact", xscale="log")
        ax.legend(fontsize=8)
    kappa, r, value = (arrays[f"parabola_{key}"] for key in ("kappa", "r", "value"))
    for i, radius in enumerate(r):
        off = np.abs(arrays["parabola_published"][1:, i] / value[1:, i] - 1)
        error.semilogy(kappa[1:], off, label=f"$r = {radius:g}$", **plots.style(i))
    error.set(xlabel=r"$\kappa$", ylabel="relative error", title="the published polyline of the parabola")
    error.legend(fontsize=8, ncols=2)
    return figure


def report(outcome, settings):
    rows = []
    for name in CURVES:
        kappa, r, value = (outcome.arrays[f"{name}_{key}"] for key in ("kappa", "r", "value"))
        metrics = outcome.metrics[name]
        published = metrics.get("published_relative_error", [None] * len(r))
        for i, radius in enumerate(r):
            estimate = metrics["relative_error_estimate"][i]
            wrong = "" if published[i] is None else f"{published[i]:.1e}"
            last = kappa.argmax()
            rows.append(
                [name, f"{radius:g}", f"{kappa[last] * radius:g}", f"{value[last, i]:.9f}", f"{estimate:.0e}", wrong]
            )
    header = ["curve", "r", "largest κr", "value there", "error estimate", "published: largest error"]
    turns = (f"{name} {m['turn_value']:.6f} at κr = {m['turn_at']:.6f}" for name, m in outcome.metrics.items())
    sentence = f"Neither curve is monotone: both fall from 2/π and turn, {' and '.join(turns)}."
    return table(header, rows) + f"\n\n{sentence}\ncomputing: {sum(outcome.timings.values()):.2f} s"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge, options={"method": METHODS})
