"""The figure of theorems.py: a panel for each check, two for the flow."""

import numpy as np
from theorems_networks import ACTIVATIONS, AIMS, EXACT
from theorems_quadratics import DIMENSIONS

from common import plots


def draw(outcome):
    figure, axes = plots.panels(2, 4, width=3.6, height=3.1)
    panels = (share, flow, newton, bound, displacement, conservation, tuned_step, group_laws)
    for ax, panel in zip(axes.flat, panels):
        name = "flow" if panel is share else panel.__name__
        arrays = {k.removeprefix(f"{name}/"): v for k, v in outcome.arrays.items() if k.startswith(f"{name}/")}
        panel(ax, arrays, outcome.metrics[name])
        ax.legend(fontsize=7, loc="center left" if panel is group_laws else "best")
    return figure


def share(ax, arrays, _):
    for i, (name, arm) in enumerate((n, a) for n in ("booth", "rosenbrock") for a in ("untouched", "teleported")):
        ax.loglog(
            arrays[f"{name}_{arm}_loss"],
            arrays[f"{name}_{arm}_share"],
            label=f"{name.title()}, {arm}",
            **plots.style(i),
        )
    ax.invert_xaxis()
    ax.set(xlabel="$L$ along the flow", ylabel=r"$\|\nabla L\|^2$ / largest at this $L$", title="One teleport enough?")


def flow(ax, arrays, _):
    for i, arm in enumerate(("untouched", "teleported")):
        time, loss = (arrays[f"rosenbrock_{arm}_{key}"][1:] for key in ("flow", "loss"))
        ax.loglog(time, loss, label=f"Rosenbrock, {arm}", **plots.style(i + 2))
    ax.set(xlabel="flow time", ylabel="$L$", title="The teleport slows the flow")


def newton(ax, arrays, _):
    for i, d in enumerate(DIMENSIONS):
        values = np.sort(arrays[f"values_{d}"])
        ax.plot(values, np.linspace(0, 1, len(values)), label=f"d = {d}, random points", **plots.style(i + 1))
    ax.plot([1, 1], [0, 1], "v-", color="black", label=r"at max $\|\nabla L\|$, and at min")
    ax.set(xlabel="$R$ (1: Newton's direction)", ylabel="share of quadratics below", title="Newton alignment")


def bound(ax, arrays, _):
    for i, (label, side) in enumerate(zip(("teleported SGD", "plain SGD"), arrays["sides"].T)):
        ax.loglog(arrays["T"], side, label=label, **plots.style(i + 1))
    ax.axhline(1, color="black", linewidth=0.8, label="bound")
    ax.set(xlabel="steps $T$", ylabel=r"$\min_t E\,\max_g\|\nabla L\|^2$ / bound", title="Theorem 3.1, least squares")


def displacement(ax, arrays, metrics):
    for i, name in enumerate(("parabola", "circle"), 1):
        ax.semilogx(arrays["kappa_r"], arrays[f"{name}_curve"], label=name, **plots.style(i))
        ax.plot(metrics[f"{name}_turn"], metrics[f"{name}_value"], plots.MARKERS[i], color=plots.COLORS[i])
    ax.axhline(2 / np.pi, color="black", linewidth=0.8, label=r"$2/\pi$: straight line")
    ax.set(xlabel=r"$\kappa r$", ylabel=r"mean distance / $r$", title="Displacement turns", ylim=(0.5, 0.9))


def conservation(ax, arrays, _):
    for i, name in enumerate(ACTIVATIONS):
        look = plots.style(i, marker=True) | {"linestyle": "none", "markersize": 3 + (name in EXACT)}
        ax.plot(arrays[f"{name}_down"].ravel(), arrays[f"{name}_change"].ravel(), label=name, **look, alpha=0.6)
    largest = max(np.abs(arrays[f"{name}_down"]).max() for name in EXACT)
    ax.plot([-largest, largest], [-largest, largest], color="black", linewidth=0.8, label="equal")
    ax.set_xscale("symlog", linthresh=10)
    ax.set_yscale("symlog", linthresh=10)
    across = r"$-\partial(\frac{1}{2}\|\nabla L\|^2)/\partial\log s_i$"
    ax.set(xlabel=across, ylabel=r"$\Delta Q_i/\eta^2$", title="Descent on the orbit")


def tuned_step(ax, arrays, metrics):
    labels = (r"max $\|g\|^2$", "max Gauss-Newton", "max decrease", r"min $\|g\|^2$")
    bounds = [B for B in ("2", "10") if f"{AIMS[0]}_{B}" in metrics]
    for i, B in enumerate(bounds, 1):
        at = np.arange(len(AIMS)) + 0.3 * (i - 1)
        ax.plot(at, [metrics[f"{aim}_{B}"] for aim in AIMS], label=f"$B = {B}$, mean", **dot(i, 8))
        seeds = np.array([arrays[f"seeds_{aim}_{B}"] for aim in AIMS])
        ax.plot(at, seeds, **dot(i, 3))
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(yscale="log", ylabel="best step's decrease, ratio", title="The tuned step", xticks=range(len(AIMS)))
    ax.set_xticklabels(labels, rotation=20, ha="right", fontsize=8)


def dot(i, size):
    return plots.style(i, marker=True) | {"linestyle": "none", "markersize": size}


def group_laws(ax, arrays, _):
    for i, name in enumerate(("preactivation", "postactivation", "rescaling"), 1):
        ax.semilogy(arrays["samples"], arrays[f"{name}_law"], label=name, **plots.style(i, marker=True))
    ax.axvline(8, color="black", linewidth=0.8)
    ax.set(
        xlabel="samples", ylabel="distance in the weights, relative", title=r"$g_1\cdot(g_2\cdot w)=(g_1g_2)\cdot w$?"
    )
