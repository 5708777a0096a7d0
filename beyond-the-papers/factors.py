"""Adam and its peers on stacks of low-rank factors, and the exact teleports between two factors.

A pair stands for W = BA between two linear maps, A (r, d_in), B (d_out, r); a LoRA adds scale · BA to a frozen weight.
Only the product matters, so (RA, BR^-1) is the same function for every invertible R: a teleport. Both factors are kept
with the inner space in front, A beside Bᵀ in one tensor F (E, r, d_in + d_out) for E runs trained as one stack. An
orthogonal element Q moves all of F alike, F -> QF; a general one moves A by R and Bᵀ by R^-ᵀ. Gradients, and Adam's
first moment, move by the inverse transpose; its second moment by that matrix squared entry by entry, which is what the
squares would be were the entries uncorrelated (exact for signed permutations and rescalings).

Optimizers are written out, with PyTorch's Adam where nothing else is said; rates are per run and per factor.
"""

import torch
from torch import Tensor

EPS = 1e-8  # Adam's


class Adam:
    """Adam on E runs of the pairs [(A (E, r, d_in), B (E, d_out, r)), …], decoupled weight decay.

    rate: of A and B, geometric mean, (E,); ratio: B's rate over A's, (E,), as in LoRA+ (Hayou, Ghosh, Yu, 2024).
    tracks: accumulate the covariance C of the inner space's gradients, Σ G_A G_Aᵀ + G_Bᵀ G_B, with this decay a step.
    """

    def __init__(self, pairs, rate, ratio, betas=(0.9, 0.999), weight_decay=0.0, tracks: float | None = None):
        self.widths = [A.shape[-1] for A, _ in pairs]
        self.F = [torch.cat([A, B.mT], -1) for A, B in pairs]
        self.m, self.v = ([torch.zeros_like(F) for F in self.F] for _ in range(2))
        self.C = [F.new_zeros(*F.shape[:-1], F.shape[-2]) for F in self.F]
        rates = rate / ratio**0.5, rate * ratio**0.5
        self.rates = [torch.cat([r[:, None].expand(-1, w) for r, w in zip(rates, _split(F, d))], 1).unsqueeze(1)
                      for F, d in zip(self.F, self.widths)]  # fmt: skip
        self.betas, self.weight_decay, self.tracks, self.steps = betas, weight_decay, tracks, 0

    def pairs(self) -> list:
        """[(A, Bᵀ), …] as views."""
        return [(F[..., :d], F[..., d:]) for F, d in zip(self.F, self.widths)]

    def step(self, gradients: list) -> None:
        """One step; gradients like F, one for each pair."""
        self.steps += 1
        for k, G in enumerate(gradients):
            if self.tracks is not None:
                self.C[k].mul_(self.tracks).baddbmm_(G, G.mT)
            self._descend(k, self.direction(k, G))

    def direction(self, k: int, G: Tensor) -> Tensor:
        """What pair k descends along, before the rates."""
        return self._normalized(k, G)

    def _normalized(self, k, G):
        beta1, beta2 = self.betas
        self.m[k].lerp_(G, 1 - beta1)
        self.v[k].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        denominator = self.v[k].sqrt().mul_((1 - beta2**self.steps) ** -0.5).add_(EPS)
        return self.m[k].div(denominator).mul_(1 / (1 - beta1**self.steps))

    def _descend(self, k, direction):
        if self.weight_decay:
            self.F[k].mul_(1 - self.rates[k] * self.weight_decay)
        self.F[k].addcmul_(self.rates[k], direction, value=-1)

    # Teleports: R, one (E, r, r) for each pair.

    def rotate(self, elements: list) -> None:
        """Move every pair by its orthogonal Q, state and covariance too."""
        for k, Q in enumerate(elements):
            self.F[k], self.m[k], self.v[k] = Q @ self.F[k], Q @ self.m[k], Q.square() @ self.v[k]
            self.C[k] = Q @ self.C[k] @ Q.mT

    def move(self, elements: list) -> None:
        """Move every pair by its invertible R, and the moments: (RA, BR^-1), gradients by the inverse transpose."""
        for k, R in enumerate(elements):
            dual, d = torch.linalg.inv(R).mT, self.widths[k]
            for tensors, on_A, on_B in (
                (self.F, R, dual),
                (self.m, dual, R),
                (self.v, dual.square(), R.square()),
            ):
                x = tensors[k]
                tensors[k] = torch.cat([on_A @ x[..., :d], on_B @ x[..., d:]], -1)

    def memory(self) -> float:
        """Numbers kept from step to step beside the factors, over the factors' own."""
        kept = [getattr(self, name, []) for name in ("m", "v", "V", "rho", "U", "bases")]
        return _size(kept + ([self.C] if self.tracks is not None else [])) / _size(self.F)

    def reset(self) -> None:
        """Forget the moments, as a new optimizer would."""
        self.steps = 0
        for x in (*self.m, *self.v):
            x.zero_()


def _size(x):
    return x.numel() if isinstance(x, Tensor) else sum(map(_size, x or ()))


def _split(F, d):
    return d, F.shape[-1] - d


# ---------------------------------------------------------------------------------------------------------------------
# Elements


def eigenbasis(optimizer: Adam) -> list:
    """The orthogonal Q whose rows are the eigenvectors of the gradients' covariance, the largest eigenvalue first."""
    return [torch.linalg.eigh(C.nan_to_num(0, 0, 0))[1].mT.flip(-2) for C in optimizer.C]


def random_rotations(optimizer: Adam, generator: torch.Generator) -> list:
    """Orthogonal matrices, uniformly distributed."""
    elements = []
    for F in optimizer.F:
        Q, R = torch.linalg.qr(torch.randn(*F.shape[:-1], F.shape[-2], generator=generator, dtype=F.dtype).to(F.device))
        elements.append(Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
    return elements


def balance(optimizer: Adam) -> list:
    """The rescaling that makes ‖A's row i‖ = ‖B's column i‖ for every i."""
    scales = [(Bt.norm(dim=-1) / A.norm(dim=-1)).sqrt() for A, Bt in optimizer.pairs()]
    return [torch.diag_embed(_usable(s)) for s in scales]


def singular_basis(optimizer: Adam) -> list:
    """R with RA(RA)ᵀ = (BR^-1)ᵀBR^-1 = diag(singular values of BA): balanced, and in the product's singular basis.

    With AAᵀ = LLᵀ and LᵀBᵀBL = V S² Vᵀ, R = S^½ Vᵀ L^-1. Where the product is not of full rank it stays as it is.
    """
    elements = []
    for A, Bt in optimizer.pairs():
        L, failed = torch.linalg.cholesky_ex(A @ A.mT)
        inner = (L.mT @ Bt @ (L.mT @ Bt).mT).nan_to_num(0, 0, 0)
        S2, V = torch.linalg.eigh(inner)
        R = S2.clamp_min(0).pow(0.25).unsqueeze(-1) * V.mT @ torch.linalg.inv(L.nan_to_num(1))
        fine = (failed == 0) & (S2.amin(-1) > 1e-10 * S2.amax(-1))
        elements.append(torch.where(fine[:, None, None], R, torch.eye(len(R[0])).to(R)))
    return elements


def _usable(scales):
    return torch.where(scales.isfinite() & (scales > 0), scales, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Peers


class ScaledAdam(Adam):
    """Riemannian preconditioned LoRA, its scaled AdamW (Zhang, Pilanci, 2024, arXiv 2402.02347): Adam on the gradients

    (BᵀB + δ)^-1 G_A and G_B (AAᵀ + δ)^-1.
    """

    def __init__(self, *arguments, damping=1e-6, **options):
        super().__init__(*arguments, **options)
        self.damping = damping

    def direction(self, k, G):
        (A, Bt), d = self.pairs()[k], self.widths[k]
        scaled = [_solve(other, part, self.damping) for other, part in ((Bt, G[..., :d]), (A, G[..., d:]))]
        return self._normalized(k, torch.cat(scaled, -1))


def _solve(x, G, damping):
    """(x xᵀ + damping)^-1 G"""
    gram = x @ x.mT + damping * torch.eye(x.shape[-2]).to(x)
    return torch.linalg.solve_ex(gram, G)[0]


class RITE(Adam):
    """LoRA-RITE (Yen et al., 2025, arXiv 2410.20625): a matrix preconditioner that no R can change.

    For A, with B = U_B R_B (polar decomposition): ḡ = R_B^-ᵀ G_A; P = U_Bᵀ times the U_B of the step before;
    V = β2 P V Pᵀ + (1 − β2) ḡḡᵀ/d_in; ρ, the running sum of what the projection took from V's eigenvalues;
    M = β1 P M + (1 − β1) (V + ρ)^-½ ḡ; A −= η R_B^-1 M. Likewise for B. Averages are corrected for their start as
    Adam's are. Where B = 0, A stays (its gradient is zero).
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.V = [[torch.zeros_like(C) for _ in range(2)] for C in self.C]
        self.rho = [[C.new_zeros(len(C), 1, 1) for _ in range(2)] for C in self.C]
        self.U = [[torch.zeros_like(Bt), torch.zeros_like(A)] for A, Bt in self.pairs()]

    def direction(self, k, G):
        (A, Bt), d = self.pairs()[k], self.widths[k]
        sides = ((Bt, G[..., :d], self.m[k][..., :d]), (A, G[..., d:], self.m[k][..., d:]))
        return torch.cat([self._side(k, i, *side) for i, side in enumerate(sides)], -1)

    def _side(self, k, i, other, G, M):
        """Descent direction of one factor; other: the other one, (E, r, d), whose magnitude is taken out."""
        beta1, beta2 = self.betas
        inverse = _inverse_root(other @ other.mT)  # R^-1, symmetric
        U, V = inverse @ other, self.V[k][i]
        P = U @ self.U[k][i].mT
        gradient = inverse @ G
        projected = P @ V @ P.mT
        lost = (torch.linalg.eigvalsh(_finite(V)) - torch.linalg.eigvalsh(_finite(projected))).abs().amax(-1)
        self.rho[k][i] = beta2 * (self.rho[k][i] + lost[:, None, None])
        self.V[k][i] = V = beta2 * projected + (1 - beta2) * (gradient @ gradient.mT) / G.shape[-1]
        self.U[k][i] = U
        correction = 1 - beta2**self.steps
        damped = (V + self.rho[k][i] * torch.eye(V.shape[-1]).to(V)) / correction
        M.copy_(beta1 * (P @ M) + (1 - beta1) * (_inverse_root(damped) @ gradient))
        return inverse @ M / (1 - beta1**self.steps)


def _finite(x):
    return x.nan_to_num(0, 0, 0)


def _inverse_root(x, relative=1e-10):
    """x^-½ of symmetric positive semidefinite x, on its range."""
    values, vectors = torch.linalg.eigh(_finite(x))
    top = values.amax(-1, keepdim=True)
    inverse = torch.where(values > relative * top.clamp_min(1e-30), values, torch.inf).rsqrt()
    return vectors * inverse.unsqueeze(-2) @ vectors.mT


class SOAP(Adam):
    """SOAP (Vyas et al., 2025, arXiv 2409.11321) on each factor: Adam in the eigenbasis of Shampoo's preconditioners.

    For G (r, d): L = β2 L + (1 − β2) GGᵀ, and R likewise of GᵀG if both_sides; every `every` steps their eigenbases Q
    by one power iteration, Q = QR(LQ); the second moment lives in the basis, the first outside. The first step only
    fills L and R.
    """

    def __init__(self, *arguments, every=10, both_sides=False, **options):
        super().__init__(*arguments, **options)
        self.every, self.both_sides = every, both_sides
        self.bases = [[None, None] for _ in self.F]

    def direction(self, k, G):
        d, m, v = self.widths[k], self.m[k], self.v[k]
        parts = [slice(None, d), slice(d, None)]
        return torch.cat([self._side(k, i, G[..., p], m[..., p], v[..., p]) for i, p in enumerate(parts)], -1)

    def _side(self, k, i, G, m, v):
        beta1, beta2 = self.betas
        grams = [G @ G.mT, G.mT @ G] if self.both_sides else [G @ G.mT]
        if self.bases[k][i] is None:
            self.bases[k][i] = [((1 - beta2) * C, torch.linalg.eigh(_finite(C))[1].flip(-1)) for C in grams]
            return torch.zeros_like(G)
        bases = self.bases[k][i]
        there, back = _turn(G, bases), lambda x: _turn(x, bases, inverse=True)
        m.lerp_(G, 1 - beta1)
        v.mul_(beta2).addcmul_(there, there, value=1 - beta2)
        t = self.steps - 1
        denominator = v.sqrt().mul_((1 - beta2**t) ** -0.5).add_(EPS)
        direction = back(_turn(m, bases) / denominator) / (1 - beta1**t)
        self.bases[k][i] = [(C.mul_(beta2).add_(gram, alpha=1 - beta2), Q) for (C, Q), gram in zip(bases, grams)]
        if t % self.every == 0:
            self.bases[k][i] = [(C, torch.linalg.qr(_finite(C @ Q))[0]) for C, Q in self.bases[k][i]]
        return direction


def _turn(G, bases, inverse=False):
    """Qᵀ G (and times the right basis, if there are two), or back."""
    (_, Q), *right = bases
    G = (Q if inverse else Q.mT) @ G
    return G @ (right[0][1].mT if inverse else right[0][1]) if right else G
