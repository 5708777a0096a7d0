"""PAPER.md names what exists, every equation that the code cites has its row, and no reference is a wrong one."""

import ast
import io
import re
import subprocess
import tokenize
from functools import cache
from itertools import pairwise

import pytest
from conftest import ROOT

PAPER = (ROOT / "PAPER.md").read_text(encoding="utf-8")
ROWS = [line for line in PAPER.splitlines() if line.startswith("| ")]
NAMES = [(path, name) for path, _, name in re.findall(r"`([\w./-]+\.py)(::?)([\w.]+)`", PAPER)]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split()
CODE = [path for path in TRACKED if path.endswith(".py") and not path.startswith("tests/") and (ROOT / path).exists()]
EQUATION = re.compile(r"\bEqs?\. ((?:\d+(?:, | and )?)+)")
# Confirmed by the authors' code or in public; see PAPER.md.
EQUATIONS = {"NeurIPS 2022": {8}, "ICLR 2024": {4, 5, 47, 57, 60}}
CURVATURES = {"curvature", "_curve_derivatives", "curve_curvature"}
SECTIONS = {"3", "4", "5.1", "5.2"}


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def defined(path):
    """Names of the functions and classes of a file, those of methods with their class before them."""
    names, todo = set(), [("", tree(path))]
    while todo:
        prefix, node = todo.pop()
        for child in getattr(node, "body", []):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                todo.append((f"{prefix}{child.name}.", child))
    return names


def texts(path):
    """(line, text) of every string and every block of comments of a file."""
    found, block = [], []
    tokens = tokenize.generate_tokens(io.StringIO((ROOT / path).read_text(encoding="utf-8")).readline)
    for token in tokens:
        if token.type == tokenize.COMMENT:
            block.append(token)
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and block:
            found.append((block[0].start[0], " ".join(t.string.lstrip("# ") for t in block)))
            block = []
        if token.type == tokenize.STRING:
            found.append((token.start[0], " ".join(token.string.split())))
    return found


def numbers(text):
    return {int(n) for match in EQUATION.findall(text) for n in re.findall(r"\d+", match)}


def within(path, line):
    """{name: docstring} of the functions and classes that the line stands in, and of the file, ""."""
    nodes = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    found = {"": ast.get_docstring(tree(path))}
    found |= {n.name: ast.get_docstring(n) for n in nodes if n.lineno <= line <= n.end_lineno}
    return {name: " ".join((text or "").split()) for name, text in found.items()}


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


@pytest.mark.parametrize("path", CODE)
def test_every_equation_cited_has_its_row_and_names_its_paper(path):
    """The paper's name stands in the same docstring or comment, or in a docstring around it."""
    for line, text in texts(path):
        for n in numbers(text):
            papers = [paper for paper, known in EQUATIONS.items() if n in known]
            assert papers, f"{path}:{line}: Eq. {n} is not known"
            around = [text, *within(path, line).values()]
            named = next((said for said in around if any(paper in said for paper in EQUATIONS)), "")
            assert papers[0] in named, f"{path}:{line}: Eq. {n} is of {papers[0]}, which is not named"
            assert any(row.startswith(f"| Eq. {n} |") for row in ROWS), f"PAPER.md has no row for Eq. {n}"


@pytest.mark.parametrize("path", CODE)
def test_no_reference_is_one_of_the_wrong_ones(path):
    for line, text in texts(path):
        where = f"{path}:{line}"
        if numbers(text) & {47, 57, 60}:
            assert set(within(path, line)) & CURVATURES, f"{where}: of the curvature, not the action"
        for section in re.findall(r"\bSections? (\d+(?:\.\d+)*)", text):
            assert section in SECTIONS, f"{where}: no source confirms Section {section}"
        if "Section 5.2" in text or "Algorithm 1" in text:
            assert path.startswith("learn-to-teleport/"), f"{where}: that is learning to teleport"
        assert not re.search(r"\bAlgorithm [^1\W]", text) or path.startswith("learn-to-teleport/"), where


@pytest.mark.parametrize("path", [path for path in TRACKED if path.endswith((".py", ".md")) or path == "Makefile"])
def test_papers_are_named_in_words(path):
    if path == "tests/test_paper.py" or not (ROOT / path).exists():
        return
    text = (ROOT / path).read_text(encoding="utf-8")
    for match in re.finditer(r"\b[Pp]apers? [A-D]\b", text):
        raise AssertionError(f"{path}:{text[: match.start()].count(chr(10)) + 1}: {match[0]}")


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
