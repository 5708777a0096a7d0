"""REPRODUCTION.md and the README say what results/ says, and name nothing that does not exist."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS


def test_reproduction_and_readme_are_what_results_say():
    check = subprocess.run([sys.executable, "report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("document", ["README.md", "REPRODUCTION.md"])
def test_every_file_and_anchor_named_exists(document):
    text = (ROOT / document).read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / (path or document)).read_text(), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target
    for command in re.findall(r"python ([\w./-]+\.py)", text):
        assert (ROOT / command).exists(), command


def test_the_readme_example_runs():
    text = (ROOT / "README.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_no_results_file_is_large_or_names_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        text = path.read_text()
        assert not re.search(r'"/|/home/|/root|/tmp/|/work/', text), path
    committed = sum(p.stat().st_size for p in [*(ROOT / "results").glob("*"), *(ROOT / "figures").glob("*")])
    assert committed < 20e6


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["figures", "paper"])
def test_make_runs_every_figure_script(target):
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [script for script in SCRIPTS if script not in run.stdout] == []
