"""Teleportation in the regression of a 5-6-7-8 network on 4 samples: NeurIPS 2022 (arXiv 2205.10637).

Gradient descent and AdaGrad, with one teleport at epoch 5 through the post-activation action (Eq. 8). The published
teleport does not keep the loss: it falls from about 600 to 50–365. How much of the acceleration is that? The arms:

  baseline               no teleport
  published              the published teleport: I − T for the inverse, stale hidden layers, contaminated direction
  drift only             no teleport, the published drop in loss for free: the weights jump along the baseline's own
                         path to the first point that has the published arm's loss after its teleport; AdaGrad's sums
                         stay as they are
  postactivation         the true action, exact on these samples, in small ascent steps until ‖∂L/∂W‖² is up tenfold (of
                         six factors that were tried the best, see the sweeps)
  postactivation, brief  the same with the published number of ascent steps, at about half the published ascent rate:
                         at the full one ‖∂L/∂W‖² grows up to 900-fold in them, and gradient descent diverges

Acceleration is counted in epochs saved until the loss that the baseline has at epoch 100. The sweeps repeat everything
at larger learning rates, and exact ascents to other norms. The paper's views: loss against epoch and seconds, gradient
norm against epoch and against loss.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, plots
from common.claims import Claim, Verdict, grade, interval, table
from common.losses import half_squared_error
from common.published import teleport_postactivation
from common.run import Outcome
from common.statistics import difference, mean_std, verdict
from teleport import leaky_relu, postactivation_action, squared_gradient_norm, teleport

CLAIM = Claim(
    order=80,
    figure="Regression (NeurIPS 2022)",
    paper="NeurIPS 2022",
    section="",
    says="One teleport at epoch 5 accelerates gradient descent and AdaGrad.",
    short="one teleport accelerates regression",
    rule="holds if an exact teleport saves both of them epochs, and lowers their final loss when each arm has its "
    "best learning rate; in part: some epochs. Epochs: until the loss that the plain optimizer reaches later.",
    dated="2026-11-22",
    headline=True,
)

ARMS = ("baseline", "published", "drift only", "postactivation", "postactivation, brief")
PAPERS = ("baseline", "published")
ACTIVATION = leaky_relu(0.1)


class Optimizer(NamedTuple):
    lr: float
    lr_teleport: float  # published ascent rate and number of steps
    steps: int
    brief: float  # postactivation, brief: ascent rate as a fraction of the published one
    small: float  # postactivation: the same


OPTIMIZERS = {
    "GD": Optimizer(1e-4, 1e-7, 8, brief=0.4, small=0.05),
    "AdaGrad": Optimizer(1e-1, 1e-5, 2, brief=0.5, small=0.02),
}


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    epochs: int = 300
    teleport_epoch: int = 5
    level_epoch: int = 100  # epochs are counted until the loss that the baseline has here
    dims: tuple = (5, 6, 7, 8)
    samples: int = 4
    factors: tuple = (1, 1.5, 2, 3, 5, 10)  # learning rates, as multiples of the published one
    growth: float = 10.0  # postactivation: how far ‖∂L/∂W‖² grows
    growths: tuple = (1.5, 2, 3, 5, 10, 20)  # the same, compared
    ascent_steps: int = 300  # postactivation: at most


PAPER = Settings()
PRESETS = {
    "tiny": replace(PAPER, seeds=2, epochs=20, level_epoch=10, factors=(1, 3), growths=(1.5, 3), ascent_steps=20),
    "quick": PAPER,
    "paper": PAPER,
}


def experiment(run):
    s = run.settings
    seeds = [n * n * 12345 for n in range(s.seeds)]
    *W, X, Y = (t.to(run.device) for t in initial_values(s.dims, s.samples, seeds))

    def part(key):
        optimizer, kind = key.split("_")
        if kind == "growths":
            return train_growths(s, optimizer, W, X, Y)
        return train_arms(s, optimizer, W, X, Y, s.factors if kind == "rates" else (1,))

    keys = [f"{o}_{kind}" for o in OPTIMIZERS for kind in ("arms", "rates", "growths")]
    parts, _ = run.parts(part, {key: key for key in keys})
    arrays = {f"{key}/{k}": v for key, values in parts.items() for k, v in values.items() if k != "seconds"}
    timings = {o: dict(zip(ARMS, parts[f"{o}_arms"]["seconds"].tolist())) for o in OPTIMIZERS}
    return Outcome({o: compare(s, o, arrays) for o in OPTIMIZERS}, arrays, seeds, timings)


def initial_values(dims, samples, seeds):
    """Published draws: W_1, W_2, W_3, X, Y uniform in [0, 1], in this order, stacked over seeds, as float64."""
    draws = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shapes = [*zip(dims[1:], dims), (dims[0], samples), (dims[-1], samples)]
        draws.append([torch.rand(shape, generator=generator) for shape in shapes])
    return [torch.stack(tensors).double() for tensors in zip(*draws)]


def train(s, optimizer, W, loss_fn, lr, move):
    """Full-batch training of a stack, weights (*E, d_m, d_{m-1}), lr (*E) or a number.

    move(weights) is called at the teleport epoch and returns the new weights. Returns loss and ‖∂L/∂W‖², each
    (*E, epochs), before each update; the weights at each epoch; and the seconds at the end of each.
    """
    lr = torch.as_tensor(lr, dtype=W[0].dtype, device=W[0].device)[..., None, None]
    gradient = torch.func.grad(lambda w: (lambda L: (L.sum(), L))(loss_fn(w)), has_aux=True)
    sums = [torch.zeros_like(V) for V in W]
    losses, norms, path, seconds, start = [], [], [], [], time.perf_counter()
    for epoch in range(s.epochs):
        if epoch == s.teleport_epoch:
            W = move(W)
        path.append(W)
        G, loss = gradient(tuple(W))
        if optimizer == "AdaGrad":
            sums = [S + D.square() for S, D in zip(sums, G)]
            W = tuple(V - lr * D / (S.sqrt() + 1e-10) for V, D, S in zip(W, G, sums))
        else:
            W = tuple(V - lr * D for V, D in zip(W, G))
        losses.append(loss)
        norms.append(sum(D.square().sum((-2, -1)) for D in G))
        seconds.append(time.perf_counter() - start)
    return torch.stack(losses, -1), torch.stack(norms, -1), path, seconds


def ascend(weights, X, loss_fn, lr, steps, growth=None):
    """The exact teleport, until ‖∂L/∂W‖² is `growth` times what it was."""
    cap = None if growth is None else growth * squared_gradient_norm(weights, loss_fn)
    options = dict(objective=squared_gradient_norm, action=postactivation_action, activation=ACTIVATION)
    return teleport(weights, X, loss_fn, lr=lr, steps=steps, cap=cap, **options)


def train_arms(s, optimizer, W, X, Y, factors):
    """Every arm of one optimizer: (F, S) networks each, F learning rates, S runs. Curves are (arm, F, S, epochs)."""
    o, loss_fn = OPTIMIZERS[optimizer], half_squared_error(X, Y, ACTIVATION)
    lr = o.lr * torch.tensor(factors, dtype=X.dtype, device=X.device)[:, None].expand(-1, s.seeds)
    W = tuple(V.expand(len(factors), *V.shape) for V in W)

    def run(move):
        return train(s, optimizer, W, loss_fn, lr, move)

    run(lambda weights: weights)  # warm up, so that the seconds compare
    losses, _, path, _ = baseline = run(lambda weights: weights)
    stale = dict(activation=ACTIVATION, lr=o.lr_teleport, steps=o.steps)
    published = run(lambda W: teleport_postactivation(W, X, loss_fn, **stale).weights)
    dropped = published[0][..., s.teleport_epoch]  # the loss after the teleport
    moves = {
        "drift only": lambda W: free_decrease(path, losses, dropped, s.teleport_epoch, loss_fn),
        "postactivation": lambda W: ascend(W, X, loss_fn, o.small * o.lr_teleport, s.ascent_steps, s.growth).weights,
        "postactivation, brief": lambda W: ascend(W, X, loss_fn, o.brief * o.lr_teleport, o.steps).weights,
    }
    loss, gradient, _, seconds = zip(baseline, published, *(run(moves[arm]) for arm in ARMS[2:]))
    return {"loss": torch.stack(loss), "gradient": torch.stack(gradient), "seconds": torch.tensor(seconds)}


def train_growths(s, optimizer, W, X, Y):
    """Exact ascents to several gradient norms, at the published learning rate. Curves are (growth, S, epochs)."""
    o, loss_fn, rows = OPTIMIZERS[optimizer], half_squared_error(X, Y, ACTIVATION), len(s.growths)
    growths = torch.tensor(s.growths, dtype=X.dtype, device=X.device)[:, None]

    def move(weights):
        return ascend(weights, X, loss_fn, o.small * o.lr_teleport, s.ascent_steps, growths).weights

    W = tuple(V.expand(rows, *V.shape) for V in W)
    loss, gradient, _, _ = train(s, optimizer, W, loss_fn, o.lr, move)
    return {"loss": loss, "gradient": gradient}


def free_decrease(path, losses, target, start, loss_fn):
    """The first point, from epoch `start` on, of the piecewise linear path of the weights at which the loss is down to
    `target`. path: the weights at each epoch; losses (*E, epochs); target (*E). Where the target is above the loss at
    `start` that point is `start` itself, where the path never gets down to it its end."""
    E, members = target.shape, torch.arange(target.numel(), device=target.device)
    below = losses[..., start:] <= target[..., None]
    k = torch.where(below.any(-1), below.int().argmax(-1), below.shape[-1] - 1) + start
    ends = []
    for epoch in ((k - 1).clamp_min(start), k):
        layers = (torch.stack([W[m] for W in path]).flatten(1, -3) for m in range(len(path[0])))
        ends.append([W[epoch.flatten(), members].unflatten(0, E) for W in layers])
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(60):
        middle = (low + high) / 2
        above = loss_fn(_between(*ends, middle)) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return _between(*ends, high)


def _between(first, second, t):
    return tuple(torch.lerp(A, B, t[..., None, None]) for A, B in zip(first, second))


def epochs_to(loss, level):
    """First epoch at which the loss (…, epochs) is at most level; the number of epochs if it never is."""
    below = loss <= np.asarray(level)[..., None]
    return np.where(below.any(-1), below.argmax(-1), loss.shape[-1])


def compare(s, optimizer, arrays):
    """The loss before a teleport is the baseline's at that epoch: until there all arms are the same."""
    loss, gradient = (arrays[f"{optimizer}_arms/{k}"][:, 0] for k in ("loss", "gradient"))  # (arm, S, epochs)
    rates, growths = (arrays[f"{optimizer}_{k}/loss"] for k in ("rates", "growths"))
    level = loss[0, :, s.level_epoch]
    needed = epochs_to(loss, level)
    saved = s.level_epoch - needed.mean(-1)
    metrics = {"level": level, "level_epoch": s.level_epoch}
    for a, arm in enumerate(ARMS):
        before, after = loss[0, :, s.teleport_epoch], loss[a, :, s.teleport_epoch]
        metrics[arm] = {
            "loss_before": before,
            "loss_after": after,
            "largest_relative_drift": np.abs(after / before - 1).max(),
            "squared_gradient_norm_after": gradient[a, :, s.teleport_epoch],
            "epochs_to_level": needed[a],
            "epochs_saved": difference(np.full(s.seeds, s.level_epoch), needed[a]),
            "share_of_published_saving": saved[a] / saved[1] if saved[1] else float("nan"),
            "final_loss": loss[a, :, -1],
            "epochs_to_level_by_factor": epochs_to(rates[a], level).mean(-1),
            "final_loss_by_factor": rates[a, :, :, -1].mean(-1),
        }
    metrics["epochs_to_level_by_growth"] = epochs_to(growths, level)
    return metrics


def judge(outcome):
    m = outcome.metrics
    saves = [m[o]["postactivation"]["epochs_saved"][1] > 0 for o in m]
    gains = [at_best_rates(outcome, o) for o in m]  # (difference, as text)
    saved, level = {arm: m["GD"][arm]["epochs_saved"][0] for arm in ARMS[1:]}, m["GD"]["level_epoch"]
    drop = m["GD"]["published"]["largest_relative_drift"]
    best = "; ".join(text for _, text in gains)
    sentence = (
        f"An exact teleport saves gradient descent {saved['postactivation']:.0f} of {level} epochs; each at its best "
        f"learning rate, the final loss changes by {best}."
    )
    details = [
        *(epochs_and_drift(o, m[o]) for o in m),
        f"Final loss, exact minus baseline, each at its best learning rate: {best}.",
        f"The published teleport itself lowers gradient descent's loss by up to {drop:.0%}; that drop alone saves "
        f"{saved['drift only']:.0f} epochs.",
    ]
    limits = "not at the best learning rate" if all(saves) else "no epochs saved by one of the two"
    better = all(verdict(gain) == "better" for gain, _ in gains)
    number = f"GD's final loss {interval(gains[0][0], 3)} at best rates"
    return Verdict(grade(all(saves) and better, any(saves)), limits, sentence, details, number)


def at_best_rates(outcome, optimizer):
    """Final loss of the exact teleport minus the baseline's, each at its best rate, with its interval, and as text."""
    m, factors = outcome.metrics[optimizer], outcome.settings.factors
    mine, base = (int(np.nanargmin(m[arm]["final_loss_by_factor"])) for arm in ("postactivation", "baseline"))
    final = outcome.arrays[f"{optimizer}_rates/loss"][..., -1]  # (arm, factors, runs)
    gain = difference(final[ARMS.index("postactivation"), mine], final[0, base])
    return gain, f"{optimizer} {interval(gain, 3)} (×{factors[mine]:g} against ×{factors[base]:g})"


def epochs_and_drift(optimizer, m):
    saved = ", ".join(f"{arm} {interval(m[arm]['epochs_saved'], 0)}" for arm in ARMS[1:])
    drift = ", ".join(f"{arm} {m[arm]['largest_relative_drift']:.0e}" for arm in ARMS[1:])
    return f"{optimizer}, epochs saved until the loss of epoch {m['level_epoch']}: {saved}. Drift: {drift}."


def plot(outcome, s, save):
    save(plot_views(outcome, s))
    save(plot_loss(outcome, s), "controls")
    save(plot_sweeps(outcome, s), "sweeps")


def plot_loss(outcome, s):
    """Loss against epoch, and beneath it the epochs saved: the published bar beside the drift's and the exact ones."""
    figure, axes = plots.panels(2, 2, width=4.4, height=2.6, height_ratios=(3, 1.5))
    for (top, bottom), optimizer in zip(axes.T, OPTIMIZERS):
        loss, metrics = outcome.arrays[f"{optimizer}_arms/loss"], outcome.metrics[optimizer]
        for a, arm in enumerate(ARMS[:4]):
            plots.log_band(top, range(s.epochs), loss[a, 0], optimizer if arm == "baseline" else f"+ {arm}", a)
        top.axvline(s.teleport_epoch, color="0.7", linewidth=0.8, zorder=0)
        top.set(title=optimizer, xlabel="Epoch", yscale="log")
        for a, arm in enumerate(ARMS[1:], 1):
            mean, low, high = metrics[arm]["epochs_saved"]
            spread = None if np.isnan(low) else [[mean - low], [high - mean]]
            look = dict(color=plots.COLORS[a], alpha=0.8, hatch=("", "", "//", "", "..")[a])
            bottom.barh(a, mean, xerr=spread, height=0.7, error_kw=dict(capsize=2, linewidth=1), **look)
        bottom.set_yticks(range(1, len(ARMS)), ARMS[1:])
        bottom.invert_yaxis()
        bottom.set(xlabel=f"Epochs saved, of {s.level_epoch}")
        bottom.grid(axis="y", visible=False)
        top.legend()
    axes[0, 0].set_ylabel("Loss")
    return figure


def plot_sweeps(outcome, s):
    figure, axes = plots.panels(2, 2, width=4.2, height=2.8)
    for (top, bottom), optimizer in zip(axes.T, OPTIMIZERS):
        metrics = outcome.metrics[optimizer]
        for a, arm in enumerate(ARMS):
            label = optimizer if arm == "baseline" else f"+ {arm}"
            top.plot(s.factors, metrics[arm]["final_loss_by_factor"], label=label, **plots.style(a, marker=True))
        top.set(
            title=optimizer, xscale="log", xlabel="Learning rate / published", ylabel=f"Loss at epoch {s.epochs - 1}"
        )
        top.set_xticks(s.factors, [f"×{f:g}" for f in s.factors])
        saved = s.level_epoch - np.array(metrics["epochs_to_level_by_growth"])
        for r in range(s.seeds):
            bottom.plot(s.growths, saved[:, r], color="0.75", linewidth=0.8)
        label = "postactivation (grey: each run)"
        bottom.plot(s.growths, saved.mean(1), label=label, **plots.style(3, marker=True))
        for a, arm in enumerate(ARMS[1:3], 1):
            bottom.axhline(metrics[arm]["epochs_saved"][0], label=arm, **plots.style(a))
        bottom.set(xscale="log", ylim=(-20, s.level_epoch + 5), ylabel="Epochs saved")
        bottom.set_xlabel(r"Growth of $\|\partial L/\partial W\|^2$ at which the ascent stops")
        bottom.set_xticks(s.growths, [f"×{g:g}" for g in s.growths])
        for ax in (top, bottom):
            ax.minorticks_off()
    axes[0, 0].legend(fontsize=8)
    axes[1, 1].legend(fontsize=8, loc="lower right")
    return figure


def plot_views(outcome, s):
    """The paper's views of its two arms: loss against epoch and seconds, gradient norm against epoch and loss."""
    figure, axes = plots.panels(2, 4, width=3.4)
    for row, optimizer in zip(axes, OPTIMIZERS):
        for arm in PAPERS:
            a, label = ARMS.index(arm), optimizer if arm == "baseline" else f"+ {arm}"
            loss, norm = (outcome.arrays[f"{optimizer}_arms/{k}"][a, 0] for k in ("loss", "gradient"))
            plots.log_band(row[0], range(s.epochs), loss, label, a)
            loss, norm = (np.exp(np.log(v).mean(0)) for v in (loss, norm))
            row[1].plot(outcome.timings[optimizer][arm], loss, label=label, **plots.style(a))
            row[2].plot(norm, label=label, **plots.style(a))
            row[3].plot(loss, norm, label=label, **plots.style(a))
        row[0].set(xlabel="Epoch", ylabel="Loss", yscale="log")
        row[1].set(xlabel=f"Seconds, {s.seeds} networks at once", ylabel="Loss", yscale="log")
        row[2].set(xlabel="Epoch", ylabel=r"$\|\partial L/\partial W\|^2$", yscale="log")
        row[3].set(xlabel="Loss", ylabel=r"$\|\partial L/\partial W\|^2$", xscale="log", yscale="log")
        row[0].legend(fontsize=8)
    return figure


def report(outcome, s):
    rows, drifts = [], []
    for optimizer in OPTIMIZERS:
        for arm in ARMS:
            m = outcome.metrics[optimizer][arm]
            share = m["share_of_published_saving"]
            norm = np.exp(np.log(m["squared_gradient_norm_after"]).mean())
            cells = [f"{norm:.2g}", interval(m["epochs_saved"], 0), "" if np.isnan(share) else f"{share:.0%}"]
            cells.append(mean_std(m["final_loss"]))
            rows.append([f"{optimizer}, {arm}", *cells])
            if arm != "baseline":
                moves = [f"{b:.4g} → {a:.4g}" for b, a in zip(m["loss_before"], m["loss_after"])]
                drifts.append([f"{optimizer}, {arm}", *moves, f"{m['largest_relative_drift']:.1e}"])
    runs = [f"run {n + 1}" for n in range(s.seeds)]
    header = ["", "‖∂L/∂W‖² after", "epochs saved [95 %]", "of published", f"loss at epoch {s.epochs - 1}"]
    return (
        table(header, rows)
        + f"\n\nLoss before → after the teleport at epoch {s.teleport_epoch}:\n"
        + table(["", *runs, "largest relative"], drifts)
        + "\n\n"
        + "\n".join(best_rate(outcome, s, optimizer) for optimizer in OPTIMIZERS)
    )


def best_rate(outcome, s, optimizer):
    """One sentence: what a better learning rate does without any teleport."""
    final = {arm: np.array(outcome.metrics[optimizer][arm]["final_loss_by_factor"]) for arm in ARMS}
    i = final["baseline"].argmin()
    others = ", ".join(f"{arm} {final[arm][i]:.3g}" for arm in ARMS[1:])
    return f"{optimizer} at its best learning rate, ×{s.factors[i]:g}: final loss {final['baseline'][i]:.3g} ({others})"


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
