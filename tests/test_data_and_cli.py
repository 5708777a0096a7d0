"""What happens when the options or the results folder are wrong, or a run is interrupted."""

import json
import os
import subprocess
import sys
import time

import torch
from conftest import ROOT, run_inside, run_script, start_script

SCRIPT = "teleport_optimization.py"


def complaint(*options, output, **where):
    status, stdout, stderr = run_inside(SCRIPT, "--preset", "tiny", *options, output=output, **where)
    assert status == 2 and len(stderr.strip().splitlines()) == 1 and stderr.startswith("error: "), (stdout, stderr)
    return stderr


def test_users_mistakes_are_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "choose from" in complaint("--dataset", "SVHN", output=tmp_path)
    assert "init_directory.py --download MNIST" in complaint("--dataset", "MNIST", output=tmp_path, data_dir=tmp_path)
    assert "not a positive number" in complaint("--seeds", "0", output=tmp_path)
    assert "Not a directory" in complaint(output=tmp_path / "file")
    assert "nothing to replot" in complaint("--replot", output=tmp_path / "empty")
    if not torch.cuda.is_available():
        assert "no CUDA device" in complaint("--device", "cuda", output=tmp_path)


def test_results_of_another_configuration_are_refused(tiny, tmp_path):
    folder = tiny(SCRIPT)[0].folder
    error = complaint("--seeds", "1", output=folder)
    assert "another configuration" in error and "seeds: 2 there, 1 now" in error and "--fresh" in error
    path = folder / "results" / "tiny" / "teleport_optimization_mnist-mini.json"
    intact = path.read_text()
    try:
        path.write_text(intact[:100])
        assert "corrupt" in complaint(output=folder)
    finally:
        path.write_text(intact)


def test_killed_run_continues_with_the_same_numbers(tiny, tmp_path):
    """SIGKILL after the first part: the rerun keeps it, and ends where the uninterrupted run ended, bit for bit."""
    whole = tiny(SCRIPT)[0]
    process = start_script(SCRIPT, "--preset", "tiny", output=tmp_path)
    parts = tmp_path / "results" / "tiny" / "teleport_optimization_mnist-mini.parts"
    deadline = time.time() + 120
    while not list(parts.glob("*.npz")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    first = next(parts.glob("*.npz"))
    finished = first.stat().st_mtime_ns, first.read_bytes()
    assert not (tmp_path / "results" / "tiny" / "teleport_optimization_mnist-mini.json").exists()
    assert "another configuration" in complaint("--seeds", "1", output=tmp_path)
    assert (first.stat().st_mtime_ns, first.read_bytes()) == finished
    status, _, error = run_script(SCRIPT, "--preset", "tiny", "--quiet", output=tmp_path)
    assert status == 0 and error == ""
    results = tmp_path / "results" / "tiny"
    assert sorted(p.suffix for p in results.iterdir()) == [".json", ".npz"]
    name = "teleport_optimization_mnist-mini"
    assert (results / f"{name}.npz").read_bytes() == (whole.folder / "results" / "tiny" / f"{name}.npz").read_bytes()
    assert json.loads((results / f"{name}.json").read_text())["metrics"] == whole.records[name]["metrics"]


def test_no_pickles():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            text = path.read_text()
            assert "import pickle" not in text and "allow_pickle=True" not in text, path


def test_torchrun_divides_the_parts_and_changes_nothing(tiny, tmp_path):
    """Two ranks write what one process writes, bit for bit (same threads each)."""
    whole = tiny(SCRIPT)[0].folder / "results" / "tiny" / "teleport_optimization_mnist-mini.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT, "--preset", "tiny"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "tiny" / whole.name).read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "results" / "tiny" / f"{whole.stem}.json").read_text())["ranks"] == 2
    assert result.stdout.count("files: ") == 1  # one rank reports
