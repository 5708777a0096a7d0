"""Two checks on quadratics: Newton's direction at the maximum of ‖∇L‖, and the bound of Theorem 3.1 (ICLR 2024).

On L = ½wᵀHw the group H^-½ O(d) H^½ reaches all of a level set; w = H^-½z has ‖z‖² = 2L and ‖∇L‖² = zᵀHz, so that
the extremes of ‖∇L‖ are the eigenvectors of H.
"""

import math

import numpy as np

DIMENSIONS = (2, 10, 100)
HORIZONS = (10, 100, 1000)  # steps T of Theorem 3.1


def alignment(H, g):
    """R = ‖g‖⁴ / (gᵀHg · gᵀH^-1g), at most 1 for positive H, and 1 where Newton's direction is the gradient's."""
    return (g @ g) ** 2 / ((g @ H @ g) * (g @ np.linalg.solve(H, g)))


def newton(s):
    """R on random quadratics, H = AAᵀ/2d with A (d, 2d) normal: at random points of a level set, at its extremes."""
    found, off = {}, {"maximum": 0.0, "minimum": 0.0}
    for d in DIMENSIONS:
        rng = np.random.default_rng(d)
        values = []
        for _ in range(s.quadratics):
            A = rng.standard_normal((d, 2 * d))
            H = A @ A.T / (2 * d)
            eigenvalues, Q = np.linalg.eigh(H)
            values.append(alignment(H, Q @ (np.sqrt(eigenvalues) * rng.standard_normal(d))))
            for name, i in (("maximum", -1), ("minimum", 0)):  # in H's eigenbasis, where R is known to rounding
                off[name] = max(off[name], abs(alignment(np.diag(eigenvalues), np.eye(d)[i]) - 1))
        found |= {f"R_{d}": np.median(values), f"values_{d}": np.array(values)}
    return found | {f"R_off_{name}": value for name, value in off.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 3.1


class LeastSquares:
    """L(w, ξ) = ½(a·(w − w*) ± r)², every sample with both signs: then E L − L* is quadratic in w − w*.

    σ² = L(w*), since no sample has a loss below 0 and each reaches it; β = max ‖a‖². η = 1/(β√(T − 1)).
    """

    def __init__(self, A, r):
        self.A, self.r = A, r
        self.H = A.T @ A / len(A)
        eigenvalues, self.Q = np.linalg.eigh(self.H)
        self.largest, self.top = eigenvalues[-1], self.Q[:, -1]
        self.beta, self.noise = (A**2).sum(1).max(), np.mean(r**2) / 2

    def step_size(self, T):
        return 1 / (self.beta * math.sqrt(T - 1))

    def teleported(self, T, start=1.0):
        """E(L − L*) before each of T steps, if each starts at the maximum of ‖∇L‖: D ← cD + b, exactly."""
        eta, weight = self.step_size(T), ((self.A @ self.H) * self.A).sum(1)  # aᵀHa
        c = 1 - 2 * eta * self.largest + eta**2 * np.mean(weight * (self.A @ self.top) ** 2) / self.largest
        b = eta**2 / 2 * np.mean(weight * self.r**2)
        D = [start]
        for _ in range(T - 1):
            D.append(c * D[-1] + b)
        return np.array(D)

    def plain(self, T, w):
        """E(L − L*) and E‖∇L‖² before each of T steps of plain SGD from w − w*: by its second moments, exactly."""
        eta, S, D, speed = self.step_size(T), np.outer(w, w), [], []
        for _ in range(T):
            HS = self.H @ S
            D.append(np.trace(HS) / 2)
            speed.append(np.trace(self.H @ HS))
            squares = ((self.A @ S) * self.A).sum(1) + self.r**2
            S = S - eta * (HS + HS.T) + eta**2 * (self.A.T * squares) @ self.A / len(self.A)
        return np.array(D), np.array(speed)

    def simulated(self, T, runs, rng):
        """L − L* of so many runs of teleported SGD before each of T steps, (T, runs)."""
        eta, D = self.step_size(T), [np.ones(runs)]
        for _ in range(T - 1):
            w = np.sqrt(2 * D[-1] / self.largest)[:, None] * self.top
            i, sign = rng.integers(len(self.A), size=runs), rng.choice([-1, 1], runs)
            a = self.A[i]
            w = w - eta * a * ((a * w).sum(1) + sign * self.r[i])[:, None]
            D.append(((w @ self.H) * w).sum(1) / 2)
        return np.array(D)

    def bound(self, T, start=1.0):
        """The right side of Theorem 3.1."""
        return (2 * self.beta * start + self.beta * self.noise) / math.sqrt(T - 1)

    def flattest(self):
        """w − w* at L − L* = 1 where ‖∇L‖ is least."""
        w = self.Q[:, 0]
        return w * math.sqrt(2 / (w @ self.H @ w))


def least_squares(draw, samples=60, d=10):
    """Normal samples whose standard deviations fall from 1 to 0.1 over the coordinates, residuals ± 0.1; the median of
    λ₁/β over draws is 0.12."""
    A = np.random.default_rng(draw).standard_normal((samples, d)) * np.geomspace(1, 0.1, d)
    return LeastSquares(A, np.full(samples, 0.1))


def bound(s):
    """Both sides of Theorem 3.1 from the flattest start, medians over draws; its parts, each on the first draw."""
    found, problems = {}, [least_squares(draw) for draw in range(s.draws)]
    for T in HORIZONS:
        medians = np.median([sides(problem, T) for problem in problems], 0)
        found |= dict(zip((f"left_{T}", f"plain_{T}", f"own_{T}"), medians))
    first = problems[0]
    steps = np.unique(np.geomspace(2, 1000, s.points).astype(int))
    found |= {"T": steps, "sides": np.array([sides(first, int(T)) for T in steps])}
    found |= {"monte_carlo": monte_carlo(first, s.runs), "orbit_maximum_off": orbit_maximum_off(first)}
    found |= {"constant_1000": constant(1000), "constant_off": max(constant_off(T) for T in HORIZONS)}
    return found | {"counterexample_T": counterexample()}


def sides(problem, T):
    """min_t E max_g ‖∇L‖² over the bound: teleported SGD's, plain SGD's; and plain SGD's own ‖∇L‖² over the former."""
    D, (D_plain, own) = problem.teleported(T), problem.plain(T, problem.flattest())
    most = 2 * problem.largest * np.array([D.min(), D_plain.min()])  # max_g ‖∇L‖² = 2λ₁(L − L*)
    return [*most / problem.bound(T), own.min() / most[0]]


def monte_carlo(problem, runs, T=10):
    """The largest distance of simulated runs' mean from the recursion, in standard errors."""
    D = problem.simulated(T, runs, np.random.default_rng(0))[1:]
    return np.abs((D.mean(1) - problem.teleported(T)[1:]) / (D.std(1) / math.sqrt(runs))).max()


def orbit_maximum_off(problem, elements=200):
    """max_g ‖∇L‖² = 2λ₁(L − L*): by how much it is missed at the top eigenvector, or passed by a random element."""
    rng, root = np.random.default_rng(1), np.linalg.cholesky(problem.H)
    z = np.stack([np.linalg.qr(rng.standard_normal((len(root),) * 2))[0][0] for _ in range(elements)])
    random = np.square(root @ z.T * math.sqrt(2)).sum(0) / (2 * problem.largest)  # g = H^½ z, at L − L* = 1
    w = problem.top * math.sqrt(2 / problem.largest)
    reached = np.square(problem.H @ w).sum() / (2 * problem.largest)
    return max(abs(reached - 1), random.max() - 1)


def constant(T):
    """What may stand for 2 in Theorem 3.1's 2β: 1/(1 − (1 − 1/T)^T), from the same inequality, summed with weights."""
    return 1 / (1 - (1 - 1 / T) ** T)


def constant_off(T):
    """The inequality D' ≤ D T/(T−1) − ηM + σ²/(T−1), taken as an equality with M at the bound, ends at D = 0 exactly
    (β = 1, D = 1, σ² = 0.1): no smaller constant follows from it."""
    D, noise = 1.0, 0.1
    M = (constant(T) + noise) / math.sqrt(T - 1)
    for _ in range(T):
        D = D * T / (T - 1) - M / math.sqrt(T - 1) + noise / (T - 1)
    return abs(D)


def counterexample():
    """The smallest T for which plain SGD breaks the bound on two samples, a = (1, 0) and (0, 0.1), w − w* = (0, 1)."""
    problem = LeastSquares(np.diag([1, 0.1]), np.zeros(2))
    return next((T for T in range(2, 100) if sides(problem, T)[1] > 1), math.nan)
