"""Nonlinear, data-dependent group actions.

Source: Zhao, Ganev, Walters, Yu, Dehmamy, *Symmetries, Flat Minima, and the Conserved Quantities of Gradient Flow*
(ICLR 2023, arXiv 2210.17216), nonlinear symmetries. For one nonzero hidden vector z, a matrix R_z with R_z e_1 = z and
R_z R_zᵀ = ‖z‖² I turns the linear map U into U R_z R_{gz}^{-1}, which does to gz what U did to z. For a batch of them,
`data_dependent_action`.

All functions work on the last axis (or axes) of tensors with any leading batch shape *E and raise ValueError for
non-finite input.
"""

import torch
from torch import Tensor

from teleport import Activation, _times_pinv, preactivation_action


def to_spherical(z: Tensor) -> Tensor:
    """Spherical coordinates (r, α_1, …, α_{n−1}) of z (*E, n), n ≥ 2; angles in radians.

    z_k = r sin α_1 ⋯ sin α_{k−1} cos α_k, and the last entry has sin α_{n−1} in place of the cosine. All angles are in
    [0, π] but the last, in (−π, π], so that the sign of the last entry survives (the arccos of the published code loses
    it). An angle that nothing determines, because all that follows is zero, is 0.
    """
    tails = _tails(z)
    return torch.cat([_norm(z), torch.atan2(tails[..., 1:], z[..., :-1])], dim=-1)


def from_spherical(coordinates: Tensor) -> Tensor:
    """The vector z (*E, n) with spherical coordinates (r, α_1, …, α_{n−1}): the inverse of to_spherical."""
    _check(coordinates, "coordinates")
    r, angles = coordinates[..., :1], coordinates[..., 1:]
    sines = torch.cat([torch.ones_like(r), angles.sin()], dim=-1).cumprod(-1)
    return r * sines * torch.cat([angles.cos(), torch.ones_like(r)], dim=-1)


def r_matrix(z: Tensor) -> Tensor:
    """R_z (*E, n, n): first column z, R Rᵀ = ‖z‖² I, zero above the first superdiagonal. z (*E, n), n ≥ 2.

    R_z / ‖z‖ is the product of the rotations by the spherical angles of z. Its trigonometric functions are ratios of
    tail norms t_k = ‖(z_k, …, z_n)‖ (t_n = z_n, signed):

        column 1:         z
        column j ≥ 2:     ‖z‖ (cos α_{j−1} z_i / t_j) in rows i ≥ j,   −‖z‖ sin α_{j−1} in row j − 1,
        cos α_{j−1} = z_{j−1} / t_{j−1},   sin α_{j−1} = t_j / t_{j−1}.

    Where a tail vanishes its angle is 0 and its direction e_j, so zero entries are safe; r_matrix(0) = 0.
    """
    tails, r = _tails(z), _norm(z)
    n = z.shape[-1]
    empty = tails == 0
    safe = torch.where(empty, torch.ones_like(tails), tails)
    identity = torch.eye(n, dtype=z.dtype, device=z.device)
    # D[i, j] = z_i / t_j for i ≥ j: the unit vector along the tail that starts at j (e_j if that is zero).
    D = torch.where(empty[..., None, :], identity, z[..., :, None] / safe[..., None, :]).tril()
    cos = torch.where(empty, torch.ones_like(z), z / safe)[..., :-1]
    sin = torch.where(empty, torch.zeros_like(z), tails.roll(-1, -1) / safe)[..., :-1]
    columns = D[..., 1:] * cos[..., None, :] - identity[:, :-1] * sin[..., None, :]
    return torch.cat([z[..., None], r[..., None] * columns], dim=-1)


def data_dependent_action(g: Tensor, H: Tensor, activation: Activation, minimal_change: bool = False) -> Tensor:
    """π(g, H) = σ(H) σ(gH)^+ (*E, h, h): with g acting on the input H of σ, U → Uπ(g, H) undoes it.

    g (*E, h, h); H (*E, h, n), columns are samples. Uπ(g, H) σ(gH) = Uσ(H) exactly on this batch if σ(gH) has full
    column rank (so n ≤ h), up to rounding times the condition number of σ(gH); on other samples only approximately.

    What a batch of n < h samples does not determine, π(g, H) discards: it is not the identity at g = I. With
    minimal_change it is kept: I + (σ(H) − σ(gH)) σ(gH)^+, what `teleport.preactivation_action` does to U, as exact on
    the batch and the same matrix at full row rank. Raises ValueError for shapes that do not fit and values that are not
    finite; with minimal_change also for a singular g.
    """
    h, n = H.shape[-2:]
    if minimal_change:
        eye = {"dtype": H.dtype, "device": H.device}
        return preactivation_action(torch.eye(h, **eye), H, torch.eye(n, **eye), g, activation)[0]
    if g.shape[-2:] != (h, h):
        raise ValueError(f"g {tuple(g.shape)}: expected {h}×{h} matrices for H {tuple(H.shape)}")
    for name, tensor in {"g": g, "H": H}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: not finite")
    return _times_pinv(activation.f(H), activation.f(g @ H))  # A^+ itself would lose digits on the batch


def _tails(z: Tensor) -> Tensor:
    """t_k = ‖(z_k, …, z_n)‖ with t_n = z_n signed, (*E, n); scaled, so that squares neither overflow nor vanish."""
    _check(z, "z")
    scale = z.abs().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    squares = (z / scale).square()
    norms = scale * squares.flip(-1).cumsum(-1).flip(-1).sqrt()
    return torch.cat([norms[..., :-1], z[..., -1:]], dim=-1)


def _norm(z: Tensor) -> Tensor:
    return _tails(z)[..., :1]


def _check(z: Tensor, name: str) -> None:
    if z.ndim < 1 or z.shape[-1] < 2:
        raise ValueError(f"{name} {tuple(z.shape)}: need vectors of two or more entries in the last axis")
    if not torch.isfinite(z).all():
        raise ValueError(f"{name}: not finite")
