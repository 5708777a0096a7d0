"""One number for each meta-training, compared over meta-seeds; and what the published code was recorded to do."""

import numpy as np

from common.claims import Published
from common.statistics import compare, family

RECORDED = {  # their code, run in full: mean loss on the five published problems after STEPS
    "GD": (477558, 68205, 38221, 2499, 48.8),
    "LSTM(lr, teleport)": (477558, 416, 111, 40.5, 20.0),
    "LSTM(update, teleport)": (477558, 10024, 5372, 5530, 12128),
    "LSTM(update)": (477558, 78571, 4162, 38075, 125071),
}
STEPS = (0, 1, 2, 10, 29)
PROBLEMS = 5  # of theirs, our first


def over_meta_seeds(arrays, arms, claimed, rivals):
    """{(arm, other): Comparison} of the mean log loss over problems after the last step, one number a meta-seed.

    arms: (part, index in the part, name), as in the arrays PART/loss (A, M, S, steps + 1). claimed: pairs of names, one
    family; all other learned arms against the rivals, which learn nothing and have one number, are another.
    """
    with np.errstate(all="ignore"):
        values = {name: np.log(arrays[f"{key}/loss"][a, :, :, -1].astype(float)).mean(-1) for key, a, name in arms}
    learned = [name for key, _, name in arms if key != "gd"]
    others = [(name, rival) for name in learned for rival in rivals if (name, rival) not in claimed]
    found = {}
    for pairs in (claimed, others):
        sides = [(values[name], np.broadcast_to(values[other], values[name].shape)) for name, other in pairs]
        found |= dict(zip(pairs, family([compare(*each, relative=False) for each in sides])))
    return found


def rising(arrays, arms):
    """{learned arm: how many of its meta-seeds rise again, i.e. end above their loss after two steps}."""
    found = {}
    for key, a, name in (arm for arm in arms if arm[0] != "gd"):
        with np.errstate(all="ignore"):
            mean = np.log(arrays[f"{key}/loss"][a].astype(float)).mean(1)  # (M, steps + 1)
        found[name] = int((~(mean[:, -1] <= mean[:, 2])).sum())  # NaN too
    return found


def updates(up, metrics):
    """What the published learned updates did, and how many of ours do."""
    mine = [name for name in up if "update" in name]
    of = sum(metrics[name]["meta_seeds"] for name in mine)
    return (
        f"The published learned updates rise again after two steps, and so do {sum(up[m] for m in mine)} of {of} here."
    )


def recorded(metrics, arrays, arms):
    """The mean losses of their code beside ours: gradient descent's agree to 1 %, learned ones within a factor 2."""
    for key, a, name in (arm for arm in arms if arm[2] in RECORDED):
        ours = metrics[name]["mean_loss_published_problems"]
        every = arrays[f"{key}/loss"][a].astype(float)[:, :PROBLEMS].mean(1)  # (M, steps + 1)
        worst = every[np.argmax(every[:, -1])]
        for step, value in zip(STEPS, RECORDED[name]):
            if str(step) in ours:
                mine = float(ours[str(step)])
                setting = "" if name == "GD" else f"exact inverse, the best meta-seed (the worst: {worst[step]:.4g})"
                agrees = bool(abs(np.log(mine / value)) < (0.01 if name == "GD" else np.log(2)))
                yield Published(f"{name}: mean loss at step {step}", float(value), mine, "their code", setting, agrees)
