"""Write REPRODUCTION.md, and the README's table and findings, from results/ alone.

    python report.py            # write both
    python report.py --check    # exit with 1 if they are not what results/ says
    python report.py --estimate # how long the committed results took
    python report.py --root DIR # your own: DIR/REPRODUCTION.md from DIR/results/

A section for each script that states a CLAIM, in the order of the claims: the paper's claim; did it come out again (the
published numbers beside ours); does it survive its controls (one verdict, computed by the rule stated with it); the
pictures, the script's own closing table, the settings.
"""

import argparse
import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from common import ROOT, UserError, cli, files, run
from common.claims import QUESTIONS, WITHOUT_A_FIGURE, Claim, duration, markdown, sentence_case
from common.data import LABELS


class Result(NamedTuple):
    """One results file and what belongs to it."""

    name: str
    path: Path
    record: dict
    outcome: run.Outcome
    table: str

    @property
    def label(self):
        return (self.outcome.label or self.name) + (f", --preset {self.preset}: a first look" if self.preset else "")

    @property
    def preset(self):
        return self.path.parent.name.removeprefix("results")  # none: the paper's size


class Section(NamedTuple):
    """A script that states a CLAIM."""

    script: str  # its path in the repository
    claim: Claim
    module: dict  # its globals

    def judge(self, results):
        with files.whole(*(r.path for r in results)):
            return self.module["judge"](*(r.outcome for r in results))


def sections():
    """Every script with a CLAIM, in the order of the claims."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*-*/*.py")]:
        if "\nCLAIM = " in path.read_text(encoding="utf-8"):
            sys.path.insert(0, str(path.parent))  # as Python does for the script it runs
            try:
                module = runpy.run_path(str(path), run_name="report")
            finally:
                sys.path.pop(0)
            found.append(Section(path.relative_to(ROOT).as_posix(), module["CLAIM"], module))
    return sorted(found, key=lambda section: section.claim.order)


def load(section, root=ROOT):
    """The section's results, datasets in the order MNIST, Fashion-MNIST, CIFAR-10; until the paper's size has been run
    those of the preset that the script calls SHOWN, if it does."""
    stem, kind = section.module.get("NAME", Path(section.script).stem), type(section.module["PRESETS"]["paper"])
    names = [stem, *(f"{stem}_{dataset}" for dataset in LABELS)]
    folders = [root / "results", root / "results" / section.module.get("SHOWN", "")]
    paths = [[path for name in names if (path := folder / f"{name}.json").exists()] for folder in folders]
    results = []
    for path in paths[0] or paths[1]:
        with files.whole(path):
            record, outcome = run.read(path)
            saved = record["configuration"]["settings"]
            settings = kind(**{f.name: _tuples(saved[f.name]) for f in fields(kind) if f.name in saved})
            outcome = outcome._replace(settings=settings)
            results.append(Result(path.stem, path, record, outcome, section.module["report"](outcome, settings)))
    return results


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------------- writing


def believe(judged):
    """The findings, a line each: the verdict, the claim, the numbers, the evidence."""
    return [
        f"- *{section.claim.says}* **{sentence_case(judgement)}.** {judgement.sentence} "
        f"[{section.claim.figure}](#{anchor(section)})"
        for section, _, judgement in judged
        if section.claim.headline and judgement
    ]


INTRODUCTION = """\
# Reproduction

Written by `python report.py` from `results/` alone; `python -m pytest tests/test_report.py` fails if the two disagree.
Differences are paired by seed. *Better*, *worse*: the paired test, after Holm's correction where a rule makes several
comparisons. *Equivalent*: the 90 % interval lies inside the margin. *Undecided*: neither; then the smallest effect that
would have shown (80 % power) stands beside. Intervals: 95 %, over initializations; all runs of a figure see one order
of the data unless it says otherwise.
"""


def reproduction(judged, root=ROOT):
    """REPRODUCTION.md: what stands in front, then a section for each figure with its two questions."""
    lines = [*INTRODUCTION.splitlines(), "", *front(judged)]
    for section, results, judgement in judged:
        claim = section.claim
        lines += [f"## {title(section)}", "", f"{claim.source} ({claim.paper}): {claim.says}", ""]
        if not results:
            lines += [not_yet_run(section), ""]
            continue
        lines += [f"**Did it come out again?** {sentence_case(judgement.again())}.", "", *judgement.comparison()]
        lines += [f"**Does it survive its controls?** {sentence_case(judgement)}. {judgement.sentence}", ""]
        lines += [f"*Rule ({claim.dated}): {claim.rule}*", ""]
        lines += [*(f"- {line}" for line in judgement.details), *([""] if judgement.details else [])]
        for result in results:
            with files.whole(result.path):
                lines += describe(result, root)
    return "\n".join([*lines, "## Recorded numbers without a figure", "", WITHOUT_A_FIGURE]) + "\n"


def front(judged):
    """What to believe, what surprised, and the reviewers' questions."""
    verdicts = [(verdict, f"[{section.claim.figure}](#{anchor(section)})") for section, _, verdict in judged if verdict]
    lines = ["## What to believe", "", *believe(judged), "", f"All results below took {total(records_of(judged))}.", ""]
    lines += [
        "## Surprises",
        "",
        *(f"- {verdict.surprise} {link}" for verdict, link in verdicts if verdict.surprise),
        "",
    ]
    lines += ["## Four questions of the reviewers", "", "Asked in the public reviews of ICLR 2024.", ""]
    for key, question in QUESTIONS.items():
        said = [f"{verdict.answers[key]} {link}" for verdict, link in verdicts if key in verdict.answers]
        lines.append(f"- **{question}** {' '.join(said) or 'Not answered by these results.'}")
    return [*lines, ""]


def not_yet_run(section):
    return f"Not yet run at paper size: `python {section.script} --preset paper`."


def records_of(judged):
    return [r.record for _, results, _ in judged for r in results]


def total(records):
    """Computing time, machine and memory of all results."""
    machines = " / ".join(sorted({record["device"] for record in records}))
    memory = [record["peak_memory_bytes"] for record in records if record.get("peak_memory_bytes")]
    where = "" if len(memory) == len(records) else f" (of {len(memory)} of {len(records)} results)"
    return (
        f"{duration(sum(record['elapsed_seconds'] * processes(record) for record in records))} of computing on "
        f"{machines}" + (f", at most {max(memory) / 2**30:.1f} GiB of memory{where}" if memory else "")
    )


def processes(record):
    """How many shared the work, on one machine (jobs) or several (ranks)."""
    return record.get("ranks", 1) * record.get("jobs", 1)


def title(section):
    return f"{section.claim.figure}: {section.script}"


def anchor(section):
    kept = re.sub(r"[^\w\- ]", "", title(section).lower())
    return kept.replace(" ", "-")


def describe(result, root):
    record = result.record
    settings = {k: v for k, v in record["configuration"]["settings"].items() if k != "dataset"}
    pictures = sorted((root / "figures" / result.preset).glob(f"{result.name}*.png"))
    hashes = record["dataset"]["sha256"]
    share = f"{processes(record)} processes of " if processes(record) > 1 else ""
    where = f"{record['device']}, {share}{record['threads']} thread(s), torch {record['versions']['torch']}"
    return [
        f"### {result.label}",
        "",
        *(f"![{p.stem}]({p.relative_to(root).as_posix()})" for p in pictures if mine(p, result)),
        "",
        "```text",
        result.table.rstrip(),
        "```",
        "",
        f"{duration(record['elapsed_seconds'])} on {where}. Numbers: "
        f"[{result.name}.json]({result.path.relative_to(root).as_posix()}).",
        "",
        "<details><summary>Settings and data</summary>",
        "",
        "; ".join(f"{k} = {json.dumps(v)}" for k, v in settings.items()),
        "",
        *(f"- `{file}` SHA-256 `{digest}`" for file, digest in sorted(hashes.items())),
        "",
        "</details>",
        "",
    ]


def mine(picture, result):
    """Is this picture result's own, and not that of a longer-named result (…_MNIST, …_radial)?"""
    others = [p.stem for p in result.path.parent.glob("*.json") if len(p.stem) > len(result.name)]
    return not any(picture.stem == o or picture.stem.startswith(o + "_") for o in others)


def readme(judged):
    """README.md with its two tables: the headlines, and what every figure takes."""
    findings, figures, link = [], [], "[{}](REPRODUCTION.md#{})".format
    for section, results, judgement in judged:
        claim, place = section.claim, anchor(section)
        if claim.headline and judgement:
            word = judgement.word + (" (first look)" if results[0].preset else "")
            findings.append((sentence_case(claim.short), link(word, place), judgement.number))
        seconds = sum(r.record["elapsed_seconds"] for r in results)
        command = f"`{section.script}{' --dataset all' if len(results) > 1 else ''}`"
        time = duration(seconds) if results and not results[0].preset else "not yet run"
        figures.append((link(claim.figure, place), command, time))
    tables = {
        "findings": markdown(("claim", "verdict", "what decides"), findings),
        "figures": [
            # Without the outer bars, which Markdown does not need and a count of words does.
            *(line.strip("| ") for line in markdown(("figure", "`python … --preset paper`", "time"), figures)),
            "",
            f"All of it: {total(records_of(judged))}.",
        ],
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for key, lines in tables.items():
        if f"<!-- begin: {key} -->" not in text or f"<!-- end: {key} -->" not in text:
            raise UserError(f"README.md has lost its marker <!-- begin: {key} --> or its end")
        text = re.sub(
            rf"(<!-- begin: {key} -->\n).*?(<!-- end: {key} -->)",
            lambda match, lines=lines: match[1] + "\n".join(lines) + "\n" + match[2],
            text,
            flags=re.S,
        )
    return text


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 and say what is out of date")
    parser.add_argument("--estimate", action="store_true", help="print how long the committed results took, and stop")
    parser.add_argument("--root", type=Path, default=ROOT, help="report on the results in this folder instead")
    options = parser.parse_args()
    if options.estimate:
        records = [files.read_json(path) for path in (ROOT / "results").glob("*.json")]
        print(f"The {len(records)} committed results took {total(records)}.")
        return
    try:
        problems, documents = compose(options.root)
    except UserError as error:
        if not options.check:
            raise
        problems, documents = [str(error)], {}
    for name, text in documents.items():
        path = options.root / name
        if not options.check:
            files.write_text(path, text)
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            problems.append(f"{name} is not what results/ says: run python report.py")
    if options.check and problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


def compose(root):
    """A line for each script whose results are gone that REPRODUCTION.md speaks of, and {document's name: text}."""
    found = [(section, load(section, root)) for section in sections()]
    if not any(results for _, results in found):
        sys.exit(f"error: no results of the paper preset in {files.relative(root / 'results')}")
    judged = [(section, results, section.judge(results) if results else None) for section, results in found]
    documents = {"REPRODUCTION.md": reproduction(judged, root)}
    missing = []
    if root.resolve() == ROOT:
        documents["README.md"] = readme(judged)
        path = root / "REPRODUCTION.md"
        known = path.read_text(encoding="utf-8") if path.exists() else ""
        missing = [s.script for s, results, _ in judged if not results and not_yet_run(s) not in known]
    return [f"the results of {script} are missing: run it with --preset paper" for script in missing], documents


if __name__ == "__main__":
    cli.guard(main)
