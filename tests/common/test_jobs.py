"""Processes that share the parts of an experiment: the same bits, whatever ends one of them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside

from common import Failure, UserError, jobs, run

OWN = "tests/common/script.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@dataclass(frozen=True)
class Settings:
    steps: int = 1


@pytest.fixture(autouse=True)
def one_thread():
    """A process with more cannot be forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_run(tmp_path):
    def make(processes):
        made = run.Run("experiment", Settings(), torch.device("cpu"), tmp_path, quiet=True, jobs=processes)
        made.open_parts()
        return made

    return make


@pytest.fixture
def two_threads(one_thread):
    """What torch takes by itself on a machine with two cores."""
    torch.set_num_threads(2)


def in_a_fork():
    return multiprocessing.parent_process() is not None


def train(seed):
    """Backward passes, which forks of a process that has done some must be able to do."""
    weights = torch.rand(20, 20, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    for _ in range(5):
        weights.tanh().matmul(weights).square().sum().backward()
    return {"gradient": weights.grad, "forked": float(in_a_fork())}


def test_parts_are_the_same_bits_in_any_number_of_processes(make_run):
    keys = {f"seed{i}": i for i in range(5)}
    alone, _ = make_run(1).parts(train, keys)
    make_run(1).close_parts()
    shared = make_run(3)
    parts, seconds = shared.parts(train, keys)
    assert list(parts) == list(keys) == list(seconds) and shared.processes == 3
    for key in keys:
        np.testing.assert_array_equal(parts[key]["gradient"], alone[key]["gradient"])
        assert parts[key]["forked"] and not alone[key]["forked"]


def test_with_more_threads_than_one_nothing_is_forked(make_run, two_threads):
    """A fork would wait for threads that it does not have."""
    parts, _ = make_run(2).parts(train, {"a": 0, "b": 1})
    assert not parts["a"]["forked"] and not parts["b"]["forked"]


def test_a_killed_process_is_one_line_and_the_next_run_goes_on(make_run):
    def killed(seed):
        if seed == 1 and in_a_fork():
            os.kill(os.getpid(), signal.SIGKILL)
        return train(seed)

    keys = {f"seed{i}": i for i in range(3)}
    with pytest.raises(Failure, match="run the same command again"):
        make_run(2).parts(killed, keys)
    parts, _ = make_run(2).parts(train, keys)
    for key, seed in keys.items():
        np.testing.assert_array_equal(parts[key]["gradient"], train(seed)["gradient"])


@pytest.mark.parametrize("error", [UserError("no such data"), OSError(28, "No space left"), ValueError("a bug")])
def test_an_error_of_one_process_ends_all_of_them_as_itself(make_run, error):
    def fail(seed):
        if seed == 1:
            raise error
        time.sleep(100 if in_a_fork() else 0)

    start = time.time()
    with pytest.raises(type(error), match=str(error.args[-1])):
        make_run(2).parts(fail, {"a": 0, "b": 1})
    assert time.time() - start < 50


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """SIGKILL cannot be caught: its children must notice."""
    code = (
        "import os, time, torch\nfrom common import jobs\ntorch.set_num_threads(1)\n"
        "def work(key):\n    os.write(1, b'%d\\n' % os.getpid())  # at once: print may not\n    time.sleep(100)\n"
        "list(jobs.each(work, ['a', 'b'], 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = [int(process.stdout.readline()) for _ in range(2)]
    assert process.pid not in children
    process.kill()
    assert process.stdout.read() == ""  # at its end when the last of them has closed it
    process.stdout.close()
    process.wait()


def test_a_script_is_the_same_with_processes_threads_and_surroundings(tmp_path):
    """--jobs, the environment's default dtype and device: none of them is seen in the arrays."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        for n in ("1", "2"):
            assert run_inside(OWN, "--quiet", "--jobs", n, output=tmp_path / n) == (0, "", "")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert run_inside(OWN, "--quiet", "--jobs", "1", output=tmp_path / "plain") == (0, "", "")
    folders = [tmp_path / name / "results" / "quick" for name in ("1", "2", "plain")]
    assert len({(folder / "script.npz").read_bytes() for folder in folders}) == 1
    assert [json.loads((f / "script.json").read_text())["jobs"] for f in folders] == [1, 2, 1]


@pytest.mark.parametrize("environment, options, expected", [(None, (), 1), ("2", (), 2), ("2", ("--threads", "3"), 3)])
def test_one_thread_unless_told_otherwise(tmp_path, monkeypatch, two_threads, environment, options, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert run_inside(OWN, "--quiet", *options, output=tmp_path) == (0, "", "")
    assert json.loads((tmp_path / "results" / "quick" / "script.json").read_text())["threads"] == expected


def test_threads_and_processes_exclude_each_other(tmp_path, two_threads):
    status, _, error = run_inside(OWN, "--jobs", "2", "--threads", "2", output=tmp_path)
    assert status == 2 and "--jobs needs --threads 1" in error and jobs.cores() == 1
