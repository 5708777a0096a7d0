"""The Makefile's environment, with pretended Pythons: nothing is installed, all of it in a folder with spaces."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$1 $2" in
  -c*) cat "$here/version" ;;
  "-m venv")
    echo venv >> log; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$here/version" .venv/bin ;;
  "-m pip") echo "pip $*" | sed 's/-m pip install --quiet -r //' >> log; test ! -e offline ;;
  "-m pytest") echo pytest >> log ;;
  *) echo "$1" >> log ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "a clone"
    folder.mkdir()
    for file in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / file, folder)
    for version in ("3.9", "3.11", "3.13", "3.15"):
        python = tmp_path / "all Pythons" / version / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        (python.parent / "version").write_text(f"{version}\n")
    return folder


def make(clone, target, version):
    """Return (exit status, what was done, stderr) of `make target` where `python` is of this version."""
    (clone / "log").unlink(missing_ok=True)
    path = f"{clone.parent / 'all Pythons' / version}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} | {"PATH": path}
    result = subprocess.run(
        ["make", target, "PYTHON=python"], cwd=clone, env=environment, capture_output=True, text=True, timeout=60
    )
    done = (clone / "log").read_text().splitlines() if (clone / "log").exists() else []
    return result.returncode, done, result.stderr


def test_environment_follows_python_and_requirements(clone):
    """Made once, again for another Python; installed again where a requirements file changed, whatever its time."""
    assert make(clone, "test", "3.11") == (0, ["venv", "pip requirements-dev.txt", "pytest"], "")
    assert make(clone, "test", "3.11") == (0, ["pytest"], "")
    assert make(clone, "benchmark", "3.11") == (0, ["benchmarks/benchmark.py"], "")
    assert make(clone, "test", "3.13") == (0, ["venv", "pip requirements-dev.txt", "pytest"], "")
    assert (clone / ".venv" / "bin" / "version").read_text() == "3.13\n"
    for file in ("requirements.txt", "requirements-dev.txt"):
        with open(clone / file, "a") as requirements:
            requirements.write("another\n")
        os.utime(clone / file, (0, 0))
        assert make(clone, "test", "3.13") == (0, ["pip requirements-dev.txt", "pytest"], "")
        assert make(clone, "test", "3.13") == (0, ["pytest"], "")


def test_smaller_environment_grows(clone):
    assert make(clone, "benchmark", "3.11")[1] == ["venv", "pip requirements.txt", "benchmarks/benchmark.py"]
    assert make(clone, "test", "3.11")[1] == ["pip requirements-dev.txt", "pytest"]
    assert make(clone, "benchmark", "3.11")[1] == ["benchmarks/benchmark.py"]


def test_failed_installation_is_tried_again(clone):
    (clone / "offline").touch()
    status, done, _ = make(clone, "test", "3.11")
    assert status == 2 and done == ["venv", "pip requirements-dev.txt"]
    (clone / "offline").unlink()
    assert make(clone, "test", "3.11")[1] == ["pip requirements-dev.txt", "pytest"]


@pytest.mark.parametrize("version", ["3.9", "3.15"])
def test_unfit_python_is_refused_in_a_line(clone, version):
    status, done, error = make(clone, "test", version)
    assert status == 2 and done == [] and not (clone / ".venv").exists()
    assert f"error: Python 3.10 to 3.14 is needed and python is {version}" in error.splitlines()[0]


def test_foreign_environment_is_not_thrown_away(clone):
    """A .venv of another Python that this Makefile did not make stays; one whose Python is gone is made again."""
    assert make(clone, "test", "3.11")[0] == 0
    (clone / ".venv" / "requirements.txt").unlink()
    status, done, error = make(clone, "test", "3.13")
    assert status == 2 and done == [] and "remove it, or make PYTHON=python3.11" in error.splitlines()[0]
    (clone / ".venv" / "bin" / "python").unlink()
    assert make(clone, "test", "3.13") == (0, ["venv", "pip requirements-dev.txt", "pytest"], "")
