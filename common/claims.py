"""What a paper claims, the rule that judges it, the verdict, and the words in which they are said.

A script states its CLAIM, the PUBLISHED numbers at hand and `judge(outcome, …) -> Verdict` beside its experiment; the
command line ends with the verdict, and report.py writes REPRODUCTION.md and the README's tables from all of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

HOLDS, IN_PART, FAILS, UNDECIDED = "holds", "holds in part", "does not hold", "undecided"  # a claim's verdicts
REPRODUCED, NOT_REPRODUCED, NONE_AT_HAND = "reproduced", "not reproduced", "no published number at hand"
QUESTIONS = {  # which the reviewers of ICLR 2024 asked in public, and which a Verdict may answer
    "cost": "What does one teleport cost?",
    "gain": "Does anything but AdaGrad gain?",
    "direction": "Which direction of curvature helps?",
    "when": "Does it matter when, and how often, one teleports?",
}

# Recorded by running the authors' code, with why it stands beside no figure.
WITHOUT_A_FIGURE = """Recorded by running the authors' code from given weights, which no figure uses, hence compared by
tests alone (`tests/golden/`, to 1e-9 or better): both group actions, the derivative of ‖∂L/∂W‖² along the group, κ and
its derivative, the perturbed losses of φ; Q, loss and Hessian of gradient descent over 400 steps; spherical coordinates
of the nonlinear action. Not comparable:

- seconds, which are of another machine (learning to teleport, 30 steps: 0.012, 0.070, 0.176, 0.147);
- the losses printed beside the ensembles' accuracies, which are of a softmax behind a softmax;
- the notebook's second teleport, before epoch 15: its training accuracy went from 0.5391 to 0.1166, and ours makes one;
- one teleport of AdaGrad, the eighth, which moved its batch's loss from 0.644 to 0.678: Figure 5 shows all drifts;
- training loss after epoch 3 with teleports (optimizer's state kept) against without, at rates that are no arm's best:
  momentum 0.251 against 0.256 at 3, 0.214 against 0.216 at 10 times the published one (test loss 0.209 against 0.210);
  Adam 0.329 against 0.343, 0.239 against 0.249 (test loss 0.231 against 0.230)."""


class Claim(NamedTuple):
    """What a paper says, in our words, and when it holds."""

    order: int  # its place in the report
    figure: str  # "Figures 5 and 13"
    paper: str  # "ICLR 2024"
    section: str  # of the paper; "" where no source confirms one
    says: str  # one sentence
    short: str  # the same in a few words, for the README
    rule: str  # "holds if …; in part: …"
    dated: str  # when the rule was written, ISO
    headline: bool = False  # among the README's findings
    source: str = "The paper"  # whose claim it is


class Published(NamedTuple):
    """A published number beside ours."""

    what: str
    published: float | str
    ours: float | str
    source: str
    setting: str = ""  # what differs in ours
    agrees: bool | None = None  # None: it cannot be compared


class Verdict(NamedTuple):
    """Two answers: does the claim survive its controls, and did the published numbers come out again?"""

    word: str  # holds, holds in part, does not hold, undecided
    limits: str  # why not more than in part
    sentence: str  # the numbers that decided
    details: Sequence[str] = ()  # more numbers, for REPRODUCTION.md
    number: str = ""  # the one number that decides, for the README
    published: Sequence[Published] = ()
    surprise: str = ""  # what nobody expected, with its number
    answers: Mapping[str, str] = MappingProxyType({})  # of QUESTIONS: a sentence with its numbers

    def __str__(self) -> str:
        """The word, and why not more than in part."""
        return self.word if self.word == HOLDS or not self.limits else f"{self.word}: {self.limits}"

    def again(self) -> str:
        """Did it come out again? In the words of the protocol."""
        compared = [row.agrees for row in self.published if row.agrees is not None]
        nothing = NONE_AT_HAND + (" that can be compared" if self.published else "")
        return (REPRODUCED if all(compared) else NOT_REPRODUCED) if compared else nothing

    def comparison(self) -> list[str]:
        """The published numbers beside ours, as the lines of a Markdown table; none where there are none."""
        rows = [(r.what, _number(r.published), _number(r.ours), r.setting or "none", r.source) for r in self.published]
        return [*markdown(("what", "published", "ours", "difference in setting", "source"), rows), ""] if rows else []


def grade(everything: object, something: object) -> str:
    """The word of a claim of which everything, something or nothing holds."""
    return HOLDS if everything else IN_PART if something else FAILS


def settle(words: Iterable[str]) -> bool | None:
    """Are all these comparisons better? None: one is undecided, and no other has answered no."""
    words = set(words)
    return True if words <= {"better"} else None if words <= {"better", UNDECIDED} else False


def graded(settled: Sequence[bool | None]) -> str:
    """The word of a claim about several cases, each settled or None (undecided)."""
    return grade(all(settled), any(settled)) if any(settled) or None not in settled else UNDECIDED


def weigh(found: Mapping[tuple, str], wanted: Mapping[str, str], text: Mapping[str, str]) -> tuple[str, str]:
    """A verdict's word and limits from those of its cases.

    found: {(where, what): word}, wanted and text: {what: the word it has where the claim holds, its name}. Holds where
    all are as wanted, in part where some are; else undecided where one case is.
    """
    shown = [case for case, word in found.items() if word == wanted[case[1]]]
    limits = (
        f"{text[what]} is {word} on {listed(places)}"
        for what in wanted
        for word in dict.fromkeys(found.values())
        if word != wanted[what]
        and (places := [where for (where, w), said in found.items() if (w, said) == (what, word)])
    )
    word = grade(len(shown) == len(found), shown)
    return UNDECIDED if word == FAILS and UNDECIDED in found.values() else word, "; ".join(limits)


def except_for(settled: Mapping[str, bool | None]) -> str:
    """Why such a claim does not hold: in which cases it does, or is undecided."""
    won, unsettled = ([name for name in settled if settled[name] is answer] for answer in (True, None))
    return f"{listed(won)} only" if won else f"nowhere{f', undecided for {listed(unsettled)}' if unsettled else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Text


def table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A plain text table: first column left, the others right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def markdown(header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """The lines of a Markdown table; what would end a cell is escaped."""
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells]]


def interval(triple: Sequence[float], digits: int = 4) -> str:
    """A difference (mean, low, high) as text; NaN: it diverged, NaN bounds: one seed."""
    middle, low, high = triple
    if math.isnan(middle):
        return "diverged"
    return f"{middle:+.{digits}f}" + ("" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def change(c: Any, digits: int = 2) -> str:
    """A statistics.Comparison of logarithms as text: per cent, the 95 % interval, the word, what would have shown."""
    if math.isnan(c.effect):
        return f"diverged in {c.diverged[0]} and {c.diverged[1]} of {c.n} ({c.word})"
    middle, low, high, detectable = (100 * math.expm1(min(x, 500)) for x in (c.effect, c.low, c.high, c.detectable))
    if math.isnan(low):
        return f"{middle:+.{digits}f} % ({c.word}: one run has no interval)"
    said = f"{detectable:.2g} %" if detectable < 1000 else "tenfold or more"
    shown = f", {said} would have shown" if c.word == UNDECIDED and not math.isnan(detectable) else ""
    return f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] % ({c.word}{shown})"


def factor(triple: Sequence[float]) -> str:
    """A ratio (mean, low, high) as text."""
    middle, low, high = triple
    if math.isnan(middle):
        return "diverged"
    return f"{middle:.3g}" + ("" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]")


def listed(names: Sequence[str], last: str = ", ") -> str:
    """Names as text: a, b and c; "none" for none."""
    return last.join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "none"


def sentence_case(text: object) -> str:
    """The text with a capital first letter."""
    return str(text)[:1].upper() + str(text)[1:]


def duration(seconds: float) -> str:
    """Seconds as text, in s, min or h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mean(values: Sequence[float]) -> float:
    """The mean of a list of numbers."""
    return sum(values) / len(values)


def median(values: Iterable[float]) -> float:
    """The median of numbers, NaN last."""
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def count(steps: float) -> str:
    """A number of steps as text; NaN: not reached."""
    return "not reached" if math.isnan(steps) else f"{steps:,.0f}"
