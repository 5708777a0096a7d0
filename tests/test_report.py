"""REPRODUCTION.md and the README say what results/ says, and name nothing that does not exist."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

import report
from common.claims import Published

SECTIONS = report.sections()


def test_reproduction_and_readme_are_what_results_say():
    check = subprocess.run([sys.executable, "report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def leaves(value, path=()):
    """Paths to all the numbers in nested dicts and lists."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return [path] if isinstance(value, int | float) else []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.script)
def test_a_missing_number_never_stops_the_report(section):
    """null in a results file: a run that diverged, the interval of one seed."""
    results = report.load(section)
    if not results:
        pytest.skip("not run at paper size yet")
    for r in [r.outcome for r in results]:
        paths = leaves(r.metrics)
        for path in paths[:: max(1, len(paths) // 100)]:
            *outer, last = path
            place = r.metrics
            for key in outer:
                place = place[key]
            kept, place[last] = place[last], float("nan")
            assert section.judge(results).word, path
            place[last] = kept


def test_a_first_look_stands_in_until_the_paper_s_size_has_been_run(tmp_path):
    section = next(s for s in SECTIONS if s.module.get("SHOWN"))
    (result,) = report.load(section)
    assert result.preset == "quick" and "a first look" in result.label
    (tmp_path / "results").mkdir()
    for suffix in ("json", "npz"):
        shutil.copy(result.path.with_suffix(f".{suffix}"), tmp_path / "results")
    (result,) = report.load(section, tmp_path)
    assert not result.preset and "a first look" not in result.label


def test_a_report_on_results_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="no results of the paper preset"):  # the line that Python prints for status 1
        report.main()
    for folder, names in (("results", ("booth.json", "booth.npz")), ("figures", ("booth_convergence.png",))):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(ROOT / folder / name, tmp_path / folder)
    before = (ROOT / "README.md").read_text()
    command = [sys.executable, "report.py", "--root", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).returncode == 0
    text = (tmp_path / "REPRODUCTION.md").read_text()
    assert "## Booth" in text and "![booth_convergence](figures/booth_convergence.png)" in text
    assert text.count("Not yet run") == len(SECTIONS) - 1
    assert (ROOT / "README.md").read_text() == before


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """A small repository whose documents are up to date, and report.py --check in it: its complaints, a line each."""
    small = [s for s in SECTIONS if s.script.endswith(("booth.py", "rosenbrock.py"))]
    monkeypatch.setattr(report, "sections", lambda: small)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    for name in ("booth", "rosenbrock"):
        for suffix in ("json", "npz"):
            shutil.copy(ROOT / "results" / f"{name}.{suffix}", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        try:
            report.main()
        except SystemExit as stop:
            return str(stop.code).splitlines()  # printed by Python, with exit status 1
        return []

    assert run() == run("--check") == []
    return tmp_path, lambda: run("--check")


def test_check_complains_about_any_difference(check):
    root, complaints = check
    for document, generated in (("README.md", "All of it:"), ("REPRODUCTION.md", "All results below")):
        text = (root / document).read_text(encoding="utf-8")
        (root / document).write_text(text.replace(generated, "All"), encoding="utf-8")
    assert [line.split()[1] for line in complaints()] == ["REPRODUCTION.md", "README.md"]
    (root / "REPRODUCTION.md").unlink()
    assert len(complaints()) == 2


@pytest.mark.parametrize("key", ["findings", "figures"])
@pytest.mark.parametrize("end", ["begin", "end"])
def test_check_complains_about_a_missing_marker(check, key, end):
    root, complaints = check
    text = (root / "README.md").read_text(encoding="utf-8")
    (root / "README.md").write_text(text.replace(f"<!-- {end}: {key} -->", ""), encoding="utf-8")
    (line,) = complaints()
    assert "README.md" in line and f"begin: {key}" in line


def test_check_complains_about_missing_and_damaged_results(check):
    root, complaints = check
    kept = (root / "results" / "booth.npz").read_bytes()
    (root / "results" / "booth.npz").write_bytes(kept[:100])
    (line,) = complaints()
    assert "booth.npz" in line
    (root / "results" / "booth.npz").write_bytes(kept)
    json_path = root / "results" / "booth.json"
    json_path.write_text(json_path.read_text(encoding="utf-8").replace('"metrics": {', '"metrics": {}, "old": {'))
    (line,) = complaints()
    assert "booth.json" in line
    json_path.unlink()
    assert "booth.py" in complaints()[0] and len(complaints()) == 3  # and neither document says so


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


def test_the_readme_s_examples_run_and_are_short():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert [len([line for line in example.splitlines() if line]) for example in examples] == [9, 8]
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    findings = re.search(r"begin: findings -->\n(.*?)<!--", text, flags=re.S)[1].splitlines()[2:]
    for row in findings:
        assert len(re.sub(r"\(\S*\)", "", row).replace("|", "").split()) <= 20, row
    headlines = [s for s in SECTIONS if s.claim.headline and report.load(s)]
    assert [s.claim.figure for s in headlines if f"#{report.anchor(s)})" not in "".join(findings)] == []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.script)
def test_a_rule_changes_with_its_date_alone(section):
    """tests/golden/rules.json: every rule that a script has had, [date, SHA-256 of its text], the newest last."""
    history = json.loads((ROOT / "tests" / "golden" / "rules.json").read_text()).get(section.script, [])
    now = [section.claim.dated, hashlib.sha256(section.claim.rule.encode()).hexdigest()]
    assert history and history[-1] == now, f"add {json.dumps(now)} to tests/golden/rules.json: the rule is new"
    dates = [date for date, _ in history]
    assert dates == sorted(set(dates)), "a rule that changes has a new date"


def test_the_surprises_are_ten_at_most():
    text = (ROOT / "REPRODUCTION.md").read_text().partition("## Surprises\n")[2].partition("\n## ")[0]
    assert 1 <= len(text.strip().splitlines()) <= 10


def test_published_numbers_stand_beside_ours(tmp_path):
    section = next(s for s in SECTIONS if s.script == "displacement_integration.py")
    results = report.load(section)
    row = Published("mean | distance", 0.75, 0.5, "its code", "no drift", agrees=False)
    verdict = section.judge(results)._replace(published=[row], surprise="It turns.", answers={"cost": "Nothing."})
    text = report.reproduction([(section, results, verdict)])
    assert "**Did it come out again?** Not reproduced." in text
    assert "| mean \\| distance | 0.75 | 0.5 | no drift | its code |" in text
    assert "**What does one teleport cost?** Nothing. [Figure 7](#" in text and "- It turns. [Figure 7](#" in text
    text = report.reproduction([(section, results, verdict._replace(published=[]))])
    assert "**Did it come out again?** No published number at hand." in text


# Printed or recorded by the authors' code: the regression's teleports, Figure 5 (at three rates), Figure 6, attacks
# (accuracies of the network and the ensemble), the sampling variant.
RECORDED = """
595.7 364.9 685.5 90.6 614.2 334.6 576.0 347.3 575.1 51.9 0.644 0.678
0.3009 0.2755 0.2800 0.2950 0.2769 0.4113 0.3835 0.4028 0.3784 0.343 0.251 0.214 0.367 0.256 0.216 0.209 0.210
0.469 0.329 0.239 0.496 0.249 0.231 0.230
477558 68205 38221 2499 48.8 416 111 40.5 20.0 10024 5372 5530 12128 78571 4162 38075 125071 0.012 0.070 0.176 0.147
59.8 21.0 13.3 6.6 2.8 53.8 22.3 15.8 10.9 8.3 57.6 0.6 46.0 3.8 0.2 2.6
0.3473 0.3554 0.3775 0.3937 0.4025 0.5109 0.5162 0.5211 0.5254 0.5291 0.5323 0.5403 0.5391 0.1166
"""


@pytest.mark.parametrize("number", RECORDED.split())
def test_every_published_number_is_shown_or_listed_as_not_comparable(number):
    text = (ROOT / "REPRODUCTION.md").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if line.startswith(("| ", "- ", "  ")))
    forms = {number, f"{float(number):.4g}"}
    assert any(re.search(rf"(?<![\d.]){re.escape(form)}(?![\d])", text) for form in forms)


def test_no_results_file_is_large_or_names_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        text = path.read_text()
        assert not re.search(r'"/|/home/|/root|/tmp/|/work/', text), path
    for folder, most in (("results", 60 * 2**20), ("figures", 20e6)):
        assert sum(p.stat().st_size for p in (ROOT / folder).glob("*.*")) < most


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["figures", "paper"])
def test_make_runs_every_figure_script(target):
    run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [script for script in SCRIPTS if script not in run.stdout] == []
