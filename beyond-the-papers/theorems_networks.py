"""Checks on small networks: what descent conserves, twins, tuned steps, group laws; weights in float64.

A hidden unit i has an incoming row V_i and an outgoing column U_i; the rescaling by s multiplies the one and divides
the other by s. Along its orbit ξ_i = ∂w/∂log s_i = (V_i, −U_i), and differentiating ⟨∇L, ξ_i⟩ = 0 along the gradient g
gives ∂(½‖g‖²)/∂log s_i = ⟨Hg, ξ_i⟩ = ‖∂U_i‖² − ‖∂V_i‖².
"""

import math
from itertools import product

import numpy as np
import torch
from scipy.optimize import minimize

from common.losses import batch_loss, cross_entropy, half_squared_error
from common.mlp import StackedMLP, initial_weights, published_seeds
from teleport import (
    IDENTITY,
    RELU,
    TANH,
    forward,
    leaky_relu,
    postactivation_action,
    preactivation_action,
    rescaling_action,
    squared_gradient_norm,
)
from teleporter.objectives import line_search_decrease, rescaled, true_decrease

ACTIVATIONS = {"linear": IDENTITY, "leaky": leaky_relu(0.1), "relu": RELU, "tanh": TANH}
EXACT = ("linear", "leaky", "relu")
DIMS, SAMPLES = (6, 5, 4), 20


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def regression(name, seed=1):
    """A network of DIMS with this activation, and its half squared error on random samples."""
    generator = torch.Generator().manual_seed(seed)
    W = tuple(normal(generator, o, i) / i**0.5 for i, o in zip(DIMS, DIMS[1:]))
    X, Y = normal(generator, DIMS[0], SAMPLES), normal(generator, DIMS[-1], SAMPLES)
    return W, half_squared_error(X, Y, ACTIVATIONS[name])


def gradients(W, loss):
    W = [w.detach().requires_grad_() for w in W]
    return torch.autograd.grad(loss(W), W)


def slope(W, loss):
    """∂(½‖∇L‖²)/∂log s of every hidden unit, by autograd along the orbit."""
    t = W[0].new_zeros(len(W[0]), requires_grad=True)
    return torch.autograd.grad(squared_gradient_norm(rescaled(W, [t]), loss) / 2, t)[0]


def per_unit(V, U):
    """‖V_i‖² − ‖U_i‖² of every hidden unit: Q of weights, the difference of the two squared norms of gradients."""
    return V.square().sum(1) - U.square().sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Newton's direction, and the largest ‖∇L‖, on a network's orbit


def hessian(W, loss):
    """H and g of all weights, flattened."""
    shapes = [w.shape for w in W]

    def flat_loss(w):
        return loss([part.view(shape) for part, shape in zip(w.split([s.numel() for s in shapes]), shapes)])

    w = torch.cat([x.flatten() for x in W])
    return torch.autograd.functional.hessian(flat_loss, w), torch.cat([g.flatten() for g in gradients(W, loss)])


def newton_degrees(W, loss):
    """The angle between the lines along g and along H^-1 g."""
    H, g = hessian(W, loss)
    newton = torch.linalg.solve(H, g)
    return math.degrees(math.acos(abs(torch.cosine_similarity(g, newton, 0).item())))


def on_an_orbit(s):
    """⟨Hg, ξ_i⟩ against ‖∂U_i‖² − ‖∂V_i‖²; Newton's direction at the one critical point, the minimum of ‖∇L‖."""
    rows = []
    for seed in range(1, 1 + s.networks):
        W, loss = regression("leaky", seed)
        (V, U), (G_V, G_U), (H, g) = W, gradients(W, loss), hessian(W, loss)
        E = torch.eye(len(V), dtype=V.dtype)
        xi = torch.stack([torch.cat(((e[:, None] * V).flatten(), -(U * e).flatten())) for e in E])
        off = (xi @ H @ g + per_unit(G_V, G_U)).abs().max() / per_unit(G_V, G_U).abs().max()
        least = rescaled(W, [(G_V.square().sum(1) / G_U.square().sum(0)).log() / 4])
        still = slope(least, loss).abs().max() / squared_gradient_norm(least, loss)
        rows.append([off.item(), still.item(), newton_degrees(W, loss), newton_degrees(least, loss)])
    rows = np.array(rows)
    names = ("network_off", "network_slope", "degrees", "degrees_at_minimum")
    return dict(zip(names, [*rows[:, :2].max(0), *np.median(rows[:, 2:], 0)]))


def no_maximum():
    """The smallest orbit: L = ½(uσ(v))² at u = v = 1. ‖∇L‖² is s² + 1/s², and λ_max grows as well, without limit."""
    found = []
    for s in (1.0, 10.0, 100.0, 1000.0):
        W = torch.tensor([[s]], dtype=torch.float64), torch.tensor([[1 / s]], dtype=torch.float64)
        H, g = hessian(W, lambda w: forward(w, torch.ones(1, 1, dtype=torch.float64), RELU).square().sum() / 2)
        found.append([(g @ g).item() / (s**2 + s**-2), (g @ g).item(), torch.linalg.eigvalsh(H)[-1].item()])
    form, speed, largest = zip(*found)
    return {
        "orbit_form_off": max(abs(x - 1) for x in form),
        "orbit_growth": speed[-1] / speed[0],
        "orbit_beta_growth": largest[-1] / largest[0],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Conservation under descent


def conservation(s):
    """ΔQ_i of every step and unit, η²(‖∂V_i‖² − ‖∂U_i‖²) and −η² ∂(½‖∇L‖²)/∂log s_i; a row a step, for each σ."""
    found = {"identity_off": 0.0, "slope_off": 0.0, "path": 0.0}
    for name in ACTIVATIONS:
        (V, U), loss = regression(name)
        rows, way, eta = [], 0.0, s.rate
        for _ in range(s.descent):
            G_V, G_U = gradients((V, U), loss)
            along = slope((V, U), loss)
            moved = V - eta * G_V, U - eta * G_U
            rows.append(
                torch.stack([per_unit(*moved) - per_unit(V, U), eta**2 * per_unit(G_V, G_U), -(eta**2) * along])
            )
            way += eta**2 * sum(G.square().sum() for G in (G_V, G_U)).item()
            V, U = moved
        change, exact, down = (torch.stack(columns) for columns in zip(*rows))
        scale = V.square().sum() + U.square().sum()
        found |= {f"{name}_change": change / eta**2, f"{name}_down": down / eta**2}
        if name in EXACT:
            found["identity_off"] = max(found["identity_off"], ((change - exact).abs().max() / scale).item())
            found["slope_off"] = max(found["slope_off"], ((exact - down).abs().max() / down.abs().max()).item())
            found["path"] = max(found["path"], change.abs().sum().item() / way)
        else:
            found[f"{name}_off"] = ((change - exact).abs().max() / exact.abs().max()).item()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A teleport is a preconditioner

TWINS = {  # optimizer, its options, the power of s in its rates, which option has to be scaled with s as well
    "descent": (torch.optim.SGD, {}, 2, ""),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 2, ""),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 2, ""),
    "decay": (torch.optim.SGD, {"weight_decay": 0.1}, 2, "weight_decay"),
    "adam": (torch.optim.Adam, {"eps": 1e-3}, 1, "eps"),
    "rmsprop": (torch.optim.RMSprop, {"eps": 1e-3}, 1, "eps"),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-3}, 1, "eps"),
    "adamw": (torch.optim.AdamW, {"eps": 0.0, "weight_decay": 0.1}, 1, "weight_decay"),
}


def trained(W, loss, s, kind, options, power=0, scaled="", steps=10, lr=1e-2):
    """Weights after some steps. A group for each row of V and column of U, with the rates of the twin of s: lr/s^power
    for the row, lr s^power for the column, and the scaled option by the inverse."""
    V, U = W
    units = [[r.clone().requires_grad_() for r in rows] for rows in (V, U.T)]
    groups = []
    for rows, side in zip(units, (s, 1 / s)):
        for row, factor in zip(rows, (side**power).tolist()):
            own = {scaled: options[scaled] * factor} if scaled else {}
            groups.append({"params": [row], "lr": lr / factor, **own})
    optimizer = kind(groups, lr=lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss((torch.stack(units[0]), torch.stack(units[1]).T)).backward()
        optimizer.step()
    return torch.stack(units[0]).detach(), torch.stack(units[1]).T.detach()


def twins():
    """The largest distance of a teleported run, pulled back, from its twin of rates per unit, relative to the way."""
    W, loss = regression("leaky")
    generator = torch.Generator().manual_seed(2)
    s = 4 ** (torch.rand(DIMS[1], generator=generator, dtype=torch.float64) - 0.5)  # within [1/2, 2]
    found = {}
    for name, (kind, options, power, scaled) in TWINS.items():
        moved = trained(rescaled(W, [s.log()]), loss, s, kind, options)
        back, twin = rescaled(moved, [-s.log()]), trained(W, loss, s, kind, options, power, scaled)
        way = max((a - b).abs().max() for a, b in zip(twin, W))
        found[name] = (max((a - b).abs().max() for a, b in zip(back, twin)) / way).item()
    return {"twins": max(found.values())} | {f"twin_{name}": value for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The tuned step

AIMS = ("norm", "newton", "decrease", "least")  # max ‖g‖²; max ‖g‖⁴/(gᵀGg); max of the true decrease; min ‖g‖²
WIDTHS = (784, 16, 10, 10)
STEPS = [2.0 ** (k / 4) for k in range(-40, 41)]  # of the line search


class TunedStep:
    """784-16-10-10 at the published initialization, on one batch: the orbit of rescalings, log s within ± log B."""

    def __init__(self, seed, X, y):
        self.W = [W[0].double() for W in initial_weights(WIDTHS, [seed])]
        self.loss = batch_loss(X, y, ACTIVATIONS["leaky"])
        self.output = lambda W: forward(W, X, ACTIVATIONS["leaky"])
        self.criterion = lambda logits: cross_entropy(logits, y)

    def at(self, t):
        return rescaled(self.W, t.split(WIDTHS[1:-1]))

    def norm(self, W):
        return squared_gradient_norm(W, self.loss)

    def decrease(self, W, steps=STEPS):
        return true_decrease(W, self.loss, steps=steps)

    def newton(self, W):
        return line_search_decrease(W, self.output, self.criterion)

    def corner(self, B):
        """The t of the largest ‖g‖² of all: log‖g‖² is convex in t, so a corner. With p, q = s² of the two layers
        ‖g(t)‖² = Σ a_i/p_i + Σ b_ji p_i/q_j + Σ c_j q_j: for each corner of q the best p is found unit by unit."""
        G = gradients(self.W, self.loss)
        a, b, c = G[0].square().sum(1), G[1].square(), G[2].square().sum(0)
        best = (-math.inf, None)
        for signs in product((-1.0, 1.0), repeat=len(c)):
            q = torch.tensor(signs, dtype=torch.float64)
            own = (B ** (-2 * q)) @ b
            up, down = a / B**2 + own * B**2, a * B**2 + own / B**2
            value = (torch.maximum(up, down).sum() + c @ B ** (2 * q)).item()
            if value > best[0]:
                best = value, torch.cat((torch.where(up > down, 1.0, -1.0), q))
        return best[1] * math.log(B)

    def climb(self, score, B, starts):
        """The best t that L-BFGS-B finds from 0 and from random starts."""
        rng, limit, best = np.random.default_rng(0), math.log(B), None

        def downhill(t):
            t = torch.tensor(t, requires_grad=True)
            value = -score(self.at(t)).log()
            return value.item(), torch.autograd.grad(value, t)[0].numpy()

        for k in range(starts):
            t = rng.uniform(-limit, limit, sum(WIDTHS[1:-1])) * (k > 0)
            options = {"bounds": [(-limit, limit)] * len(t), "method": "L-BFGS-B", "options": {"maxiter": 60}}
            found = minimize(downhill, t, jac=True, **options)
            best = found if best is None or found.fun < best.fun else best
        return torch.tensor(best.x)

    def best(self, aim, B, starts):
        if aim == "norm":
            return self.corner(B)
        scores = {
            "newton": self.newton,
            "decrease": lambda W: self.decrease(W, STEPS[::4]),
            "least": lambda W: 1 / self.norm(W),
        }
        return self.climb(scores[aim], B, 1 if aim == "least" else starts)


def tuned_step(s, data):
    """What the best step gains after a rescaling, over what it gains without: {aim_B: mean of the seeds}."""
    X, y = data.x[: s.batch].flatten(1).T.double(), data.y[: s.batch]
    rows, moved = {}, {}
    for seed in published_seeds(s.seeds):
        step = TunedStep(seed, X, y)
        norm, decrease = step.norm(step.W), step.decrease(step.W)
        for B, aim in product(s.bounds, AIMS):
            there = step.at(step.best(aim, B, s.starts))
            rows.setdefault(f"{aim}_{B:g}", []).append((step.decrease(there) / decrease).item())
            rows.setdefault(f"{aim}_{B:g}_growth", []).append((step.norm(there) / norm).item())
            moved.setdefault(aim, there) if B == s.bounds[0] else None
    found = {key: np.mean(values) for key, values in rows.items()}
    return found | {f"seeds_{key}": np.array(values) for key, values in rows.items()} | after_training(s, data, moved)


def after_training(s, data, moved):
    """After some steps of SGD (batch 20), each arm at its own best rate: the loss's decrease over the untouched run's;
    the first seed, the first bound."""
    untouched = [W[0] for W in initial_weights(WIDTHS, published_seeds(1))]
    arms, rates = {"untouched": untouched, **moved}, torch.tensor([2.0 ** (k / 2) for k in range(-12, 7)])
    stack = [torch.stack([W[m].float() for W in arms.values() for _ in rates]) for m in range(len(untouched))]
    x, y = data.x[: 20 * s.steps].flatten(1), data.y[: 20 * s.steps]
    networks = StackedMLP(stack, lr=rates.repeat(len(arms)))
    before, _ = networks.evaluate(x, y)
    networks.train_epoch(x, y, 20)
    decrease = (before - networks.evaluate(x, y)[0]).view(len(arms), len(rates)).nan_to_num(-math.inf).amax(1)
    return {f"trained_{arm}": (value / decrease[0]).item() for arm, value in zip(arms, decrease) if arm != "untouched"}


# ---------------------------------------------------------------------------------------------------------------------
# Group laws


def group_laws(s):
    """How far g₁·(g₂·w) is from (g₁g₂)·w in the weights, and the outputs from unmoved ones, against the samples."""
    generator, width = torch.Generator().manual_seed(0), 8  # of the input and of the hidden layer
    U, V, X = normal(generator, 4, width), normal(generator, width, width), normal(generator, width, 2 * width)
    g1, g2 = (torch.eye(width, dtype=torch.float64) + 0.3 * normal(generator, width, width) / width**0.5 for _ in "12")
    r1, r2 = (g.diagonal().abs() for g in (g1, g2))
    sigma, samples, found = ACTIVATIONS["leaky"], range(1, 2 * width + 1), {}
    actions = {
        "preactivation": lambda W, h, g: preactivation_action(*W, h, g, sigma),
        "postactivation": lambda W, h, g: postactivation_action(*W, h, g, sigma),
        "rescaling": lambda W, h, g: rescaling_action(*W, g, sigma),
    }
    for name, act in actions.items():
        a, b, ab = (r1, r2, r1 * r2) if name == "rescaling" else (g1, g2, g1 @ g2)
        rows = []
        for h in (X[:, :n] for n in samples):
            twice, once = act(act((U, V), h, b), h, a), act((U, V), h, ab)
            size = sum(W.square().sum() for W in once).sqrt()
            law = sum((p - q).square().sum() for p, q in zip(twice, once)).sqrt() / size
            outputs = [P @ sigma.f(Q @ h) for P, Q in ((U, V), once)]
            rows.append([law.item(), ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item()])
        found |= dict(zip((f"{name}_law", f"{name}_outputs"), np.array(rows).T))
        for where, n in (("fewer", width // 2), ("square", width), ("more", 2 * width)):
            found |= {f"{name}_{what}_{where}": value for what, value in zip(("law", "outputs"), rows[n - 1])}
    return found | {"samples": np.array(samples)}
