"""ICLR 2023, Figure 11: attacks (FGSM, PGD) on a convnet and on the ensembles along its data-dependent symmetry.

One network is trained; with elements g = exp(εT) at ε = 10 it becomes the ensembles of symmetry_ensemble.ARMS, whose
members vote. Who is attacked makes the difference, so the figure has a column for each:

- base model: the images are made with the gradient of the network, and every ensemble gets those (as in the paper);
- itself: each ensemble gets images made with its own gradient (of −log of its mean probability);
- either: an image counts as right only if both of these attacks failed. An ensemble that resists its own gradient
  better than the base model's hides its gradient, it is not robust: this column is what is left;
- published: base model, as in the published notebook, which applies each attack twice and clips to [0, 1] images that
  are centred on 0, so that every pixel below 1/2 becomes 1/2; its PGD starts at a random point within 0.3 of the image.
  The dotted line is the network's accuracy after that clipping (and that random start) alone, with no attack.

FGSM: x + r sign(∂L/∂x), kept in [0, 1]. PGD: steps of 0.01, kept within 0.3 of x and in [0, 1], from x. These are the
radii for CIFAR-10; digits, which are nearly black and white, need SCALE times as much.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from symmetry_ensemble import (
    ARMS,
    HIDDEN,
    LEAKY_RELU,
    batches,
    draw,
    ensemble,
    fgsm,
    hidden_input,
    input_gradient,
    original,
    pgd,
    predict,
    split,
    train,
)

from common import cli, plots
from common.claims import Claim, Verdict, grade, table
from common.run import Outcome
from common.statistics import difference, verdict

CLAIM = Claim(
    order=170,
    figure="Attacks (ICLR 2023, Figure 11)",
    paper="ICLR 2023",
    section="",
    says="Ensembles of a network moved along a symmetry are more robust to certain adversarial attacks.",
    short="ensembles resist attacks",
    rule="holds if they are more accurate than the base model under the strongest FGSM and PGD when the attacks on "
    "either model must fail, and at most a point less without attack; in part: at a greater cost, or through "
    "the ensemble's own gradients only.",
    dated="2026-11-22",
    headline=True,
)


@dataclass(frozen=True)
class Settings:
    dataset: str = "mnist-mini"
    images: int | None = None  # of the training set; all if None
    epochs: int = 5
    samples: int = 500  # test images that are attacked
    elements: int = 100
    epsilon: float = 10.0  # g = exp(εT)
    radii: tuple = (0.0, 0.003, 0.006, 0.009, 0.012)  # FGSM
    iterations: int = 3  # PGD
    step: float = 0.01
    radius: float = 0.3
    seeds: int = 3


PRESETS = {
    "tiny": Settings(images=1000, epochs=1, samples=100, elements=8, radii=(0.0, 0.006, 0.012), iterations=2, seeds=2),
    "quick": Settings(),
    "paper": Settings(dataset="CIFAR10", epochs=10, samples=1000, elements=200, seeds=5),
}
SCALE = {"CIFAR10": 1}  # of all radii and steps; 10 for the other datasets
SIGMA = LEAKY_RELU
MODELS = ("original", *ARMS)
ATTACKED = ("base model", "itself", "either", "published")
ATTACKS = ("FGSM", "PGD")


def experiment(run):
    s = run.settings
    seeds = list(range(s.seeds))
    parts, seconds = run.parts(lambda seed: measure(run, seed), {f"seed{seed}": seed for seed in seeds})
    arrays = {name: np.stack([part[name] for part in parts.values()]) for name in parts["seed0"]}
    metrics = {}  # accuracies
    for attack in ATTACKS:
        for i, attacked in enumerate(ATTACKED):
            metrics[f"{attack}/{attacked.replace(' ', '_')}"] = {
                model: {
                    f"{strength:g}": {"mean": values.mean(), "std": values.std(ddof=1) if len(values) > 1 else 0.0}
                    for strength, values in zip(strengths(attack, s), arrays[attack][:, i, m].T)
                }
                for m, model in enumerate(MODELS)
            }
        metrics[f"{attack}/clipped"] = dict(zip(MODELS, arrays[f"{attack}_alone"].mean(0)))  # and noise, no attack
    return Outcome(metrics, arrays, seeds, {"seconds": list(seconds.values())})


def strengths(attack, s):
    """What the horizontal axis shows: the radius of FGSM, the iterations of PGD."""
    scale = SCALE.get(s.dataset, 10)
    return [scale * r for r in s.radii] if attack == "FGSM" else list(range(s.iterations + 1))


def measure(run, seed):
    """Train one network, build its ensembles, attack. Accuracies of shape (attacked, model, strength)."""
    s, data = run.settings, run.data()
    (x, y), (held_out, _) = split(data, s.images)
    net = train(x, y, data.shape, SIGMA, epochs=s.epochs, seed=seed, progress=partial(run.progress, desc="epochs"))
    x, y = data.x_test[: s.samples], data.y_test[: s.samples]
    H = hidden_input(net, held_out[: s.elements * HIDDEN], data.shape).double()
    H_pi, draws = batches(H, s.elements, HIDDEN), draw(s.elements, seed, run.device)
    models = {arm: ensemble(arm, draws, s.epsilon, H_pi, SIGMA) for arm in ARMS}
    models = {"original": original(net), **models}
    scale = SCALE.get(s.dataset, 10)
    limits = {"radius": scale * s.radius, "step": scale * s.step}

    def gradient_of(members):
        return lambda images: input_gradient(net, members, images, y, data.shape, SIGMA)

    def hidden(images):
        return hidden_input(net, images, data.shape).double()

    def right(members, H):
        return predict(net, members, H, SIGMA) == y

    def attacks(gradient):
        """H for every strength of both attacks; strength 0 is the image itself."""
        made = {
            "FGSM": fgsm(gradient, x, [scale * r for r in s.radii]),
            "PGD": pgd(gradient, x, s.iterations, **limits),
        }
        return {attack: [hidden(images) for images in path] for attack, path in made.items()}

    def published(gradient):
        """The same, each applied twice and clipped to [1/2, 3/2], which is [0, 1] for the published, centred images.

        Also H for what is left of the images without any gradient: "alone".
        """
        clip = {"low": 0.5, "high": 1.5}
        generator = torch.Generator().manual_seed(seed)

        def fgsm_once(z, radius):
            return fgsm(gradient, z, [radius], **clip)[0]

        def pgd_once(z, iterations):
            noise = 2 * torch.rand(z.shape, generator=generator).to(z) - 1
            return pgd(gradient, z, iterations, noise=noise, **limits, **clip)[-1]

        def twice(attack, strength):
            return hidden(attack(attack(x, strength), strength))

        made = {
            "FGSM": [hidden(x), *(twice(fgsm_once, scale * r) for r in s.radii[1:])],
            "PGD": [hidden(x), *(twice(pgd_once, iterations) for iterations in range(1, s.iterations + 1))],
        }
        return made, {"FGSM": hidden(x.clamp(0.5, 1.5)), "PGD": twice(pgd_once, 0)}

    on_base = attacks(gradient_of(models["original"]))
    as_published, alone = published(gradient_of(models["original"]))
    result = {attack: torch.empty(len(ATTACKED), len(MODELS), len(strengths(attack, s))) for attack in ATTACKS}
    result |= {f"{attack}_alone": torch.empty(len(MODELS)) for attack in ATTACKS}
    for m, (name, members) in enumerate(run.progress(models.items(), desc="attacks")):
        on_itself = on_base if name == "original" else attacks(gradient_of(members))
        for attack in ATTACKS:
            for i, images in enumerate(zip(on_base[attack], on_itself[attack], as_published[attack])):
                base, itself, published_ = (right(members, H) for H in images)
                result[attack][:, m, i] = torch.stack([base, itself, base & itself, published_]).double().mean(1)
            result[f"{attack}_alone"][m] = right(members, alone[attack]).double().mean()
    return result


TITLES = {
    "base model": "attack on the base model",
    "itself": "attack on each model",
    "either": "either attack succeeds",
    "published": "published attack on the base",
}
LABELS = dict(zip(MODELS, ("original", "group", "interpolated permutation", "$g^{-1}$", "random", "shuffled π")))


def judge(outcome):
    def accuracy(attack, by, model, strength=-1):
        """Of every seed; strength 0: without attack."""
        return outcome.arrays[attack][:, ATTACKED.index(by), MODELS.index(model), strength]

    def gain(attack, by):
        return difference(accuracy(attack, by, "group"), accuracy(attack, by, "original"))

    robust = {
        by: [verdict(gain(attack, by), smaller_is_better=False) == "better" for attack in ("FGSM", "PGD")]
        for by in ("itself", "either")
    }

    def percent(*where):
        return f"{100 * accuracy(*where).mean():.1f}"

    sentence = (
        f"Accuracy under the strongest FGSM ({outcome.label}): {percent('FGSM', 'itself', 'group')} % when attacked "
        f"through the ensemble's own gradients, {percent('FGSM', 'either', 'group')} % when the base model's attack "
        f"counts too, against the base model's {percent('FGSM', 'either', 'original')} %; without attack "
        f"{percent('FGSM', 'either', 'group', 0)} against {percent('FGSM', 'either', 'original', 0)} %."
    )
    details = []
    for attack in ("FGSM", "PGD"):
        strength = f"{strengths(attack, outcome.settings)[-1]:g}"
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
        f"{percent('FGSM', 'either', 'group')} against {percent('FGSM', 'either', 'original')} % under either FGSM",
    )


def plot(outcome, settings, save):
    figure, axes = plots.panels(len(ATTACKS), len(ATTACKED), width=3.3, height=2.8, sharey=True, sharex="row")
    for attack, row in zip(ATTACKS, axes):
        x = strengths(attack, settings)
        for i, (attacked, ax) in enumerate(zip(ATTACKED, row)):
            for m, model in enumerate(MODELS):
                accuracy = outcome.arrays[attack][:, i, m]
                plots.band(ax, x, accuracy, LABELS[model], **plots.style(m, True))
            if attacked == "published":
                alone = outcome.arrays[f"{attack}_alone"][:, 0].mean()
                ax.axhline(alone, color="black", linestyle=":", linewidth=1, label="original, clipped only")
            ax.set_xticks(x)
            ax.set_xlabel("FGSM radius" if attack == "FGSM" else "PGD iterations")
            ax.set_title(TITLES[attacked])
        row[0].set_ylabel("accuracy")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{outcome.label}: votes of {settings.elements} elements, ε = {settings.epsilon:g}")
    save(figure)


def report(outcome, s):
    rows = []
    for attack in ATTACKS:
        for i, attacked in enumerate(ATTACKED):
            for j, strength in list(enumerate(strengths(attack, s)))[1:]:
                accuracy = 100 * outcome.arrays[attack][:, i, :, j].mean(0)
                rows.append([f"{attack} {strength:g}", attacked, *(f"{a:.1f}" for a in accuracy)])
    clean = 100 * outcome.arrays["FGSM"][:, 0, :, 0].mean(0)
    rows.insert(0, ["none", "", *(f"{a:.1f}" for a in clean)])
    alone = 100 * outcome.arrays["FGSM_alone"].mean(0)
    rows.insert(1, ["none, clipped", "published", *(f"{a:.1f}" for a in alone)])
    return f"{outcome.label}: accuracy in per cent, mean over {s.seeds} seed(s)\n\n" + table(
        ["attack", "attacked", *MODELS], rows
    )


if __name__ == "__main__":
    cli.main(__file__, __doc__, PRESETS, experiment, plot, report, judge)
