"""What the user types, and what happens when options, results folder, disk, terminal or a second run are in the way."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, SCRIPTS, die_after, run_inside, start_in_own_folder

from common import files, terminal

SCRIPT = "teleport_optimization.py"
OWN = "tests/common/script.py"


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
    folder = tmp_path / "own"  # a copy: other workers read the run's files
    shutil.copytree(tiny(SCRIPT)[0].folder, folder, symlinks=True)
    error = complaint("--seeds", "1", output=folder)
    assert "another configuration" in error and "seeds: 2 there, 1 now" in error and "--fresh" in error
    path = folder / "results" / "tiny" / "teleport_optimization_mnist-mini.json"
    path.write_text(path.read_text()[:100])
    assert "corrupt" in complaint(output=folder)


def test_killed_run_continues_with_the_same_numbers(tiny, tmp_path):
    """SIGKILL after the first part: the rerun keeps it, and ends where the uninterrupted run ended, bit for bit."""
    whole, name = tiny(SCRIPT)[0], "teleport_optimization_mnist-mini"
    killed = start_in_own_folder(SCRIPT, tmp_path, partial(die_after, "common.run", "save_npz", 1))
    killed.join(timeout=240)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "stdout").read_text()
    results = tmp_path / "results" / "tiny"
    (first,) = (results / f"{name}.parts").glob("*.npz")
    finished = first.stat().st_mtime_ns, first.read_bytes()
    assert not (results / f"{name}.json").exists()
    assert "another configuration" in complaint("--seeds", "1", output=tmp_path)
    assert (first.stat().st_mtime_ns, first.read_bytes()) == finished
    continued = start_in_own_folder(SCRIPT, tmp_path, partial(refuse_to_compute, first.stem))
    continued.join(timeout=240)
    assert continued.exitcode == 0, (tmp_path / "stdout").read_text()
    assert sorted(p.suffix for p in results.iterdir()) == [".json", ".npz"]
    assert (results / f"{name}.npz").read_bytes() == (whole.folder / "results" / "tiny" / f"{name}.npz").read_bytes()
    assert json.loads((results / f"{name}.json").read_text())["metrics"] == whole.records[name]["metrics"]


def refuse_to_compute(part):
    """The part is finished: whoever saves it again computed it again."""
    sys.path.insert(0, str(ROOT))
    from common import run

    save = run.save_npz

    def checked(path, *arguments):
        assert path.stem != part
        save(path, *arguments)

    run.save_npz = checked


def test_torchrun_divides_the_parts_and_changes_nothing(finished, tmp_path):
    """Two ranks write what one process writes, bit for bit (same threads each)."""
    whole = finished / "results" / "quick" / "script.npz"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", OWN, "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "quick" / whole.name).read_bytes() == whole.read_bytes()
    assert json.loads((tmp_path / "results" / "quick" / f"{whole.stem}.json").read_text())["ranks"] == 2
    assert result.stdout.count("files: ") == 1  # one rank reports


# ---------------------------------------------------------------------------------------------------------------------
# The disk


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_inside(OWN, "--quiet", output=folder) == (0, "", "")
    return folder


@pytest.fixture
def results(finished, tmp_path):
    """A copy of its results, to damage."""
    return shutil.copytree(finished / "results" / "quick", tmp_path / "results" / "quick")


@pytest.mark.parametrize("room, kept", [(1_000, 0), (4_000, 1), (48_000, 2), (400_000, 3)])
def test_no_room_is_one_line_and_keeps_what_is_finished(tmp_path, room, kept):
    """A limit on the size of files is what a full disk looks like, at any point of a run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        status, _, error = run_inside(OWN, "--jobs", "1", output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and "File too large" in error and len(error.splitlines()) == 1, error
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    assert len(written) == (kept if kept < 3 else 1)  # the last limit is met by a figure, when the results are whole
    assert not list((tmp_path / "figures").glob("*/*")) and not list(tmp_path.rglob(".*"))
    assert run_inside(OWN, "--quiet", output=tmp_path) == (0, "", "")
    assert sorted(p.name for p in tmp_path.glob("*/*/*")) == ["script.json", "script.npz", "script.pdf", "script.png"]


def test_no_room_for_a_fresh_result_keeps_the_old_one(results, tmp_path):
    before = {p: p.read_bytes() for p in results.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (205_000, hard))  # the largest part fits, all of them in one file do not
    try:
        status, _, error = run_inside(OWN, "--fresh", output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1 and "script.npz: File too large" in error
    assert before == {p: p.read_bytes() for p in before}
    parts = sorted((results / "script.parts").glob("*.npz"))
    finished = [p.stat().st_mtime_ns for p in parts]
    older = {p: p.stat().st_mtime_ns for p in before}
    assert finished and run_inside(OWN, "--quiet", "--replot", output=tmp_path) == (0, "", "")  # what is whole
    assert finished == [p.stat().st_mtime_ns for p in parts]
    assert run_inside(OWN, "--quiet", output=tmp_path) == (0, "", "")  # without --fresh: the new run is continued
    assert not any(p.exists() for p in parts) and all(p.stat().st_mtime_ns > older[p] for p in older)


def test_links_in_the_place_of_results_and_figures_are_replaced(tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    links = [
        tmp_path / folder / "quick" / f"script.{s}"
        for folder, s in [("figures", "pdf"), ("figures", "png"), ("results", "npz")]
    ]
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(treasure)
    assert run_inside(OWN, "--quiet", output=tmp_path) == (0, "", "")
    assert treasure.read_text() == "mine" and not any(link.is_symlink() for link in links)


@pytest.mark.parametrize("options", [(), ("--replot",), ("--fresh",)])
def test_a_second_run_of_the_same_experiment_says_so(results, tmp_path, options):
    before = {p: p.read_bytes() for p in results.iterdir()}
    with files.lock(results / "script.lock", ""):
        status, _, error = run_inside(OWN, *options, output=tmp_path)
    assert status == 2 and "is running already" in error and len(error.splitlines()) == 1
    assert before == {p: p.read_bytes() for p in results.iterdir()}


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    assert run_inside(OWN, "--replot", output=tmp_path / "typo")[0] == 2
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("key", ["metrics", "device"])
def test_results_that_lack_something_are_one_line(results, tmp_path, key):
    path = results / "script.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: {}}))
    status, _, error = run_inside(OWN, "--replot", output=tmp_path)
    assert status == 2 and "script.json" in error and "--fresh" in error and len(error.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_every_symbol_can_be_printed_in_every_encoding(encoding):
    sources = [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]
    symbols = {symbol for path in sources for symbol in path.read_text(encoding="utf-8")}
    text = terminal.plain("".join(sorted(symbols)), encoding)
    assert "?" not in text.replace("?", "", 1)
    if encoding == "ascii":
        assert terminal.plain("φ ψ κ ± × ≤ Σ ‖g‖²") == "phi psi kappa +/- x <= Sigma ||g||^2"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_scripts_print_where_stdout_is_not_utf8(finished, encoding):
    status, out, err = run_inside(OWN, output=finished, encoding=encoding)
    assert status == 0 and err == "" and ("kappa" in out or "κ" in out), err
    status, out, err = run_inside(OWN, "--seeds", "φ\udcff", output=finished, encoding=encoding)
    assert status == 2 and "is not a positive number" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, "init_directory.py", "report.py"])
def test_help_is_printed_where_stdout_is_ascii(tmp_path, script):
    status, out, err = run_inside(script, "--help", output=tmp_path, encoding="ascii")
    assert status == 0 and "usage" in out and err == ""


def test_a_reader_who_leaves_early_is_no_error():
    code = "from common import cli; cli.guard(lambda: print('a line'))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
    process.stderr.close()
