"""Two checks in the plane: is one teleport enough for a gradient flow, and where does the displacement turn?

A loss is L = u² + v², so that a level set is a circle in (u, v), and the group SO(2) reaches all of it. The share of a
point is its ‖∇L‖² over the largest on its level set; a teleport to the maximum makes it 1, and the flow may keep it
there or not. The flow is integrated in τ = −log L, dw/dτ = −L g/‖g‖², along which time passes as dt/dτ = L/‖g‖².
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq, minimize_scalar

END = 1e-6  # the loss that a flow runs to


class Plane(NamedTuple):
    """L = u² + v² with v linear, and u linear but for the constant u_xx."""

    uv: Callable  # (x, y) -> (u, v)
    slopes: Callable  # (x, y) -> (u_x, u_y, v_x, v_y)
    xy: Callable  # (u, v) -> (x, y)
    u_xx: float = 0.0


BOOTH = Plane(
    lambda x, y: (x + 2 * y - 7, 2 * x + y - 5),
    lambda x, y: (1.0, 2.0, 2.0, 1.0),
    lambda u, v: (-u / 3 + 2 * v / 3 + 1, 2 * u / 3 - v / 3 + 3),
)
ROSENBROCK = Plane(
    lambda x, y: (10 * (x**2 - y), x - 1),
    lambda x, y: (20 * x, -10.0, 1.0, 0.0),
    lambda u, v: (v + 1, (v + 1) ** 2 - u / 10),
    20.0,
)


def loss_gradient(f, w):
    """L and ∂L/∂w at w = (x, y), numbers or arrays."""
    (u, v), (u_x, u_y, v_x, v_y) = f.uv(*w), f.slopes(*w)
    return u**2 + v**2, np.array([2 * (u * u_x + v * v_x), 2 * (u * u_y + v * v_y)])


def hessian(f, w):
    u_x, u_y, v_x, v_y = f.slopes(*w)
    J = np.array([[u_x, u_y], [v_x, v_y]])
    return 2 * J.T @ J + np.diag([2 * f.uv(*w)[0] * f.u_xx, 0])


def third(f, w, g):
    """D³L[g]g, a vector: what bends the gradient's line away from an eigenvector of the Hessian."""
    u_x, u_y, _, _ = f.slopes(*w)
    S = np.array([f.u_xx * g[0], 0])  # the second derivative of u, times g
    return 2 * (S @ g * np.array([u_x, u_y]) + 2 * (u_x * g[0] + u_y * g[1]) * S)


def fastest(f, loss):
    """The point of the level set where ‖∇L‖² is largest, and that ‖∇L‖²: a grid of angles, then the best polished."""

    def point(angle):
        return np.array(f.xy(math.sqrt(loss) * np.cos(angle), math.sqrt(loss) * np.sin(angle)))

    def speed(angle):
        return np.square(loss_gradient(f, point(angle))[1]).sum(0)

    angles = np.linspace(-np.pi, np.pi, 721)
    best = angles[speed(angles).argmax()]
    near = (best - angles[1] + angles[0], best + angles[1] - angles[0])
    best = minimize_scalar(lambda a: -speed(a), bounds=near, method="bounded", options={"xatol": 1e-12}).x
    return point(best), speed(best)


def flow(f, start):
    """(w, t) along the flow from start to L = END, a function of τ, and τ at the end."""

    def velocity(_, state):
        loss, g = loss_gradient(f, state[:2])
        return np.append(-loss * g, loss) / (g @ g)

    def jacobian(_, state):
        loss, g = loss_gradient(f, state[:2])
        H, n = hessian(f, state[:2]), g @ g
        result = np.zeros((3, 3))
        result[:2, :2] = -(np.outer(g, g) + loss * H) / n + 2 * loss * np.outer(g, H @ g) / n**2
        result[2, :2] = g / n - 2 * loss * H @ g / n**2
        return result

    end = math.log(loss_gradient(f, start)[0] / END)
    options = {"method": "LSODA", "jac": jacobian, "rtol": 1e-10, "atol": 1e-13, "dense_output": True}
    found = solve_ivp(velocity, (0, end), [*start, 0.0], **options)
    return found.sol, end


def path(f, start, points):
    """Loss, share and time along the flow from start, at so many equal steps of log L; and the flow."""
    along, end = flow(f, start)
    states = along(np.linspace(0, end, points))
    loss, g = loss_gradient(f, states[:2])
    return {"loss": loss, "share": np.square(g).sum(0) / [fastest(f, v)[1] for v in loss], "flow": states[2]}, along


def one_teleport(s):
    """Booth from (5, −5), Rosenbrock from (−1, −1), each untouched and from the fastest point of its level set."""
    found = {}
    for name, f, start in (("booth", BOOTH, (5.0, -5.0)), ("rosenbrock", ROSENBROCK, (-1.0, -1.0))):
        top = loss_gradient(f, np.array(start))[0]
        there, _ = fastest(f, top)
        g = loss_gradient(f, there)[1]
        bent = third(f, there, g)
        across = np.linalg.norm(bent - g * (g @ bent) / (g @ g))
        found[f"{name}_condition"] = across / max(np.linalg.norm(bent), np.finfo(float).tiny)
        for arm, place in (("untouched", np.array(start)), ("teleported", there)):
            along_path, along = path(f, place, s.points)
            found |= {f"{name}_{arm}_{key}": value for key, value in along_path.items()}
            found |= {f"{name}_{arm}_half": along(math.log(2))[2], f"{name}_{arm}_time": along_path["flow"][-1]}
    found["booth_share_off"] = np.abs(found["booth_teleported_share"] - 1).max()
    found["booth_share_end"] = found["booth_untouched_share"][-1]
    loss, g = loss_gradient(f, along(math.log(top / 189))[:2])  # Rosenbrock's, teleported
    found["rosenbrock_share_189"] = g @ g / fastest(f, loss)[1]
    return found | {"rosenbrock_x": there[0], "rosenbrock_y": there[1]} | grid(s.grid)


def grid(side):
    """Rosenbrock from side × side starts in the published window: time to the end after a teleport over without."""
    slower = np.array([[slowdown(x, y) for x in np.linspace(-2, 2, side)] for y in np.linspace(-2, 4, side)])
    counts = {"slower_of_36": (slower > 1).sum(), "slower_median": np.median(slower)} if side == 6 else {}
    return counts | {"grid": slower}


def slowdown(x, y):
    start = np.array([x, y])
    there, _ = fastest(ROSENBROCK, loss_gradient(ROSENBROCK, start)[0])
    after, before = (along(end)[2] for along, end in (flow(ROSENBROCK, w) for w in (there, start)))
    return after / before


# ---------------------------------------------------------------------------------------------------------------------
# Displacement: independent of displacement_integration.py, by adaptive quadrature and roots of polynomials


def parabola_distance(a, angle):
    """From (cos θ, sin θ) to y = ax²/2, by the cubic of the normals, all its real roots tried."""
    x, y = math.cos(angle), math.sin(angle)
    roots = np.roots([a * a / 2, 0, 1 - a * y, -x])
    X = roots[np.abs(roots.imag) < 1e-7].real
    return np.hypot(X - x, a * X**2 / 2 - y).min()


def circle_distance(a, angle):
    return abs(math.hypot(math.cos(angle), math.sin(angle) - 1 / a) - 1 / a)


DISTANCES = {  # and where the curve of curvature a crosses the unit circle
    "parabola": (parabola_distance, lambda a: math.asin((math.sqrt(1 + a * a) - 1) / a)),
    "circle": (circle_distance, lambda a: math.asin(min(a / 2, 1))),
}


def mean_distance(name, a):
    """E dist / r at κr = a, over the half circle (it is symmetric), cut at the crossing."""
    distance, crossing = DISTANCES[name]
    ends = (-math.pi / 2, crossing(a), math.pi / 2)
    halves = zip(ends, ends[1:])
    return sum(quad(lambda t: distance(a, t), *half, epsabs=1e-11, epsrel=1e-11)[0] for half in halves) / math.pi


def displacement(s):
    """Where each curve's mean distance is least, where it is a straight line's again, and how it starts."""
    flat, found, scaled = 2 / math.pi, {}, np.geomspace(0.1, 10, s.points)
    for name in DISTANCES:
        turn = brentq(lambda a, name=name: mean_distance(name, a + 1e-3) - mean_distance(name, a - 1e-3), 1, 3)
        back = brentq(lambda a, name=name: mean_distance(name, a) - flat, turn, 8, xtol=1e-7)
        # (2/π − value)/(κr)², extrapolated to κr = 0 from two small ones: the error is of fourth order.
        fine, coarse = ((flat - mean_distance(name, a)) / a**2 for a in (0.05, 0.1))
        found |= {f"{name}_turn": turn, f"{name}_value": mean_distance(name, turn), f"{name}_back": back}
        found |= {f"{name}_series": (4 * fine - coarse) / 3 * 12 * math.pi}
        found[f"{name}_curve"] = [mean_distance(name, a) for a in scaled]
    return found | {"kappa_r": scaled}
