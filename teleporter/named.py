"""The objectives that a Teleporter knows by name (objectives.py), for any module and the optimizer that trains it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from teleport import Teleportation
from teleporter.objectives import (
    Rule,
    adam,
    balancing,
    balancing_matrix,
    covectors,
    descent,
    look_ahead,
    parabola,
    require_limit,
    sign,
)
from teleporter.passes import same_randomness
from teleporter.symmetry import Symmetry

NAMES = ("line_search_decrease", "look_ahead", "balance")
_ADAPTIVE = (torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax, torch.optim.NAdam)


def optimizers(optimizer: Any) -> list:
    """One, several or none, as a list."""
    return [] if optimizer is None else list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


def line_search_decrease(
    optimizer: Any, loss: Tensor, output: Any, parameters: dict, symmetries: list | None, reach: float
) -> tuple[Tensor, list | None]:
    """D of the first step that the optimizer would take from an empty state (gradient descent if there is none), and
    tangents of the steepest ascent, up to `reach` long; without symmetries none.

    All of the orbit is known from here, see `covectors`: no second derivative, less than three gradients.
    """
    adaptive = any(isinstance(o, (*_ADAPTIVE, torch.optim.AdamW)) for o in optimizers(optimizer))
    outputs = tree_leaves(vars(output) if hasattr(output, "__dataclass_fields__") else output)
    outputs = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    found = parabola(loss, outputs, tuple(parameters.values()), sign if adaptive else None)
    if not symmetries:
        return found.decrease, None
    C = dict(zip(parameters, covectors(found, outputs, tuple(parameters.values()))))
    power = 1 if adaptive else 2  # pulled back, the direction moves by the inverse of the element, or by its square
    C, u = {name: -power * c for name, c in C.items()}, dict(zip(parameters, found.direction))
    return found.decrease, [reach * s.steepest(s.norm_derivative(C, u)) for s in symmetries]


def apart(output: Any) -> Any:
    """A model's output with every tensor an alias of its own, so that none is computed from another."""
    return tree_map(lambda x: x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x, output)


def balance(
    optimizer: Any, loss: Any, output: Any, parameters: dict, symmetries: list | None, reach: Any, sweeps: int = 100
) -> tuple[Tensor, list | None]:
    """−Σ‖W‖² and the tangents at which it is largest, however far; only parameters and symmetries count.

    Symmetries that share parameters take the closed form in turns until none moves by more than 1e-9. A rotation within
    GL(r) changes no norm, so that of what several turns make together only the symmetric factor is left to do.
    """
    W = {name: p.detach().clone() for name, p in parameters.items()}
    value = -sum(x.double().square().sum().cpu() for x in W.values())
    if not symmetries:
        return value, None
    totals = [torch.zeros(s.shape, dtype=torch.float64, device="cpu") for s in symmetries]
    scaling = {k: s for k, s in enumerate(symmetries) if s.kind != "stream"}  # rotations are left alone
    elements = [torch.linalg.matrix_exp(T) if T.ndim == 3 and k in scaling else T for k, T in enumerate(totals)]
    for _ in range(sweeps):
        largest = 0.0
        for k, s in scaling.items():
            T = _turn(s, W)
            s.act_(W, T)
            elements[k] = elements[k] + T if T.ndim == 1 else torch.linalg.matrix_exp(T) @ elements[k]
            largest = max(largest, T.abs().max().item())
        if largest < 1e-9:
            break
    return value, [_logarithm(x.mT @ x) / 2 if x.ndim == 3 and k in scaling else x for k, x in enumerate(elements)]


def _turn(s: Symmetry, W: dict) -> Tensor:
    """What balances one symmetry: Σ W Wᵀ of its writers against that of its readers."""
    sizes = [torch.zeros(s.shape, dtype=torch.float64, device="cpu") for _ in range(2)]
    for slot in s.slots:
        found = slot.product(W[slot.name].double(), W[slot.name].double(), s.kind != "rescale").cpu()
        sizes[slot.reads][: len(found)] += found
    return balancing(*sizes) if s.kind == "rescale" else balancing_matrix(*map(s.tangent, sizes))


def _logarithm(P: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(P)
    return (Q * values.log().unsqueeze(-2)) @ Q.mT


AIMS = {"line_search_decrease": line_search_decrease, "balance": balance}


def balanced(teleporter: Any, moving: dict, inputs: Any) -> Teleportation:
    """One balance without a loss. Returns a Teleportation whose losses are NaN."""
    before, tangents = balance(None, None, None, teleporter.parameters, teleporter.symmetries, None)
    teleporter.apply(teleporter._within_total_bound(tangents, teleporter._allowed([])), inputs)
    after, nan = balance(None, None, None, teleporter.parameters, None, None)[0], torch.tensor(torch.nan)
    return Teleportation(moving, nan, nan, before, after)


def checked(objective: Any, optimizer: Any, items: list, maximize: bool, bound: float | None) -> str | None:
    """The objective if it is one of NAMES, else None. Raises ValueError for one that does not exist, one without a
    maximum that has no bound, and for what it does not go with."""
    if not callable(objective) and objective not in ("gradient_norm", *NAMES):
        known = '", "'.join(("gradient_norm", *NAMES))
        raise ValueError(f'objective must be "{known}" or callable(loss, parameters), got {objective!r}')
    require_limit(objective, bound)
    if bound is None or not 1 < bound < math.inf:
        raise ValueError(f"bound must be a finite factor above 1, got {bound}")
    name = objective if objective in NAMES else None
    if name and not maximize:
        raise ValueError(f"{name} is an objective that is the better, the larger: maximize must be True")
    if name in AIMS and {"preactivation", "postactivation"} & {item for item in items if isinstance(item, str)}:
        raise ValueError(f"{name} needs symmetries that are exact for every input")
    if name == "look_ahead":
        if not optimizers(optimizer):
            raise ValueError("look_ahead needs the optimizer whose steps it takes")
        for o in optimizers(optimizer):
            [rule(o, group) for group in o.param_groups]
    return name


def ahead(model: nn.Module, optimizer: Any, batches: Sequence[tuple]) -> Callable[..., Tensor]:
    """objective(loss, parameters) -> minus the loss of the last batch after one step of the optimizer on each other.

    batches: [(inputs, loss_fn), …]. The steps start from an empty state, at the rates that the optimizer has now;
    parameters that it does not hold stay. Raises ValueError as `rule`.
    """
    rules = {id(p): rule(o, group) for o in optimizers(optimizer) for group in o.param_groups for p in group["params"]}

    def stay(W, G, state, t):
        return W, state

    def loss_of(names, inputs, loss_fn):
        arguments, options = (inputs if isinstance(inputs, tuple) else (inputs,), {})
        if isinstance(inputs, dict):
            arguments, options = (), inputs
        return lambda W: loss_fn(functional_call(model, dict(zip(names, W)), arguments, options))

    def objective(loss, parameters):
        *losses, held_out = (partial(loss_of, tuple(parameters))(*batch) for batch in batches)
        with sdpa_kernel(SDPBackend.MATH), same_randomness(model):
            steps = [rules.get(id(p), stay) for p in parameters.values()]
            return look_ahead(tuple(parameters.values()), losses, held_out, steps)

    return objective


def rule(optimizer: torch.optim.Optimizer, group: dict) -> Rule:
    """The step that a torch optimizer takes with the options of this group. ValueError where it is not known here."""
    rest, lr = ("maximize", "amsgrad", "dampening"), group["lr"]
    refused = [key for key in rest if group.get(key)]
    if isinstance(optimizer, torch.optim.SGD) and not refused:
        return descent(lr, group["momentum"], group["nesterov"], group["weight_decay"])
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and not refused:
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        return adam(lr, group["betas"], group["eps"], group["weight_decay"], decoupled)
    what = f"{type(optimizer).__name__}{f' with {refused[0]}' if refused else ''}"
    raise ValueError(f"look_ahead knows the steps of SGD, Adam and AdamW, not of {what}: give a callable objective")
