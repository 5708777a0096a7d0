"""What booth.py and rosenbrock.py share: SO(2) teleportation (orbits.py) against descent without it, from the published
start with several angles, and from random starts.
"""

from dataclasses import dataclass

import numpy as np
import scipy
import torch
from orbits import (
    act,
    adagrad,
    along_orbit,
    descend,
    gradient,
    gradient_descent,
    newton,
    newton_direction,
    orbit_maximum,
    published_teleport,
)

from common import plots
from common.claims import Published, Verdict, grade, median, table
from common.run import Outcome


@dataclass(frozen=True)
class Settings:
    start: tuple  # (x, y)
    steps: int
    teleports: tuple  # before these steps
    lr: float
    lr_theta: float  # of the published ascent on the angle, in radians
    adagrad_lr: float  # the best of 0.1, 0.3, 1, 3, 10 for AdaGrad alone
    ascent_steps: int = 10
    newton_steps: int = 10
    seeds: int = 10  # of the starting angles; the first is that of the published figures' recorded run
    random_starts: int = 1000  # uniform in the figures' window, each with angles of its own


ARMS = {
    "gd": "GD",
    "gd_random": "GD + random angle",
    "gd_published": "GD + published teleport",
    "gd_maximum": "GD + orbit maximum",
    "adagrad": "AdaGrad",
    "adagrad_maximum": "AdaGrad + orbit maximum",
    "newton": "Newton's method",
}
SHOWN = ("gd", "gd_published", "gd_maximum", "adagrad", "adagrad_maximum", "newton")  # as trajectories


def starting_angles(seed, count):
    """Uniform in [0, π), drawn as the published code does."""
    return torch.from_numpy(np.random.RandomState(seed).random(count) * np.pi)


def experiment(run, function):
    s = run.settings
    seeds = list(range(1, s.seeds + 1))
    angles = torch.stack([starting_angles(seed, len(s.teleports)) for seed in seeds], dim=1)  # (teleports, seeds)
    start = torch.tensor(s.start, dtype=torch.float64)[:, None]
    everyone, moves = start.expand(2, s.seeds), teleports(function, s, angles)
    arms = {  # start, steps, optimizer, teleportation
        "gd": (start, s.steps, gradient_descent(s.lr), None),
        "gd_random": (everyone, s.steps, gradient_descent(s.lr), moves["gd_random"]),
        "gd_published": (everyone, s.steps, gradient_descent(s.lr), moves["gd_published"]),
        "gd_maximum": (start, s.steps, gradient_descent(s.lr), moves["gd_maximum"]),
        "adagrad": (start, s.steps, adagrad(s.adagrad_lr), None),
        "adagrad_maximum": (start, s.steps, adagrad(s.adagrad_lr), moves["gd_maximum"]),
        "newton": (start, s.newton_steps, newton(function), None),
    }
    arrays, metrics = {}, {}
    for name, (w, steps, optimizer, teleport) in arms.items():
        when = [t for t in s.teleports if t <= steps] if teleport else []
        iterates, departures = descend(function, w, steps, optimizer, teleport, when)
        result = measure(function, iterates.movedim(1, 0), departures.movedim(1, 0), when)
        metrics[name] = summary(result)
        arrays |= {f"{name}_{key}": value for key, value in result.items()}
    return Outcome(metrics, arrays | elsewhere(function, s), seeds)


def teleports(function, s, angles):
    """{arm: teleportation} of gradient descent's; each teleport takes the next row of angles (teleports, *E)."""

    def published(steps):
        theta = iter(angles)
        return lambda w: published_teleport(function, w, next(theta), s.lr_theta, steps)

    def to_maximum(w):
        return act(function, orbit_maximum(function, w), w)

    # One step is no ascent: the point is that before the last update.
    return {"gd_random": published(1), "gd_published": published(s.ascent_steps), "gd_maximum": to_maximum}


def elsewhere(function, s):
    """Final losses of gradient descent and its teleports from random starts, (starts,) each; NaN: it diverged."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(function.window, dtype=torch.float64).T[..., None]
    w = low + (high - low) * torch.rand(2, s.random_starts, generator=generator, dtype=torch.float64)
    angles = torch.pi * torch.rand(len(s.teleports), s.random_starts, generator=generator, dtype=torch.float64)
    arrays = {"starts": w}
    for arm, teleport in ({"gd": None} | teleports(function, s, angles)).items():
        when = s.teleports if teleport else ()
        last = descend(function, w, s.steps, gradient_descent(s.lr), teleport, when)[0][-1]
        loss = function.loss(*last)
        arrays[f"{arm}_starts_loss"] = torch.where(loss.isfinite(), loss, torch.nan)
    return arrays


def measure(function, iterates, departures, when):
    """Arrays from iterates and departures (2, steps + 1, *E); those of teleports have length len(when) instead."""
    loss, speed = function.loss(*departures), gradient(function, departures).square().sum(0)
    before, after = iterates[:, when], departures[:, when]
    result = {"path": iterates[..., 0].T, "loss": loss, "speed": speed}
    if when:
        g, n = gradient(function, after), newton_direction(function, after)
        cross, dot = g[0] * n[1] - g[1] * n[0], (g * n).sum(0)
        best = along_orbit(function, orbit_maximum(function, before), before)[1]
        result |= {
            "when": torch.tensor(when),
            "arrivals": after[..., 0].T,
            "drift": loss[when] - function.loss(*before),
            "speed_before": gradient(function, before).square().sum(0),
            "speed_of_orbit": best,  # its maximum over the orbit
            "degrees_from_newton": torch.rad2deg(torch.atan2(cross.abs(), dot.abs())),  # between the two lines
        }
    return result


def summary(result):
    loss = result["loss"]
    reached = loss < 1e-3
    first = torch.where(reached.any(0), reached.int().argmax(0).double(), torch.nan)
    metrics = {"final_loss": loss[-1], "steps_to_loss_below_1e-3": first}
    if "drift" in result:
        drift, at = result["drift"].abs(), loss[result["when"]]
        settled = at > 1e-4  # where rounding of x and y does not dominate: L is then known to a few 1e-13
        metrics |= {
            "largest_drift": drift.max(),
            "largest_relative_drift": (drift / at)[settled].max(),  # of the teleports at L > 1e-4
            "speed_gain": (result["speed_of_orbit"] / result["speed_before"])[settled].median(),  # available
            "speed_share": (result["speed"][result["when"]] / result["speed_of_orbit"])[settled].median(),  # reached
            "degrees_from_newton": result["degrees_from_newton"][settled].max(),
        }
    return metrics


RANDOM = "Teleports to random angles end at a loss of {:.1e}, the published ascent at {:.1e}."


def judge(outcome, recorded):
    final = {arm: median(m["final_loss"]) for arm, m in outcome.metrics.items()}
    names = {"gd": "gradient descent", "gd_random": "random angles", "gd_published": "the published ascent"}
    names |= {"gd_maximum": "the orbit's maximum", "newton": "Newton's method"}
    faster = {arm: final["gd_published"] <= final[arm] / 10 for arm in ("gd", "gd_random")}
    return Verdict(
        grade(all(faster.values()), faster["gd"]),
        "random angles do as well as the published ascent" if faster["gd"] else "no faster",
        "Final loss, median over starting angles: " + ", ".join(f"{names[a]} {final[a]:.2g}" for a in names) + ".",
        [how_far(outcome.metrics), from_everywhere(outcome.arrays)],
        published=list(beside(outcome, recorded)),
        surprise="" if faster["gd_random"] else RANDOM.format(final["gd_random"], final["gd_published"]),
    )


def beside(outcome, recorded):
    """The losses that the authors' code recorded, {(arm, step): loss}, beside ours from the same angles."""
    for (arm, step), loss in recorded.items():
        if step >= outcome.settings.steps:
            continue
        ours = float(outcome.arrays[f"{arm}_loss"][step, 0])
        what = f"loss after {step} steps, {ARMS[arm]}"
        yield Published(what, loss, ours, "the authors' code, run here", agrees=abs(ours - loss) <= 1e-6 * loss)


def how_far(m):
    """What the teleports reach, and what they cost."""
    drift = max(arm.get("largest_relative_drift", 0) for arm in m.values())
    return (
        f"Share of the largest dL/dt that a teleport reaches: published {m['gd_published']['speed_share']:.0%}, "
        f"random angle {m['gd_random']['speed_share']:.0%}. At the maximum the gradient is within "
        f"{m['gd_maximum']['degrees_from_newton']:.0e} degrees of Newton's direction. Largest drift {drift:.0e}."
    )


def from_everywhere(arrays):
    """Whether it depends on the start: how often a teleport ends lower than gradient descent alone."""
    plain, said = arrays["gd_starts_loss"], []
    for arm, name in (("gd_published", "published"), ("gd_random", "random angle"), ("gd_maximum", "maximum")):
        loss, n = arrays[f"{arm}_starts_loss"], len(plain)
        lower = int((np.nan_to_num(loss, nan=np.inf) < np.nan_to_num(plain, nan=np.inf)).sum())
        low, high = scipy.stats.binomtest(lower, n).proportion_ci()
        said.append(f"{name} {lower / n:.1%} [{low:.1%}, {high:.1%}], {np.isnan(loss).sum()} diverged")
    return (
        f"From {n} random starts in the figures' window, of which gradient descent alone diverges from "
        f"{np.isnan(plain).sum()}, a teleport ends lower than it: {'; '.join(said)}."
    )


def plot(outcome, settings, save, function):
    save(_trajectories(outcome.arrays, settings, function), "trajectories")
    save(_convergence(outcome.arrays, function), "convergence")


def _trajectories(arrays, settings, function):
    """The first seed's paths over the level sets, teleports as arrows."""
    figure, axes = plots.panels(2, 3, width=3.2, height=2.9, sharex=True, sharey=True)
    black, blue, red, green = plots.COLORS[:4]
    arrow = {"arrowstyle": "->", "color": red, "linestyle": "--", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    t = np.linspace(0, 2 * np.pi, 4000)
    for ax, name in zip(axes.flat, SHOWN):
        for level in function.levels:
            x, y = function.from_uv(np.sqrt(level) * np.cos(t), np.sqrt(level) * np.sin(t))
            ax.plot(x, y, color="#bbbbbb", linewidth=0.7)
        path = arrays[f"{name}_path"]
        if f"{name}_when" in arrays:
            when, arrivals = arrays[f"{name}_when"], arrays[f"{name}_arrivals"]
            for departure, arrival in zip(path[when], arrivals):
                ax.annotate("", arrival, departure, arrowprops=arrow)
            gap = np.full_like(arrivals, np.nan)  # the line breaks at a teleport and goes on where it arrives
            path = np.insert(path, np.repeat(when + 1, 2), np.stack([gap, arrivals], axis=1).reshape(-1, 2), axis=0)
        (steps,) = ax.plot(*path.T, ".-", color=blue, markersize=4, linewidth=1)
        (start,) = ax.plot(*settings.start, "o", color=black, markersize=6, linestyle="")
        (minimum,) = ax.plot(*function.minimum, "*", color=green, markersize=11, zorder=1, linestyle="")
        ax.set(title=ARMS[name], xlim=function.window[0], ylim=function.window[1])
    (teleport,) = axes[0, 0].plot([], [], "--", color=red)
    for ax in axes[-1]:
        ax.set_xlabel("$x$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$y$")
    labels = ["start", "steps", "teleport", "minimum"]
    figure.legend([start, steps, teleport, minimum], labels, loc="outside upper center", ncols=4)
    return figure


def _convergence(arrays, function):
    """Loss and dL/dt against the step, dL/dt against loss: the first seed thick, the others thin."""
    figure, ((loss_ax, speed_ax, phase_ax),) = plots.panels(1, 3, width=3.6, height=3.4)
    for i, (name, label) in enumerate(ARMS.items()):
        # Newton's method reaches 0; just below the frame it still shows from where to where.
        loss, speed = (np.maximum(arrays[f"{name}_{key}"], 1e-6 * function.floor) for key in ("loss", "speed"))
        for ax, curves in ((loss_ax, loss), (speed_ax, speed)):
            ax.plot(curves[:, 1:], **plots.style(i) | {"linewidth": 0.5, "alpha": 0.3})
            ax.plot(curves[:, 0], label=label, **plots.style(i))
        if name in SHOWN:
            x, y = loss[:, 0], speed[:, 0]
            if f"{name}_when" in arrays:  # a teleport goes up a line of constant loss
                when, before = arrays[f"{name}_when"], arrays[f"{name}_speed_before"][:, 0]
                phase_ax.plot(x[when], y[when], plots.MARKERS[i], color=plots.COLORS[i], markersize=4)
                x, y = np.insert(x, when, x[when]), np.insert(y, when, before)
            phase_ax.plot(x, y, **plots.style(i))
    dL_dt, floor = r"$dL/dt = \|\partial L/\partial w\|^2$", (function.floor, None)
    loss_ax.set(xlabel="step", ylabel="loss", title="thick: first angle; thin: the others")
    speed_ax.set(xlabel="step", ylabel=dL_dt)
    phase_ax.set(xlabel="loss", ylabel=dL_dt, title="markers: after a teleport", xscale="log", xlim=floor)
    for ax in (loss_ax, speed_ax, phase_ax):
        ax.set(yscale="log", ylim=floor)
    figure.legend(*loss_ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return figure


def report(outcome, settings):
    rows = []
    for name, label in ARMS.items():
        m = outcome.metrics[name]
        loss = m["final_loss"]
        reached = [t for t in m["steps_to_loss_below_1e-3"] if not np.isnan(t)]
        seeds = f" ({len(reached)}/{len(loss)})" if len(loss) > 1 else ""
        row = [label, f"{np.median(loss):.1e}", f"{min(loss):.0e} … {max(loss):.0e}" if len(loss) > 1 else ""]
        row += [(f"{np.median(reached):.0f}" if reached else "-") + seeds]
        if "largest_drift" in m:
            row += [f"{m['largest_drift']:.0e}", f"{m['largest_relative_drift']:.0e}"]
            row += [f"{m['speed_share']:.3f}", f"{m['degrees_from_newton']:.1e}"]
        rows.append(row + [""] * (8 - len(row)))
    header = ["", "final loss", "over seeds", "L < 1e-3 at", "largest drift", "relative*", "dL/dt*", "Newton*"]
    gain = outcome.metrics["gd_maximum"]["speed_gain"]
    notes = (
        f"Medians over {len(outcome.seeds)} starting angles. * Of the teleports at L > 1e-4. dL/dt: median share of\n"
        "its maximum over the orbit that a teleport reaches; in GD + orbit maximum this raises dL/dt by a factor of\n"
        f"{gain:.4g} (median). Newton: largest angle between gradient and Newton direction after a teleport (degrees)."
    )
    return table(header, rows) + "\n\n" + notes
