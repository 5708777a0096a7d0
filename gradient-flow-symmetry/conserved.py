"""Two-layer networks U σ(Vᵀ) and what gradient flow conserves in them.

Source: Zhao, Ganev, Walters, Yu, Dehmamy, *Symmetries, Flat Minima, and the Conserved Quantities of Gradient Flow*
(ICLR 2023, arXiv 2210.17216). The input is whitened, X = I, so that the network is the matrix U σ(Vᵀ).

Shapes, everywhere in this file: U (*E, m, h), V (*E, n, h), Y (m, n) or (*E, m, n), where *E is any (possibly empty)
ensemble shape; results have shape E. h hidden units, n inputs (= samples), m outputs. A column V[:, i] feeds unit i.
σ is one of ACTIVATIONS: elementwise, or `radial`, which maps each column v of V to v / ‖v‖².

All functions raise ValueError for an unknown activation, for shapes that do not fit, for non-finite numbers, and for a
zero column of V where σ is radial.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import teleport  # noqa: E402

ACTIVATIONS = ("linear", "relu", "tanh", "sigmoid", "radial")
_SIGMA = {"linear": teleport.IDENTITY, "relu": teleport.RELU, "tanh": teleport.TANH, "sigmoid": teleport.SIGMOID}


def hidden(V: Tensor, activation: str) -> Tensor:
    """σ(V), shape (*E, n, h); the hidden layer of the paper is its transpose."""
    match activation:
        case "linear":
            return V
        case "relu":
            return V.relu()
        case "tanh":
            return V.tanh()
        case "sigmoid":
            return V.sigmoid()
        case "radial":
            return V / V.square().sum(-2, keepdim=True)
    raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def two_layer_loss(U: Tensor, V: Tensor, Y: Tensor, activation: str) -> Tensor:
    """‖Y − U σ(Vᵀ)‖, the Frobenius norm, which the paper plots as the loss. Shape E.

    Training minimizes its square divided by the number of entries of Y (the mean squared error), and the Hessian of
    Figure 9 is that of its square.
    """
    _check(U, V, activation, Y)
    return torch.linalg.matrix_norm(Y - U @ hidden(V, activation).mT)


def conserved_quantity(U: Tensor, V: Tensor, activation: str) -> Tensor:
    """The conserved quantity Q of gradient flow on any loss of U σ(Vᵀ), in the scaling the paper plots. Shape E.

    Derivation. Let G = ∂L/∂σ(V), (n, h), be the loss's gradient at the hidden layer. The loss depends on U and σ(Vᵀ)
    through their product alone, so unit by unit

        Σ_k U_ki ∂L/∂U_ki = Σ_a σ(V_ai) G_ai.                                                        (1)

    Elementwise σ. ∂L/∂V = σ′(V) ∘ G. Under gradient flow, dU/dt = −∂L/∂U and dV/dt = −∂L/∂V, hence with (1)

        d/dt ½ Σ U_ki² = −Σ σ(V_ai) G_ai   and   d/dt Σ F(V_ai) = −Σ F′(V_ai) σ′(V_ai) G_ai,

    which are equal if F′ = σ / σ′. So the general formula is Q = ½ Tr UᵀU − Σ_ai ∫^{V_ai} σ/σ′ dx:

        linear    σ/σ′ = x                    F = x²/2               2Q = Tr(UᵀU − VᵀV)
        relu      x where x > 0; where x < 0 V stands still, F = 0   2Q = Tr(UᵀU − relu(V)ᵀrelu(V))
        tanh      tanh / sech² = sinh cosh    F = cosh²/2 (+ const)  2Q = Tr(UᵀU − cosh(V)ᵀcosh(V))
        sigmoid   1 / (1 − σ) = 1 + eˣ        F = x + eˣ              Q = ½ Tr UᵀU − Σ V − Σ e^V

    Radial σ(v) = f(r) v/r with r = ‖v‖ the norm of a column. Only the component of G along v changes r, and
    dr/dt = −f′(r) ⟨v/r, G⟩, while (1) reads Σ_k U_ki ∂L/∂U_ki = f(r) ⟨v/r, G⟩. So the same formula holds for the norms,
    Q = ½ Tr UᵀU − Σ_i ∫^{r_i} f/f′ dr:

        radial    f = 1/r, f/f′ = −r          F = −r²/2              2Q = Tr(UᵀU + VᵀV)

    As in the paper, the factor 2 is dropped and `tanh` keeps the constant of cosh² = 1 + sinh². The sum over units is
    conserved because each unit's share is.
    """
    _check(U, V, activation)
    outer, inner = U.square().sum((-2, -1)), _inner_term(V, activation)
    return outer / 2 - inner if activation == "sigmoid" else outer - inner


def quantity_scale(U: Tensor, V: Tensor, activation: str) -> Tensor:
    """The terms of Q added where Q subtracts them: the paper divides by it, and nothing conserves it. Shape E.

    For `radial`, where Q is itself a sum, the terms are subtracted.
    """
    _check(U, V, activation)
    outer, inner = U.square().sum((-2, -1)), _inner_term(V, activation)
    return outer / 2 + inner if activation == "sigmoid" else outer + inner


def _inner_term(V: Tensor, activation: str) -> Tensor:
    """The V part of Q, summed over V: ΣF for sigmoid, 2ΣF for the others (F of the table above)."""
    match activation:
        case "tanh":
            entries = V.cosh().square()
        case "sigmoid":
            entries = V + V.exp()
        case "radial":
            entries = -V.square()
        case _:
            entries = hidden(V, activation).square()
    return entries.sum((-2, -1))


def squared_loss_hessian(U: Tensor, V: Tensor, Y: Tensor, activation: str) -> Tensor:
    """Hessian of ‖Y − U σ(Vᵀ)‖² in (vec U, vec V), rows stacked first: shape (*E, P, P) with P = (m + n) h.

    Forward over reverse: all P directional derivatives of the gradient are taken at once.
    """
    _check(U, V, activation, Y)
    (m, h), n = U.shape[-2:], V.shape[-2]

    def squared_loss(parameters, y):
        u, v = parameters[: m * h].view(m, h), parameters[m * h :].view(n, h)
        return (y - u @ hidden(v, activation).T).square().sum()

    parameters = torch.cat([U.flatten(-2), V.flatten(-2)], dim=-1)
    batch = parameters.shape[:-1]
    targets = Y.expand(*batch, m, n).reshape(-1, m, n)
    hessian = torch.func.jacfwd(torch.func.grad(squared_loss))
    P = parameters.shape[-1]
    return torch.vmap(hessian)(parameters.view(-1, P), targets).view(*batch, P, P)


def largest_eigenvalue(U: Tensor, V: Tensor, activation: str) -> Tensor:
    """The Hessian's largest eigenvalue at a minimum of zero loss, in closed form. Shape E. Elementwise σ only.

    There the Hessian of ‖Y − U σ(Vᵀ)‖² is 2JᵀJ, J the Jacobian of the entries f_ka = Σ_i U_ki σ(V_ai), and JᵀJ shares
    its largest eigenvalue with the small (JJᵀ)_{ka,lb} = δ_kl Σ_i σ(V_ai) σ(V_bi) + δ_ab σ'(V_ai)² U_ki U_li, summed
    over i. Elsewhere it is that of the Gauss-Newton part.
    """
    _check(U, V, activation)
    sigma, (m, n) = _SIGMA[activation], (U.shape[-2], V.shape[-2])
    h, slope = sigma.f(V), sigma.derivative(V)
    ours = torch.einsum("...ki,...ai,...li->...akl", U, slope.square(), U)
    eye_m, eye_n = (torch.eye(k, dtype=U.dtype, device=U.device) for k in (m, n))
    JJ = torch.einsum("kl,...ab->...kalb", eye_m, h @ h.mT) + torch.einsum("ab,...akl->...kalb", eye_n, ours)
    return 2 * torch.linalg.eigvalsh(JJ.reshape(*U.shape[:-2], m * n, m * n))[..., -1]


def gradient_descent(
    U: Tensor, V: Tensor, Y: Tensor, activation: str, lr: float | Tensor, record: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradient descent on the mean squared error, all members of the ensemble at once; yields (U, V) at `record`.

    lr: one step size, or one per member (shape E). record: increasing numbers of steps; 0 is the start.

    A step of such a small network is all call overhead, so the gradient is written out and every operation works in
    place: for the stack of three 5×50 networks of Figure 3, 18 to 28 µs a step (two cores of an AMD EPYC, float64).
    Compiling pays nothing there: torch.compile over 20 unrolled steps took 22 to 24 µs a step.
    """
    _check(U, V, activation, Y)
    m, n = Y.shape[-2:]
    batch = torch.broadcast_shapes(U.shape[:-2], V.shape[:-2], Y.shape[:-2])
    U, V, Y = (W.expand(*batch, *W.shape[-2:]).clone() for W in (U, V, Y))
    rate = torch.as_tensor(lr, dtype=U.dtype, device=U.device).expand(batch).reshape(-1, 1, 1) * (2 / (m * n))
    if not (torch.isfinite(rate).all() and (rate > 0).all()):
        raise ValueError("lr: must be positive and finite")
    if list(record) != sorted(set(record)) or (record and record[0] < 0):
        raise ValueError("record: must be increasing numbers of steps, none negative")
    done = 0
    for target in record:
        _descend_(*(W.view(-1, *W.shape[-2:]) for W in (U, V, Y)), activation, rate, target - done)
        done = target
        yield U.clone(), V.clone()


def moved_pair(U: Tensor, V: Tensor, g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(U, V) moved along its symmetry orbit by g (h, h): Vᵀ' = gVᵀ and U' refitted, so that U'σ(V'ᵀ) = Uσ(Vᵀ).

    The pre-activation action of teleport.py with the whitened input, exact where σ(gVᵀ) has rank n (needs n ≤ h).
    Elementwise σ only. Q changes, the loss does not.
    """
    X = torch.eye(V.shape[-2], dtype=V.dtype, device=V.device)
    moved_U, moved_Vt = teleport.preactivation_action(U, V.mT, X, g, _SIGMA[activation])
    return moved_U, moved_Vt.mT


def scaled_pair(U: Tensor, V: Tensor, s: float, activation: str) -> tuple[Tensor, Tensor]:
    """(U, V) moved along its symmetry orbit by g = sI: V' = sV. See moved_pair."""
    return moved_pair(U, V, s * torch.eye(V.shape[-1], dtype=V.dtype, device=V.device), activation)


def crossing(steps: Sequence[int], loss: np.ndarray, level: float) -> float:
    """The (interpolated) number of steps at which the recorded loss first falls to the level; NaN: it does not."""
    below = np.flatnonzero(loss <= level)
    if not len(below):
        return math.nan
    i = below[0]
    return float(np.interp(level, loss[[i, i - 1]], np.asarray(steps)[[i, i - 1]]))


def record_steps(steps: int, per_decade: int) -> list[int]:
    """Log-spaced numbers of steps for `record`, from 0 and 1 to `steps`; k and k / 10 both occur, up to rounding."""
    decades = range(int(per_decade * math.log10(steps)) + 1)
    return sorted({0, 1, *(round(steps * 10 ** (-i / per_decade)) for i in decades)})


def published_normal(rows: int, columns: int, mean: float, std: float, seed: int | torch.Generator = 12345) -> Tensor:
    """The published start: float32 normal numbers as `torch.rand(…).normal_(mean, std)` draws them after `seed`.

    The discarded uniform numbers move the generator on. In the training experiments every matrix starts from the same
    seed, so that the starts at several standard deviations are one draw, scaled. A generator in place of the seed
    continues its stream.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator).normal_(mean, std, generator=generator)


@torch.no_grad()
def _descend_(U: Tensor, V: Tensor, Y: Tensor, activation: str, rate: Tensor, steps: int) -> None:
    """`steps` steps in place on stacks (S, ., .); rate (S, 1, 1) multiplies the gradient of half the squared error."""
    R, G = torch.empty_like(Y), torch.empty_like(V)
    H = V if activation == "linear" else torch.empty_like(V)
    Ht, Rt = H.mT, R.mT
    activate, pull_back = _in_place(activation, V, H, G)
    for _ in range(steps):
        activate()
        torch.baddbmm(Y, U, Ht, beta=-1, out=R)  # U σ(Vᵀ) − Y
        R.mul_(rate)
        torch.bmm(Rt, U, out=G)  # rate · ∂L/∂σ(V), with the old U
        U.baddbmm_(R, H, alpha=-1)
        pull_back()
        V.sub_(G)


def _in_place(activation: str, V: Tensor, H: Tensor, G: Tensor):
    """Two functions for the loop above: write σ(V) into H; turn G from ∂L/∂σ(V) into ∂L/∂V (H may be spent)."""
    q = torch.empty_like(V[:, :1])

    def radial():
        torch.mul(V, V, out=H)
        torch.sum(H, 1, keepdim=True, out=q)
        torch.div(V, q, out=H)

    def tanh_derivative():  # 1 − σ²
        H.square_()
        G.addcmul_(G, H, value=-1)

    def sigmoid_derivative():  # σ (1 − σ)
        G.mul_(H)
        G.addcmul_(G, H, value=-1)

    def radial_derivative():  # (G − 2 v ⟨v, G⟩ / ‖v‖²) / ‖v‖², column by column
        inner = (G * H).sum(1, keepdim=True)
        G.div_(q).addcmul_(H, inner, value=-2)

    return {
        "linear": (lambda: None, lambda: None),
        "relu": (lambda: torch.clamp(V, min=0, out=H), lambda: G.mul_(H.sign_())),
        "tanh": (lambda: torch.tanh(V, out=H), tanh_derivative),
        "sigmoid": (lambda: torch.sigmoid(V, out=H), sigmoid_derivative),
        "radial": (radial, radial_derivative),
    }[activation]


def _check(U: Tensor, V: Tensor, activation: str, Y: Tensor | None = None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if U.ndim < 2 or V.ndim < 2 or U.shape[-1] != V.shape[-1]:
        raise ValueError(f"U {tuple(U.shape)}, V {tuple(V.shape)}: need (*E, m, h) and (*E, n, h), the same h")
    if Y is not None and tuple(Y.shape[-2:]) != (U.shape[-2], V.shape[-2]):
        raise ValueError(f"Y {tuple(Y.shape)}: need (m, n) = {(U.shape[-2], V.shape[-2])}")
    for name, W in (("U", U), ("V", V), ("Y", Y)):
        if W is not None and not torch.isfinite(W).all():
            raise ValueError(f"{name}: not finite")
    if activation == "radial" and (V == 0).all(-2).any():
        raise ValueError("V: a column is zero, where v / ‖v‖² has no value")
