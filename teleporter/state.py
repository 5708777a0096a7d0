"""What an optimizer remembers of a parameter, and how it moves when the parameter does."""

import torch

# Optimizer states that are made of gradients, and of their squares; all others are kept as they are.
STATES = {
    "gradients": ("momentum_buffer", "exp_avg", "grad_avg"),
    "squares": ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"),
}


@torch.no_grad()
def transport(parameters, optimizer, symmetries, tangents):
    """Move what the optimizer remembers, and the gradients that wait in .grad, after a move by exp(tangents).

    parameters: {name: parameter}; optimizer: torch.optim.Optimizer or None; one tangent for each symmetry.
    """
    state = optimizer.state if optimizer is not None else {}
    groups = [("gradients", {name: p.grad for name, p in parameters.items()})]
    for like, keys in STATES.items():
        for key in keys:
            found = {name: state.get(p, {}) for name, p in parameters.items()}
            # RMSprop's momentum is made of normalized gradients, on which a rescaling has no effect.
            found = {n: x for n, x in found.items() if key != "momentum_buffer" or "square_avg" not in x}
            groups.append((like, {name: x.get(key) for name, x in found.items()}))
    for like, tensors in groups:
        for s, T in zip(symmetries, tangents):
            s.act_(tensors, T, like)
