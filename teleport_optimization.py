"""Teleportation with standard optimizers: Figures 5 and 13 of the ICLR 2024 paper (arXiv 2305.13404), Section 5.1.

Each optimizer trains a 784-16-10-10 network; eight times, before the first mini-batches of one epoch, the weights are
teleported: gradient ascent on ‖∂L/∂W‖² over the group, on a fresh batch of 200. The arms:

  baseline       the optimizer alone
  published      the published teleport, which moves the loss, with the optimizer built anew after each teleport
  restart        no teleport, the optimizer built anew at the same steps: what the restart does by itself
  preactivation  pre-activation action on the true hidden layers, optimizer state kept; with 200 samples on 16 and 10
                 units it is a least-squares fit, and moves the loss a little
  rescaling      positive rescaling, exact on every input, optimizer state kept
  random         a random element of the same action that changes the weights as much
  lr raised      no teleport; the learning rate is raised for good by as much as a teleport would raise ‖∂L/∂W‖

Every arm's learning rate is tuned on other runs, on a grid that grows; then fresh runs, as many as the tuning asks for,
are compared at the published rate and at every arm's best (common/protocol.py). Beside them: other epochs and numbers
of teleports and restarts, runs with an order of the data of their own (all others share the dataset's), drift on the
batch and on the training set, seconds of each arm alone.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from common import cli, plots, protocol, published
from common.arms import Arm, Stack, as_large, draw_batches
from common.claims import Claim, Published, Verdict, change, listed, table
from common.data import published_split, require
from common.losses import batch_loss
from common.mlp import initial_weights
from common.protocol import against, number
from common.run import Outcome
from common.statistics import compare, percent
from common.tuning import GRID, compared, in_chunks, room
from teleport import leaky_relu, preactivation_action, rescaling_action, squared_gradient_norm, teleport

CLAIM = Claim(
    order=10,
    figure="Figures 5 and 13",
    paper="ICLR 2024",
    section="Section 5.1",
    says="Teleporting a few times early in training speeds up AdaGrad, momentum, RMSprop and Adam.",
    short="teleporting early speeds up four optimizers",
    rule="holds if for all four the pre-activation teleport that keeps the optimizer's state has a better mean log "
    "training loss than the baseline at the published learning rate and at each arm's best, and at best rates better "
    "than a random element of the same size and than a rate raised as much as the gradient norm; in part: for some. "
    "Rates tuned on other runs, interior; paired by seed; margin 1 %; Holm over optimizers and comparisons.",
    dated="2026-11-25",
    headline=True,
)
BEFORE = "Under the rule of 2026-11-22 (training loss after epoch 8, five runs on MNIST, three rates): momentum only."

ARMS = ("baseline", "published", "restart", "preactivation", "rescaling", "random", "lr raised")
TELEPORTING = ("published", "preactivation", "rescaling", "random")
# Published, by optimizer: learning rate (CIFAR-10: doubled), epoch of the teleports, learning rate of the ascent
# (lr_t). SGD was not published: it has AdaGrad's.
OPTIMIZERS = {
    "SGD": (1e-2, 2, 1e-4),
    "AdaGrad": (1e-2, 2, 1e-4),
    "momentum": (1e-3, 0, 5e-2),
    "RMSprop": (1e-4, 0, 5e-2),
    "Adam": (1e-4, 0, 5e-2),
}
# The published code run with 5 seeds on MNIST: training loss of an arm after an epoch.
PUBLISHED = {
    "AdaGrad": {("baseline", 8): 0.3009, ("restart", 8): 0.2755, ("published", 8): 0.2800},
    "momentum": {("baseline", 5): 0.295, ("published", 5): 0.2769, ("baseline", 3): 0.367, ("preactivation", 3): 0.343},
    "RMSprop": {("baseline", 5): 0.4113, ("published", 5): 0.3835},
    "Adam": {("baseline", 5): 0.4028, ("published", 5): 0.3784, ("baseline", 3): 0.496, ("preactivation", 3): 0.469},
}
SHOWN = "quick"  # whose results the report shows, until the paper's size has been run
ACTIVATION = leaky_relu(0.1)
BOUND = 2.0  # rescaling only: ‖∂L/∂W‖² grows without limit along that orbit, so each unit's total scale per teleport
#              stays within [1/2, 2]
COST = 3  # gradient evaluations of an ascent step: one for ∂L/∂W, about two for a Hessian-vector product
DRIFT_RUNS = 5


@dataclass(frozen=True)
class Settings:
    dataset: str = "MNIST"
    seeds: int = 200  # compared at most
    least: int = 20  # compared at least
    tuning_seeds: int = 10
    side_seeds: int = 10  # of the schedules, and of the runs with an order of their own
    grid: tuple = GRID  # learning rates, as multiples of the published one; it grows
    epochs: int = 40
    optimizers: tuple = tuple(OPTIMIZERS)
    when: tuple = (0, 1, 2, 4, 8, 16)  # epochs of the teleports, compared
    often: tuple = (1, 8, 32)  # numbers of teleports, compared
    batch: int = 20
    samples: int | None = None  # train on the first samples only
    teleports: int = 8
    teleport_batch: int = 200
    ascent_steps: int = 10
    cap: float = 100.0  # ascent stops once ‖∂L/∂W‖² is above it


PAPER = Settings()
SMALL = dict(dataset="mnist-mini", grid=(1, 3, 10), tuning_seeds=3, side_seeds=3, least=6, when=(0, 2), often=(1,))
QUICK = replace(PAPER, optimizers=("AdaGrad", "momentum"), seeds=8, epochs=4, samples=2000, teleports=3, **SMALL)
SMALL |= dict(grid=(1, 3), tuning_seeds=2, side_seeds=1, least=2, when=(0,), often=(1,), samples=400, ascent_steps=2)
PRESETS = {
    "tiny": replace(PAPER, seeds=2, epochs=3, optimizers=("AdaGrad",), teleports=2, **SMALL),
    "quick": QUICK,
    "paper": PAPER,
}


def arms(s, optimizer, seed=0):
    """Who is moved, and how, at which epoch; random elements are drawn from the seed on."""
    _, epoch, lr = OPTIMIZERS[optimizer]
    ascent = dict(activation=ACTIVATION, lr=lr, steps=s.ascent_steps, cap=s.cap)
    loss = partial(batch_loss, activation=ACTIVATION)

    def stale(weights, X, labels):
        return published.teleport_gradient_norm(weights, X, loss(X, labels), **ascent)

    def along(action, weights, X, labels, **bound):
        options = {**ascent, **bound}
        return teleport(weights, X, loss(X, labels), objective=squared_gradient_norm, action=action, **options)

    preactivation = partial(along, preactivation_action)
    every = (
        Arm("baseline"),
        Arm("published", stale, restart=True),
        Arm("restart", restart=True),
        Arm("preactivation", preactivation),
        Arm("rescaling", partial(along, rescaling_action, bound=BOUND)),
        Arm("random", as_large(preactivation, loss, preactivation_action, ACTIVATION, seed)),
        Arm("lr raised", preactivation, raises=True),
    )
    return [arm._replace(epoch=epoch, moves=s.teleports) for arm in every]


def experiment(run):
    s, data = run.settings, published_split(run.data())
    data = data._replace(x=data.x[: s.samples], y=data.y[: s.samples])
    require(data, train=max(s.teleport_batch, s.teleports * s.batch))

    def train_arms(o, which, factors, seeds):
        every = arms(s, o, seeds[0])
        return kept(stacked(run, o, [every[a] for a in which], factors, seeds, data))

    claimed, member = ["preactivation"], initial_weights(dimensions(s, data), [0])
    arrays, tuned, seeds, metrics = protocol.stages(run, s.optimizers, ARMS, train_arms, claimed, member=member)
    kinds = {"schedule": compare_schedules, "shuffled": shuffle, "drift": measure_moves}
    keys = {f"{kind}.{o}": (function, o) for kind, function in kinds.items() for o in s.optimizers}
    parts, _ = run.parts(lambda key: key[0](run, key[1], protocol.both_rates(tuned[key[1]]), seeds[key[1]], data), keys)
    timings = {o: dict(zip(ARMS, parts[f"drift.{o}"].pop("seconds").tolist())) for o in s.optimizers}
    arrays |= {f"{key}/{k}": v for key, values in parts.items() for k, v in values.items()}
    for o in s.optimizers:
        metrics[o]["mini_batches"] = -(-len(data.x) // s.batch)
    return Outcome(metrics, arrays, max(seeds.values(), key=len), timings)


def stacked(run, optimizer, arms, factors, seeds, data, epochs=None, whole=False):
    """Train the arms (A) at their learning rates (factors, (A, F)) and seeds (S): curves, and what each move did to the
    loss of its batch and, if asked for, of the whole training set."""
    s, moves = run.settings, max(arm.moves for arm in arms)
    W = initial_weights(dimensions(s, data), seeds, run.device)
    rates = OPTIMIZERS[optimizer][0] * (2 if s.dataset == "CIFAR10" else 1) * torch.tensor(factors, dtype=W[0].dtype)
    stack = Stack(arms, W, optimizer, rates, moves)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each run draws its own teleport batches
    losses = torch.zeros_like(stack.loss)

    def before(epoch, i):
        if i < moves:
            batch = draw_batches(data.x, data.y, s.teleport_batch, generators)
            if whole:
                losses[..., i, 0] = stack.evaluate(data.x, data.y)[0]
            stack.move(i, *batch, epoch=epoch)
            if whole:
                losses[..., i, 1] = stack.evaluate(data.x, data.y)[0]

    at = {epoch: partial(before, epoch) for epoch in {arm.epoch for arm in arms}}
    curves = stack.train(run, data, epochs or s.epochs, s.batch, at, desc=optimizer)
    curves["teleport_loss"], curves["teleport_gradient_norm"] = stack.loss.float(), stack.objective.float().sqrt()
    return curves | {"whole_loss": losses.float()}


def dimensions(s, data):
    return data.features, *((128, 32, 10) if s.dataset == "CIFAR10" else (16, 10, 10))


def kept(curves):
    """Without what only some need."""
    return {key: curves[key] for key in ("train_loss", "test_loss")}


def train(run, optimizer, arms, factors, seeds, data):
    """The losses of `stacked`, in chunks of the seeds."""
    one = initial_weights(dimensions(run.settings, data), seeds[:1])

    def chunk(some):
        return kept(stacked(run, optimizer, arms, factors, some, data))

    return in_chunks(chunk, seeds, factors.size, one, room(run.device))


def schedules(s, optimizer):
    """(arm, epoch, number of teleports): the published number at other epochs, other numbers at the published one."""
    _, epoch, _ = OPTIMIZERS[optimizer]
    when = [e for e in s.when if e < s.epochs]
    yield from (("preactivation", e, s.teleports) for e in when)
    yield from (("preactivation", epoch, k) for k in s.often if k != s.teleports)
    yield from (("restart", e, s.teleports) for e in when)


def compare_schedules(run, optimizer, factors, seeds, data):
    """Runs' numbers of the baseline, then of the schedules, at the published rate and at the arm's best."""
    s, every = run.settings, dict(zip(ARMS, arms(run.settings, optimizer)))
    varied = [every[name]._replace(epoch=e, moves=k) for name, e, k in schedules(s, optimizer)]
    rows = [0, *(ARMS.index(arm.name) for arm in varied)]
    curves = train(run, optimizer, [every["baseline"], *varied], factors[rows], seeds[: s.side_seeds], data)
    return {"numbers": number(curves["train_loss"])}


def shuffle(run, optimizer, factors, seeds, data):
    """Runs' numbers of the baseline and the teleport, every run with an order of the data of its own."""
    rows, numbers = [0, ARMS.index("preactivation")], []
    pair = [arms(run.settings, optimizer)[a] for a in rows]
    for seed in seeds[: run.settings.side_seeds]:
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed)).to(data.x.device)
        own = data._replace(x=data.x[order], y=data.y[order])
        numbers.append(number(train(run, optimizer, pair, factors[rows], [seed], own)["train_loss"]))
    return {"numbers": np.concatenate(numbers, 2)}


def measure_moves(run, optimizer, factors, seeds, data):
    """What the moves do to the losses of the first runs, and the seconds of an epoch with them, each arm alone."""
    every, epochs = arms(run.settings, optimizer), OPTIMIZERS[optimizer][1] + 1
    curves = stacked(run, optimizer, every, factors, seeds[:DRIFT_RUNS], data, epochs, whole=True)
    early = [[arm._replace(epoch=0)] for arm in every]
    alone = [stacked(run, optimizer, arm, np.ones((1, 1)), seeds[:1], data, 1)["seconds"][0, 0] for arm in early]
    kept = ("teleport_loss", "teleport_gradient_norm", "whole_loss")
    return {"seconds": np.array(alone), **{key: curves[key] for key in kept}}


def pairs(o):
    if o != "SGD":
        yield against(o, "preactivation", "published")
        yield from (against(o, "preactivation", "best", other=other) for other in ("baseline", "random", "lr raised"))


def judge(*outcomes):
    first, weighed = outcomes[0], protocol.weigh(outcomes, ARMS, pairs, "preactivation")
    sentence = f"Training loss with teleports against the baseline's, each arm at its best rate: {weighed.said}."
    details = [BEFORE, *(line for r, found in zip(outcomes, weighed.found) for line in detail(r, found))]
    return Verdict(
        weighed.word,
        weighed.limits,
        sentence,
        details,
        weighed.number,
        published=list(published_rows(first)),
        surprise=restarts(first, weighed.found[0]),
        answers={"cost": cost(first), "gain": sentence, "when": when(first)},
    )


def detail(r, found):
    yield from protocol.described(r, found, ARMS)
    for o, m in r.metrics.items():
        controls = [change(found[pair]) for pair in list(pairs(o))[2:]]
        beside = "; against random {}, against lr raised {}".format(*controls) if controls else ""
        baseline, teleport = r.arrays[f"shuffled.{o}/numbers"]  # (rates, S) each
        own = [compare(*each, relative=False) for each in zip(teleport, baseline)]
        yield (
            f"{o}, preactivation, best rates: the tuning asked for {m['runs']} runs, which can show equivalence within "
            f"{100 * m['reachable_margin']:.2g} %{beside}. With an order of the data of its own for every run "
            f"({own[0].n} runs): published rate {change(own[0])}, best rates {change(own[1])}."
        )


def restarts(r, found):
    """AdaGrad's gain at the published rate, taken apart."""
    if "AdaGrad" not in r.metrics:
        return ""
    three = (f"{arm} {change(found[against('AdaGrad', arm, 'published')])}" for arm in ARMS[1:4])
    return f"AdaGrad at the published rate, training loss against the baseline's: {', '.join(three)}."


def cost(r):
    """What the teleports of a run take, in gradients of a mini-batch and in seconds of an arm that is run alone."""
    s, batches = r.settings, next(iter(r.metrics.values()))["mini_batches"]
    gradients = s.teleports * s.ascent_steps * COST * s.teleport_batch / s.batch
    times = [t["preactivation"] / t["baseline"] for t in r.timings.values()]
    return (
        f"{s.teleports} teleports of at most {s.ascent_steps} ascent steps on {s.teleport_batch} samples take as many "
        f"gradients as {gradients:.0f} mini-batches, {gradients / batches:.1f} of an epoch ({r.label}); run alone, an "
        f"epoch with them takes {min(times):.2g} to {max(times):.2g} times as long."
    )


def schedule_effects(r, o):
    """{(arm, epoch, teleports): Comparison with the baseline}, at the published rate and at best rates."""
    numbers, names = r.arrays[f"schedule.{o}/numbers"], [None, *schedules(r.settings, o)]
    for k in range(2):
        found = compared(dict(zip(names, numbers[:, k])), [(name, None) for name in names[1:]])
        yield {name: c for (name, _), c in found.items()}


def when(r):
    """Other epochs and other numbers of teleports, at tuned rates."""
    said = []
    for o in r.metrics:
        found = [c for (arm, *_), c in list(schedule_effects(r, o))[1].items() if arm == "preactivation"]
        effects, words = [percent(c.effect) for c in found], [c.word for c in found]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        said.append(f"{o} {min(effects):+.2f} to {max(effects):+.2f} % ({counts})")
    epochs, numbers = (listed([str(n) for n in ns]) for ns in (r.settings.when, r.settings.often))
    return (
        f"Training loss against the baseline's at best rates, teleports at epochs {epochs}, or {numbers} of them, "
        f"{found[0].n} runs: {'; '.join(said)}."
    )


def published_rows(r):
    for o, values in PUBLISHED.items():
        for (arm, epoch), value in values.items():
            ours, agrees = "not run", None
            if o in r.metrics and epoch <= r.settings.epochs:
                ours = float(r.arrays[f"compared.{o}/train_loss"][ARMS.index(arm), 0, :, epoch - 1].mean())
                agrees = bool(abs(ours / value - 1) < 0.05) if r.label == "MNIST" else None
            other = "true hidden layers" if arm == "preactivation" else "other runs"
            texts = "their code on MNIST, 5 runs", f"{r.label}, {r.settings.epochs} epochs, {other}"
            yield Published(f"{o}, {arm}: training loss after epoch {epoch}", value, ours, *texts, agrees)


def plot(outcome, settings, save):
    save(plot_curves(outcome, settings, "epoch"))
    save(plot_curves(outcome, settings, "seconds"), "seconds")
    save(plot_protocol(outcome, settings), "controls")
    losses = [[outcome.arrays[f"drift.{o}/{k}_loss"] for k in ("teleport", "whole")] for o in settings.optimizers]
    moved = [ARMS.index(arm) for arm in TELEPORTING]
    drift = {o: [values[moved, 0] for values in each] for o, each in zip(settings.optimizers, losses)}
    save(protocol.plot_drift(TELEPORTING, drift), "drift")


def plot_curves(outcome, s, x_axis):
    """Figure 5 (x_axis epoch) or 13 (seconds, of an arm run alone): the paper's two arms at the published rate."""
    figure, axes = plots.panels(1, len(s.optimizers), width=3.1, height=2.8)
    for ax, o in zip(axes[0], s.optimizers):
        for arm in ("baseline", "published"):
            a, x = ARMS.index(arm), np.arange(1.0, s.epochs + 1)
            if x_axis == "seconds":
                plain, mine = outcome.timings[o]["baseline"], outcome.timings[o][arm]
                x = plain * x + (mine - plain) * (x > OPTIMIZERS[o][1])
            for key, line in (("train_loss", "--"), ("test_loss", "-")):
                look = plots.marked(a, s.epochs) | {"linestyle": line, "label": arm if line == "-" else None}
                plots.band(ax, x, outcome.arrays[f"compared.{o}/{key}"][a, 0], **look)
        ax.set(title=o, xlabel="epoch" if x_axis == "epoch" else "seconds of a run alone")
        plots.log_loss(ax)
    axes[0, 0].set_ylabel(f"loss, {outcome.label}, ± std\n(training dashed, test solid)")
    axes[0, -1].legend(fontsize=8)
    return figure


def plot_protocol(outcome, s):
    """The controls, the tuning, and moves at other epochs: at best rates and at the published rate."""
    figure, axes = protocol.plot_controls(outcome, protocol.findings(outcome, ARMS, pairs), ARMS, more=2)
    for column, o in zip(axes.T, s.optimizers):
        for ax, effects in zip(column[:1:-1], schedule_effects(outcome, o)):
            for k, arm in enumerate(("preactivation", "restart")):
                points = {e: c for (name, e, n), c in effects.items() if name == arm and n == s.teleports}
                plots.intervals(ax, points.values(), np.array(list(points)) + 0.2 * k, k, arm, vertical=True)
        column[3].set_xlabel(f"epoch of the {s.teleports} moves")
    axes[2, 0].set_ylabel("training loss against the\nbaseline's, %, best rates")
    axes[3, 0].set_ylabel("the same,\npublished rate")
    axes[2, -1].legend(fontsize=7)
    return figure


def report(outcome, s):
    found, rows = protocol.findings(outcome, ARMS, pairs), []
    for o in s.optimizers:
        norm = outcome.arrays[f"drift.{o}/teleport_gradient_norm"]
        losses = [outcome.arrays[f"drift.{o}/{k}"] for k in ("teleport_loss", "whole_loss")]
        for a, arm in enumerate(ARMS):
            moved = [""] * 5
            if arm in TELEPORTING:
                drift = (f"{protocol.relative_drift(loss[a, r]).max():.0e}" for r in (0, 1) for loss in losses)
                moved = [f"×{np.nanmedian(norm[a, 0, ..., 1] / norm[a, 0, ..., 0]):.3f}", *drift]
            seconds = f"{outcome.timings[o][arm]:.2f}"
            rows.append([f"{o}, {arm}", *protocol.cells(outcome, found, ARMS, o, a), *moved, seconds])
    header = ["", *protocol.HEADER, "‖∂L/∂W‖", "drift, batch", "training set"]
    header += ["at best: batch", "training set", "s/epoch"]
    n = ", ".join(f"{o} {m['runs']}" for o, m in outcome.metrics.items())
    return (
        f"{outcome.label}, losses against the baseline's with 95 % intervals; runs: {n}. ‖∂L/∂W‖: median growth in a\n"
        f"teleport. Drift: largest |Δloss|/loss of {DRIFT_RUNS} runs, at published and at best rates. s/epoch: "
        f"with the moves, run alone.\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
