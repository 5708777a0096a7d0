"""learn-to-teleport/multi_layer_regression.py: killed, diverging, what its results hold and where its figures go."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, die_after, load_script, read_results, start_in_own_folder

meta_seeds = load_script("learn-to-teleport/meta_seeds.py")
SCRIPT = ROOT / "learn-to-teleport" / "multi_layer_regression.py"


def test_script_killed_in_meta_training_continues_with_the_same_results(tiny, tmp_path):
    script = "learn-to-teleport/multi_layer_regression.py"
    half_way = partial(die_after, "common.run:Run", "save_checkpoint", 5)  # through the third of five trainings
    killed = start_in_own_folder(script, tmp_path, half_way)
    killed.join(timeout=240)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "stdout").read_text()
    parts = sorted(path.name for path in (tmp_path / "results/tiny/learn_to_teleport.parts").iterdir())
    assert "lr.npz" in parts and "update_published.checkpoint.npz" in parts and "update_published.npz" not in parts
    continued = start_in_own_folder(script, tmp_path)
    continued.join(timeout=240)
    assert continued.exitcode == 0, (tmp_path / "stdout").read_text()
    _, arrays = read_results(tmp_path / "results" / "tiny")
    expected = tiny(script)[0].arrays["learn_to_teleport"]
    assert arrays["learn_to_teleport"].keys() == expected.keys()
    for name, array in arrays["learn_to_teleport"].items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert not list(tmp_path.rglob("*.parts"))


def test_script_reports_divergence_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as Python does for the script it runs
    script = load_script("learn-to-teleport/multi_layer_regression.py")
    wild = {"quick": replace(script.PRESETS["tiny"], updater_rate=1e20, save_every=1)}
    arguments = (wild, script.experiment, script.plot, script.report, script.judge)
    with pytest.raises(SystemExit) as stop:
        options = ["--output", str(tmp_path), "--quiet"]
        script.cli.main(str(SCRIPT), "", *arguments, name="learn_to_teleport", argv=options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "LSTM(update" in error and "checkpoint" in error


def test_results_are_what_the_table_needs(tiny):
    run = tiny("learn-to-teleport/multi_layer_regression.py")[0]
    metrics, arrays = run.records["learn_to_teleport"]["metrics"], run.arrays["learn_to_teleport"]
    for name, m in metrics.items():
        published = "published" in name
        if name.startswith("LSTM"):
            assert m["largest_relative_drift"] <= 1e-5 or published, name
        mean, low, high = m["ratio_to_GD"]
        assert low <= mean <= high and 0 <= m["meta_seeds_better_than_GD"] <= m["meta_seeds"]
    final = arrays["gd/loss"][:, 0, :, -1].astype(float)
    ratio = np.exp(np.log(final[1] / final[0]).mean())
    assert metrics["GD, rates of the clamp"]["ratio_to_GD"][0] == pytest.approx(ratio, rel=1e-9)
    json.dumps(metrics, allow_nan=False)


def test_figures_are_linked_from_the_script_s_folder(tiny):
    folder = tiny("learn-to-teleport/multi_layer_regression.py")[0].folder
    links = sorted((folder / "learn-to-teleport" / "figures" / "tiny").iterdir())
    assert len(links) == 6  # three figures, PDF and PNG
    for link in links:
        assert link.is_symlink() and not Path(os.readlink(link)).is_absolute()
        assert link.resolve() == (folder / "figures" / "tiny" / link.name).resolve() and link.exists()


def test_meta_seeds_that_rise_again_are_counted():
    """Of three that fall by half a step: one rises from step 3 on, one is not a number in the end."""
    arms = [("gd", 0, "GD"), ("lr", 0, "LSTM(lr)"), ("update", 0, "LSTM(update)")]
    fall = np.broadcast_to(0.5 ** np.arange(11), (1, 3, 4, 11)).copy()
    rise = fall.copy()
    rise[0, 1, :, 3:] = 0.26
    rise[0, 2, :, -1] = np.nan
    arrays = {"gd/loss": fall, "lr/loss": fall, "update/loss": rise}
    up = meta_seeds.rising(arrays, arms)
    assert up == {"LSTM(lr)": 0, "LSTM(update)": 2}
    assert "so do 2 of 3 here" in meta_seeds.updates(up, {name: {"meta_seeds": 3} for name in up})
