"""The house: no long file or function, nothing said twice, a name for each thing, each script its claim and judge."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from itertools import combinations

import pytest
from conftest import ROOT, SCRIPTS

PARTS = [p for p in ROOT.glob("*-*/*.py") if p.relative_to(ROOT).as_posix() not in SCRIPTS]  # what scripts share
PACKAGES = [p for folder in ("common", "teleporter") for p in ROOT.glob(f"{folder}/*.py")]
# teleport.py is one file however long.
FILES = sorted([*(ROOT / script for script in SCRIPTS), *PARTS, *PACKAGES, ROOT / "report.py"])
WINDOW = 6  # lines of logic


def name(path):
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def long_files():
    return {name(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 400}


def long_functions():
    paths = [*FILES, ROOT / "teleport.py", *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    return {f"{name(path)}: {node.name}" for path in paths for node in functions(path) if length(node) > 60}


def odd_judges():
    """judge stands in the script, or in the module that scripts share it from."""
    paths = [ROOT / "report.py"]
    judges = {name(p): n for p in FILES if p not in paths for n in functions(p) if n.name == "judge"}
    return {path for path, node in judges.items() if not 8 <= length(node) <= 15}


def logic(function):
    """(statement, lines it takes) of a function in order, a block's head apart from its body; no docstrings."""
    statements = []

    def flatten(body):
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            blocks = [getattr(node, key) for key in ("body", "orelse", "finalbody") if getattr(node, key, None)]
            said = ast.unparse(node)
            last = blocks[0][0].lineno - 1 if blocks else node.end_lineno
            statements.append((said.splitlines()[0] if blocks else said, last - node.lineno + 1))
            for block in blocks:
                flatten(block)

    flatten(function.body)
    return statements


def windows(statements):
    """Every run of statements that takes WINDOW lines or more, and no shorter one inside it from its start."""
    for start in range(len(statements)):
        lines = 0
        for end in range(start, len(statements)):
            lines += statements[end][1]
            if lines >= WINDOW:
                yield tuple(said for said, _ in statements[start : end + 1])
                break


def repetitions():
    places = defaultdict(set)
    for path in [*(ROOT / script for script in SCRIPTS), *PARTS]:
        for function in functions(path):
            for window in windows(logic(function)):
                places[window].add(name(path))
    return {" ~ ".join(pair) for found in places.values() for pair in combinations(sorted(found), 2)}


def shared_names():
    """Classes of one name in two files; every script has its Settings."""
    files = defaultdict(set)
    for path in [*FILES, ROOT / "teleport.py"]:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name != "Settings":
                files[node.name].add(name(path))
    return {f"{each}: {', '.join(sorted(found))}" for each, found in files.items() if len(found) > 1}


@pytest.mark.parametrize("offenders", [long_files, long_functions, odd_judges, repetitions, shared_names])
def test_nobody_offends(offenders):
    assert offenders() == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_states_one_claim(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if "CLAIM" in line]) == 1 and re.search(
        r"^CLAIM = ", text, flags=re.M
    )


def test_the_report_is_short_and_knows_no_script():
    text = (ROOT / "report.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert [script for script in SCRIPTS if script.rpartition("/")[2] in text] == []


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 30


def test_ruff_finds_nothing():
    """Among the rest: docstrings and type hints of all that teleport.py, teleporter/ and common/ define."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert found.returncode == 0, found.stdout + found.stderr
