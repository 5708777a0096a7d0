"""Write REPRODUCTION.md, and the README's table and findings, from results/ alone.

    python report.py            # write both
    python report.py --check    # exit with 1 if they are not what results/ says
    python report.py --estimate # how long the committed results took
    python report.py --root DIR # your own: DIR/REPRODUCTION.md from DIR/results/

A section a figure: the paper's claim, one verdict computed by the rule stated with it, the numbers, the pictures, the
script's own closing table, the settings. Differences are paired by seed; "better" and "worse" mean that their 95 % t interval excludes zero.
"""

import argparse
import json
import math
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import ROOT, cli
from common.data import LABELS
from common.statistics import difference, verdict


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


class Verdict(NamedTuple):
    word: str  # of the paper's claim: holds, holds in part, does not hold
    limits: str  # why not more than in part
    sentence: str  # the numbers that decided
    details: list = []  # more numbers, for REPRODUCTION.md

    def __str__(self):
        return self.word if self.word == "holds" else f"{self.word}: {self.limits}"


class Section(NamedTuple):
    figure: str
    script: str
    claim: str  # the paper's
    rule: str  # when the claim holds
    judge: object  # function of the list of results -> Verdict
    believe: bool = False  # in "What to believe" and in the README's findings
    name: str | None = None  # of the results, if not the script's


def load(section, root=ROOT):
    """The section's results, datasets in the order MNIST, Fashion-MNIST, CIFAR-10."""
    sys.path.insert(0, str((ROOT / section.script).parent))  # as Python does for the script it runs
    try:
        script = runpy.run_path(str(ROOT / section.script), run_name="report")
    finally:
        sys.path.pop(0)
    stem, kind = section.name or Path(section.script).stem, type(script["PRESETS"]["paper"])
    results = []
    for name in [stem, *(f"{stem}_{dataset}" for dataset in LABELS)]:
        path = root / "results" / f"{name}.json"
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
# A function a section: its results -> a Verdict, computed by the rule that SECTIONS states beside it.


def grade(everything, something):
    return "holds" if everything else "holds in part" if something else "does not hold"


def optimization(results):
    m, s = results[0].metrics, results[0].settings
    early, last = s.milestones[-2], s.milestones[-1]

    def triple(optimizer, arm, epoch=early, rate="at_published_rate", key="train_loss"):
        return m[optimizer][arm][f"{key}_{epoch}"][rate]

    def helped(*where):
        return [o for o in m if verdict(triple(o, "teleport", *where)) == "better"]

    claimed = [o for o in m if o != "SGD"]
    both = [o for o in claimed if o in helped() and o in helped(early, "at_best_rate")]
    loss = {arm: mean(m["AdaGrad"][arm][f"train_loss_{early}"]["values"][0]) for arm in m["AdaGrad"]}
    restart, kept = (verdict(triple("AdaGrad", arm)) == "better" for arm in ("restart", "teleport"))
    sentence = (
        f"After epoch {early} teleporting with the optimizer's state kept lowers the training loss of {listed(helped())} at "
        f"the published learning rate and of {listed(helped(early, 'at_best_rate'))} when each arm has its best, after epoch "
        f"{last} of {listed(helped(last, 'at_best_rate'))}, and the test loss of "
        f"{listed(helped(last, 'at_best_rate', 'test_loss'))}. AdaGrad's gain is {'' if restart and not kept else 'not '}"
        f"the restart of its state: {loss['baseline']:.4f} alone, {loss['restart']:.4f} restarted without teleporting, "
        f"{loss['teleport']:.4f} teleported with its state kept."
    )

    def compare(*where):
        return f"{interval(triple(*where))} ({verdict(triple(*where))})"

    details = []
    for o in m:
        details.append(
            f"{o}, training loss minus baseline's after epoch {early}: restart only {compare(o, 'restart')}, "
            f"published teleport {compare(o, 'published')}, teleport with the optimizer's state kept "
            f"{compare(o, 'teleport')}, rescaling {compare(o, 'rescaling')}; teleport, each arm at its best learning "
            f"rate {compare(o, 'teleport', early, 'at_best_rate')}, after epoch {last} "
            f"{compare(o, 'teleport', last, 'at_best_rate')}, test loss "
            f"{compare(o, 'teleport', last, 'at_best_rate', 'test_loss')}."
        )
    drift = {a: max(m[o][a]["largest_relative_drift"] for o in m) for a in ("published", "teleport", "rescaling")}
    details.append(
        "Largest relative drift of one teleport: " + ", ".join(f"{a} {d:.1e}" for a, d in drift.items()) + "."
    )
    limits = f"{listed(both)} only" if both else "none of them"
    return Verdict(grade(len(both) == len(claimed), both), limits, sentence, details)


def correlation(results):
    def c(r, name):
        return r.metrics["correlations"][f"{name}, test_loss"]

    def where(name):
        return ", ".join(
            f"{c(r, name)['r']:.2f} [{c(r, name)['low']:.2f}, {c(r, name)['high']:.2f}] on {r.label}" for r in results
        )

    signs = {"phi": 1, "psi": -1}
    right = {n: [r.label for r in results if c(r, n)["p"] < 0.05 and c(r, n)["r"] * signs[n] > 0] for n in signs}
    details = []
    for r in results:
        parts = (
            f"r({pair.replace('test_loss', 'test loss').replace('phi', 'φ').replace('psi', 'ψ')}) = {v['r']:.2f} "
            f"[{v['low']:.2f}, {v['high']:.2f}], p = {v['p']:.1g}"
            for pair, v in r.metrics["correlations"].items()
        )
        details.append(f"{r.label}: " + "; ".join(parts) + ".")
    full = all(len(labels) == len(results) for labels in right.values())
    sentence = (
        f"r(φ, test loss) = {where('phi')}: positive beyond chance on {listed(right['phi'])}. "
        f"r(ψ, test loss) = {where('psi')}: negative beyond chance on {listed(right['psi'])}."
    )
    missing = {n: [r.label for r in results if r.label not in right[n]] for n in signs}
    limits = "; ".join(
        f"not {'φ' if n == 'phi' else 'ψ'} on {listed(labels)}" for n, labels in missing.items() if labels
    )
    return Verdict(grade(full, any(right.values())), limits, sentence, details)


def sharpness_curvature(results):
    def changes(key):
        return [(r.label, r.metrics[key]["minus_no_teleport"]) for r in results]

    def text(key):
        return ", ".join(f"{interval(triple)} on {label}" for label, triple in changes(key))

    improves = [label for label, triple in changes("curvature_up_teleport") if verdict(triple) == "better"]
    negligible = [verdict(triple) == "no difference" for _, triple in changes("sharpness_down_teleport")]
    others, differ, details = 0, [], []
    for r in results:
        for key, m in r.metrics.items():
            if key == "no_teleport":
                continue
            change = "diverged" if m["total_change"] is None else f"{m['total_change']:+.1%}"
            word = verdict(m["minus_no_teleport"])
            details.append(
                f"{r.label}, {arm_name(key)}: {m['moved_as_asked']} of {m['teleports']} teleports went as asked, "
                f"{change} in all; test loss minus no teleport {interval(m['minus_no_teleport'])} ({word})."
            )
            if key not in ("curvature_up_teleport", "sharpness_down_teleport"):
                others += 1
                differ += [f"{arm_name(key)} ({r.label}, {word})"] if word in ("better", "worse") else []
    sentence = (
        f"Final test loss minus that without teleporting: {text('curvature_up_teleport')} after teleporting to larger "
        f"curvature, {text('sharpness_down_teleport')} to flatter points. Of the {others} other arms, controls "
        f"included, {len(differ)} differ{'s' if len(differ) == 1 else ''} from no teleport{': ' + listed(differ) if differ else ''}."
    )
    limits = f"larger curvature improves {'the results on ' + listed(improves) if improves else 'none'}"
    return Verdict(grade(len(improves) == len(results) and all(negligible), improves), limits, sentence, details)


def arm_name(key):
    objective, direction, kind = key.split("_")
    return f"{'φ' if objective == 'sharpness' else 'ψ'} {direction}, {kind}"


def learning(results):
    m, s = results[0].metrics, results[0].settings
    arms = {"LSTM(lr, teleport)": "LSTM(lr)", "LSTM(update, teleport)": "LSTM(update)"}
    beat = [m[arm]["verdict"] == "better" for arm in arms]
    add = [m[arm]["ratio_to_no_element"][2] < 1 for arm in arms]
    ratios = ", ".join(f"{a} {factor(m[a]['ratio_to_GD'])}" for pair in arms.items() for a in pair)
    sentence = (
        f"Loss after {s.steps} steps over gradient descent's, on {s.seeds} held-out problems: {ratios}; gradient "
        f"descent at the learned rate's upper limit, with nothing learned, "
        f"{factor(m['GD, rates of the clamp']['ratio_to_GD'])}."
    )
    details = []
    for arm, v in m.items():
        if arm == "GD":
            continue
        drift = v.get("largest_relative_drift")
        details.append(
            f"{arm}: final loss / GD's {factor(v['ratio_to_GD'])} ({v['verdict']}), / GD at the clamp's rate "
            f"{factor(v['ratio_to_clamp'])}{f', drift of a teleport at most {drift:.0e}' if drift else ''}."
        )
    limits = "no better than without the teleport" if any(beat) else "no better than gradient descent"
    return Verdict(grade(all(beat) and all(add), any(beat)), limits, sentence, details)


def factor(triple):
    """A ratio (mean, low, high) as text."""
    if triple is None or triple[0] is None:
        return "diverged"
    middle, low, high = triple
    return f"{middle:.3g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]")


def displacement(results):
    m = results[0].metrics
    parabola, circle = m["parabola"], m["circle"]
    flat = 2 / math.pi  # the mean distance of a circle's points to a straight line through its centre, over the radius
    depends = [abs(curve["smallest_value"] / flat - 1) > 0.01 for curve in (parabola, circle)]
    return Verdict(
        grade(all(depends), any(depends)),
        "one of the two curves only",
        f"It does, but not monotonically: the parabola's is {flat:.3f} r without curvature, least, "
        f"{parabola['smallest_value']:.3f} r, at κr = {parabola['smallest_at_kappa_r']:.2g}, and grows from there on. All "
        f"radii fall on one curve of κr (to {parabola['difference_from_radius_1']:.0e}); the published polyline is off by "
        f"up to {max(parabola['published_relative_error']):.0%}.",
    )


def so2(results):
    m = results[0].metrics
    final = {arm: median(m[arm]["final_loss"]) for arm in m}
    names = {"gd": "gradient descent", "gd_random": "random angles", "gd_published": "the published ascent"}
    names |= {"gd_maximum": "the orbit's maximum", "newton": "Newton's method"}
    drift = max(m[arm].get("largest_relative_drift", 0) for arm in m)
    faster = {arm: final["gd_published"] <= final[arm] / 10 for arm in ("gd", "gd_random")}
    return Verdict(
        grade(all(faster.values()), faster["gd"]),
        "random angles do as well" if faster["gd"] else "no faster",
        "Final loss, median over starting angles: " + ", ".join(f"{names[a]} {final[a]:.2g}" for a in names) + ".",
        [
            f"Share of the largest dL/dt that a teleport reaches: published {m['gd_published']['speed_share']:.0%}, "
            f"random angle {m['gd_random']['speed_share']:.0%}. At the maximum the gradient is within "
            f"{m['gd_maximum']['degrees_from_newton']:.0e} degrees of Newton's direction. Largest drift {drift:.0e}."
        ],
    )


def regression(results):
    metrics, arrays, factors = results[0].metrics, results[0].outcome.arrays, results[0].settings.factors
    saves, gains, details, best = [], [], [], []
    for optimizer, m in metrics.items():
        arms = [arm for arm, v in m.items() if isinstance(v, dict)]
        rate = min(range(len(factors)), key=lambda i: m["plain"]["final_loss_by_factor"][i])
        final = dict(zip(arms, arrays[f"{optimizer}_rates/loss"][:, rate, :, -1]))
        gain = difference(final["exact"], final["plain"])
        saves.append(m["exact"]["epochs_saved"][1] > 0)
        gains.append(verdict(gain) == "better")
        best.append(f"{optimizer} (×{factors[rate]}) {interval(gain, 3)}")
        arms.remove("plain")
        saved = ", ".join(f"{arm} {interval(m[arm]['epochs_saved'], 0)}" for arm in arms)
        drift = ", ".join(f"{arm} {m[arm]['largest_relative_drift']:.0e}" for arm in arms)
        details.append(
            f"{optimizer}, epochs saved until the loss of epoch {m['level_epoch']}: {saved}. Drift: {drift}."
        )
    m = metrics["GD"]
    saved = {arm: m[arm]["epochs_saved"][0] for arm in ("published", "exact", "drift only")}
    sentence = (
        f"Of gradient descent's {m['level_epoch']} epochs an exact teleport saves {saved['exact']:.0f}, the published one "
        f"{saved['published']:.0f}; the latter itself lowers the loss by up to "
        f"{m['published']['largest_relative_drift']:.0%}, a drop that alone saves {saved['drift only']:.0f}. Final loss with "
        f"an exact teleport minus without, both at the best learning rate: {'; '.join(best)}."
    )
    limits = "not at the best learning rate" if all(saves) else "not both optimizers"
    return Verdict(grade(all(saves) and all(gains), any(saves)), limits, sentence, details)


def classification(results):
    details, better, exact = [], [], []
    for r in results:
        for network, m in r.metrics.items():
            change = {arm: m[arm]["train_loss_minus_plain"] for arm in m if arm != "plain"}
            name = network.replace("_", " ")
            better += [name] if verdict(change["exact"]) == "better" else []
            exact.append(f"{name} {interval(change['exact'], 3)}")
            cells = ", ".join(f"{arm} {interval(v)} ({verdict(v)})" for arm, v in change.items())
            drift = ", ".join(f"{a} {m[a]['largest_relative_drift']:.0e}" for a in ("published", "exact", "rescaling"))
            details.append(f"{r.label}, {network}, final training loss minus plain: {cells}. Drift: {drift}.")
    return Verdict(
        grade(len(better) == len(exact), better),
        f"{listed(better)} only",
        f"Final training loss with exact teleports minus without: {', '.join(exact)}.",
        details,
    )


def sampling(results):
    m = results[0].metrics
    arms = [arm for arm in m if "train_loss_minus_SGD" in m[arm] and arm != "SGD"]
    gain = verdict(m["search"]["train_loss_minus_SGD"]) == "better"
    matched = [a for a in ("rescaling", "SGD lr x10") if m[a]["train_loss_minus_search"][1] <= 0]
    loss = {arm: mean(m[arm]["final_train_loss"]) for arm in ("SGD", "search", "rescaling", "SGD lr x10")}
    cost = m["gradient_evaluations"]
    sentence = (
        f"The best of {cost['search']} random elements takes SGD's final training loss from {loss['SGD']:.3f} to "
        f"{loss['search']:.3f}; one rescaling number that gives the same gradient norm, to {loss['rescaling']:.3f}, and a "
        f"tenfold learning rate to {loss['SGD lr x10']:.3f}. Gradient ascent finds that norm in {min(cost['ascent'])} to "
        f"{max(cost['ascent'])} gradient evaluations instead of {cost['search']}."
    )
    details = [
        f"{arm}: final training loss minus SGD's {interval(m[arm]['train_loss_minus_SGD'])} "
        f"({verdict(m[arm]['train_loss_minus_SGD'])})."
        for arm in arms
    ]
    names = {"rescaling": "a rescaling by one number", "SGD lr x10": "a larger learning rate"}
    limits = f"{' and '.join(names[a] for a in matched)} do{'es' if len(matched) == 1 else ''} as well or better"
    return Verdict(grade(gain and not matched, gain), limits if gain else "no faster", sentence, details)


def dynamics(results):
    m = results[0].metrics
    orders = [v["order_in_step_size"] for v in m.values()]
    conserved = [abs(order - 1) < 0.1 for order in orders]
    sentence = (
        f"Under gradient descent Q drifts in proportion to the step size to the power {min(orders):.2f} to "
        f"{max(orders):.2f}, which is what a first-order method leaves of a quantity that its flow conserves."
    )
    details = [
        f"{name}: Q drifts by {abs(v['drift_at_equal_time'][0]):.1e} at the largest step size, as its power "
        f"{v['order_in_step_size']:.2f}; the control (terms added, not subtracted) moves by "
        f"{abs(v['control_at_equal_time'][0]):.2g}, as its power {v['control_order']:.2f}."
        for name, v in m.items()
    ]
    return Verdict(grade(all(conserved), any(conserved)), "not for every activation", sentence, details)


def distribution(results):
    m = results[0].metrics.values()
    off = max(abs(v["standard_errors_off"]) for v in m)
    spread = max(abs(v["std"] / v["expected_std"] - 1) for v in m)
    return Verdict(
        grade(off < 4 and spread < 0.1, off < 4),
        "another deviation",
        f"Q of Xavier draws concentrates around a value that the shape and the activation fix: closed-form mean (at most "
        f"{off:.1f} standard errors off) and deviation (to {spread:.0%}).",
    )


def convergence(results):
    m, s = results[0].metrics, results[0].settings
    details, spread, ordered = [], {}, []
    for name, v in m.items():
        Q, needed = v["Q_start"], v["steps_to_threshold"]
        published, orbit = range(len(s.stds)), [s.base, *range(len(s.stds), len(Q))]
        along = [needed[i] for i in sorted(orbit, key=lambda i: abs(Q[i]))]
        if all(along):
            spread[name] = max(along) / min(along)
            ordered += [name] if along in (sorted(along), sorted(along, reverse=True)) else []
        pairs = [", ".join(f"Q = {Q[i]:.4g}: {steps(needed[i])}" for i in chosen) for chosen in (published, orbit)]
        details.append(
            f"{name}, steps to loss {s.threshold:g}: published starts {pairs[0]}. The same start function, moved along "
            f"its orbit: {pairs[1]}."
        )
    depends = [spread.get(name, 0) > 2 for name in m]
    cells = ", ".join(f"×{ratio:.1f} ({name})" for name, ratio in spread.items())
    return Verdict(
        grade(all(depends) and len(ordered) == len(m), any(depends)),
        f"in the order of Q's size for {listed(ordered)}",
        f"Along one orbit, where all starts compute the same function, the steps to the loss {s.threshold:g} differ by up "
        f"to {cells}; they follow the order of Q's size for {listed(ordered)}.",
        details,
    )


def convergence_radial(results):
    m = results[0].metrics
    times = [t for t in m["flow_time_over_Q"] if t]
    return Verdict(
        grade(max(times) < 1.1 * min(times), len(times) > 1),
        "not in proportion",
        f"All starts compute the same function, and the time to converge is proportional to Q: flow time / Q = "
        f"{min(times):.3f} to {max(times):.3f} over Q = {m['Q_start'][0]:.2g} to {m['Q_start'][len(times) - 1]:.2g}; "
        f"Q = {m['Q_start'][-1]:.4g} {'converges' if m['steps_to_reduction'][-1] else 'does not converge in time'}.",
    )


def hessian(results):
    s, details, ranges, ordered, along = results[0].settings, [], [], [], []
    for name, v in results[0].metrics.items():
        starts = range(len(s.stds))
        orbit = [s.base, *range(len(s.stds), len(v["Q"]))]
        for chosen, names in ((starts, ordered), (orbit, along)):
            largest = [v["largest"][i] for i in sorted(chosen, key=lambda i: v["Q"][i])]
            names += [name] if largest in (sorted(largest), sorted(largest, reverse=True)) else []
            if chosen is starts:
                ranges.append(f"{name} {', '.join(f'{e:.3g}' for e in largest)}")
        eigenvalues = ", ".join(f"{e:.3g}" for e in v["largest"])
        values = ", ".join(f"{q:.4g}" for q in v["Q"])
        details.append(
            f"{name}: largest eigenvalues {eigenvalues} at minima with Q = {values} (the last three: one orbit)."
        )
    n = len(results[0].metrics)
    return Verdict(
        grade(len(ordered) == len(along) == n, ordered or along),
        f"over the published starts for {listed(ordered)}, along one orbit for {listed(along)}",
        "Largest Hessian eigenvalue from the smallest to the largest Q over the published starts: "
        + "; ".join(ranges)
        + ".",
        details,
    )


def ensembles(results):
    r = results[0]
    gains = next(v for k, v in r.metrics.items() if k.startswith("accuracy of") and "minus original" in k)
    on_batch = next(v for k, v in r.metrics.items() if k.startswith("relative change of the logits on the batch"))
    base = r.metrics["original: accuracy"]
    similar = [epsilon for epsilon, v in gains["group"].items() if v["mean"] > -1]
    epsilon, best = max(gains["group"].items(), key=lambda item: item[1]["mean"])
    exact = max(change for epsilon, change in on_batch.items() if float(epsilon) <= 1)
    sentence = (
        f"{r.label}: votes of symmetry ensembles stay within a point of the network's {100 * base['mean']:.1f} % for "
        f"{len(similar)} of {len(gains['group'])} sizes ε of the moves (ε = {', '.join(similar)}); they gain at most "
        f"{best['mean']:+.2f} ± {best['std']:.2f} points. On the batch that defined π the logits change by at most "
        f"{exact:.0e} (ε ≤ 1)."
    )
    details = []
    for arm, by_epsilon in gains.items():
        cells = ", ".join(f"{v['mean']:+.1f} ± {v['std']:.1f} at ε = {e}" for e, v in by_epsilon.items())
        details.append(f"{arm}, accuracy minus the original's, points: {cells}.")
    return Verdict(
        grade(len(similar) == len(gains["group"]), similar), f"for moves of ε = {listed(similar)}", sentence, details
    )


def adversarial(results):
    r = results[0]
    prefix = "accuracy under FGSM, attacked: "
    attacked = [k.removeprefix(prefix) for k in r.metrics if k.startswith(prefix)]
    models = list(r.metrics[prefix + attacked[0]])

    def accuracy(attack, by, model, strength=-1):
        """Of every seed; strength 0: without attack."""
        return r.outcome.arrays[attack][:, attacked.index(by), models.index(model), strength]

    def gain(attack, by):
        return difference(accuracy(attack, by, "group"), accuracy(attack, by, "original"))

    robust = {
        by: [verdict(gain(attack, by), smaller_is_better=False) == "better" for attack in ("FGSM", "PGD")]
        for by in ("itself", "either")
    }

    def percent(*where):
        return f"{100 * accuracy(*where).mean():.1f}"

    sentence = (
        f"Under the strongest FGSM, {r.label}: {percent('FGSM', 'itself', 'group')} % accuracy when attacked through the "
        f"ensemble's own gradients, {percent('FGSM', 'either', 'group')} % when the base model's attack counts as well, "
        f"against {percent('FGSM', 'either', 'original')} % for the base model (PGD: {percent('PGD', 'itself', 'group')}, "
        f"{percent('PGD', 'either', 'group')} and {percent('PGD', 'either', 'original')} %); without attack "
        f"{percent('FGSM', 'either', 'group', 0)} against {percent('FGSM', 'either', 'original', 0)} %."
    )
    details = []
    for attack in ("FGSM", "PGD"):
        strength = list(r.metrics[f"accuracy under {attack}, attacked: {attacked[0]}"]["original"])[-1]
        for by in ("base model", "itself", "either"):
            cells = ", ".join(
                f"{model} {percent(attack, by, model, 0)} → {percent(attack, by, model)} %"
                for model in ("original", "group")
            )
            more = ", ".join(f"{100 * v:+.1f}" for v in gain(attack, by))
            details.append(
                f"{attack} up to {strength} on {by}: {cells}; difference (mean, 95 % from, to) {more} points."
            )
    loss = 100 * float(np.mean(accuracy("FGSM", "either", "original", 0) - accuracy("FGSM", "either", "group", 0)))
    limits = (
        f"at a cost of {loss:.1f} points without attack"
        if all(robust["either"])
        else "through their own gradients only"
    )
    return Verdict(grade(all(robust["either"]) and loss < 1, any(robust["itself"])), limits, sentence, details)


def steps(count):
    return "not reached" if count is None else f"{count:,.0f}"


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def listed(names):
    return ", ".join(names) if names else "none"


def mean(values):
    return sum(values) / len(values)


def interval(triple, digits=4):
    """A difference (mean, low, high) as text."""
    middle, low, high = triple
    if middle is None:
        return "diverged"
    if low is None:
        return f"{middle:+.{digits}f}"
    return f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


OF_SO2 = (
    "the median final loss is at most a tenth of plain gradient descent's and of that after random angles; in part: of the "
    "former only."
)

SECTIONS = (
    Section(
        "Figures 5 and 13",
        "teleport_optimization.py",
        "Teleporting a few times early in training speeds up AdaGrad, momentum, RMSprop and Adam.",
        "the teleport that keeps the optimizer's state lowers the training loss after epoch 8, at the published learning "
        "rate and at each arm's best, for all four; in part: for some.",
        optimization,
        believe=True,
    ),
    Section(
        "Table 1, Figures 9 and 10",
        "correlation.py",
        "Over networks trained alike, the test loss correlates positively with sharpness φ and negatively with curvature ψ.",
        "both correlations have that sign on every dataset, p < 0.05; in part: some. Intervals: 95 %, Fisher's z.",
        correlation,
        believe=True,
    ),
    Section(
        "Figure 4",
        "teleport_sharpness_curvature.py",
        "Teleporting to minima of larger curvature improves generalization; to flatter ones, the effect is negligible.",
        "larger ψ lowers the final test loss and smaller φ makes no difference, on every dataset; in part: larger ψ lowers it "
        "on some.",
        sharpness_curvature,
        believe=True,
    ),
    Section(
        "Figure 6",
        "learn-to-teleport/multi_layer_regression.py",
        "Meta-optimizers that learn the teleport with the learning rate or the update beat gradient descent.",
        "both beat gradient descent and the same meta-optimizer without the teleport; in part: gradient descent only. "
        "Geometric means over problems with 95 % intervals.",
        learning,
        believe=True,
        name="learn_to_teleport",
    ),
    Section(
        "Figure 7",
        "displacement_integration.py",
        "How far a minimum is expected to move when the loss landscape shifts depends on its curvature.",
        "the exact mean distance over r, at its smallest, is more than 1 % from that of a straight line; both curves.",
        displacement,
    ),
    Section(
        "Booth (NeurIPS 2022)",
        "symmetry-teleportation/booth.py",
        "Teleporting accelerates gradient descent.",
        OF_SO2,
        so2,
    ),
    Section(
        "Rosenbrock (NeurIPS 2022)",
        "symmetry-teleportation/rosenbrock.py",
        "Teleporting accelerates gradient descent.",
        OF_SO2,
        so2,
    ),
    Section(
        "Regression (NeurIPS 2022)",
        "symmetry-teleportation/multi_layer_regression.py",
        "One teleport at epoch 5 accelerates gradient descent and AdaGrad.",
        "an exact teleport saves both of them epochs and lowers their final loss at the best learning rate; in part: some "
        "of it. Epochs: until the loss that the plain optimizer reaches later.",
        regression,
        believe=True,
    ),
    Section(
        "MNIST classification (NeurIPS 2022)",
        "symmetry-teleportation/mnist_classification.py",
        "Teleports in the first epochs accelerate SGD and AdaGrad.",
        "exact teleports lower the final training loss of every network and optimizer; in part: of some. Drift: largest "
        "relative change of a teleport batch's loss.",
        classification,
    ),
    Section(
        "Sampling (Fashion-MNIST variant)",
        "symmetry-teleportation/random_search.py",
        "Keeping the best of 1000 random group elements accelerates SGD.",
        "the final training loss is below SGD's and below that of two controls, a rescaling by one number and a tenfold "
        "learning rate; in part: below SGD's only.",
        sampling,
        believe=True,
    ),
    Section(
        "Q dynamics (ICLR 2023, Figure 3)",
        "gradient-flow-symmetry/Q_dynamics_elementwise.py",
        "Gradient flow conserves Q, and gradient descent nearly does.",
        "at equal training time Q drifts as the step size to a power within 0.1 of 1, for every activation.",
        dynamics,
        believe=True,
    ),
    Section(
        "Q distribution (ICLR 2023, Figures 4 and 5)",
        "gradient-flow-symmetry/Q_distribution.py",
        "Common initializations reach a narrow range of Q only.",
        "1000 draws agree with closed-form mean (4 standard errors) and deviation (10 %).",
        distribution,
    ),
    Section(
        "Q and convergence (ICLR 2023, Figure 6)",
        "gradient-flow-symmetry/Q_convergence_elementwise.py",
        "The rate of convergence is related to Q.",
        "along one orbit, whose points compute the same function, the steps to a loss differ more than twofold, in the "
        "order of Q's absolute value, for every activation; in part: they differ. The published starts differ in function too.",
        convergence,
    ),
    Section(
        "Q and convergence, radial (ICLR 2023, Figure 7)",
        "gradient-flow-symmetry/Q_convergence_radial.py",
        "The rate of convergence is related to Q.",
        "the time to reduce the loss is proportional to Q, within 10 %.",
        convergence_radial,
    ),
    Section(
        "Q and the Hessian (ICLR 2023, Figure 9)",
        "gradient-flow-symmetry/Q_hessian_eigenvalues.py",
        "The sharpness of a minimum is related to Q.",
        "the largest Hessian eigenvalue is monotone in Q, over the published starts and along one orbit, for every "
        "activation; in part: for some.",
        hessian,
    ),
    Section(
        "Ensembles (ICLR 2023, Figure 10)",
        "gradient-flow-symmetry/ensemble_cifar.py",
        "A nonlinear, data-dependent symmetry turns a trained network into others that perform similarly on new samples, "
        "so that ensembles need no training.",
        "the ensemble's accuracy is at most one point below the network's at every size ε of the moves; in part: at some.",
        ensembles,
    ),
    Section(
        "Attacks (ICLR 2023, Figure 11)",
        "gradient-flow-symmetry/adversarial_cifar.py",
        "Such ensembles are more robust to certain adversarial attacks.",
        "they are more accurate than the base model under the strongest FGSM and PGD when the attacks on either model must fail, and "
        "at most a point less without attack; in part: under an attack through the ensemble's own gradients.",
        adversarial,
        believe=True,
    ),
)


# ------------------------------------------------------------------------------------------------------------- writing


def believe(judged):
    """The findings, a line each: the verdict, the claim, the numbers, the evidence."""
    return [
        f"- **{sentence_case(judgement)}.** The paper: {section.claim} Here: {judgement.sentence} "
        f"([{section.figure}](LINK#{anchor(section)}))"
        for section, _, judgement in judged
        if section.believe and judgement
    ]


def sentence_case(judgement):
    text = str(judgement)
    return text[0].upper() + text[1:]


def reproduction(judged, root=ROOT):
    lines = [
        "# Reproduction",
        "",
        "Written by `python report.py` from `results/` alone; `python -m pytest tests/test_report.py` fails if the two",
        "disagree. Differences are paired by seed; *better*, *worse*: their 95 % t interval excludes zero. A verdict is",
        "computed by the rule beside it: the claim *holds* if the rule is met, *in part* as the rule says.",
        "",
        "## What to believe",
        "",
        *(line.replace("LINK#", "#") for line in believe(judged)),
        "",
        f"All results below took {total(judged)}.",
        "",
    ]
    for section, results, judgement in judged:
        lines += [f"## {title(section)}", "", f"The paper: {section.claim}", ""]
        if not results:
            lines += [f"Not yet run at paper size: `python {section.script} --preset paper`.", ""]
            continue
        lines += [f"**{sentence_case(judgement)}.** {judgement.sentence}", "", f"*Rule: holds if {section.rule}*", ""]
        lines += [*(f"- {line}" for line in judgement.details), *([""] if judgement.details else [])]
        for result in results:
            lines += describe(result, root)
    return "\n".join(lines).rstrip() + "\n"


def total(judged):
    """Computing time, machine and memory of all results."""
    records = [r.record for _, results, _ in judged for r in results]
    machines = " / ".join(sorted({record["device"] for record in records}))
    memory = max(record.get("peak_memory_bytes") or 0 for record in records)
    return f"{duration(sum(record['elapsed_seconds'] for record in records))} of computing on {machines}" + (
        f", {memory / 2**30:.1f} GiB of memory at most" if memory else ""
    )


def title(section):
    return f"{section.figure}: {section.script}"


def anchor(section):
    kept = re.sub(r"[^\w\- ]", "", title(section).lower())
    return kept.replace(" ", "-")


def describe(result, root):
    record = result.record
    settings = {k: v for k, v in record["configuration"]["settings"].items() if k != "dataset"}
    pictures = [p for p in sorted((root / "figures").glob(f"{result.name}*.png")) if mine(p, result, root)]
    hashes = record["dataset"]["sha256"]
    where = f"{record['device']}, {record['threads']} threads, torch {record['versions']['torch']}"
    return [
        f"### {result.label}",
        "",
        *(f"![{p.stem}](figures/{p.name})" for p in pictures),
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


def mine(picture, result, root):
    """Is this picture result's own, and not that of a longer-named result (…_MNIST, …_radial)?"""
    others = [p.stem for p in (root / "results").glob("*.json") if len(p.stem) > len(result.name)]
    return not any(picture.stem == o or picture.stem.startswith(o + "_") for o in others)


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def readme(judged):
    rows = ["| what | command (`--preset paper`) | time | the claim |", "| --- | --- | --- | --- |"]
    for section, results, judgement in judged:
        times = "; ".join(
            duration(r.record["elapsed_seconds"]) + (f" ({r.label})" if len(results) > 1 else "") for r in results
        )
        word = f"[{judgement}](REPRODUCTION.md#{anchor(section)})" if judgement else ""
        rows.append(f"| {section.figure} | `python {section.script}` | {times or 'not yet run'} | {word} |")
    rows += ["", f"All of it: {total(judged)}."]
    findings = "\n".join(believe(judged)).replace("LINK#", "REPRODUCTION.md#")
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
    parser.add_argument("--estimate", action="store_true", help="print how long the committed results took, and stop")
    parser.add_argument("--root", type=Path, default=ROOT, help="report on the results in this folder instead")
    options = parser.parse_args()
    if options.estimate:
        records = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
        seconds, machines = sum(r["elapsed_seconds"] for r in records), {r["device"] for r in records}
        print(f"The {len(records)} committed results took {duration(seconds)} on {' / '.join(sorted(machines))}.")
        return
    found = [(section, load(section, options.root)) for section in SECTIONS]
    if not any(results for _, results in found):
        sys.exit(f"error: no results of the paper preset in {options.root / 'results'}")
    judged = [(section, results, section.judge(results) if results else None) for section, results in found]
    documents = {"REPRODUCTION.md": reproduction(judged, options.root)}
    if options.root == ROOT:
        documents["README.md"] = readme(judged)
    stale = []
    for name, text in documents.items():
        path = options.root / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not options.check:
                path.write_text(text)
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python report.py")


if __name__ == "__main__":
    main()
