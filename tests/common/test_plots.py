"""What the shared style promises: curves that can be told apart in grey, legends that can be read over curves."""

from itertools import combinations

import matplotlib
import numpy as np

from common import plots
from common.tuning import tune


def lightness(color):
    """CIE L* of a colour, 0 black, 100 white."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_every_curve_has_its_own_line_and_marker():
    looks = [plots.style(i, marker=True) for i in range(len(plots.COLORS))]
    for key in ("color", "linestyle", "marker"):
        assert all(a[key] != b[key] for a, b in combinations(looks, 2)), key
    assert all(lightness(look["color"]) < 78 for look in looks)  # not lost on white


def test_what_runs_behind_a_legend_does_not_mix_with_its_text():
    figure, ((ax,),) = plots.panels()
    ax.plot([0, 1], label="a curve", **plots.style(0))
    frame = ax.legend().get_frame()
    assert frame.get_alpha() > 0.8 and frame.get_facecolor()[:3] == (1, 1, 1)
    matplotlib.pyplot.close(figure)


def test_a_band_is_one_standard_deviation_and_absent_for_one_seed():
    figure, ((ax,),) = plots.panels()
    line = plots.band(ax, [0, 1], [[1.0, 2.0], [3.0, 6.0]])
    np.testing.assert_allclose(line.get_ydata(), [2, 4])
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [2 - 2**0.5, 4 + 2 * 2**0.5])
    plots.band(ax, [0, 1], [1.0, 2.0], i=1)
    assert len(ax.collections) == 1
    matplotlib.pyplot.close(figure)


def test_a_tuning_is_drawn_with_every_best_marked():
    tuned = tune(lambda which, factors: np.log(factors / 2)[..., None] ** 2 * np.ones(3), 2, grid=(1, 2, 5))
    tuned = tuned._replace(interior=np.array([True, False]))
    figure, axes = plots.panels()
    plots.tuning_curves(axes[0, 0], tuned, ("baseline", "other"))
    marks = [(line.get_marker(), line.get_xdata()[0]) for line in axes[0, 0].lines if line.get_marker() in "ox"]
    assert marks == [("o", 2), ("x", 2)]
    matplotlib.pyplot.close(figure)


def test_a_figure_is_laid_out_once_for_both_files(tmp_path):
    figure, ((ax,),) = plots.panels()
    ax.set_ylabel("a label\nthat needs\nroom")
    laid_out, engine = [], figure.get_layout_engine()
    execute = engine.execute
    engine.execute = lambda f: laid_out.append(execute(f))
    assert [path.name for path in plots.save(figure, tmp_path, "name")] == ["name.pdf", "name.png"]
    assert len(laid_out) == 1 and all((tmp_path / f"name.{suffix}").stat().st_size for suffix in ("pdf", "png"))
