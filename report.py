"""Write REPRODUCTION.md, and the README's table and findings, from results/ alone.

    python report.py            # write both
    python report.py --check    # exit with 1 if they are not what results/ says

A section a figure: the paper's claim, what was run, the script's own closing table, and one verdict computed by the
rule stated with it. Differences are paired by seed; "better" and "worse" mean that their 95 % t interval excludes zero.
"""

import argparse
import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from common import ROOT, cli
from common.data import LABELS
from common.statistics import verdict


class Result(NamedTuple):
    """One results file and what belongs to it."""

    name: str
    record: dict
    outcome: cli.Outcome
    settings: object
    table: str

    @property
    def metrics(self):
        return self.outcome.metrics

    @property
    def label(self):
        return self.outcome.label or self.name


class Section(NamedTuple):
    figure: str
    script: str
    claim: str  # the paper's
    rule: str  # how the verdict is computed
    verdict: object  # function of the list of results -> sentences
    finding: object = None  # the same in one or two, for the README and for "What to believe"
    name: str | None = None  # of the results, if not the script's


def load(section):
    """The section's results, datasets in the order MNIST, Fashion-MNIST, CIFAR-10."""
    script = runpy.run_path(str(ROOT / section.script), run_name="report")
    stem, kind = section.name or Path(section.script).stem, type(script["PRESETS"]["paper"])
    results = []
    for name in [stem, *(f"{stem}_{dataset}" for dataset in LABELS)]:
        path = ROOT / "results" / f"{name}.json"
        if not path.exists():
            continue
        record, outcome = cli.read(path)
        saved = record["configuration"]["settings"]
        settings = kind(**{f.name: _tuples(saved[f.name]) for f in fields(kind) if f.name in saved})
        results.append(Result(name, record, outcome, settings, script["report"](outcome, settings)))
    return results


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------------ verdicts


def optimization(results):
    m, s = results[0].metrics, results[0].settings
    early, last = s.milestones[-2], s.milestones[-1]

    def compare(optimizer, arm, epoch, rate="at_published_rate", key="train_loss"):
        triple = m[optimizer][arm][f"{key}_{epoch}"][rate]
        return f"{interval(triple)} ({verdict(triple)})"

    lines = []
    for optimizer in m:
        lines.append(
            f"{optimizer}, training loss minus baseline's after epoch {early}: "
            f"restart only {compare(optimizer, 'restart', early)}, "
            f"published teleport {compare(optimizer, 'published', early)}, "
            f"teleport with the optimizer's state kept {compare(optimizer, 'teleport', early)}, "
            f"rescaling {compare(optimizer, 'rescaling', early)}; teleport, each arm at its best learning rate "
            f"{compare(optimizer, 'teleport', early, 'at_best_rate')}, after epoch {last} "
            f"{compare(optimizer, 'teleport', last, 'at_best_rate')}, test loss "
            f"{compare(optimizer, 'teleport', last, 'at_best_rate', 'test_loss')}."
        )
    drift = {a: max(m[o][a]["largest_relative_drift"] for o in m) for a in ("published", "teleport", "rescaling")}
    lines.append("Largest relative drift of one teleport: " + ", ".join(f"{a} {d:.1e}" for a, d in drift.items()) + ".")
    return lines


def optimization_finding(results):
    m, s = results[0].metrics, results[0].settings
    early, last = s.milestones[-2], s.milestones[-1]

    def triple(optimizer, arm, epoch=early, rate="at_published_rate", key="train_loss"):
        return m[optimizer][arm][f"{key}_{epoch}"][rate]

    losses = {arm: mean(m["AdaGrad"][arm][f"train_loss_{early}"]["values"][0]) for arm in m["AdaGrad"]}
    restart, kept = (
        verdict(triple("AdaGrad", "restart")) == "better",
        verdict(triple("AdaGrad", "teleport")) == "better",
    )
    cause = (
        "is the restart of the optimizer" if restart and not kept else "is not explained by restarting the optimizer"
    )
    ada = (
        f"AdaGrad's gain {cause}: training loss after epoch {early} is {losses['baseline']:.4f} alone, "
        f"{losses['restart']:.4f} restarted without teleporting, {losses['teleport']:.4f} with its state kept."
    )
    gains = [o for o in m if o != "AdaGrad" and verdict(triple(o, "teleport")) == "better"]
    left = [o for o in m if verdict(triple(o, "teleport", early, "at_best_rate")) == "better"]
    late = [o for o in m if verdict(triple(o, "teleport", last, "at_best_rate")) == "better"]
    test = [o for o in m if verdict(triple(o, "teleport", last, "at_best_rate", "test_loss")) == "better"]
    return (
        f"{ada} A gain of teleporting itself after epoch {early}: {listed(gains)} at the published learning rate, "
        f"{listed(left)} at each arm's best; after epoch {last}: {listed(late)}, in test loss {listed(test)}."
    )


def correlation(results):
    lines = []
    for r in results:
        c = r.metrics["correlations"]
        parts = (
            f"r({pair.replace('test_loss', 'test loss').replace('phi', 'φ').replace('psi', 'ψ')}) = {v['r']:.2f} "
            f"[{v['low']:.2f}, {v['high']:.2f}], p = {v['p']:.1g}"
            for pair, v in c.items()
        )
        lines.append(f"{r.label}: " + "; ".join(parts) + ".")
    return lines


def correlation_finding(results):
    def where(pair):
        return ", ".join(f"{r.metrics['correlations'][pair]['r']:.2f} on {r.label}" for r in results)

    zero = [r.label for r in results if r.metrics["correlations"]["psi, test_loss"]["p"] >= 0.05]
    return (
        f"Sharpness φ correlates with the test loss (r = {where('phi, test_loss')}); curvature ψ does so far less "
        f"(r = {where('psi, test_loss')}), and not distinguishably from zero on {listed(zero)}."
    )


def displacement(results):
    m = results[0].metrics
    off = max(m["parabola"]["published_relative_error"])
    return [
        f"All radii fall on one curve of κr (to {m['parabola']['difference_from_radius_1']:.0e} for the parabola, "
        f"{m['circle']['difference_from_radius_1']:.0e} for the circle), smallest at κr = "
        f"{m['parabola']['smallest_at_kappa_r']:.2g} and {m['circle']['smallest_at_kappa_r']:.2g}: more curvature "
        f"first brings the minimum nearer, then takes it farther. The published polyline is off by up to {off:.0%}."
    ]


def listed(names):
    return ", ".join(names) if names else "none"


def mean(values):
    return sum(values) / len(values)


def interval(triple, digits=4):
    """A difference (mean, low, high) as text."""
    middle, low, high = triple
    if low is None:
        return f"{middle:+.{digits}f}"
    return f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


SECTIONS = (
    Section(
        "Figures 5 and 13",
        "teleport_optimization.py",
        "Teleporting a few times early in training speeds up AdaGrad, momentum, RMSprop and Adam.",
        "each arm against the baseline, at the published learning rate and best of sweep against best of sweep.",
        optimization,
        optimization_finding,
    ),
    Section(
        "Table 1, Figures 9 and 10",
        "correlation.py",
        "Sharpness φ and curvature ψ of a minimum correlate with its test loss: φ positively, ψ negatively.",
        "Pearson r over the runs with its 95 % Fisher interval and p-value.",
        correlation,
        correlation_finding,
    ),
    Section(
        "Figure 7",
        "displacement_integration.py",
        "When the loss landscape shifts, the expected distance to a more curved minimum is larger.",
        "exact mean distances; the published polyline's largest relative error.",
        displacement,
    ),
)


# ------------------------------------------------------------------------------------------------------------- writing


def believe(found):
    """The findings: (sentence, section) for every section that has results and a finding."""
    return [(section.finding(results), section) for section, results in found if results and section.finding]


def reproduction(found):
    lines = [
        "# Reproduction",
        "",
        "Written by `python report.py` from `results/` alone; `python -m pytest tests/test_report.py` fails if the two",
        "disagree. Differences are paired by seed; *better*, *worse*: their 95 % t interval excludes zero.",
        "",
        "## What to believe",
        "",
        *(f"- [{section.figure}](#{anchor(section)}): {sentence}" for sentence, section in believe(found)),
        "",
    ]
    total = sum(r.record["elapsed_seconds"] for _, results in found for r in results)
    lines += [f"All results below took {duration(total)} of computing in total.", ""]
    for section, results in found:
        lines += [f"## {title(section)}", "", f"The paper: {section.claim}", ""]
        if not results:
            lines += [f"Not yet run at paper size: `python {section.script} --preset paper`.", ""]
            continue
        lines += [f"**Verdict** (rule: {section.rule})", "", *(f"- {v}" for v in section.verdict(results)), ""]
        for result in results:
            lines += describe(result)
    return "\n".join(lines).rstrip() + "\n"


def title(section):
    return f"{section.figure}: {section.script}"


def anchor(section):
    kept = re.sub(r"[^\w\- ]", "", title(section).lower())
    return kept.replace(" ", "-")


def describe(result):
    record = result.record
    settings = {k: v for k, v in record["configuration"]["settings"].items() if k != "dataset"}
    pictures = [p.relative_to(ROOT) for p in sorted((ROOT / "figures").glob(f"{result.name}*.png")) if mine(p, result)]
    hashes = record["dataset"]["sha256"]
    where = f"{record['device']}, {record['threads']} threads, torch {record['versions']['torch']}"
    return [
        f"### {result.label}",
        "",
        *(f"![{p.stem}]({p.as_posix()})" for p in pictures),
        "",
        "```text",
        result.table.rstrip(),
        "```",
        "",
        f"{duration(record['elapsed_seconds'])} on {where}. Numbers: [{result.name}.json](results/{result.name}.json).",
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
    others = [p.stem for p in (ROOT / "results").glob("*.json") if len(p.stem) > len(result.name)]
    return not any(picture.stem == o or picture.stem.startswith(o + "_") for o in others)


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def readme(found):
    rows = ["| what | command (`--preset paper`) | time | pictures |", "| --- | --- | --- | --- |"]
    for section, results in found:
        times = "; ".join(
            duration(r.record["elapsed_seconds"]) + (f" ({r.label})" if len(results) > 1 else "") for r in results
        )
        where = f"[see](REPRODUCTION.md#{anchor(section)})" if results else ""
        rows.append(f"| {section.figure} | `python {section.script}` | {times or 'not yet run'} | {where} |")
    findings = "\n".join(
        f"- [{section.figure}](REPRODUCTION.md#{anchor(section)}): {sentence}" for sentence, section in believe(found)
    )
    text = (ROOT / "README.md").read_text()
    for key, content in (("findings", findings), ("figures", "\n".join(rows))):
        text = re.sub(
            rf"(<!-- begin: {key} -->\n).*?(<!-- end: {key} -->)",
            lambda match, content=content: match[1] + content + "\n" + match[2],
            text,
            flags=re.S,
        )
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the files are out of date")
    options = parser.parse_args()
    found = [(section, load(section)) for section in SECTIONS]
    stale = []
    for name, text in (("REPRODUCTION.md", reproduction(found)), ("README.md", readme(found))):
        path = ROOT / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not options.check:
                path.write_text(text)
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python report.py")


if __name__ == "__main__":
    main()
