"""Learning to teleport: recurrent networks that choose where to teleport, how far to step, and which way.

ICLR 2024 (arXiv 2305.13404), Algorithm 1. The optimizee is an MLP W_L σ(W_{L-1} … σ(W_1 X)) fitted to Y by half the
squared error; every width and the number of samples are the same d, which makes the post-activation action exact.
After each local update a meta-optimizer reads the gradients of two adjacent layers and writes the element T of the
hidden layer between them. It is trained by back-propagation through the optimizee, truncated every `unroll` steps.

Shapes: a stack of E meta-optimizers (arms × meta-seeds) drives S optimizees each. Weights W and gradients G are one
tensor (E, S, L, d, d), elements T are (E, S, L−1, d, d), X and Y (S, d, d), losses (E, S).

Lean graphs (timed in benchmarks/learn_to_teleport.py). The graph of an unroll holds neither losses nor the weights of
the meta-optimizers: the sum of the losses is differentiated through the W that were visited, whose ∂L/∂W are at hand,
down to what enters the cells' nonlinearities; one matrix product per unroll then gives the gradient of a weight
matrix. The action inverts X once per optimizee. The steps after the last meta-update teach nothing and are left out.
"""

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from common import UserError
from common.arms import clock

SLOPE = 0.1  # of σ, the leaky ReLU
FIRST_RATE = 1e-4  # learning rate of the first step, when no core has written one yet
RATES = (1e-7, 5e-3)  # learned learning rates are clamped to this range
DIVERGED = 1e6  # meta-training stops when a loss exceeds the run's first by this factor


class Learner(NamedTuple):
    """An arm of Figure 6: what a learned optimizer does at each step."""

    name: str
    local: str  # "rate": gradient descent with a learned learning rate; "update": a learned update
    element: str | None  # "learned"; "random", of the same norm; None: no teleportation
    inverse: str = "exact"  # or "first-order": I − T in place of (I + T)^-1, as published
    meta_gradient: str = "first-order"  # ∂L/∂W taken for a constant, as published; or "full"


class Problem(NamedTuple):
    """S optimizees."""

    W: Tensor  # (S, L, d, d)
    X: Tensor  # (S, d, d), columns are samples
    Y: Tensor  # (S, d, d)


class Diverged(UserError):
    """Meta-training met a loss or a weight that is not finite, or a loss beyond all bounds."""


# ---------------------------------------------------------------------------------------------------------------------
# The optimizee


def regression(width, layers, seeds, device="cpu"):
    """The published problems: W_1 … W_L, X, Y uniform in [0, 1], drawn in this order from each seed."""
    draws = [torch.rand(layers + 2, width, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    draws = torch.stack(draws).to(device)
    return Problem(draws[:, :layers], draws[:, layers], draws[:, layers + 1])


def loss_and_gradients(weights, X, Y):
    """L = ½‖W_L h_{L-1} − Y‖² (*E) and all ∂L/∂W_m, written out. weights: W_m (*E, d_m, d_{m-1}), any widths."""
    h, slopes = [X], []
    for W in weights[:-1]:
        z = W @ h[-1]
        h.append(leaky_relu(z, SLOPE))
        slopes.append(torch.ones_like(z).where(z > 0, SLOPE))
    delta = weights[-1] @ h[-1] - Y
    loss = 0.5 * delta.square().sum((-2, -1))
    gradients = [delta @ h[-1].mT]
    for m in reversed(range(len(slopes))):
        delta = weights[m + 1].mT @ delta * slopes[m]
        gradients.insert(0, delta @ h[m].mT)
    return loss, gradients


def gradient_descent(weights, X, Y, rates):
    """W ← W − rate ∂L/∂W, one step per rate (a number, or a tensor that broadcasts to W). Any widths.

    Returns losses and squared gradient norms at the points visited, both (*E, steps + 1), and the seconds after each.
    """
    losses, norms, seconds, start = [], [], [], time.perf_counter()
    for rate in [*rates, 0]:
        loss, gradients = loss_and_gradients(weights, X, Y)
        weights = [W - rate * G for W, G in zip(weights, gradients)]
        losses.append(loss)
        norms.append(sum(G.square().sum((-2, -1)) for G in gradients))
        seconds.append(time.perf_counter() - start)
    return torch.stack(losses, -1), torch.stack(norms, -1), seconds


def act(W, X, X_inverse, T, first_order):
    """g_m = I + T_m acts after σ on every hidden layer (NeurIPS 2022, Eq. 8). Returns the new W (E, S, L, d, d).

    What teleport.apply_to_layers does with teleport.postactivation_action, for square layers only, in half the time (X
    is inverted beforehand, and every later hidden layer is known to become g_m h_m), and without its checks: a member
    that diverges turns into NaN and the stack goes on. first_order (E, bool): members with I − T for (I + T)^-1.
    """
    eye = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    g = eye + T
    inverse = torch.where(first_order[:, None, None, None, None], eye - T, torch.linalg.inv(g))
    weights, h = list(W.unbind(-3)), X
    for m in range(len(weights) - 1):
        z = weights[m] @ h
        moved = g[..., m, :, :] @ leaky_relu(z, SLOPE)
        change = leaky_relu(moved, 1 / SLOPE) - z  # the inverse of σ is a leaky ReLU too
        change = change @ X_inverse if m == 0 else torch.linalg.solve(h, change, left=False)
        weights[m], weights[m + 1] = weights[m] + change, weights[m + 1] @ inverse[..., m, :, :]
        h = moved
    return torch.stack(weights, -3)


# ---------------------------------------------------------------------------------------------------------------------
# The meta-optimizers


class Core(torch.nn.Module):
    """Two stacked LSTM cells and a linear head; one independent set of weights for each of `stack` members.

    Reads (stack, S, inputs), writes (stack, S, outputs). The autograd graph never holds the weights: the tape keeps
    the inputs and the output z of every affine map, and `accumulate` turns the derivatives of z into theirs.
    """

    def __init__(self, inputs, hidden, outputs, generators):
        super().__init__()
        bound = 1 / math.sqrt(hidden)

        def draw(*shape):
            draws = [bound * (2 * torch.rand(shape, generator=generator) - 1) for generator in generators]
            return torch.nn.Parameter(torch.stack(draws))

        self.x1, self.h1, self.b1 = draw(4 * hidden, inputs), draw(4 * hidden, hidden), draw(1, 4 * hidden)
        self.x2, self.h2, self.b2 = draw(4 * hidden, hidden), draw(4 * hidden, hidden), draw(1, 4 * hidden)
        self.head, self.b = draw(outputs, hidden), draw(1, outputs)
        self.tape = []

    def start(self, S):
        """The state before the first step: (h1, c1, h2, c2), zeros."""
        return (self.head.new_zeros(len(self.head), S, self.head.shape[-1]),) * 4

    def forward(self, x, state):
        h1, c1, h2, c2 = state
        h1, c1 = _lstm(self._affine("b1", x1=x, h1=h1), c1)
        h2, c2 = _lstm(self._affine("b2", x2=h1, h2=h2), c2)
        return self._affine("b", head=h2), (h1, c1, h2, c2)

    def _affine(self, bias, **inputs):
        z = getattr(self, bias).detach()
        for weight, x in inputs.items():
            z = torch.baddbmm(z, x, getattr(self, weight).detach().mT)
        if torch.is_grad_enabled():
            self.tape.append((z.requires_grad_(), bias, {weight: x.detach() for weight, x in inputs.items()}))
        return z

    def accumulate(self, derivatives):
        """Set the weights' .grad from ∂/∂z, one for every entry of the tape (None: nothing depends on it)."""
        dz, xs = {}, {}
        for d, (_, bias, inputs) in zip(derivatives, self.tape):
            if d is not None:
                dz.setdefault(bias, []).append(d)
                for weight, x in inputs.items():
                    xs.setdefault((bias, weight), []).append(x)
        dz = {bias: torch.cat(d, 1) for bias, d in dz.items()}
        for bias, d in dz.items():
            getattr(self, bias).grad = d.sum(1, keepdim=True)
        for (bias, weight), x in xs.items():
            getattr(self, weight).grad = dz[bias].mT @ torch.cat(x, 1)


def _lstm(z, c):
    """One LSTM cell after its affine map: gates i, f, o and candidate in z (…, 4H), cell state c. Returns (h, c)."""
    H = c.shape[-1]
    i, f, o = z[..., : 3 * H].sigmoid().chunk(3, -1)
    c = torch.addcmul(f * c, i, z[..., 3 * H :].tanh())
    return o * c.tanh(), c


class MetaOptimizer(torch.nn.Module):
    """A stack of meta-optimizers, one for every arm and meta-seed, arms outermost.

    teleporter: a core for each hidden layer, which writes T, and a learning rate if that is what the arms learn.
    updater: a core that reads all gradients and writes the update, if the arms learn one. Same meta-seed, same initial
    weights. Raises ValueError for arms that differ in `local` or are not ordered learned, random, no element.
    """

    def __init__(self, arms, meta_seeds, *, width, layers, hidden, norm):
        super().__init__()
        self.members = [(arm, seed) for arm in arms for seed in meta_seeds]
        elements = [arm.element for arm, _ in self.members]
        order = ("learned", "random", None)
        if len({arm.local for arm in arms}) != 1 or elements != sorted(elements, key=order.index):
            raise ValueError(f"arms must share `local` and come as learned, random, no element: {arms}")
        self.learns_rate, self.norm = arms[0].local == "rate", norm
        self.shape = dict(width=width, layers=layers, hidden=hidden, norm=norm)
        self.learned, self.moving = elements.count("learned"), len(elements) - elements.count(None)
        first_order = torch.tensor([arm.inverse == "first-order" for arm, _ in self.members])
        full = torch.tensor([arm.meta_gradient == "full" for arm, _ in self.members])
        self.register_buffer("first_order", first_order[: self.moving], persistent=False)
        self.register_buffer("full", full.view(-1, 1, 1, 1, 1), persistent=False)
        self.any_full = bool(full.any())

        generators = [torch.Generator().manual_seed(seed) for _, seed in self.members]
        square = width * width
        self.updater = None if self.learns_rate else Core(layers * square, hidden, layers * square, generators)
        readers = generators if self.learns_rate else generators[: self.learned]
        readers = [generator for generator in readers for _ in range(layers - 1)]
        self.teleporter = Core(2 * square, hidden, square + self.learns_rate, readers) if readers else None

    def cores(self):
        return [core for core in (self.updater, self.teleporter) if core is not None]

    def member(self, e):
        """Member e alone, as a stack of one, with its present weights."""
        arm, seed = self.members[e]
        alone = MetaOptimizer([arm], [seed], **self.shape).to(self.full.device)
        for name, weight in alone.named_parameters():
            mine = self.get_parameter(name)
            each = len(weight)  # cores per member
            weight.data.copy_(mine.data[e * each : (e + 1) * each])
        return alone

    def adam(self, teleporter_rate, updater_rate):
        rates = {"teleporter": teleporter_rate, "updater": updater_rate}
        groups = [{"params": [*core.parameters()], "lr": rates[name]} for name, core in self.named_children()]
        return torch.optim.Adam(groups, fused=True)


class Unroll:
    """The body of Algorithm 1: S optimizees under every member of a stack, and what the cores remember of them."""

    def __init__(self, meta, problem, generator=None):
        self.meta, self.generator = meta, generator  # the generator draws the random elements
        self.S, self.L, self.d, _ = problem.W.shape
        self.W = problem.W.expand(len(meta.members), *problem.W.shape)
        self.X, self.Y, self.X_inverse = problem.X, problem.Y, torch.linalg.inv(problem.X)
        self.states = {core: core.start(self.S) for core in meta.cores()}
        self.rate = FIRST_RATE
        self.cut()

    def local_update(self):
        """W ← W − rate ∂L/∂W, or W ← W − f with the learned f; notes W, ∂L/∂W and L as they were before."""
        meta, full = self.meta, self.meta.any_full and torch.is_grad_enabled()
        with torch.set_grad_enabled(full):
            loss, gradients = loss_and_gradients((self.W if full else self.W.detach()).unbind(-3), self.X, self.Y)
            G = torch.stack(gradients, -3)
        self.visited.append(self.W)
        self.gradients.append(G.detach())
        self.losses.append(loss.detach())
        self.G = torch.where(meta.full, G, G.detach()) if full else G
        if meta.learns_rate:
            self.W = self.W - self.rate * self.G
        else:
            self.W = self.W - self._read(meta.updater, self.G.flatten(-3)).clamp(-1e7, 1e7).view_as(self.G)

    def teleport(self):
        """W ← g·W for the members that move. Where learning rates are learned, writes the next one too."""
        meta, elements = self.meta, []
        if meta.teleporter is not None:
            readers = len(meta.members) if meta.learns_rate else meta.learned
            G = self.G[:readers].flatten(-2)
            pairs = torch.cat((G[:, :, :-1], G[:, :, 1:]), -1)  # ∂L/∂W_m and ∂L/∂W_{m+1} side by side
            out = self._read(meta.teleporter, pairs.transpose(1, 2).flatten(0, 1))
            out = out.unflatten(0, (readers, self.L - 1)).transpose(1, 2)  # (E, S, L−1, outputs)
            if meta.learns_rate:
                self.rate = out[..., -1].clamp(*RATES).mean(-1).view(readers, self.S, 1, 1, 1)
            elements.append(out[: meta.learned, ..., : self.d**2].unflatten(-1, (self.d, self.d)))
        if meta.moving > meta.learned:
            R = 2 * torch.rand(self.S, self.L - 1, self.d, self.d, generator=self.generator) - 1
            elements.append(R.to(self.W).expand(meta.moving - meta.learned, *R.shape))
        if meta.moving:
            T = torch.cat(elements)
            T = T * (meta.norm / torch.linalg.matrix_norm(T, keepdim=True))
            moved = act(self.W[: meta.moving], self.X, self.X_inverse, T, meta.first_order)
            self.W = torch.cat((moved, self.W[meta.moving :]))

    def _read(self, core, x):
        out, self.states[core] = core(x, self.states[core])
        return out

    def meta_gradient(self):
        """Set .grad of the cores' weights to the derivative of the sum of the losses noted since the last cut."""
        dependent = [(W, G) for W, G in zip(self.visited, self.gradients) if W.requires_grad]
        visited, gradients = zip(*dependent)
        outputs = [[z for z, _, _ in core.tape] for core in self.meta.cores()]
        derivatives = iter(torch.autograd.grad(visited, sum(outputs, []), gradients, allow_unused=True))
        for core, tape in zip(self.meta.cores(), outputs):
            core.accumulate([next(derivatives) for _ in tape])

    def cut(self):
        """Truncate: forget the steps so far, and how W and the states of the cells came about."""
        self.W = self.W.detach()
        self.states = {core: tuple(t.detach() for t in state) for core, state in self.states.items()}
        self.visited, self.gradients, self.losses = [], [], []
        for core in self.meta.cores():
            core.tape.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing them


def meta_train(meta, adam, problem, *, runs, steps, unroll, progress=range, saved=None, save=None, save_every=25):
    """Algorithm 1: train all members side by side, run n on the optimizees problem(n), for `steps` steps each.

    save(arrays) is given the whole state after every save_every runs; saved: such arrays, to continue from with the
    same results. progress(done, runs) iterates over the runs to do. Returns the loss at each run's last meta-update,
    (E, runs), and the seconds that it took. Raises ValueError for an unroll that trains nothing; Diverged, with the
    weights as they were, once a loss is not finite or DIVERGED times the run's first.
    """
    if not 2 <= unroll < steps:
        raise ValueError(f"unroll must be at least 2 and less than the {steps} steps, got {unroll}")
    done, seconds, curve = 0, 0.0, []
    if saved is not None:
        done, seconds, curve = _restore(meta, adam, saved)
    start = time.perf_counter() - seconds
    last = (steps - 1) // unroll * unroll  # the step of the last meta-update
    for n in progress(done, runs):
        body = Unroll(meta, problem(n), torch.Generator().manual_seed(n))
        for step in range(last + 1):
            body.local_update()
            if step == 0:
                bound = DIVERGED * body.losses[0]
            elif step % unroll == 0:
                losses = torch.stack(body.losses)
                if not (losses <= bound).all():
                    raise Diverged(_describe(meta, losses <= bound, f"run {n}, step {step}"))
                body.meta_gradient()
                adam.step()
                body.cut()
            if step < last:
                body.teleport()
        curve.append(losses[-1].mean(-1).cpu())
        if save is not None and ((n + 1) % save_every == 0 or n + 1 == runs):
            if not all(p.isfinite().all() for p in meta.parameters()):  # never save what cannot be continued
                raise Diverged(f"meta-training diverged: weights that are not finite after run {n}")
            save(_state(meta, adam, n + 1, time.perf_counter() - start, curve))
    return torch.stack(curve, -1), time.perf_counter() - start


@torch.no_grad()
def meta_test(meta, problem, steps, generator=None, measure_drift=True):
    """Run the optimizees of `problem` under every member, weights fixed, for `steps` steps.

    Returns loss and squared_gradient_norm at the points visited, (E, S, steps + 1); rate, those used, (E, S, steps),
    1 where the update is learned; drift, what each teleport does to the loss relative to it, (E, S, steps); seconds
    after each point (steps + 1; with measure_drift they include the two losses that it takes).
    """
    body, rates, drifts, seconds = Unroll(meta, problem, generator), [], [], []
    start = clock(body.W.device)
    for step in range(steps + 1):
        rate = torch.as_tensor(body.rate if meta.learns_rate else 1.0, device=body.W.device)
        rates.append(rate.expand(len(body.W), body.S, 1, 1, 1))
        body.local_update()
        seconds.append(clock(body.W.device) - start)
        if step < steps:
            before = body.W
            body.teleport()
            if measure_drift:
                before, after = (loss_and_gradients(W.unbind(-3), body.X, body.Y)[0] for W in (before, body.W))
                drifts.append((after - before) / before)
    results = {
        "loss": body.losses,
        "squared_gradient_norm": [G.square().sum((-3, -2, -1)) for G in body.gradients],
        "rate": [rate[..., 0, 0, 0] for rate in rates[:-1]],
        "drift": drifts,
    }
    return {**{name: torch.stack(v, -1) for name, v in results.items() if v}, "seconds": seconds}


def _state(meta, adam, done, seconds, curve):
    arrays = {"done": done, "seconds": seconds, "curve": torch.stack(curve)}
    for name, p in meta.named_parameters():
        moments = {k: adam.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq")}
        arrays |= {f"{name}/{k}": v.detach().cpu().numpy() for k, v in {"weight": p, **moments}.items()}
    return arrays


def _restore(meta, adam, arrays):
    for name, p in meta.named_parameters():
        weight, *moments = (torch.as_tensor(arrays[f"{name}/{k}"]) for k in ("weight", "step", "exp_avg", "exp_avg_sq"))
        p.data.copy_(weight)
        adam.state[p] = {k: v.to(p.device) for k, v in zip(("step", "exp_avg", "exp_avg_sq"), moments)}
    return int(arrays["done"]), float(arrays["seconds"]), [*torch.as_tensor(arrays["curve"])]


def _describe(meta, good, where):
    """Which members went wrong, given good (steps, E, S)."""
    bad = [member for member, fine in zip(meta.members, good.all(-1).all(0)) if not fine]
    names = ", ".join(f"{arm.name} (meta-seed {seed})" for arm, seed in bad)
    return f"meta-training diverged in {where}: {names}: a loss is not finite or beyond {DIVERGED:g} times the first"
