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
from collections import Counter
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
    metrics: dict  # the outcome's, with NaN where the file says null
    table: str

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
    source: str = "The paper"  # of the claim
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
        metrics = _with_nan(outcome.metrics)
        results.append(Result(name, record, outcome, settings, metrics, script["report"](outcome, settings)))
    return results


def _with_nan(value):
    if isinstance(value, dict):
        return {k: _with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_nan(v) for v in value]
    return math.nan if value is None else value


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
    adagrad = "AdaGrad's gain is the restart of its state" if restart and not kept else "AdaGrad"
    sentence = (
        f"With the optimizer's state kept, teleporting lowers the training loss after epoch {early} for {listed(both)} (also "
        f"at each arm's best learning rate), after epoch {last} for {listed(helped(last, 'at_best_rate'))}. "
        f"{adagrad}: {loss['baseline']:.4f} alone, "
        f"{loss['restart']:.4f} restarted without teleporting, {loss['teleport']:.4f} teleported with its state kept."
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
    arms, arrays = list(m["AdaGrad"]), results[0].outcome.arrays
    for a, arm in enumerate(arms):
        if arm in ("published", "teleport", "rescaling"):
            norms = {o: arrays[f"{o}/teleport_gradient_norm"][a] for o in m}  # (…, [before, after])
            grown = ", ".join(f"{o} {np.nanmedian(n[..., 1] / n[..., 0] - 1):+.1%}" for o, n in norms.items())
            details.append(f"What a teleport does to ‖∂L/∂W‖, {arm}, median: {grown}.")
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
        return ", ".join(f"{c(r, name)['r']:.2f} on {r.label}" for r in results)

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
    sentence = f"r(φ, test loss) = {where('phi')}; r(ψ, test loss) = {where('psi')}."
    missing = {n: [r.label for r in results if r.label not in right[n]] for n in signs}
    limits = "; ".join(
        f"not {'φ' if n == 'phi' else 'ψ'} on {listed(labels)}" for n, labels in missing.items() if labels
    )
    return Verdict(grade(full, any(right.values())), limits, sentence, details)


def sharpness_curvature(results):
    def arms(key):
        return [(r.label, r.metrics[key]) for r in results]

    def text(key):
        return ", ".join(f"{interval(m['minus_no_teleport'])} on {label}" for label, m in arms(key))

    def labels(key, word):
        return [label for label, m in arms(key) if verdict(m["minus_no_teleport"]) == word]

    up, down, n = "curvature_up_teleport", "sharpness_down_teleport", len(results)
    improves, negligible = labels(up, "better"), labels(down, "no difference")
    words, details = Counter(), []
    for r in results:
        for key, m in r.metrics.items():
            if key == "no_teleport":
                continue
            word = "diverged" if math.isnan(m["minus_no_teleport"][0]) else verdict(m["minus_no_teleport"])
            change = "diverged" if math.isnan(m["total_change"]) else f"{m['total_change']:+.1%}"
            details.append(
                f"{r.label}, {arm_name(key)}: {m['moved_as_asked']} of {m['teleports']} teleports went as asked, "
                f"{change} in all; test loss minus no teleport {interval(m['minus_no_teleport'])} ({word})."
            )
            if key not in (up, down):
                words[word] += 1
    others = "; ".join(f"{count} {word}" for word, count in words.items())
    details.append(f"The other arms, controls included: {others}.")
    limits = []
    if len(improves) < n:
        limits.append(
            f"larger curvature lowers the test loss {'on ' + listed(improves) + ' only' if improves else 'nowhere'}"
        )
    diverged = [label for label, m in arms(down) if math.isnan(m["minus_no_teleport"][0])]
    matter = [r.label for r in results if r.label not in negligible + diverged]
    if matter:
        limits.append(f"flatter points matter on {listed(matter)}")
    if diverged:
        limits.append(f"some runs sent to flatter points diverge on {listed(diverged)}")
    return Verdict(
        grade(len(improves) == len(negligible) == n, improves),
        "; ".join(limits),
        f"Final test loss after teleporting to larger curvature minus that without: {text(up)}.",
        details,
    )


def arm_name(key):
    objective, direction, kind = key.split("_")
    return f"{'φ' if objective == 'sharpness' else 'ψ'} {direction}, {kind}"


def learning(results):
    m, s = results[0].metrics, results[0].settings
    arms = {"LSTM(lr, teleport)": "LSTM(lr)", "LSTM(update, teleport)": "LSTM(update)"}
    beat = [m[arm]["verdict"] == "better" for arm in arms]
    add = [m[arm]["ratio_to_no_element"][2] < 1 for arm in arms]
    pairs = (
        f"{a} {m[a]['ratio_to_GD'][0]:.3f}, without teleport {m[b]['ratio_to_GD'][0]:.3f}" for a, b in arms.items()
    )
    sentence = (
        f"Loss after {s.steps} steps over gradient descent's: {'; '.join(pairs)}; gradient descent at the learned rate's "
        f"upper limit, with nothing learned, {m['GD, rates of the clamp']['ratio_to_GD'][0]:.3f}."
    )
    details = []
    for arm, v in m.items():
        if arm == "GD":
            continue
        drift = v.get("largest_relative_drift")
        details.append(
            f"{arm}: final loss / GD's {factor(v['ratio_to_GD'])} ({v['verdict']}), / GD at the clamp's rate "
            f"{factor(v['ratio_to_clamp'])}{f', drift of a teleport at most {drift:.0e}' if drift else ''}; of "
            f"{v['meta_seeds']} meta-seeds {v['meta_seeds_better_than_GD']} beat GD, the best in meta-training is shown."
        )
    limits = "no better than without the teleport" if all(beat) else "no better than gradient descent"
    return Verdict(grade(all(beat) and all(add), all(beat)), limits, sentence, details)


def factor(triple):
    """A ratio (mean, low, high) as text."""
    middle, low, high = triple
    return (
        "diverged" if math.isnan(middle) else f"{middle:.3g}" + ("" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]")
    )


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
        "random angles do as well as the published ascent" if faster["gd"] else "no faster",
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
        rate = {arm: int(np.nanargmin(m[arm]["final_loss_by_factor"])) for arm in ("plain", "exact")}
        final = dict(zip(arms, arrays[f"{optimizer}_rates/loss"][..., -1]))  # arm: (factors, runs)
        gain = difference(final["exact"][rate["exact"]], final["plain"][rate["plain"]])
        saves.append(m["exact"]["epochs_saved"][1] > 0)
        gains.append(verdict(gain) == "better")
        best.append(
            f"{optimizer} {interval(gain, 3)} (×{factors[rate['exact']]:g} against ×{factors[rate['plain']]:g})"
        )
        arms.remove("plain")
        saved = ", ".join(f"{arm} {interval(m[arm]['epochs_saved'], 0)}" for arm in arms)
        drift = ", ".join(f"{arm} {m[arm]['largest_relative_drift']:.0e}" for arm in arms)
        details.append(
            f"{optimizer}, epochs saved until the loss of epoch {m['level_epoch']}: {saved}. Drift: {drift}."
        )
    m = metrics["GD"]
    saved = {arm: m[arm]["epochs_saved"][0] for arm in ("published", "exact", "drift only")}
    details.append(f"Final loss, exact minus plain, each at its best learning rate: {'; '.join(best)}.")
    details.append(
        f"The published teleport itself lowers gradient descent's loss by up to "
        f"{m['published']['largest_relative_drift']:.0%}; that drop alone saves {saved['drift only']:.0f} epochs."
    )
    sentence = (
        f"An exact teleport saves gradient descent {saved['exact']:.0f} of {m['level_epoch']} epochs; each at its best "
        f"learning rate, the final loss changes by {'; '.join(best)}."
    )
    limits = "not at the best learning rate" if all(saves) else "no epochs saved by one of the two"
    return Verdict(grade(all(saves) and all(gains), any(saves)), limits, sentence, details)


def classification(results):
    details, better, beyond, exact = [], [], [], []
    for r in results:
        for network, m in r.metrics.items():
            change = {arm: m[arm]["train_loss_minus_plain"] for arm in m if arm != "plain"}
            name = network.replace("_", " ")
            faster = difference(m["exact"]["final_train_loss"], m["lr x3"]["final_train_loss"])
            better += [name] if verdict(change["exact"]) == "better" else []
            beyond += [name] if verdict(faster) == "better" else []
            exact.append(f"{name} {change['exact'][0]:+.3f} (learning rate ×3: {change['lr x3'][0]:+.3f})")
            cells = ", ".join(f"{arm} {interval(v)} ({verdict(v)})" for arm, v in change.items())
            drift = ", ".join(
                f"{a} {m[a]['largest_relative_drift']:.0e} ({np.abs(m[a]['whole_loss_drift']).max():.0e})"
                for a in ("published", "exact", "rescaling")
            )
            details.append(
                f"{r.label}, {name}, final training loss minus plain: {cells}. Drift on the teleport's batch (the whole "
                f"training set): {drift}."
            )
    return Verdict(
        grade(len(better) == len(beyond) == len(exact), better),
        f"{listed(better)} only, and less than a threefold learning rate does" if better else "nowhere",
        f"Final training loss with exact teleports minus without: {', '.join(exact)}.",
        details,
    )


def sampling(results):
    m = results[0].metrics
    arms = [arm for arm in m if "train_loss_minus_SGD" in m[arm] and arm != "SGD"]
    gain = verdict(m["search"]["train_loss_minus_SGD"]) == "better"
    controls = {"random": "one random element", "rescaling": "one rescaling number of the same gradient norm"}
    controls["SGD lr x10"] = "a tenfold learning rate"
    matched = [name for a, name in controls.items() if not m[a]["train_loss_minus_search"][1] > 0]
    loss = {arm: mean(m[arm]["final_train_loss"]) for arm in ("SGD", "search", *controls)}
    cost = m["gradient_evaluations"]
    sentence = (
        f"Final training loss: SGD {loss['SGD']:.3f}, with the best of {cost['search']} {loss['search']:.3f}; with "
        f"{', '.join(f'{name} {loss[a]:.3f}' for a, name in controls.items())}."
    )
    details = [
        f"{arm}: final training loss minus SGD's {interval(m[arm]['train_loss_minus_SGD'])} "
        f"({verdict(m[arm]['train_loss_minus_SGD'])})."
        for arm in arms
    ]
    details.append(
        f"Gradient ascent reaches the norm that sampling finds in {min(cost['ascent'])} to {max(cost['ascent'])} gradient "
        f"evaluations instead of {cost['search']}; the loss that follows is "
        f"{interval(m['ascent']['train_loss_minus_search'], 3)} above sampling's."
    )
    limits = f"{listed(matched, ' and ')} do{'es' if len(matched) == 1 else ''} as well or better"
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
        along = [s.steps if math.isnan(needed[i]) else needed[i] for i in orbit]  # at least, if it was not reached
        spread[name] = max(along) / min(along)
        ordered += [name] if monotone([Q[i] for i in orbit], along) else []
        pairs = [", ".join(f"Q = {Q[i]:.4g}: {steps(needed[i])}" for i in chosen) for chosen in (published, orbit)]
        details.append(
            f"{name}, steps to loss {s.threshold:g}: published starts {pairs[0]}. The same start function, moved along "
            f"its orbit: {pairs[1]}."
        )
    depends = [ratio > 2 for ratio in spread.values()]
    cells = ", ".join(f"×{ratio:.1f} ({name})" for name, ratio in spread.items())
    return Verdict(
        grade(all(depends) and len(ordered) == len(m), any(depends)),
        f"in the order of Q or its size for {listed(ordered)} only",
        f"Along one orbit, where all starts compute the same function, the steps to the loss {s.threshold:g} differ by up "
        f"to {cells}.",
        details,
    )


def monotone(Q, values):
    """Do the values rise or fall with Q, or with |Q|?"""
    sequences = ([values[i] for i in sorted(range(len(Q)), key=key)] for key in (lambda i: Q[i], lambda i: abs(Q[i])))
    return any(q in (sorted(values), sorted(values, reverse=True)) for q in sequences)


def convergence_radial(results):
    m = results[0].metrics
    times = [t for t in m["flow_time_over_Q"] if t > 0]  # NaN where it does not converge
    return Verdict(
        grade(max(times) < 1.1 * min(times), len(times) > 1),
        "not in proportion",
        f"All starts compute the same function, and the time to converge is proportional to Q: flow time / Q = "
        f"{min(times):.3f} to {max(times):.3f} over Q = {m['Q_start'][0]:.2g} to {m['Q_start'][len(times) - 1]:.2g}; "
        f"Q = {m['Q_start'][-1]:.4g} {'does not converge in time' if math.isnan(m['steps_to_reduction'][-1]) else 'converges'}.",
    )


def hessian(results):
    s, details, ranges, ordered, along = results[0].settings, [], [], [], []
    for name, v in results[0].metrics.items():
        starts, orbit = range(len(s.stds)), [s.base, *range(len(s.stds), len(v["Q"]))]
        for chosen, names in ((starts, ordered), (orbit, along)):
            names += [name] if monotone([v["Q"][i] for i in chosen], [v["largest"][i] for i in chosen]) else []
        largest = [v["largest"][i] for i in sorted(starts, key=lambda i: v["Q"][i])]
        ranges.append(f"{name} {', '.join(f'{e:.3g}' for e in largest)}")
        eigenvalues = ", ".join(f"{e:.3g}" for e in v["largest"])
        values = ", ".join(f"{q:.4g}" for q in v["Q"])
        details.append(
            f"{name}: largest eigenvalues {eigenvalues} at minima with Q = {values} (the last {len(orbit) - 1}: moved along "
            f"the orbit of number {s.base + 1})."
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
    similar = {arm: [e for e, v in by_epsilon.items() if v["mean"] >= -1] for arm, by_epsilon in gains.items()}
    alone = [e for e in similar["group"] if not any(e in similar[arm] for arm in ("inverse", "random", "shuffled"))]
    _, best = max(gains["group"].items(), key=lambda item: item[1]["mean"])
    exact = max(change for epsilon, change in on_batch.items() if float(epsilon) <= 1)
    sentence = (
        f"Accuracy of the vote within a point of the network's {100 * base['mean']:.1f} % ({r.label}): at ε = "
        f"{listed(similar['group'])}, with random matrices at ε = {listed(similar['random'])}; it gains at most "
        f"{best['mean']:+.2f} points. On the batch that defined π the logits change by at most {exact:.0e} (ε ≤ 1)."
    )
    details = []
    for arm, by_epsilon in gains.items():
        cells = ", ".join(f"{v['mean']:+.1f} ± {v['std']:.1f} at ε = {e}" for e, v in by_epsilon.items())
        details.append(f"{arm}, accuracy minus the original's, points: {cells}.")
    everywhere = len(similar["group"]) == len(alone) == len(gains["group"])
    limits = f"for moves of ε = {listed(similar['group'])}; {'more than a control at ' + listed(alone) if alone else 'no more than controls'}"
    return Verdict(grade(everywhere, similar["group"]), limits, sentence, details)


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
        f"Accuracy under the strongest FGSM ({r.label}): {percent('FGSM', 'itself', 'group')} % when attacked through the "
        f"ensemble's own gradients, {percent('FGSM', 'either', 'group')} % when the base model's attack counts too, against "
        f"the base model's {percent('FGSM', 'either', 'original')} %; without attack {percent('FGSM', 'either', 'group', 0)} "
        f"against {percent('FGSM', 'either', 'original', 0)} %."
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
    limits = f"at a cost of {loss:.1f} points without attack"
    if not all(robust["either"]):
        limits = "through their own gradients only" if any(robust["itself"]) else "under neither attack"
    return Verdict(
        grade(all(robust["either"]) and loss <= 1, all(robust["either"]) or any(robust["itself"])),
        limits,
        sentence,
        details,
    )


def steps(count):
    return "not reached" if math.isnan(count) else f"{count:,.0f}"


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def listed(names, last=", "):
    return last.join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "none"


def mean(values):
    return sum(values) / len(values)


def interval(triple, digits=4):
    """A difference (mean, low, high) as text."""
    middle, low, high = triple
    if math.isnan(middle):
        return "diverged"
    return f"{middle:+.{digits}f}" + ("" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


OF_SO2 = (
    "the published teleport's median final loss is at most a tenth of plain gradient descent's and of that after random angles; in part: of the "
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
        "both kinds beat gradient descent and themselves without the teleport; in part: gradient descent only. "
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
        "an exact teleport saves both of them epochs, and lowers their final loss when each arm has its best learning rate; "
        "in part: some epochs. Epochs: until the loss that the plain optimizer reaches later.",
        regression,
        believe=True,
    ),
    Section(
        "MNIST classification (NeurIPS 2022)",
        "symmetry-teleportation/mnist_classification.py",
        "Teleports in the first epochs accelerate SGD and AdaGrad.",
        "exact teleports lower the final training loss of every network and optimizer, and more than a threefold learning "
        "rate does; in part: lower it for some.",
        classification,
    ),
    Section(
        "Sampling (Fashion-MNIST variant)",
        "symmetry-teleportation/random_search.py",
        "Keeping the best of 1000 random group elements accelerates SGD.",
        "the final training loss is below SGD's and below that of three controls, one random element, a rescaling by one "
        "number and a tenfold learning rate; in part: below SGD's only.",
        sampling,
        believe=True,
        source="An unofficial variant of the paper's",
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
        "Common initializations concentrate Q in a narrow range.",
        "the draws agree with a closed-form mean (4 standard errors) and deviation (10 %), which say how narrow.",
        distribution,
    ),
    Section(
        "Q and convergence (ICLR 2023, Figure 6)",
        "gradient-flow-symmetry/Q_convergence_elementwise.py",
        "The rate of convergence is related to Q.",
        "along one orbit, whose points compute the same function, the steps to a loss differ more than twofold, in the "
        "order of Q or of |Q|, for every activation; in part: they differ. The published starts differ in function too.",
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
        "the largest Hessian eigenvalue is monotone in Q or in |Q|, over the published starts and along one orbit, for every "
        "activation; in part: for some.",
        hessian,
    ),
    Section(
        "Ensembles (ICLR 2023, Figure 10)",
        "gradient-flow-symmetry/ensemble_cifar.py",
        "A nonlinear, data-dependent symmetry turns a trained network into others that perform similarly on new samples, "
        "so that ensembles need no training.",
        "the vote's accuracy is at most one point below the network's at every size ε of the moves, and that of controls (π "
        "from random matrices, inverted, shuffled) is not; in part: at some ε, controls or not.",
        ensembles,
    ),
    Section(
        "Attacks (ICLR 2023, Figure 11)",
        "gradient-flow-symmetry/adversarial_cifar.py",
        "Ensembles of a network moved along a symmetry are more robust to certain adversarial attacks.",
        "they are more accurate than the base model under the strongest FGSM and PGD when the attacks on either model must fail, and "
        "at most a point less without attack; in part: at a greater cost, or through the ensemble's own gradients only.",
        adversarial,
        believe=True,
    ),
)


# ------------------------------------------------------------------------------------------------------------- writing


def believe(judged):
    """The findings, a line each: the verdict, the claim, the numbers, the evidence."""
    return [
        f"- *{section.claim}* **{sentence_case(judgement)}.** {judgement.sentence} "
        f"[{section.figure}](LINK#{anchor(section)})"
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
        f"All results below took {total(records_of(judged))}.",
        "",
    ]
    for section, results, judgement in judged:
        lines += [f"## {title(section)}", "", f"{section.source}: {section.claim}", ""]
        if not results:
            lines += [f"Not yet run at paper size: `python {section.script} --preset paper`.", ""]
            continue
        lines += [f"**{sentence_case(judgement)}.** {judgement.sentence}", "", f"*Rule: holds if {section.rule}*", ""]
        lines += [*(f"- {line}" for line in judgement.details), *([""] if judgement.details else [])]
        for result in results:
            lines += describe(result, root)
    return "\n".join(lines).rstrip() + "\n"


def records_of(judged):
    return [r.record for _, results, _ in judged for r in results]


def total(records):
    """Computing time, machine and memory of all results."""
    machines = " / ".join(sorted({record["device"] for record in records}))
    memory = [record["peak_memory_bytes"] for record in records if record.get("peak_memory_bytes")]
    where = "" if len(memory) == len(records) else f" (of {len(memory)} of {len(records)} results)"
    return (
        f"{duration(sum(record['elapsed_seconds'] * record.get('ranks', 1) for record in records))} of computing on "
        f"{machines}" + (f", at most {max(memory) / 2**30:.1f} GiB of memory{where}" if memory else "")
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
    ranks = f"{record['ranks']} ranks of " if record.get("ranks", 1) > 1 else ""
    where = f"{record['device']}, {ranks}{record['threads']} thread(s), torch {record['versions']['torch']}"
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
        options = " --dataset all" if len(results) > 1 else ""
        rows.append(f"| {section.figure} | `python {section.script}{options}` | {times or 'not yet run'} | {word} |")
    rows += ["", f"All of it: {total(records_of(judged))}."]
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
        print(f"The {len(records)} committed results took {total(records)}.")
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
