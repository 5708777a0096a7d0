"""Shared by the tests: golden numbers, and every script run once at --preset tiny."""

import fcntl
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import second_device
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The scripts that make figures: those that call the shared command line.
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "*-*/*.py")
    for path in ROOT.glob(pattern)
    if "cli.main(" in path.read_text()
)


LEFT_OPEN = ExitStack()  # to the end of a process
LEFT_OUT_THERE = {
    "gradient-flow-symmetry/Q_hessian_eigenvalues.py",  # what watches its transforms changes how they round
    "symmetry-teleportation/mnist_classification.py",
    "symmetry-teleportation/random_search.py",
    "teleport_sharpness_curvature.py",
}


class TinyRun(NamedTuple):
    script: str
    folder: Path  # what --output named: holds figures/tiny and results/tiny
    stdout: str
    records: dict  # name -> parsed JSON
    arrays: dict  # name -> {array name: array}


def run_inside(script, *options, output, data_dir=None, encoding="utf-8"):
    """Run a script to its end within this process, without the seconds that importing torch takes; return (exit status,
    stdout, stderr)."""
    arguments = [script, "--output", str(output), *options, *(["--data-dir", str(data_dir)] if data_dir else [])]
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    path = list(sys.path)
    status = 0
    sys.path.insert(0, str((ROOT / script).parent))  # as `python SCRIPT` does
    try:
        with mock.patch.object(sys, "argv", arguments), redirect_stdout(stdout), redirect_stderr(stderr):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.path[:] = path
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in (stdout, stderr))


def read_results(folder):
    records = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    arrays = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            arrays[path.stem] = dict(archive)
    return records, arrays


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(script) -> (run from the root, run from the script's own folder), both at --preset tiny, cached.

    Workers of pytest-xdist share the runs: they lie in one folder, and a lock lets one worker make them.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "tiny"
    cache = {}

    def run(script):
        if script not in cache:
            folder = shared / script.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (folder / "done").exists():
                    run_tiny(script, folder)
                    (folder / "done").touch()
            cache[script] = tuple(
                TinyRun(script, f, (f / "stdout").read_text(), *read_results(f / "results" / "tiny"))
                for f in (folder / "root", folder / "own")
            )
        return cache[script]

    return run


def run_tiny(script, folder):
    """The script at --preset tiny into folder/root and folder/own: from the root as a user would, and from its own
    folder on the second device (second_device.py), but for a few of which that takes long."""
    command = [sys.executable, script, "--preset", "tiny", "--output", str(folder / "root")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two run at once
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child = start_in_own_folder(script, folder / "own", None if script in LEFT_OUT_THERE else move_to_the_second_device)
    stdout, stderr = process.communicate(timeout=240)
    child.join(timeout=240)
    assert process.returncode == 0, f"{script}:\n{stdout}\n{stderr}"
    (folder / "root" / "stdout").write_text(stdout)
    assert child.exitcode == 0, f"{script} from its own folder:\n{(folder / 'own' / 'stdout').read_text()}"


def start_in_own_folder(script, output, prepare=None):
    """Start what `python SCRIPT --preset tiny` does in the script's folder, without the seconds that importing torch
    takes and those that drawing does. prepare: called before the script is."""
    import torch._dynamo  # noqa: F401  torch.func and torch.optim do it when first used: a second, once for all forks

    child = multiprocessing.get_context("fork").Process(target=_run_in_own_folder, args=(script, output, prepare))
    child.start()
    return child


def move_to_the_second_device():
    """For `prepare`: a GPU is found, which this machine does not have."""
    sys.path.insert(0, str(ROOT))
    from common import cli

    cli._device = lambda name: second_device.DEVICE
    LEFT_OPEN.enter_context(second_device.second_device())


def die_after(owner, function, times):
    """For `prepare`: the last thing that the process does is this function's return, when it was called so often.
    owner: where it is looked up, as in "common.run" or "common.run:Run"."""
    sys.path.insert(0, str(ROOT))
    place, calls = pkgutil.resolve_name(owner), []
    original = getattr(place, function)

    def last(*arguments, **options):
        original(*arguments, **options)
        calls.append(arguments)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, function, last)


def _run_in_own_folder(script, output, prepare):
    """In a process that has torch, but nothing of the project."""
    output.mkdir(exist_ok=True)
    with open(output / "stdout", "w", encoding="utf-8") as stdout:
        sys.stdout = sys.stderr = stdout
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None) or ""
            if path.startswith(f"{ROOT}{os.sep}") and ".venv" not in path:
                del sys.modules[name]
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
        os.chdir((ROOT / script).parent)
        sys.path.insert(0, os.getcwd())
        sys.argv = [Path(script).name, "--preset", "tiny", "--jobs", "1", "--output", str(output)]
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        Figure.savefig = lambda self, buffer, **options: buffer.write(b"not drawn")
        try:
            if prepare:
                prepare()
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:
            traceback.print_exc(file=stdout)
            raise


@pytest.fixture(autouse=True)
def seed():
    """Every test draws from the same stream, whatever ran before it."""
    set_seed(0)


def set_seed(number):
    """torch.manual_seed, for the CPU alone: for every other kind of device that keeps a traceback, a millisecond."""
    torch.default_generator.manual_seed(number)


@pytest.fixture(scope="session")
def golden():
    """golden("actions") -> dict of float64 tensors (and int64 labels) from tests/golden/actions.npz."""

    def load(name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz", allow_pickle=False) as archive:
            return {k: torch.from_numpy(np.asarray(v)) for k, v in archive.items()}

    return load


def load_script(script):
    """The script as a module under a name of its own: two folders have a multi_layer_regression.py."""
    name = script.removesuffix(".py").replace("/", "_").replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    with mock.patch.object(sys, "path", [str((ROOT / script).parent), *sys.path]):  # as `python SCRIPT` does
        spec.loader.exec_module(module)
    return module


def close(a, b, tolerance=1e-9):
    """Equal to tolerance, relative and absolute."""
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


def normal(seed, *shape):
    """Normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
