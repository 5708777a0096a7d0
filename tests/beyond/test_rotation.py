"""Low-rank factors: the identities of a teleport between them, the stacked trainer, the peers' formulas, the script."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "beyond-the-papers"))

import adaptation  # noqa: E402
import factors  # noqa: E402
import rotation  # noqa: E402
import spelling  # noqa: E402

from common.run import Outcome  # noqa: E402

DIMS, RANK, STEPS = (9, 8, 7, 5), 3, 200
SEEDS = [1, 2]


def task(scale=0.7, samples=60):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o, i, generator=generator).double() / i**0.5 for i, o in zip(DIMS, DIMS[1:])]
    x = torch.rand(samples, DIMS[0], generator=generator).double()
    y = torch.randint(DIMS[-1], (samples,), generator=generator)
    return adaptation.Images(weights, x, y, x, y, scale)


def start(copies=1, init="gaussian", seeds=SEEDS):
    shapes = [(o, i) for i, o in zip(DIMS, DIMS[1:])]
    return [tuple(x.double() for x in p) for p in adaptation.initial_pairs(shapes, RANK, init, seeds, copies)]


def optimizer(pairs, kind=factors.Adam, rate=0.01, ratio=1.0, **options):
    E = len(pairs[0][0])
    rates = (torch.as_tensor(v, dtype=torch.float64).expand(E) for v in (rate, ratio))
    return kind(pairs, *rates, **options)


def elements(orthogonal, count=3):
    generator = torch.Generator().manual_seed(5)
    R = [torch.randn(len(SEEDS), RANK, RANK, generator=generator).double() + 2 * torch.eye(RANK) for _ in range(count)]
    return [torch.linalg.qr(r)[0] for r in R] if orthogonal else R


def train(optimizer, problem, steps=STEPS, size=6):
    losses = []
    for batch in problem.batches(SEEDS, size, steps):
        loss, gradients = problem.gradients(optimizer.pairs(), batch)
        optimizer.step(gradients)
        losses.append(loss)
    return torch.stack(losses)


class Twin(factors.Adam):
    """The untouched run: its directions are the moved run's, pulled back by R, with the exponents given.

    A: R^-1 step(R^-a G_A); Bᵀ: R^a step(R G_Bᵀ), R^a the transpose for a = 1. Right for Adam and for gradient descent.
    """

    def __init__(self, *arguments, R, inner, broken=False, **options):
        super().__init__(*arguments, **options)
        self.R, self.inner, self.broken = R, inner, broken

    def direction(self, k, G):
        R, d = self.R[k], self.widths[k]
        inverse = torch.linalg.inv(R)
        there = torch.cat([inverse.mT @ G[..., :d], R @ G[..., d:]], -1)
        direction = self.inner(self, k, there)
        back = R if self.broken else inverse
        return torch.cat([back @ direction[..., :d], R.mT @ direction[..., d:]], -1)


def adam(optimizer, k, G):
    return factors.Adam.direction(optimizer, k, G)


class Momentum(factors.Adam):
    """Gradient descent (beta 0), heavy ball, Nesterov, as torch.optim.SGD has them; m is the velocity."""

    beta, nesterov = 0.0, False

    def direction(self, k, G):
        self.m[k] = self.beta * self.m[k] + G
        return G + self.beta * self.m[k] if self.nesterov else self.m[k].clone()


def largest_difference(moved, twin, R):
    """Of the pulled-back weights, relative to the twin's."""
    worst = 0.0
    for k, ((A, Bt), (A0, Bt0)) in enumerate(zip(moved.pairs(), twin.pairs())):
        for x, y in ((torch.linalg.inv(R[k]) @ A, A0), (R[k].mT @ Bt, Bt0)):
            worst = max(worst, ((x - y).norm() / y.norm()).item())
    return worst


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_adam_after_a_teleport_is_the_untouched_run_in_another_basis(orthogonal, broken):
    R, problem = elements(orthogonal), task()
    moved, twin = optimizer(start()), optimizer(start(), Twin, R=R, inner=adam, broken=broken)
    moved.move(R)
    losses = train(moved, problem), train(twin, problem)
    if broken:
        assert not torch.allclose(*losses, rtol=1e-3)
    else:
        assert (losses[0] / losses[1] - 1).abs().max() < 1e-10
        assert largest_difference(moved, twin, R) < 1e-10


@pytest.mark.parametrize("beta, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_descent_after_a_teleport_is_preconditioned_and_its_velocity_moves_with_the_gradients(beta, nesterov):
    """In the middle of a run: steps (RᵀR)^-1 m_A and m_B RᵀR, the velocities R^-ᵀ m_A, m_B Rᵀ."""
    R, problem = elements(False), task()
    kind = type("Descent", (Momentum,), {"beta": beta, "nesterov": nesterov})

    class Preconditioned(kind):
        def direction(self, k, G):
            step, d, metric = super().direction(k, G), self.widths[k], R[k].mT @ R[k]
            return torch.cat([torch.linalg.solve(metric, step[..., :d]), metric @ step[..., d:]], -1)

    moved, twin = (optimizer(start(), kind, rate=0.002) for kind in (kind, kind))
    train(moved, problem, 10), train(twin, problem, 10)
    moved.move(R)
    twin.__class__ = Preconditioned
    losses = train(moved, problem), train(twin, problem)
    assert (losses[0] / losses[1] - 1).abs().max() < 1e-10
    assert largest_difference(moved, twin, R) < 1e-10


def test_descent_does_not_feel_a_rotation_and_adam_does():
    Q, problem = elements(True), task()
    for kind, same in ((Momentum, True), (factors.Adam, False)):
        runs = [optimizer(start(), kind) for _ in range(2)]
        runs[0].rotate(Q)
        losses = [train(run, problem) for run in runs]
        assert torch.allclose(*losses, rtol=1e-9) == same


def test_no_teleport_moves_the_loss_and_moments_move_as_they_should():
    """rotate is move for orthogonal elements; back by the inverse, weights and first moments are what they were; a
    signed permutation moves the second moment exactly."""
    problem, run, other = task(), optimizer(start()), optimizer(start())
    train(run, problem, 5), train(other, problem, 5)
    generator = torch.Generator().manual_seed(3)
    batch = next(problem.batches(SEEDS, 6, 1))
    run.C = [x @ x.mT for x in run.m]
    before = problem.gradients(run.pairs(), batch)[0]
    kinds = factors.eigenbasis(run), factors.random_rotations(run, generator), factors.balance(run)
    for moved_by in (*kinds, factors.singular_basis(run), elements(False)):
        run.move(moved_by)
        assert torch.allclose(problem.gradients(run.pairs(), batch)[0], before, rtol=1e-12)
        run.move([torch.linalg.inv(R) for R in moved_by])
    for mine, theirs in zip((*run.F, *run.m), (*other.F, *other.m)):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    Q = elements(True)
    run.v = [v.clone() for v in other.v]
    run.rotate(Q), other.move(Q)
    for mine, theirs in zip((*run.F, *run.m, *run.v), (*other.F, *other.m, *other.v)):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12)
    permutation = torch.tensor([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]).double().expand(len(SEEDS), 3, 3)
    run, twin = optimizer(start()), optimizer(start())
    train(run, problem, 5), train(twin, problem, 5)
    run.rotate([permutation] * 3)
    assert torch.allclose(train(run, problem, 50), train(twin, problem, 50), rtol=1e-9)


def test_elements_are_what_they_are_called():
    problem, run = task(), optimizer(start(), tracks=0.9)
    train(run, problem, 20)
    for Q, C in zip(factors.eigenbasis(run), run.C):
        rotated = Q @ C @ Q.mT
        diagonal = rotated.diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(rotated, torch.diag_embed(diagonal), atol=1e-9 * C.max().item())
        assert (diagonal.diff() <= 1e-12).all()
    run.move(factors.balance(run))
    for A, Bt in run.pairs():
        assert torch.allclose(A.norm(dim=-1), Bt.norm(dim=-1))
    products = [Bt.mT @ A for A, Bt in run.pairs()]
    run.move(factors.singular_basis(run))
    for (A, Bt), product in zip(run.pairs(), products):
        S = torch.linalg.svdvals(product)[..., :RANK]
        for x in (A, Bt):
            assert torch.allclose(x @ x.mT, torch.diag_embed(S.flip(-1)), atol=1e-9)
    zero = optimizer(start(init="zero"))
    for R in (*factors.balance(zero), *factors.singular_basis(zero)):  # B = 0: nothing to balance
        assert torch.equal(R, torch.eye(RANK).double().expand_as(R))


def test_gradients_are_autograd_s():
    problem, K = task(), 2
    run = optimizer(start(K))
    x, y = next(problem.batches(SEEDS, 6, 1))
    loss, gradients = problem.gradients(run.pairs(), (x, y))
    leaves = [F.clone().requires_grad_() for F in run.F]
    h = x.repeat_interleave(K, 0)
    for k, (W, F, d) in enumerate(zip(problem.weights, leaves, run.widths)):
        h = (W + problem.scale * F[..., d:].mT @ F[..., :d]) @ h
        h = torch.nn.functional.leaky_relu(h, 0.1) if k < 2 else h
    wanted = torch.nn.functional.cross_entropy(h, y.repeat_interleave(K, 0), reduction="none").mean(1)
    assert torch.allclose(loss, wanted, rtol=1e-12)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted.sum(), leaves)):
        assert torch.allclose(mine, theirs, atol=1e-14)


def test_adam_is_torch_s_for_every_member_and_its_ratio_is_that_of_lora_plus():
    problem, rates, ratios = task(), torch.tensor([0.01, 0.03]).double(), torch.tensor([1.0, 16.0]).double()
    run = factors.Adam(start(), rates, ratios, betas=(0.9, 0.99), weight_decay=0.1)
    batches = list(problem.batches(SEEDS, 6, 30))
    for e in range(2):
        pairs = [(A[e : e + 1].clone(), B.mT[e : e + 1].clone()) for A, B in start()]
        plus = rates[e].item() * ratios[e].item() ** 0.5
        groups = [
            {"params": [A for A, _ in pairs], "lr": plus / ratios[e].item()},
            {"params": [b for _, b in pairs], "lr": plus},
        ]
        theirs = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
        for x, y in batches:
            for (A, Bt), G in zip(pairs, problem.gradients(pairs, (x[e : e + 1], y[e : e + 1]))[1]):
                A.grad, Bt.grad = G[..., : A.shape[-1]], G[..., A.shape[-1] :]
            theirs.step()
        if e == 0:
            for batch in batches:
                run.step(problem.gradients(run.pairs(), batch)[1])
        for (A, Bt), (A0, Bt0) in zip(run.pairs(), pairs):
            assert torch.allclose(A[e], A0[0], rtol=1e-9, atol=1e-12) and torch.allclose(
                Bt[e], Bt0[0], rtol=1e-9, atol=1e-12
            )


def test_scaled_adam_preconditions_by_the_other_factor():
    problem = task()
    run, twin = optimizer(start(), factors.ScaledAdam, damping=0.01), optimizer(start())
    for batch in problem.batches(SEEDS, 6, 10):
        gradients = problem.gradients(twin.pairs(), batch)[1]
        run.step(gradients)
        for k, (A, Bt) in enumerate(twin.pairs()):
            d, eye, B = A.shape[-1], 0.01 * torch.eye(RANK), Bt.mT
            G_A, G_B = gradients[k][..., :d], gradients[k][..., d:].mT
            scaled = torch.linalg.inv(B.mT @ B + eye) @ G_A, G_B @ torch.linalg.inv(A @ A.mT + eye)
            gradients[k] = torch.cat([scaled[0], scaled[1].mT], -1)
        twin.step(gradients)
        for mine, theirs in zip(run.F, twin.F):
            assert torch.allclose(mine, theirs, rtol=1e-8)


def test_rite_does_not_feel_any_element_and_its_first_step_is_the_formula():
    """The run after R is the untouched run, which only a transformation-invariant method does (Adam does not)."""
    R, problem = elements(False), task()
    for kind, same in ((factors.RITE, True), (factors.Adam, False)):
        runs = [optimizer(start(), kind, rate=0.01) for _ in range(2)]
        runs[0].move(R)
        assert torch.allclose(*(train(run, problem, 30) for run in runs), rtol=1e-5) == same
    run = optimizer(start(), factors.RITE)
    (A, Bt), G = (
        (x.clone() for x in run.pairs()[0]),
        problem.gradients(run.pairs(), next(problem.batches(SEEDS, 6, 1)))[1],
    )
    run.step(G)
    B, d = Bt.mT, A.shape[-1]
    U, R_B = torch.linalg.qr(B)
    g = torch.linalg.inv(R_B).mT @ G[0][..., :d]
    values, vectors = torch.linalg.eigh(g @ g.mT / d)
    step = torch.linalg.inv(R_B) @ (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT @ g
    assert torch.allclose(run.pairs()[0][0], A - 0.01 * step, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("both_sides", [False, True])
def test_soap_is_adam_in_the_eigenbasis_of_its_preconditioners(both_sides):
    """One pair, one run, by the formula; the first step only fills the preconditioners."""
    generator, beta1, beta2 = torch.Generator().manual_seed(0), 0.9, 0.99
    A, B = (torch.randn(1, *shape, generator=generator).double() for shape in ((3, 4), (5, 3)))
    run = optimizer([(A, B)], factors.SOAP, every=2, both_sides=both_sides, betas=(beta1, beta2))
    W, state = A[0].clone(), {}
    for t in range(8):
        G = torch.randn(1, 3, 9, generator=generator).double()
        run.step([G])
        g = G[0, :, :4]
        if t == 0:
            state = {"L": (1 - beta2) * g @ g.T, "R": (1 - beta2) * g.T @ g, "m": 0 * g, "v": 0 * g}
            QL, QR = (torch.linalg.eigh(state[x])[1].flip(-1) for x in "LR")
            continue
        QR = QR if both_sides else torch.eye(4).double()
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * (QL.T @ g @ QR) ** 2
        step = (QL.T @ state["m"] @ QR) / (1 - beta1**t) / ((state["v"] / (1 - beta2**t)).sqrt() + factors.EPS)
        W = W - 0.01 * QL @ step @ QR.T
        state["L"], state["R"] = (beta2 * state[x] + (1 - beta2) * y for x, y in zip("LR", (g @ g.T, g.T @ g)))
        if t % 2 == 0:
            QL, QR = (torch.linalg.qr(state[x] @ Q)[0] for x, Q in zip("LR", (QL, QR)))
        assert torch.allclose(run.pairs()[0][0][0], W, rtol=1e-9)


def test_search_finds_an_interior_best_wherever_it_lies_and_says_where_there_is_none():
    def bowl(points):
        return [(i - 14) ** 2 + (j + 9) ** 2 + 0.5 * (i - 14) * (j + 9) for i, j in points]

    best, scores = adaptation.search(bowl, (6, 3), ((2, 4), (1, 2), (1, 1)))
    assert best == (14, -9) and all(scores[(14 + di, -9 + dj)] > scores[best] for di, dj in ((1, 0), (0, 1), (-1, 0)))
    assert adaptation.search(lambda points: [-i for i, _ in points], (6, 0), ((1, 0),))[0] is None
    assert adaptation.search(lambda points: [float("inf")] * len(points), (6, 0), ((1, 1),))[0] is None
    assert adaptation.point((6, 4)) == (0.01, 16.0) and adaptation.point((-1, -1)) == pytest.approx((7e-4, 0.5))


def effect(value, word):
    return {"effect": value, "low": value - 0.01, "high": value + 0.01, "word": word}


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, "holds"),
        ({("rank_2", "train_loss", "every_2"): effect(0.0, "undecided")}, "holds in part: not in rank_2"),
        ({("rotated", "held_out", "every_2"): effect(0.0, "equivalent")}, "holds in part: not in held-out loss"),
        ({("rotated", "held_out", "random_2"): effect(-0.1, "better")}, "holds in part: random rotations help too"),
        ({("rotated", "train_loss", "random_2"): effect(-0.1, "better")}, "does not hold: random rotations help too"),
        ({("rotated", "train_loss", "every_2"): effect(0.1, "worse")}, "does not hold"),
        ({("rotated", "train_loss", "every_2"): effect(0.0, "undecided")}, "undecided"),
    ],
)
def test_the_verdict_follows_the_rule(changed, expected):
    arms = {"every_2": effect(-0.1, "better"), "random_2": effect(0.0, "equivalent")}
    found = {n: {m: dict(arms) for m in rotation.MEASURES} for n in ("rotated", "rank_2")}
    for (setting, measure, arm), e in changed.items():
        found[setting][measure][arm] = e
    metrics = {
        "effects": {n: {"tuned": f} for n, f in found.items()},
        "peers": {n: {m: {"soap": effect(0.01, "undecided")} for m in rotation.MEASURES} for n in found},
    }
    verdict = rotation.judge(Outcome(metrics, {}))
    assert str(verdict).startswith(expected)
    (row,) = [r for r in verdict.published if r.what.startswith("rotated, every_2") and r.what.endswith("train loss")]
    assert row.agrees == (found["rotated"]["train_loss"]["every_2"]["effect"] == -0.1)


def test_an_arm_without_a_best_rate_is_undecided():
    curves = np.random.default_rng(0).uniform(1, 1.01, (12, 5))
    arrays = {"a.x/tuned_train_loss": 0.8 * curves, "a.none/tuned_train_loss": curves}
    for interior, word in ((True, "better"), (False, "undecided")):
        arrays |= {"a.x/tuned_interior": np.array(interior), "a.none/tuned_interior": np.array(True)}
        found = rotation.compared(arrays, [("a.x", "a.none")], "tuned", "train_loss")
        assert found["x"]["word"] == word and abs(found["x"]["effect"] - np.log(0.8)) < 1e-12


def test_memory_is_counted():
    problem, runs = task(), {}
    for kind, options in ((factors.Adam, {}), (factors.Adam, {"tracks": 0.9}), (factors.RITE, {}), (factors.SOAP, {})):
        run = runs[kind.__name__, bool(options)] = optimizer(start(), kind, **options)
        train(run, problem, 3)
    size = sum(RANK * (i + o) for i, o in zip(DIMS, DIMS[1:]))
    memory = {key: run.memory() * size for key, run in runs.items()}
    assert memory["Adam", False] == pytest.approx(2 * size)
    assert memory["Adam", True] == pytest.approx(2 * size + 3 * RANK**2)
    assert memory["SOAP", False] == pytest.approx(2 * size + 3 * 4 * RANK**2)  # L and its basis, of either factor
    assert memory["RITE", False] > 3 * size


def test_numbers_in_words_and_what_is_held_out():
    for n, english, german in (
        (0, "zero", "null"),
        (7, "seven", "sieben"),
        (12, "twelve", "zwölf"),
        (30, "thirty", "dreißig"),
        (61, "sixty-one", "einundsechzig"),
        (101, "one hundred and one", "einhunderteins"),
        (816, "eight hundred and sixteen", "achthundertsechzehn"),
        (999, "nine hundred and ninety-nine", "neunhundertneunundneunzig"),
    ):
        assert (spelling.words(n, "English"), spelling.words(n, "German")) == (english, german)
    spelled = {}
    for held_out in (False, True):
        letters = bytes(spelling.ALPHABET[i] for i in spelling.text("German", held_out).tolist()).decode()
        spelled[held_out] = set(letters.split(" "))
    assert not spelled[False] & spelled[True] and "siebenundzwanzig" not in spelled[False]


def test_a_teleport_keeps_what_the_transformer_says_and_members_do_not_mix():
    problem = spelling.Spelling(width=8, heads=2, depth=1)
    problem.weights, problem.outer = ([W.double() for W in group] for group in (problem.weights, problem.outer))
    pairs = adaptation.initial_pairs(problem.shapes, RANK, "gaussian", SEEDS, 2)
    run = optimizer([tuple(factor.double() for factor in pair) for pair in pairs])
    batch = next(problem.batches(SEEDS, 4, 1))
    before, gradients = problem.gradients(run.pairs(), batch)
    alone = problem.gradients([(A[2:], Bt[2:]) for A, Bt in run.pairs()], [z[1:] for z in batch])
    assert torch.allclose(before[2:], alone[0], rtol=1e-12)
    assert all(torch.allclose(mine[2:], theirs, rtol=1e-9, atol=1e-14) for mine, theirs in zip(gradients, alone[1]))
    run.rotate(factors.random_rotations(run, torch.Generator().manual_seed(0)))
    assert torch.allclose(problem.gradients(run.pairs(), batch)[0], before, rtol=1e-12)
