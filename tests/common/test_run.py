"""An experiment on disk: numbers come back as they were, damage is one line, one run at a time."""

import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from common import UserError, run
from common.claims import Published, Verdict


@dataclass(frozen=True)
class Settings:
    steps: int = 1


@pytest.fixture
def make_run(tmp_path):
    return lambda: run.Run("experiment", Settings(), torch.device("cpu"), tmp_path, quiet=True)


def experiment(this):
    parts, seconds = this.parts(lambda n: {"values": torch.arange(n)}, {"two": 2, "three": 3})
    metrics = {"finite": 1.5, "diverged": math.nan, "nested": {"list": [1, math.inf, "text"]}}
    return run.Outcome(metrics, {key: part["values"] for key, part in parts.items()}, timings=seconds)


def test_nan_comes_back_as_nan_and_infinity_too(make_run):
    outcome, _ = make_run().outcome(experiment)
    assert outcome.metrics["finite"] == 1.5 and math.isnan(outcome.metrics["diverged"])
    assert math.isnan(outcome.metrics["nested"]["list"][1]) and outcome.metrics["nested"]["list"][2] == "text"
    assert outcome.settings == Settings() and set(outcome.timings) == {"two", "three"}
    again, _ = make_run().outcome(experiment)
    np.testing.assert_equal(again.metrics, outcome.metrics)


def test_a_damaged_part_is_computed_again_and_a_whole_one_is_not(make_run, capsys):
    calls = []

    def count(n):
        calls.append(n)
        return {"values": np.arange(n)}

    first = make_run()
    first.open_parts()
    first.parts(count, {"two": 2, "three": 3})
    path = first.folder / "experiment.parts" / "two.npz"
    path.write_bytes(path.read_bytes()[:40])
    second = make_run()
    second.open_parts()
    parts, _ = second.parts(count, {"two": 2, "three": 3})
    assert calls == [2, 3, 2] and parts["two"]["values"].tolist() == [0, 1]
    assert capsys.readouterr().err.count("is damaged and is computed again") == 1


@pytest.mark.parametrize("content", ["", "garbage", "[]", "null", '{"metrics": null}'])
def test_damaged_results_are_one_line_that_names_the_file(make_run, content):
    make_run().outcome(experiment)
    path = make_run().folder / "experiment.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"experiment\.json.*--fresh"):
        make_run().outcome(experiment)
    assert path.read_text() == content  # nothing is deleted


def test_arrays_that_are_not_those_of_their_json_are_one_line(make_run):
    make_run().outcome(experiment)
    run.save_npz(make_run().folder / "experiment.npz", {"three": np.arange(3)})  # whole, but "two" is missing
    with pytest.raises(UserError, match=r"experiment\.npz.*--fresh"):
        make_run().outcome(experiment)


def test_a_damaged_checkpoint_is_as_good_as_none(make_run, capsys):
    first = make_run()
    first.save_checkpoint("two", {"values": np.arange(2)})
    assert first.load_checkpoint("two")["values"].tolist() == [0, 1] and first.load_checkpoint("three") is None
    (first.folder / "experiment.parts" / "two.checkpoint.npz").write_bytes(b"PK")
    assert first.load_checkpoint("two") is None and "damaged" in capsys.readouterr().err


def test_parts_are_never_looked_for_behind_a_link(make_run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "experiment.parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"experiment\.parts is a link"):
        make_run().outcome(experiment)
    assert not os.listdir(tmp_path / "elsewhere")


def test_one_run_of_an_experiment_at_a_time(make_run):
    first, other = make_run(), make_run()
    other.name = "other"
    with first.alone(), other.alone():  # different experiments share a folder
        with pytest.raises(UserError, match="experiment is running already"):
            with make_run().alone():
                pass
    with make_run().alone():
        pass
    assert not os.listdir(first.folder)


def test_a_damaged_manifest_is_one_line_that_names_the_file(make_run):
    first = make_run()
    first.open_parts()
    manifest = first.folder / "experiment.parts" / "configuration.json"
    manifest.write_text("")
    with pytest.raises(UserError, match="configuration.json.*--fresh"):
        make_run().open_parts()


def test_a_verdict_says_whether_it_came_out_again():
    def row(agrees):
        return Published("loss", 1.0, 1.0, "a notebook", agrees=agrees)

    verdict = Verdict("holds in part", "here only", "numbers")
    assert str(verdict) == "holds in part: here only" and verdict.again() == "no published number at hand"
    assert verdict._replace(published=[row(True), row(None)]).again() == "reproduced"
    assert verdict._replace(published=[row(True), row(False)]).again() == "not reproduced"
