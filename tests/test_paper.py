"""PAPER.md names what exists and its equations are those that a source confirms."""

import ast
import re
import subprocess
from itertools import pairwise

import pytest
from conftest import ROOT

PAPER = (ROOT / "PAPER.md").read_text(encoding="utf-8")
ROWS = [line for line in PAPER.splitlines() if line.startswith("| ")]
NAMES = [(path, name) for path, _, name in re.findall(r"`([\w./-]+\.py)(::?)([\w.]+)`", PAPER)]
EQUATIONS = {"NeurIPS 2022": {8}, "ICLR 2024": {4, 5, 47, 57, 60}}


def defined(path):
    """Names of the functions and classes of a file, those of methods with their class before them."""
    names, todo = set(), [("", ast.parse((ROOT / path).read_text(encoding="utf-8")))]
    while todo:
        prefix, node = todo.pop()
        for child in getattr(node, "body", []):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                todo.append((f"{prefix}{child.name}.", child))
    return names


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMES}))
def test_every_function_and_test_that_paper_md_names_exists(path):
    assert (ROOT / path).exists(), f"{path} does not exist"
    assert {name for where, name in NAMES if where == path} <= defined(path)


def test_every_row_of_paper_md_names_a_function_and_a_test():
    rows = [row for row in ROWS if not row.startswith("| ---") and not row.endswith("| code | test |")]
    assert len(rows) > 30
    for row in rows:
        *_, code, test = row.strip("| ").split(" | ")
        assert re.search(r"`[\w./-]+\.py:\w+", code) and re.search(r"`tests/[\w./-]+\.py::test_\w+`", test), row


@pytest.mark.parametrize(
    "searched, found",
    [
        ("Eq. 4", "teleport.py:sharpness"),
        ("Eq. 5", "teleport.py:curvature"),
        ("Eq. 8", "teleport.py:postactivation_action"),
        ("Theorem 3.1", "teleport.py:squared_gradient_norm"),
        ("Figure 4", "teleport_sharpness_curvature.py:Settings"),
    ],
)
def test_the_first_hit_of_a_search_names_the_function(searched, found):
    """`git grep` lists PAPER.md before the code."""
    hits = subprocess.run(["git", "grep", "-hF", searched], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"`{found}`" in hits.splitlines()[0]


def test_equations_of_a_paper_come_in_order():
    for paper in EQUATIONS:
        section = PAPER.split(f"## {paper}\n")[1].split("\n## ")[0]
        rows = [int(n) for n in re.findall(r"^\| Eq\. (\d+) \|", section, flags=re.M)]
        assert set(rows) == EQUATIONS[paper] and all(a < b for a, b in pairwise(rows))
