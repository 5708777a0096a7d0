"""The numbers that the checks of theorems.py must give: an independent prototype's, or what a statement demands.

Tolerances were set with the rule. A distance or a factor goes with the prototype's digits where its inputs are known,
and with the spread over draws where they are not.
"""

import math
from typing import NamedTuple

WITHIN, FACTOR, MOST, LEAST, SHOWN = "±", "×/÷", "at most", "at least", "shown"


class Number(NamedTuple):
    """One of them. SHOWN: of an unknown setting, to stand beside ours and decide nothing."""

    what: str
    value: float
    how: str = MOST
    tolerance: float = math.nan  # of WITHIN and FACTOR

    def agrees(self, ours):
        """Does our number agree? None: it cannot be compared. NaN does not."""
        if self.how == SHOWN:
            return None
        if self.how == WITHIN:
            return abs(ours - self.value) <= self.tolerance
        if self.how == FACTOR:
            return ours > 0 and 1 / self.tolerance <= ours / self.value <= self.tolerance
        return ours <= self.value if self.how == MOST else ours >= self.value

    def text(self):
        if self.how in (MOST, LEAST):
            return f"{self.how} {self.value:.7g}"
        return f"{self.value:.7g}" + ("" if self.how == SHOWN else f" {self.how} {self.tolerance:g}")


def ratio(after, value):
    return Number(f"the best step's decrease after {after}, over before", value, FACTOR, 1.5)


def trained(after, value):
    return Number(f"the decrease by 200 steps at the best rate after {after}, over without", value, SHOWN)


def exact(what, bound=1e-12):
    return Number(what, bound, MOST)


FLOW = {
    "booth_share_off": exact("Booth, teleported: |share − 1|, largest", 1e-11),
    "booth_share_end": Number("Booth, untouched: share at the end", 1 / 9, WITHIN, 1e-6),
    "booth_teleported_time": Number("Booth, teleported: flow time to L = 1e-6", 0.5218, WITHIN, 1e-4),
    "booth_untouched_time": Number("Booth, untouched: flow time to L = 1e-6", 4.523, WITHIN, 1e-3),
    "booth_condition": exact("Booth: ‖P⊥ D³L[g]g‖ / ‖D³L[g]g‖"),
    "rosenbrock_x": Number("Rosenbrock, teleported: x", 14.97, WITHIN, 0.005),
    "rosenbrock_y": Number("Rosenbrock, teleported: y", 222.8, WITHIN, 0.05),
    "rosenbrock_share_189": Number("Rosenbrock, teleported: share at L = 189", 4.9e-8, FACTOR, 1.02),
    "rosenbrock_teleported_half": Number("Rosenbrock, teleported: flow time to L/2", 9.2e-6, FACTOR, 1.02),
    "rosenbrock_untouched_half": Number("Rosenbrock, untouched: flow time to L/2", 4.4e-4, FACTOR, 1.02),
    "rosenbrock_teleported_time": Number("Rosenbrock, teleported: flow time to L = 1e-6", 273.5, WITHIN, 0.05),
    "rosenbrock_untouched_time": Number("Rosenbrock, untouched: flow time to L = 1e-6", 14.37, WITHIN, 0.005),
    "rosenbrock_condition": Number("Rosenbrock: ‖P⊥ D³L[g]g‖ / ‖D³L[g]g‖", 0.022, WITHIN, 5e-4),
    "slower_of_36": Number("Rosenbrock: starts of 36 that a teleport slows to L = 1e-6", 35, WITHIN, 0),
    "slower_median": Number("Rosenbrock: their median slowdown", 21.6, WITHIN, 0.05),
}
NEWTON = {
    "R_2": Number("median R of random quadratics, d = 2", 0.895, WITHIN, 0.05),
    "R_10": Number("median R of random quadratics, d = 10", 0.709, WITHIN, 0.03),
    "R_100": Number("median R of random quadratics, d = 100", 0.666, WITHIN, 0.01),
    "R_off_maximum": exact("|R − 1| at the maximum of ‖∇L‖", 1e-15),
    "R_off_minimum": exact("|R − 1| at the minimum of ‖∇L‖", 1e-15),
    "network_off": exact("network: ⟨Hg, ξ_i⟩ − ‖∂U_i‖² + ‖∂V_i‖², relative"),
    "network_slope": exact("network: slope of ½‖g‖² at the one critical point, over ‖g‖²"),
    "degrees_at_minimum": Number("network: degrees from Newton's direction there, median", 90, WITHIN, 15),
}
BOUND = {
    "left_10": Number("Theorem 3.1: left over right side, T = 10", 0.180, FACTOR, 1.1),
    "left_100": Number("Theorem 3.1: left over right side, T = 100", 0.112, FACTOR, 1.1),
    "left_1000": Number("Theorem 3.1: left over right side, T = 1000", 0.0020, FACTOR, 1.5),
    "plain_10": Number("plain SGD's maximum over the orbit, over the right side, T = 10", 0.359, FACTOR, 1.1),
    "plain_100": Number("plain SGD's maximum over the orbit, over the right side, T = 100", 1.173, FACTOR, 1.1),
    "plain_1000": Number("plain SGD's maximum over the orbit, over the right side, T = 1000", 3.53, FACTOR, 1.1),
    "own_100": Number("plain SGD's own ‖∇L‖² over the teleported run's, T = 100", 1, MOST),
    "monte_carlo": Number("simulated runs from the recursion, standard errors", 4, MOST),
    "orbit_maximum_off": exact("max_g ‖∇L‖² from 2λ₁(L − L*), relative"),
    "constant_1000": Number("what may stand for the 2 of 2β, T = 1000", 1.582, MOST),
    "constant_off": exact("D after T steps of the inequality with it, from 0", 1e-11),
    "orbit_form_off": exact("rescaling orbit: ‖∇L‖² from a/s² + b s², relative"),
    "orbit_growth": Number("rescaling orbit: ‖∇L‖² at s = 1000 over that at 1", 1e5, LEAST),
    "orbit_beta_growth": Number("rescaling orbit: λ_max at s = 1000 over that at 1", 1e5, LEAST),
}
DISPLACEMENT = {
    "parabola_turn": Number("parabola: κr where it turns", 1.828216, WITHIN, 2e-6),
    "parabola_value": Number("parabola: least mean distance / r", 0.613787, WITHIN, 1e-6),
    "parabola_back": Number("parabola: κr where it is back at 2/π", 4.7327, WITHIN, 1e-4),
    "parabola_series": Number("parabola: (2/π − value)/(κr)² at κr = 0, times 12π", 1, WITHIN, 1e-4),
    "circle_turn": Number("circle: κr where it turns", 1.630849, WITHIN, 2e-6),
    "circle_value": Number("circle: least mean distance / r", 0.539410, WITHIN, 1e-6),
    "circle_back": Number("circle: κr where it is back at 2/π", 2.4705, WITHIN, 1e-4),
    "circle_series": Number("circle: (2/π − value)/(κr)² at κr = 0, times 12π", 1, WITHIN, 1e-4),
}
CONSERVATION = {
    "identity_off": exact("ΔQ_i − η²(‖∂V_i‖² − ‖∂U_i‖²), over ‖w‖²", 1e-15),
    "slope_off": exact("η²(‖∂V_i‖² − ‖∂U_i‖²) + η² ∂(½‖∇L‖²)/∂log s_i, relative"),
    "path": Number("Σ|ΔQ| over η Σ η‖g_t‖²", 1, MOST),
    "tanh_off": Number("control, tanh: violation of the identity, relative", 1, LEAST),
}
TUNED_STEP = {
    "twins": exact("teleported runs from their twins, 8 optimizers, relative"),
    "norm_2": ratio("max ‖g‖², B = 2", 1.11),
    "norm_10": ratio("max ‖g‖², B = 10", 1.44),
    "norm_10_growth": Number("growth of ‖g‖² by it, B = 10", 244, FACTOR, 1.5),
    "newton_2": ratio("max ‖g‖⁴/(gᵀGg), B = 2", 2.45),
    "newton_10": ratio("max ‖g‖⁴/(gᵀGg), B = 10", 2.15),
    "decrease_2": ratio("max of the true decrease, B = 2", 3.93),
    "decrease_10": ratio("max of the true decrease, B = 10", 10.6),
    "least_2": ratio("min ‖g‖², B = 2", 0.90),
    "trained_norm": trained("max ‖g‖², B = 2", 0.81),
    "trained_newton": trained("max ‖g‖⁴/(gᵀGg), B = 2", 1.49),
    "trained_decrease": trained("max of the true decrease, B = 2", 1.63),
}
GROUP_LAWS = {
    **{f"rescaling_law_{n}": exact(f"rescaling: group law, {n} samples") for n in ("fewer", "more")},
    "preactivation_outputs_fewer": exact("pre-activation: outputs moved, fewer samples than units", 1e-9),
    "preactivation_law_fewer": Number("pre-activation: group law off in the weights, the same", 1e-3, LEAST),
    "preactivation_law_square": exact("pre-activation: group law off, as many samples as units", 1e-9),
    "preactivation_law_more": Number("pre-activation: group law off, more samples than units", 1e-3, LEAST),
    "postactivation_law_fewer": exact("post-activation: group law off, fewer samples than inputs", 1e-9),
    "postactivation_law_square": exact("post-activation: group law off, as many samples as inputs", 1e-9),
    "postactivation_law_more": Number("post-activation: group law off, more samples than inputs", 1e-3, LEAST),
}
NUMBERS = {
    "flow": FLOW,
    "newton": NEWTON,
    "bound": BOUND,
    "displacement": DISPLACEMENT,
    "conservation": CONSERVATION,
    "tuned_step": TUNED_STEP,
    "group_laws": GROUP_LAWS,
}
