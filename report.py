"""Write REPRODUCTION.md, and the README's table and findings, from results/ alone.

    python report.py            # write both
    python report.py --check    # exit with 1 if they are not what results/ says
    python report.py --estimate # how long the committed results took

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
    sys.path.insert(0, str((ROOT / section.script).parent))  # as Python does for the script it runs
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
        f"{ada} Optimizers that teleporting itself helps after epoch {early}: {listed(gains)} at the published learning "
        f"rate, {listed(left)} when each arm has its best; after epoch {last}: {listed(late)}; in test loss: {listed(test)}."
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


def so2(results):
    m = results[0].metrics
    final = {arm: median(m[arm]["final_loss"]) for arm in m}
    names = {"gd": "gradient descent", "gd_random": "random angles", "gd_published": "the published ascent"}
    names |= {"gd_maximum": "the orbit's maximum", "newton": "Newton's method"}
    drift = max(m[arm].get("largest_relative_drift", 0) for arm in m)
    return [
        "Final loss, median over starting angles: " + ", ".join(f"{names[a]} {final[a]:.2g}" for a in names) + ".",
        f"Share of the largest dL/dt that a teleport reaches: published {m['gd_published']['speed_share']:.0%}, "
        f"random angle {m['gd_random']['speed_share']:.0%}. At the maximum the gradient is within "
        f"{m['gd_maximum']['degrees_from_newton']:.0e} degrees of Newton's direction. Largest drift {drift:.0e}.",
    ]


def regression(results):
    lines = []
    for optimizer, m in results[0].metrics.items():
        arms = [arm for arm in ("published", "drift only", "exact", "exact, brief") if arm in m]
        saved = ", ".join(f"{arm} {interval(m[arm]['epochs_saved'], 0)}" for arm in arms)
        drift = ", ".join(f"{arm} {m[arm]['largest_relative_drift']:.0e}" for arm in arms)
        lines.append(f"{optimizer}, epochs saved until the loss of epoch {m['level_epoch']}: {saved}. Drift: {drift}.")
    return lines


def regression_finding(results):
    m, factors = results[0].metrics["GD"], results[0].settings.factors
    saved = {arm: m[arm]["epochs_saved"][0] for arm in ("published", "exact", "drift only")}
    best = min(range(len(factors)), key=lambda i: m["plain"]["final_loss_by_factor"][i])
    drift = m["published"]["largest_relative_drift"]
    return (
        f"The published teleport itself lowers the loss by up to {drift:.0%}. Of the {saved['published']:.0f} "
        f"epochs in {m['level_epoch']} that it saves gradient descent, that drop alone saves {saved['drift only']:.0f}, and "
        f"an exact teleport {saved['exact']:.0f}; at the best learning rate (×{factors[best]}) the final loss is "
        f"{m['plain']['final_loss_by_factor'][best]:.2f} without and {m['exact']['final_loss_by_factor'][best]:.2f} with it."
    )


def sharpness_curvature(results):
    lines = []
    for r in results:
        for key, m in r.metrics.items():
            if key == "no_teleport":
                continue
            change = "diverged" if m["total_change"] is None else f"{m['total_change']:+.1%}"
            lines.append(
                f"{r.label}, {arm_name(key)}: {m['moved_as_asked']} of {m['teleports']} teleports went as asked, {change} in "
                f"all; test loss minus no teleport {interval(m['minus_no_teleport'])} ({verdict(m['minus_no_teleport'])})."
            )
    return lines


def sharpness_curvature_finding(results):
    better, worse = [], []
    for r in results:
        for key, m in r.metrics.items():
            if key.endswith("_teleport") and key != "no_teleport":
                word, (middle, *_) = verdict(m["minus_no_teleport"]), m["minus_no_teleport"]
                if word in ("better", "worse"):
                    (better if word == "better" else worse).append(f"{arm_name(key)} {middle:+.4f} ({r.label})")
    return (
        "Teleporting to flatter, sharper, more or less curved points (test loss minus no teleport, 95 % interval without "
        f"zero): better after {listed(better)}; worse after {listed(worse)}."
    )


def arm_name(key):
    objective, direction, kind = key.split("_")
    return f"{'φ' if objective == 'sharpness' else 'ψ'} {direction}, {kind}"


def learning(results):
    m = results[0].metrics
    lines = []
    for arm, v in m.items():
        if arm == "GD":
            continue
        extra = (
            f", drift of a teleport at most {v['largest_relative_drift']:.0e}"
            if v.get("largest_relative_drift")
            else ""
        )
        lines.append(
            f"{arm}: final loss / GD's {factor(v['ratio_to_GD'])} ({v['verdict']}), / GD at the clamp's rate "
            f"{factor(v['ratio_to_clamp'])}{extra}."
        )
    return lines


def learning_finding(results):
    m, s = results[0].metrics, results[0].settings
    names = ("LSTM(lr, teleport)", "LSTM(lr)", "LSTM(update, teleport)", "LSTM(update)")
    ratios = ", ".join(f"{arm} {factor(m[arm]['ratio_to_GD'])}" for arm in names)
    return (
        f"Loss after {s.steps} steps over gradient descent's, on {s.seeds} held-out problems: {ratios}; "
        f"gradient descent at the learned rate's upper limit, with nothing learned, "
        f"{factor(m['GD, rates of the clamp']['ratio_to_GD'])}."
    )


def factor(triple):
    """A ratio (mean, low, high) as text."""
    if triple is None or triple[0] is None:
        return "diverged"
    middle, low, high = triple
    return f"{middle:.3g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]")


def classification(results):
    lines = []
    for r in results:
        for network, m in r.metrics.items():
            cells = ", ".join(
                f"{arm} {interval(m[arm]['train_loss_minus_plain'])} ({verdict(m[arm]['train_loss_minus_plain'])})"
                for arm in m
                if arm != "plain"
            )
            drift = ", ".join(f"{a} {m[a]['largest_relative_drift']:.0e}" for a in ("published", "exact", "rescaling"))
            lines.append(f"{r.label}, {network}, final training loss minus plain: {cells}. Drift: {drift}.")
    return lines


def sampling(results):
    m = results[0].metrics
    lines = [
        f"{arm}: final training loss minus SGD's {interval(m[arm]['train_loss_minus_SGD'])} "
        f"({verdict(m[arm]['train_loss_minus_SGD'])})."
        for arm in m
        if "train_loss_minus_SGD" in m.get(arm, {}) and arm != "SGD"
    ]
    lines.append(
        f"Ascent reaches the gradient norm that {m['gradient_evaluations']['search']} candidates found after "
        f"{', '.join(map(str, m['gradient_evaluations']['ascent']))} gradient evaluations."
    )
    return lines


def sampling_finding(results):
    m = results[0].metrics
    loss = {arm: mean(m[arm]["final_train_loss"]) for arm in ("SGD", "search", "rescaling", "SGD lr x10")}
    cost = m["gradient_evaluations"]
    return (
        f"The best of {cost['search']} random elements takes SGD's final training loss from "
        f"{loss['SGD']:.3f} to {loss['search']:.3f}; one rescaling number that gives the same gradient norm, to "
        f"{loss['rescaling']:.3f}, and a tenfold learning rate to {loss['SGD lr x10']:.3f}. Gradient ascent finds that norm "
        f"in {min(cost['ascent'])} to {max(cost['ascent'])} gradient evaluations instead of {cost['search']}."
    )


def dynamics(results):
    m = results[0].metrics
    lines = [
        f"{name}: Q drifts by {abs(v['drift_at_equal_time'][0]):.1e} at the largest step size, as its power "
        f"{v['order_in_step_size']:.2f}; the control (terms added, not subtracted) moves by "
        f"{abs(v['control_at_equal_time'][0]):.2g}, as its power {v['control_order']:.2f}."
        for name, v in m.items()
    ]
    return lines


def dynamics_finding(results):
    orders = [v["order_in_step_size"] for v in results[0].metrics.values()]
    return (
        f"Gradient flow's conserved quantities are conserved: under gradient descent they drift in proportion to the "
        f"step size to the power {min(orders):.2f} to {max(orders):.2f}."
    )


def distribution(results):
    off = max(abs(v["standard_errors_off"]) for v in results[0].metrics.values())
    spread = max(abs(v["std"] / v["expected_std"] - 1) for v in results[0].metrics.values())
    return [
        f"Q of Xavier draws has the closed-form mean (at most {off:.1f} standard errors off) and deviation (to "
        f"{spread:.0%}): it concentrates around a value that the shape and the activation fix."
    ]


def convergence(results):
    m, s = results[0].metrics, results[0].settings
    lines = []
    for name, v in m.items():
        published, orbit = len(s.stds), [s.base, *range(len(s.stds), len(v["Q_start"]))]
        pairs = [
            ", ".join(f"Q = {v['Q_start'][i]:.4g}: {steps(v['steps_to_threshold'][i])}" for i in chosen)
            for chosen in (range(published), orbit)
        ]
        lines.append(
            f"{name}, steps to loss {s.threshold:g}: published starts {pairs[0]}. The same start function, moved along "
            f"its orbit: {pairs[1]}."
        )
    return lines


def convergence_radial(results):
    m = results[0].metrics
    times = [t for t in m["flow_time_over_Q"] if t]
    return [
        f"All starts compute the same function, and the time to converge is proportional to Q: flow time / Q = "
        f"{min(times):.3f} to {max(times):.3f} over Q = {m['Q_start'][0]:.2g} to {m['Q_start'][len(times) - 1]:.2g}; "
        f"Q = {m['Q_start'][-1]:.4g} {'converges' if m['steps_to_reduction'][-1] else 'does not converge in time'}."
    ]


def hessian(results):
    lines = []
    for name, v in results[0].metrics.items():
        largest = ", ".join(f"{e:.3g}" for e in v["largest"])
        values = ", ".join(f"{q:.4g}" for q in v["Q"])
        lines.append(f"{name}: largest eigenvalues {largest} at minima with Q = {values} (the last three: one orbit).")
    return lines


def ensembles(results):
    lines = []
    for r in results:
        gains = next(v for k, v in r.metrics.items() if k.startswith("accuracy of") and "minus original" in k)
        on_batch = next(v for k, v in r.metrics.items() if k.startswith("relative change of the logits on the batch"))
        base = r.metrics["original: accuracy"]
        for arm, by_epsilon in gains.items():
            cells = ", ".join(f"{v['mean']:+.1f} ± {v['std']:.1f} at ε = {e}" for e, v in by_epsilon.items())
            lines.append(
                f"{r.label}, {arm}, accuracy minus the original's {100 * base['mean']:.1f} %, points: {cells}."
            )
        exact = max(change for epsilon, change in on_batch.items() if float(epsilon) <= 1)
        lines.append(f"{r.label}: on the batch that defined π the logits change by at most {exact:.0e} (ε ≤ 1).")
    return lines


def adversarial(results):
    lines = []
    for r in results:
        for attack in ("FGSM", "PGD"):
            for attacked in ("base model", "itself", "either"):
                by_model = r.metrics[f"accuracy under {attack}, attacked: {attacked}"]
                cells = []
                for model in ("original", "group"):
                    (clean, _), *_, (strength, last) = by_model[model].items()
                    cells.append(f"{model} {100 * by_model[model][clean]['mean']:.1f} → {100 * last['mean']:.1f} %")
                lines.append(f"{r.label}, {attack} up to {strength} on {attacked}: " + ", ".join(cells) + ".")
    return lines


def adversarial_finding(results):
    def at(attacked, model):
        *_, last = results[0].metrics[f"accuracy under FGSM, attacked: {attacked}"][model].values()
        return 100 * last["mean"]

    clean = {
        m: 100 * next(iter(results[0].metrics["accuracy under FGSM, attacked: base model"][m].values()))["mean"]
        for m in ("original", "group")
    }
    return (
        f"Symmetry ensembles under FGSM ({results[0].label}): {at('itself', 'group'):.1f} % accuracy when attacked through "
        f"their own gradients, {at('either', 'group'):.1f} % when the base model's attack counts as well, against "
        f"{at('either', 'original'):.1f} % for the base model; without attack {clean['group']:.1f} against "
        f"{clean['original']:.1f} %."
    )


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
        "Figure 4",
        "teleport_sharpness_curvature.py",
        "Teleporting to flatter points improves generalization slightly, and so does teleporting to higher curvature.",
        "final test loss of each arm minus no teleport, paired by run.",
        sharpness_curvature,
        sharpness_curvature_finding,
    ),
    Section(
        "Figure 6",
        "learn-to-teleport/multi_layer_regression.py",
        "Meta-optimizers that learn the teleport with the learning rate or the update beat gradient descent.",
        "geometric mean over held-out problems of the final loss over gradient descent's, with its 95 % interval.",
        learning,
        learning_finding,
        "learn_to_teleport",
    ),
    Section(
        "Figure 7",
        "displacement_integration.py",
        "When the loss landscape shifts, the expected distance to a more curved minimum is larger.",
        "exact mean distances; the published polyline's largest relative error.",
        displacement,
    ),
    Section(
        "Booth (NeurIPS 2022)",
        "symmetry-teleportation/booth.py",
        "One teleport along the level set lets gradient descent converge like Newton's method.",
        "final losses, and how much of the orbit's largest dL/dt a teleport reaches.",
        so2,
    ),
    Section(
        "Rosenbrock (NeurIPS 2022)",
        "symmetry-teleportation/rosenbrock.py",
        "Teleportation accelerates gradient descent.",
        "as for Booth.",
        so2,
    ),
    Section(
        "Regression (NeurIPS 2022)",
        "symmetry-teleportation/multi_layer_regression.py",
        "One teleport at epoch 5 accelerates gradient descent and AdaGrad.",
        "epochs saved until the loss that the plain optimizer reaches later; exact, published, and the published drift alone.",
        regression,
        regression_finding,
    ),
    Section(
        "MNIST classification (NeurIPS 2022)",
        "symmetry-teleportation/mnist_classification.py",
        "Teleports in the first epochs accelerate SGD and AdaGrad.",
        "final training loss minus the plain optimizer's; largest relative change of a teleport batch's loss.",
        classification,
    ),
    Section(
        "Sampling (Fashion-MNIST variant)",
        "symmetry-teleportation/random_search.py",
        "Keeping the best of 1000 random group elements accelerates SGD.",
        "final training loss minus SGD's, and gradient evaluations to the same norm.",
        sampling,
        sampling_finding,
    ),
    Section(
        "Q dynamics (ICLR 2023, Figure 3)",
        "gradient-flow-symmetry/Q_dynamics_elementwise.py",
        "Q is nearly constant during gradient descent.",
        "drift of Q at equal training time, as a power of the step size; 1 is what a first-order method leaves.",
        dynamics,
        dynamics_finding,
    ),
    Section(
        "Q distribution (ICLR 2023, Figures 4 and 5)",
        "gradient-flow-symmetry/Q_distribution.py",
        "Common initializations reach a narrow range of Q only.",
        "1000 draws against closed-form mean and standard deviation.",
        distribution,
    ),
    Section(
        "Q and convergence (ICLR 2023, Figure 6)",
        "gradient-flow-symmetry/Q_convergence_elementwise.py",
        "Convergence depends on Q.",
        "steps to a loss, from the published starts (which differ in function too) and along one orbit (which do not).",
        convergence,
    ),
    Section(
        "Q and convergence, radial (ICLR 2023, Figure 7)",
        "gradient-flow-symmetry/Q_convergence_radial.py",
        "Convergence depends on Q.",
        "time to reduce the loss, divided by Q.",
        convergence_radial,
    ),
    Section(
        "Q and the Hessian (ICLR 2023, Figure 9)",
        "gradient-flow-symmetry/Q_hessian_eigenvalues.py",
        "Q goes with the sharpness of the minimum.",
        "largest Hessian eigenvalue at minima with different Q.",
        hessian,
    ),
    Section(
        "Ensembles (ICLR 2023, Figure 10)",
        "gradient-flow-symmetry/ensemble_cifar.py",
        "Ensembles of a network moved along its symmetry improve accuracy at no training cost.",
        "accuracy minus the original network's, mean ± std over seeds.",
        ensembles,
    ),
    Section(
        "Attacks (ICLR 2023, Figure 11)",
        "gradient-flow-symmetry/adversarial_cifar.py",
        "Such ensembles are more robust to adversarial attacks.",
        "accuracy without attack → at the strongest one, by which model's gradients were attacked; either: both must fail.",
        adversarial,
        adversarial_finding,
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
    parser.add_argument("--estimate", action="store_true", help="print how long the committed results took, and stop")
    options = parser.parse_args()
    if options.estimate:
        records = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
        seconds, machines = sum(r["elapsed_seconds"] for r in records), {r["device"] for r in records}
        print(f"The {len(records)} committed results took {duration(seconds)} on {' / '.join(sorted(machines))}.")
        return
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
