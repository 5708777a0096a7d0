"""One plot style: readable in print and without colour (every curve has its own line style or marker)."""

import io
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from common.files import write  # noqa: E402

# Okabe-Ito colours: distinct for colour-blind readers and of different lightness in grey.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "savefig.dpi": 200,
        "font.size": 10,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.3,
        "legend.edgecolor": "none",  # a white ground: what runs behind a legend does not mix with its text
        "legend.facecolor": "white",
        "legend.fancybox": False,
        "legend.framealpha": 0.85,
        "legend.handlelength": 3,
        "lines.linewidth": 1.5,
        "pdf.fonttype": 42,
    }
)


def panels(
    rows: int = 1, columns: int = 1, width: float = 3.6, height: float = 2.9, **options: Any
) -> tuple[plt.Figure, np.ndarray]:
    """A figure and its (rows, columns) array of axes, each width × height inches."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)


def style(i: int, marker: bool = False) -> dict:
    """Colour, line style (and marker) number i, as keyword arguments of plot."""
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": LINES[i % len(LINES)],
        **({"marker": MARKERS[i % len(MARKERS)], "markersize": 4} if marker else {}),
    }


def marked(i: int, points: int) -> dict:
    """The look of line number i, of so many points: five markers or so, at other points than the other lines'."""
    return {**style(i, marker=True), "markevery": (i * points // 25, max(1, points // 5))}


def band(ax: plt.Axes, x: Sequence, y: np.ndarray, label: str | None = None, i: int = 0, **options: Any) -> plt.Line2D:
    """Plot the mean of y (seeds, points) over seeds with a band of ±1 standard deviation (not drawn for one seed)."""
    y = np.atleast_2d(np.asarray(y, float))
    mean = y.mean(0)
    options = {**style(i), **options}
    (line,) = ax.plot(x, mean, label=label, **options)
    if len(y) > 1:
        spread = y.std(0, ddof=1)
        ax.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
    return line


def log_band(ax: plt.Axes, x: Sequence, y: np.ndarray, label: str, i: int) -> None:
    """Geometric mean of y (runs, points) ×/÷ one standard deviation: an arithmetic band would reach below zero."""
    y = np.log(np.asarray(y, float))
    mean, spread = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else 0
    (line,) = ax.plot(x, np.exp(mean), label=label, **style(i))
    ax.fill_between(x, np.exp(mean - spread), np.exp(mean + spread), color=line.get_color(), alpha=0.15, linewidth=0)


def intervals(ax: plt.Axes, found: Collection, at: Sequence, i: int, label: str, vertical: bool = False) -> None:
    """Comparisons of logarithms with 95 % intervals, in per cent, at places on the y axis (vertical: on the x axis).

    Horizontally, one that diverged is said in words, and a change beyond a factor of 3 makes the axis logarithmic
    outside ± 10 %."""
    middle, low, high = (np.array([100 * np.expm1(getattr(c, k)) for c in found]) for k in ("effect", "low", "high"))
    bars, look = np.stack([middle - low, high - middle]), style(i, marker=True) | {"linestyle": "none"}
    if vertical:
        ax.errorbar(at, middle, yerr=bars, label=label, capsize=2, **look)
        ax.axhline(0, color="black", linewidth=0.8)
    else:
        ax.errorbar(middle, at, xerr=bars, label=label, capsize=2, **look)
        ax.axvline(0, color="black", linewidth=0.8)
        for y, c in zip(at, found):
            if np.isnan(c.effect):
                said = f"diverged in {max(c.diverged)} of {c.n}"
                place = dict(xytext=(4, 0), textcoords="offset points", va="center")
                ax.annotate(said, (0, y), xycoords=ax.get_yaxis_transform(), fontsize=6, color=look["color"], **place)
        if np.nan_to_num(high).max(initial=0) > 200:
            ax.set_xscale("symlog", linthresh=10)
            ax.xaxis.get_major_locator().set_params(numticks=5)


def tuning_curves(ax: plt.Axes, tuned: Any, names: Sequence[str], baseline: int = 0) -> None:
    """A tuning (common/tuning.py): mean score of every arm at every factor that it tried, as the loss above the
    baseline's best in per cent; each arm's best in a ring, or crossed where it lies at an edge."""
    reference, lowest, highest = tuned.at_best()[baseline].mean(), 0.0, 0.0
    for a, name in enumerate(names):
        tried = tuned.tried[a]
        x, y = tuned.factors[tried], 100 * np.expm1(tuned.scores[a, tried].mean(-1) - reference)
        ax.plot(x, y, label=name, **style(a) | {"linewidth": 1.1})
        best, look = y[(x == tuned.factors[tuned.best[a]]).argmax()], {"markerfacecolor": "none", "markersize": 8}
        mark = "o" if tuned.interior[a] else "x"
        ax.plot(tuned.factors[tuned.best[a]], best, mark, color=COLORS[a % len(COLORS)], **look)
        lowest, highest = min(lowest, np.nan_to_num(best)), max(highest, np.nan_to_num(best))
    ax.set(xscale="log", xlabel="learning rate / published", ylim=(1.2 * lowest - 3, max(30.0, 2 * highest)))


class _FewDecades(matplotlib.ticker.MaxNLocator):
    """Ticks at 1, 2 and 5 times powers of ten, evenly spaced ones where these would be fewer than three."""

    def __init__(self) -> None:
        super().__init__(5, steps=[1, 2, 5, 10])

    def tick_values(self, low: float, high: float) -> np.ndarray:
        ticks = matplotlib.ticker.LogLocator(subs=(1, 2, 5)).tick_values(low, high)
        ticks = ticks[(low <= ticks) & (ticks <= high)]
        return ticks if len(ticks) > 2 else super().tick_values(low, high)


def log_loss(ax: plt.Axes) -> None:
    """A logarithmic y axis for values within a decade or two, where powers of ten would leave one label or none."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(_FewDecades())
    ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def save(figure: plt.Figure, folder: Path, name: str) -> list[Path]:
    """Write name.pdf and name.png into folder, complete or not at all, without dates; close the figure."""
    contents = {}
    figure.set_dpi(plt.rcParams["savefig.dpi"])
    figure.get_layout_engine().execute(figure)  # once for both: savefig would, after a dry drawing, for each
    with plt.rc_context({"figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)
        for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, metadata=metadata)
            contents[folder / f"{name}.{suffix}"] = buffer.getvalue()
    plt.close(figure)
    write(contents)
    return sorted(contents)


def link(paths: Sequence[Path], folder: Path) -> None:
    """Make symbolic links to the files in folder; what stands there under their names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        with tempfile.TemporaryDirectory(dir=folder) as private:  # a name that nobody else has
            temporary = Path(private) / path.name
            temporary.symlink_to(os.path.relpath(path.resolve(), folder.resolve()))
            temporary.replace(folder / path.name)
