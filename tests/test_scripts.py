"""Every figure script, at --preset tiny, from the root and from its own folder: what it writes, and that it repeats."""

import json
import shutil

import matplotlib.image
import numpy as np
import pytest
from conftest import SCRIPTS, run_inside

# Script by script (scope): two workers that want the same run, which one of them makes, would wait for it.
pytestmark = pytest.mark.parametrize("script", SCRIPTS, scope="module")


def test_results_are_complete_and_anonymous(tiny, script):
    run = tiny(script)[0]
    assert run.records and set(run.records) == set(run.arrays)
    for record in run.records.values():
        keys = {"configuration", "dataset", "seeds", "versions", "device", "elapsed_seconds", "git_commit", "metrics"}
        assert keys <= set(record)
        assert record["metrics"] and record["elapsed_seconds"] > 0 and 1e8 < record["peak_memory_bytes"] < 4e9
        if "dataset" in record["configuration"]["settings"]:
            assert record["dataset"]["label"] and all(len(h) == 64 for h in record["dataset"]["sha256"].values())
        assert str(run.folder) not in json.dumps(record) and "/root" not in json.dumps(record)
    for arrays in run.arrays.values():
        assert arrays
        for name, array in arrays.items():
            assert (
                array.size and array.dtype.kind in "fiub" and not (array.dtype.kind == "f" and np.isnan(array).all())
            ), name


def test_figures_have_content(tiny, script):
    folder = tiny(script)[0].folder / "figures" / "tiny"
    pdfs, pngs = sorted(folder.glob("*.pdf")), sorted(folder.glob("*.png"))
    assert pngs and [p.stem for p in pdfs] == [p.stem for p in pngs]
    for pdf, png in zip(pdfs, pngs):
        assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 5000
        image = matplotlib.image.imread(png)
        assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.02  # not an empty canvas


def test_same_bits_from_root_and_from_its_own_folder_on_another_device(tiny, script):
    root, own = tiny(script)
    assert set(root.arrays) == set(own.arrays)
    for name, arrays in root.arrays.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, own.arrays[name][key], err_msg=f"{name}: {key}", strict=True)
        assert root.records[name]["metrics"] == own.records[name]["metrics"]


def test_table_and_files_are_printed(tiny, script):
    run = tiny(script)[0]
    assert "---" in run.stdout and ".json" in run.stdout and ".png" in run.stdout and run.stdout.strip().endswith(" s")


def test_replot_and_wrong_options(tiny, script, tmp_path):
    folder = tmp_path / "own"  # a copy: other workers read the run's files
    shutil.copytree(tiny(script)[0].folder, folder, symlinks=True)
    status, _, error = run_inside(script, "--no-such-option", output=folder)
    assert status == 2 and error.startswith("error: ") and len(error.strip().splitlines()) == 1
    drawn = {p: p.read_bytes() for p in (folder / "figures" / "tiny").iterdir()}
    for path in drawn:
        path.unlink()
    before = {p.name: p.read_bytes() for p in (folder / "results" / "tiny").iterdir()}
    status, _, error = run_inside(script, "--preset", "tiny", "--replot", output=folder)
    assert status == 0, error
    assert drawn == {p: p.read_bytes() for p in (folder / "figures" / "tiny").iterdir()}
    assert before == {p.name: p.read_bytes() for p in (folder / "results" / "tiny").iterdir()}
