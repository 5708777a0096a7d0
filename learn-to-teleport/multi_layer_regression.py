"""ICLR 2024 (arXiv 2305.13404), Figure 6: learning to teleport, on the regression of a two-layer 20-20-20 network.

Meta-optimizers (meta_optimizer.py, Algorithm 1) learn where to teleport, together with the learning rate (lr) or with
the local update. Held-out problems: five published ones, and beyond the paper as many as --seeds, of which the five
are the first. One number a meta-optimizer, fixed beforehand: the mean log loss over problems after the last step; what
is compared are meta-seeds, each trained anew, for they differ more than problems do. The arms, published:

  GD                      learning rate 3e-4
  LSTM(lr, teleport)      learned element of norm 0.01, learned learning rate, clamped to at most 5e-3
  LSTM(update, teleport)  learned element, learned local update
  LSTM(update)            learned local update alone

Controls:

  …, published inverse    I − T for (I + T)^-1, as in the published code; every other arm uses the exact inverse
  …, full meta-gradient   differentiates through ∂L/∂W too, the only thing that a teleport changes
  LSTM(…, random element) the learned element replaced by a random one of the same norm
  LSTM(lr)                no element
  GD, rates of the clamp  no meta-optimizer: 1e-4 at the first step, as LSTM(lr, …) has it, then the clamp's 5e-3
  GD, best rate           the same with the best second rate on the meta-training problems

An arm's meta-seeds train as one stack, as do all arms of the lr kind. Curves are of the meta-seed with the lowest loss
in meta-training. The published learned updates diverged; so do some meta-seeds of all of these, teleporting or not.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from meta_optimizer import (
    FIRST_RATE,
    RATES,
    Diverged,
    Learner,
    MetaOptimizer,
    gradient_descent,
    meta_test,
    meta_train,
    regression,
)
from meta_seeds import PROBLEMS, over_meta_seeds, recorded, rising, updates

from common import UserError, cli, plots
from common.claims import Claim, Verdict, change, except_for, factor, graded, settle, table
from common.run import Outcome
from common.statistics import compare as compared

CLAIM = Claim(
    order=40,
    figure="Figure 6",
    paper="ICLR 2024",
    section="Section 5.2",
    says="Meta-optimizers that learn the teleport with the learning rate or the update beat gradient descent.",
    short="learned teleports beat gradient descent",
    rule="holds if over meta-seeds both kinds have a better mean log loss after the last step than gradient descent, "
    "than gradient descent at the learned rate's clamp, with nothing learned, and than themselves without teleport; in "
    "part: one kind does. Margin 1 %; Holm over the six.",
    dated="2026-11-25",
    headline=True,
)

# Trained together, part by part.
PARTS = {
    "lr": [
        Learner("LSTM(lr, teleport)", "rate", "learned"),
        Learner("LSTM(lr, teleport), published inverse", "rate", "learned", "first-order"),
        Learner("LSTM(lr, teleport), full meta-gradient", "rate", "learned", meta_gradient="full"),
        Learner("LSTM(lr, random element)", "rate", "random"),
        Learner("LSTM(lr)", "rate", None),
    ],
    "update_teleport": [Learner("LSTM(update, teleport)", "update", "learned")],
    "update_published": [Learner("LSTM(update, teleport), published inverse", "update", "learned", "first-order")],
    "update_random": [Learner("LSTM(update, random element)", "update", "random")],
    "update": [Learner("LSTM(update)", "update", None)],
}
CLAMP = "GD, rates of the clamp"
GD_ARMS = ("GD", CLAMP, "GD, best rate")
TELEPORTING = {"LSTM(lr, teleport)": "LSTM(lr)", "LSTM(update, teleport)": "LSTM(update)"}  # and without
FIGURE = ("GD", "LSTM(lr, teleport)", "LSTM(update)", "LSTM(update, teleport)")
BEFORE = "Under the rule of 2026-11-22 (best meta-seed, over problems): in part, no better than without the teleport."


@dataclass(frozen=True)
class Settings:
    seeds: int = 100  # held-out problems
    steps: int = 30  # on each
    meta_seeds: int = 20  # initial weights of the meta-optimizers of the lr kind
    update_meta_seeds: int = 10  # of the update kind
    lr_runs: int = 30  # meta-training problems, and steps on each
    lr_steps: int = 300
    update_runs: int = 600
    update_teleport_runs: int = 700
    update_steps: int = 100
    unroll: int = 10
    width: int = 20
    layers: int = 2
    lr_hidden: int = 20
    update_hidden: int = 300
    norm: float = 0.01  # Frobenius norm of T
    teleporter_rate: float = 1e-4  # Adam's
    updater_rate: float = 1e-3
    gd_rate: float = 3e-4
    sweep: tuple = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2)
    save_every: int = 25  # meta-training runs between checkpoints


NAME = "learn_to_teleport"  # of results and figures: another script has this one's name
PAPER = Settings()
SMALL = dict(seeds=8, steps=5, meta_seeds=2, lr_runs=3, lr_steps=12, update_runs=4, update_teleport_runs=4, unroll=5)
SMALL |= dict(update_meta_seeds=1, update_steps=12, width=8, lr_hidden=4, update_hidden=8, sweep=(1e-3, 5e-3))
PRESETS = {
    "tiny": replace(PAPER, save_every=2, **SMALL),
    "quick": replace(PAPER, meta_seeds=3, update_meta_seeds=1, lr_runs=15, update_runs=5, update_teleport_runs=5),
    "paper": PAPER,
}


def experiment(run):
    s = run.settings
    seeds = [n * n * 12345 for n in range(s.seeds)]
    parts, _ = run.parts(
        lambda key: descend(run, seeds) if key == "gd" else learn(run, key, seeds), {key: key for key in (*PARTS, "gd")}
    )
    arrays = {f"{key}/{name}": v for key, part in parts.items() for name, v in part.items() if "seconds" not in name}
    timings = {
        "training": {key: parts[key]["training_seconds"] for key in PARTS},
        "after_each_step": {arm: parts[key]["seconds"][a] for key, a, arm in arms()},
    }
    return Outcome(compare(s, arrays), arrays, seeds, timings)


def arms():
    """(part, index in the part, name) of every arm."""
    yield from (("gd", a, name) for a, name in enumerate(GD_ARMS))
    yield from ((key, a, arm.name) for key, stack in PARTS.items() for a, arm in enumerate(stack))


def problems(run, seeds):
    return regression(run.settings.width, run.settings.layers, seeds, run.device)


def learn(run, key, seeds):
    """Train a stack of arms (A) and meta-seeds (M), then test it on all problems (S) and, by the clock, one by one."""
    s, stack = run.settings, PARTS[key]
    if key == "lr":
        hidden, count, runs, steps = s.lr_hidden, s.meta_seeds, s.lr_runs, s.lr_steps
    else:
        runs = s.update_runs if key == "update" else s.update_teleport_runs
        hidden, count, steps = s.update_hidden, s.update_meta_seeds, s.update_steps
    meta = MetaOptimizer(stack, range(count), width=s.width, layers=s.layers, hidden=hidden, norm=s.norm)
    meta = meta.to(run.device)
    try:
        curve, training_seconds = meta_train(
            meta,
            meta.adam(s.teleporter_rate, s.updater_rate),
            lambda n: problems(run, [n * n * 12345 - 1]),
            runs=runs,
            steps=steps,
            unroll=s.unroll,
            progress=lambda done, runs: run.progress(range(done, runs), desc=key, total=runs, initial=done, unit="run"),
            saved=run.load_checkpoint(key),
            save=partial(run.save_checkpoint, key),
            save_every=s.save_every,
        )
    except Diverged as error:
        hint = "the last good checkpoint is kept: lower teleporter_rate or updater_rate and use --fresh"
        raise UserError(f"{error}; {hint}") from None
    generator = torch.Generator().manual_seed(0)
    tested = {k: torch.as_tensor(v) for k, v in meta_test(meta, problems(run, seeds), s.steps, generator).items()}
    tested = {k: v.unflatten(0, (len(stack), count)) for k, v in tested.items() if k != "seconds"}
    results = {
        "training_curve": curve.view(len(stack), count, runs),  # loss at the last meta-update of each run
        "loss": tested["loss"],  # (A, M, S, steps + 1)
        "squared_gradient_norm": tested["squared_gradient_norm"][:, :, :PROBLEMS],
        "rate": tested["rate"].mean(2),  # (A, M, steps)
        "drift": tested["drift"].abs().amax(2),
        "training_seconds": training_seconds,
    }
    chosen, seconds = best_in_training(results["training_curve"]), []
    for a in range(len(stack)):
        alone = meta.member(a * count + chosen[a])
        test = partial(meta_test, alone, steps=s.steps, generator=generator, measure_drift=False)
        seconds.append(timed(lambda seed, test=test: test(problems(run, [seed]))["seconds"], seeds))
    return {**results, "chosen": chosen, "seconds": seconds}


def timed(seconds, seeds):
    """The clock after every step of a typical run: medians over the published problems, each run alone, three times."""
    clocks = np.array([seconds(seed) for seed in seeds[:PROBLEMS] * 3])
    return np.median(np.diff(clocks, axis=1, prepend=0.0), axis=0).cumsum()


def best_in_training(curve):
    """The meta-seed of each arm with the lowest loss (geometric mean) over the last ten runs of meta-training."""
    return np.log(np.asarray(curve))[..., -10:].mean(-1).argmin(-1)


def descend(run, seeds):
    """The arms that learn nothing. Chooses the best second rate on the meta-training problems of the lr kind."""
    s = run.settings
    W, X, Y = problems(run, [n * n * 12345 - 1 for n in range(s.lr_runs)])
    second = torch.tensor(s.sweep, device=run.device).view(-1, 1, 1, 1)
    W = W.expand(len(second), *W.shape)
    swept, _, _ = gradient_descent(W.unbind(2), X, Y, [FIRST_RATE] + [second] * (s.steps - 1))
    swept = swept[..., -1].log().mean(1)
    best = s.sweep[int(torch.where(swept.isfinite(), swept, torch.inf).argmin())]
    rates = [[s.gd_rate] * s.steps, *([FIRST_RATE] + [rate] * (s.steps - 1) for rate in (RATES[1], best))]
    W, X, Y = problems(run, seeds)
    losses, norms, _ = zip(*(gradient_descent(W.unbind(1), X, Y, r) for r in rates))

    def seconds(rates, seed):
        W, X, Y = problems(run, [seed])
        return gradient_descent(W.unbind(1), X, Y, rates)[2]

    return {
        "loss": torch.stack(losses).unsqueeze(1),
        "squared_gradient_norm": torch.stack(norms).unsqueeze(1)[:, :, :PROBLEMS],
        "rate": np.array(rates)[:, None],
        "sweep": swept,  # mean logarithm of the loss after the last step, by rate
        "chosen": np.zeros(len(rates), int),
        "seconds": [timed(partial(seconds, r), seeds) for r in rates],
    }


def compare(s, arrays):
    """Every arm on the problems after the last step: its chosen meta-seed, over GD's loss with a 95 % interval over
    problems, and how many of its meta-seeds are below GD's."""
    loss = {arm: arrays[f"{key}/loss"][a].astype(float) for key, a, arm in arms()}  # (M, S, steps + 1)

    def ratio(mine):
        with np.errstate(all="ignore"):
            logs = (np.log(x[:, -1]) for x in (mine, loss["GD"][0]))
            return [float(np.exp(v)) for v in compared(*logs, relative=False)[:3]]

    metrics = {}
    for key, a, arm in arms():
        chosen = int(arrays[f"{key}/chosen"][a])
        mine = loss[arm][chosen]
        metrics[arm] = {
            "mean_loss_published_problems": {str(t): mine[:PROBLEMS, t].mean() for t in milestones(s)},
            "mean_loss": mine[:, -1].mean(),
            "ratio_to_GD": ratio(mine),
            "meta_seeds": len(loss[arm]),
            "meta_seeds_better_than_GD": sum(ratio(each)[2] < 1 for each in loss[arm]),
            "chosen_meta_seed": chosen,
        }
        if key != "gd":
            metrics[arm]["largest_relative_drift"] = float(arrays[f"{key}/drift"][a].max())
    metrics["GD, best rate"]["second_rate"] = float(arrays["gd/rate"][GD_ARMS.index("GD, best rate"), 0, -1])
    return metrics


def milestones(s):
    """Steps at which the published numbers were recorded, and the last."""
    return sorted({t for t in (0, 1, 2, 10, 29) if t < s.steps} | {s.steps})


def effects(outcome):
    """{(arm, other): Comparison} over meta-seeds: what the claim rests on, and all others to GD and the clamp."""
    claimed = [(arm, other) for arm, still in TELEPORTING.items() for other in ("GD", CLAMP, still)]
    return over_meta_seeds(outcome.arrays, list(arms()), claimed, ("GD", CLAMP))


def judge(outcome):
    found, m = effects(outcome), outcome.metrics
    rivals = {arm: ("GD", CLAMP, still) for arm, still in TELEPORTING.items()}
    settled = {arm: settle(found[arm, other].word for other in others) for arm, others in rivals.items()}
    said = (f"{arm} against {each} {change(found[arm, each])}" for arm, others in rivals.items() for each in others)
    n = [m[arm]["meta_seeds"] for arm in rivals]
    sentence = f"Loss after {outcome.settings.steps} steps, {n[0]} and {n[1]} meta-seeds: {'; '.join(said)}."
    clamp, best = (m[arm]["ratio_to_GD"][0] for arm in (CLAMP, "LSTM(lr, teleport)"))
    up = rising(outcome.arrays, arms())
    surprise = f"Of GD's loss remain: at the clamp's rate, nothing learned, {clamp:.3f}; all learned {best:.3f}."
    number = f"learned rate: {found['LSTM(lr, teleport)', CLAMP].word} against the clamp's, with nothing learned"
    details = [BEFORE, *(detail(arm, m[arm], found, n) for arm, n in up.items())]
    rows, word = list(recorded(m, outcome.arrays, arms())), graded(list(settled.values()))
    return Verdict(word, except_for(settled), sentence, details, number, rows, f"{surprise} {updates(up, m)}")


def detail(arm, m, found, up):
    against = ", ".join(f"{other} {change(found[arm, other])}" for other in ("GD", CLAMP))
    beat = f"{m['meta_seeds_better_than_GD']} of {m['meta_seeds']} meta-seeds beat GD over problems, {up} rise again"
    return f"{arm}: loss against {against}; {beat}; largest drift of a teleport {m['largest_relative_drift']:.0e}."


def plot(outcome, settings, save):
    save(plot_figure6(outcome, settings))
    save(plot_controls(outcome, settings), "controls")
    save(plot_rates(outcome, settings), "rates")


def curves(outcome, name, of="loss"):
    """(S, points) of an arm's chosen meta-seed."""
    key, a = next((key, a) for key, a, arm in arms() if arm == name)
    return outcome.arrays[f"{key}/{of}"][a, outcome.arrays[f"{key}/chosen"][a]]


def plot_figure6(outcome, s):
    """Figure 6 on the published problems: loss against step and seconds, gradient norm against loss."""
    figure, ((by_step, by_seconds, gradient),) = plots.panels(1, 3, width=4.0, height=3.4)
    for i, name in enumerate(FIGURE):
        loss = curves(outcome, name)[:PROBLEMS]
        plots.log_band(by_step, np.arange(s.steps + 1), loss, name, i)
        plots.log_band(by_seconds, outcome.timings["after_each_step"][name], loss, name, i)
        norm = curves(outcome, name, "squared_gradient_norm")
        gradient.plot(*(np.exp(np.log(v).mean(0)) for v in (loss, norm)), label=name, **plots.style(i))
    by_step.set(xlabel="Step", ylabel="Loss", yscale="log")
    by_seconds.set(xlabel="Seconds", ylabel="Loss", yscale="log")
    gradient.set(xlabel="Loss", ylabel=r"$\|\partial L/\partial W\|^2$", xscale="log", yscale="log")
    by_step.legend(fontsize=7)
    return figure


def plot_rates(outcome, s):
    """What the meta-optimizers of the lr kind learned: the learning rate at every step, of every meta-seed."""
    figure, ((rate,),) = plots.panels(1, 1, width=5.5, height=3.4)
    for a, arm in enumerate(PARTS["lr"]):
        every = outcome.arrays["lr/rate"][a]
        rate.plot(np.arange(s.steps), every.T, color=plots.style(a + 1)["color"], linewidth=0.5, alpha=0.5)
        rate.plot(np.arange(s.steps), curves(outcome, arm.name, "rate"), label=arm.name, **plots.style(a + 1))
    rate.set(xlabel="Step", ylabel="Learned rate (thin: other meta-seeds)", yscale="log")
    rate.set_ylim(bottom=rate.get_ylim()[0] / 30)
    rate.legend(fontsize=6, loc="lower left")
    return figure


def plot_controls(outcome, s):
    """All held-out problems: both kinds of meta-optimizers with their controls, every meta-seed, and the drift."""
    figure, ((rates, updates), (seeds, drift)) = plots.panels(2, 2, width=4.8, height=3.6)
    steps = np.arange(s.steps + 1)
    unlearned = curves(outcome, CLAMP)  # nearly what all have learned: relative to it they do not coincide
    for ax, kind in ((rates, "lr"), (updates, "update")):
        for i, arm in enumerate((arm for key in PARTS if key.startswith(kind) for arm in PARTS[key]), 1):
            plots.log_band(ax, steps, curves(outcome, arm.name) / unlearned, arm.name, i)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xlabel="Step", ylabel=f"Loss / loss of {CLAMP}\n({s.seeds} problems)")
        plots.log_loss(ax)
        ax.legend(fontsize=6)
    names = [name for _, _, name in arms()]
    for key, a, name in arms():
        final = np.log(outcome.arrays[f"{key}/loss"][a, :, :, -1].astype(float)).mean(-1)
        row, chosen = names.index(name), outcome.arrays[f"{key}/chosen"][a]
        seeds.plot(np.exp(final), [row] * len(final), "o", color="#999999", markersize=5)
        seeds.plot(np.exp(final[chosen]), row, "D", color="#000000", markersize=5)
        if key != "gd" and outcome.arrays[f"{key}/drift"][a].any():
            i = 1 + [n for k, _, n in arms() if k != "gd"].index(name)  # black is GD, above
            drift.plot(steps[:-1], outcome.arrays[f"{key}/drift"][a].max(0), label=name, **plots.style(i))
    seeds.set_yticks(range(len(names)), names, fontsize=6)
    seeds.invert_yaxis()
    seeds.set(xlabel=f"Loss after {s.steps} steps, every meta-seed (black: as shown)", xscale="log")
    seeds.xaxis.set_major_formatter("{x:g}")
    seeds.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    seeds.tick_params(axis="x", which="both", labelsize=7)
    drift.axhline(1e-5, color="#999999", linewidth=0.8, label="1e-5")
    drift.set(xlabel="Step", ylabel="Largest relative change\nof the loss by a teleport", yscale="log")
    drift.set_ylim(top=drift.get_ylim()[1] * 30)
    drift.legend(fontsize=6, loc="upper left")
    return figure


def report(outcome, s):
    rows, found = [], effects(outcome)
    for key, _, name in arms():
        m = outcome.metrics[name]
        drift = m.get("largest_relative_drift")
        means = [
            number(m["mean_loss_published_problems"][str(s.steps)]),
            number(m["mean_loss"]),
            factor(m["ratio_to_GD"]),
        ]
        over = [change(found[name, other], 0) if (name, other) in found else "" for other in ("GD", CLAMP)]
        better = f"{m['meta_seeds_better_than_GD']}/{m['meta_seeds']}" if key != "gd" else ""
        rows.append([name, *means, *over, better, f"{drift:.1e}" if drift else ""])
    header = [f"loss after {s.steps} steps", f"{min(PROBLEMS, s.seeds)} problems", f"{s.seeds} problems"]
    header += ["/ GD [95 %]", "meta-seeds, against GD", "GD at the clamp", "meta-seeds < GD", "largest drift"]
    training = ", ".join(f"{key} {seconds:.0f} s" for key, seconds in outcome.timings["training"].items())
    best = outcome.metrics["GD, best rate"]["second_rate"]
    return (
        table(header, rows)
        + f"\n\nGD, best rate: {best:g} after the first step. Meta-training: {training}"
        + f"\nThe learned updates are far from trained: {s.update_runs} runs, not the paper's 600 and 700."
        * (s.update_runs < PAPER.update_runs)
    )


def number(value):
    return "diverged" if math.isnan(value) else f"{value:.4g}"


if __name__ == "__main__":
    figures = "learn-to-teleport/figures"
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge, name=NAME, links=figures)
