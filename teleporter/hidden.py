"""Data-dependent actions of teleport.py between the Linear layers of a model."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from teleporter.symmetry import HiddenAction


def act_on_hidden(
    action: Callable,
    symmetries: Sequence[HiddenAction],
    parameters: Mapping[str, Tensor],
    tangents: Sequence[Tensor],
    hidden: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """{name: tensor} moved by g = exp(T), layer after layer; each sees its true, already transformed input.

    hidden: {name of a Linear: what it read, (features, samples)}.
    """
    W = {slot.name: parameters[slot.name].detach() for s in symmetries for slot in s.slots}
    hidden = dict(hidden)
    for s, T in zip(symmetries, tangents):
        U, V, b = f"{s.U}.weight", f"{s.V}.weight", f"{s.V}.bias"
        h, A = hidden[s.V], W[V]
        if b in W:  # one more column of V, one more row of ones in h
            h, A = torch.cat([h, torch.ones_like(h[:1])]), torch.cat([A, W[b].unsqueeze(1)], 1)
        W[U], A = action(W[U], A, h, torch.linalg.matrix_exp(T.to(A)), s.activation)
        hidden[s.U] = s.activation.f(A @ h)
        W[V] = A[:, : W[V].shape[1]]
        if b in W:
            W[b] = A[:, -1]
    return W


def pull_back(
    action: Callable,
    symmetries: Sequence[HiddenAction],
    parameters: Mapping[str, Tensor],
    C: Mapping[str, Tensor],
    hidden: Mapping[str, Tensor],
) -> tuple[Tensor, ...]:
    """∂objective/∂T at T = 0 through the actions, from C = ∂objective/∂W."""
    tangents = [torch.zeros(s.shape, dtype=torch.float64, device="cpu", requires_grad=True) for s in symmetries]
    moved = act_on_hidden(action, symmetries, parameters, tangents, hidden)
    moved = {name: x for name, x in moved.items() if x.requires_grad}  # not the last layer's bias
    return torch.autograd.grad(list(moved.values()), tangents, [C[name] for name in moved])
