"""What an optimizer remembers of a parameter, and how it moves when the parameter does.

Where the weights move by s, gradients move by 1/s. An optimizer's memory moves to what it would be had every past
gradient been taken at the moved weights. Each tensor in it is of one kind, known by its key:

    "gradients"   means of gradients: 1/s                "squares"   means of squared gradients: 1/s²
    "magnitudes"  largest |gradient|: 1/s                "weights"   means of weights: s
    "kept"        what gradients decide by their sign or after normalization: nothing

Other symmetries than rescalings mix the entries of a gradient: its squares and magnitudes move as those of uncorrelated
entries would. `notes` says what else is not exact, and how large it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_leaves

from teleporter.rotations import trained_gains
from teleporter.symmetry import HiddenAction, Symmetry

Tensors = Mapping[str, Tensor]  # by the names of parameters
Optimizers = Sequence[optim.Optimizer]
State = dict[str, Any]  # what an optimizer remembers of a parameter
KINDS = {
    **dict.fromkeys(("momentum_buffer", "exp_avg", "grad_avg", "prev"), "gradients"),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), "squares"),
    "exp_inf": "magnitudes",
    **dict.fromkeys(("ax", "z"), "weights"),  # z: schedule-free optimizers
    **dict.fromkeys(("step_size", "acc_delta"), "kept"),
}
_FACTORED = ("row_var", "col_var")  # Adafactor's: means of squares along the last two dimensions
_ADAPTIVE = (optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta)
_NORMALIZING = (*_ADAPTIVE, optim.AdamW, optim.SparseAdam, optim.Rprop)


def kind_of(key: str, state: State) -> str | None:
    """The kind of state[key]; None if it is unknown."""
    if key == "momentum_buffer" and "square_avg" in state:  # RMSprop's is made of normalized gradients
        return "kept"
    return "squares" if key in _FACTORED else KINDS.get(key)


def checked(optimizer: optim.Optimizer | Optimizers | None, parameters: Tensors) -> list[optim.Optimizer]:
    """The optimizers in a list, if together they hold the parameters {name: parameter}. Raises ValueError otherwise."""
    optimizers = [] if optimizer is None else list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for o in optimizers:
        if not (hasattr(o, "state") and hasattr(o, "param_groups")):
            raise ValueError(f"optimizer: {type(o).__name__} has no state and param_groups to move, give what it wraps")
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in held]
    if optimizers and missing:
        raise ValueError(
            f"optimizer does not hold {_listed(missing)}: it was made for other parameters (those of a copy?); give a "
            "list of optimizers that hold all that moves, or freeze what is not trained"
        )
    return optimizers


def copies(averaged: nn.Module | Tensors | Sequence | None, parameters: Tensors) -> list[dict[str, Tensor]]:
    """[{name: tensor}] of averaged copies of the model (modules or dicts). Raises ValueError for one that is unlike."""
    found = []
    for copy in [] if averaged is None else averaged if isinstance(averaged, list | tuple) else [averaged]:
        tensors = dict(copy.named_parameters()) if isinstance(copy, nn.Module) else copy
        tensors = {_plain(name): t for name, t in tensors.items()}
        unlike = [n for n, p in parameters.items() if getattr(tensors.get(_plain(n)), "shape", None) != p.shape]
        if unlike:
            raise ValueError(f"averaged: {type(copy).__name__} has no copy of {_listed(unlike)}")
        found.append({name: tensors[_plain(name)] for name in parameters})
    return found


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put in front of it."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _each(
    parameters: Tensors, optimizers: Optimizers
) -> Iterator[tuple[optim.Optimizer, dict[str, Any], str, Tensor, State]]:
    """(optimizer, its options, name, parameter, state) of every parameter that an optimizer remembers something of."""
    names = {id(p): name for name, p in parameters.items()}
    for o in optimizers:
        for group in o.param_groups:
            for p in group["params"]:
                if id(p) in names and not isinstance(o, optim.LBFGS) and o.state.get(p):
                    yield o, group, names[id(p)], p, o.state[p]


def resolve_unknown(parameters: Tensors, optimizers: Optimizers, on_unknown: str | None) -> None:
    """Keep or reset (to zero) the tensors of unknown kinds; raises ValueError, naming them, if on_unknown is None."""
    for o, _, name, _, state in _each(parameters, optimizers):
        for key, value in state.items():
            tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.ndim > 0]
            if tensors and kind_of(key, state) is None:
                if on_unknown is None:
                    raise ValueError(
                        f"optimizer {type(o).__name__} keeps {key!r} of {name}, of which nothing is known: "
                        'on_unknown_state="keep" leaves it as it is, "reset" sets it to zero'
                    )
                if on_unknown == "reset":
                    [t.zero_() for t in tensors]


@torch.no_grad()
def transport(
    parameters: Tensors,
    optimizers: Optimizers,
    averages: Sequence[Tensors],
    symmetries: Sequence[Symmetry],
    tangents: Sequence[Tensor],
    on_unknown: str | None = None,
) -> None:
    """Move all that follows the parameters after a move by exp(tangents): the gradients that wait in .grad, what the
    optimizers remember, averaged copies.

    parameters: {name: parameter}; one tangent for each symmetry; optimizers, averages: of `checked` and `copies`.
    """

    def act(tensors: Tensors, like: str) -> None:
        for s, T in zip(symmetries, tangents):
            if like != "magnitudes":
                s.act_(tensors, T, like)
            elif s.kind == "rescale":
                s.act_(tensors, T, "gradients")
            else:  # as the roots of their squares
                squares = {name: x.square() for name, x in tensors.items()}
                s.act_(squares, T, "squares")
                [x.copy_(squares[name].sqrt()) for name, x in tensors.items()]

    for name, p in parameters.items():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = _sparse_moved(p.grad, lambda dense, name=name: act({name: dense}, "gradients"))
    act({n: p.grad for n, p in parameters.items() if p.grad is not None and not p.grad.is_sparse}, "gradients")
    for s in symmetries:
        if s.kind == "stream":
            s.regain(parameters)
    for copy in averages:
        act(copy, "weights")
    resolve_unknown(parameters, optimizers, on_unknown)
    tensors = {}
    for _, group, name, _, state in _each(parameters, optimizers):
        if all(key in state for key in _FACTORED):
            _act_factored(state, lambda v, name=name: act({name: v}, "squares"))
        for key, x in state.items():
            if isinstance(x, Tensor) and x.ndim and key not in _FACTORED and kind_of(key, state) not in (None, "kept"):
                start = group.get("initial_accumulator_value", 0) if key == "sum" else 0
                tensors.setdefault((kind_of(key, state), key, start), {})[name] = x
    for (kind, _, start), found in tensors.items():
        for x in found.values() if start else ():  # Adagrad's accumulator starts at a number, which has no gradients
            x.sub_(start)
        act(found, kind)
        for x in found.values() if start else ():
            x.add_(start)
    for o in optimizers:
        if isinstance(o, optim.LBFGS):
            _act_lbfgs(o, {id(p): name for name, p in parameters.items()}, act)


def _sparse_moved(grad: Tensor, act: Callable[[Tensor], None]) -> Tensor:
    """A sparse gradient of an embedding after act has moved its dense form."""
    grad = grad.coalesce()
    dense, indices = grad.to_dense(), grad.indices()
    act(dense)
    return torch.sparse_coo_tensor(
        indices, dense[tuple(indices)], grad.shape, is_coalesced=True, check_invariants=False
    )


def _act_factored(state: State, act: Callable[[Tensor], None]) -> None:
    """Move row and column means as the estimate that is made of them, their outer product over their mean."""
    row, col = (state[key] for key in _FACTORED)
    v = row * col / row.mean(-2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    act(v)
    row.copy_(v.mean(-1, keepdim=True))
    col.copy_(v.mean(-2, keepdim=True))


def _act_lbfgs(optimizer: optim.LBFGS, names: Mapping[int, str], act: Callable[[Tensors, str], None]) -> None:
    """Move L-BFGS's pairs: differences of weights, differences of gradients, and the scale that the last pair gives."""
    params = optimizer.param_groups[0]["params"]
    state, sizes = optimizer.state.get(params[0], {}), [p.numel() for p in params]

    def move(flat: Tensor, like: str) -> None:
        pieces = zip(params, flat.split(sizes))
        act({names[id(p)]: x.view_as(p) for p, x in pieces if id(p) in names}, like)

    for key, like in (("d", "weights"), ("prev_flat_grad", "gradients")):
        if state.get(key) is not None:
            move(state[key], like)
    for key, like in (("old_stps", "weights"), ("old_dirs", "gradients")):
        for flat in state.get(key) or ():
            move(flat, like)
    if state.get("old_dirs"):
        y, s = state["old_dirs"][-1], state["old_stps"][-1]
        state["H_diag"] = y.dot(s) / y.dot(y)


def notes(parameters: Tensors, optimizers: Optimizers, symmetries: Sequence[Symmetry | HiddenAction]) -> list[str]:
    """What `transport` cannot move exactly, one line a cause, with its size in the optimizer's present state."""
    found, names = {}, {id(p): name for name, p in parameters.items()}
    mixing = sorted({s.kind for s in symmetries if s.kind != "rescale"})
    mixed = {slot.name for s in symmetries if s.kind != "rescale" for slot in s.slots}
    gains = trained_gains(symmetries)
    for o in optimizers:
        kind = type(o).__name__
        for group in o.param_groups:
            for p in group["params"]:
                if id(p) in gains and (group.get("momentum") or not isinstance(o, optim.SGD)):
                    found[f"{kind}: what it remembers of the gains of norms stays where a stream rotates"] = 0.0
                if id(p) not in names:
                    continue
                state = o.state.get(p, {})
                causes = _decay(o, group, p, state) | _epsilon(o, group, state)
                if kind == "Adafactor" and 1 < p.ndim < 4:  # of images' convolutions no channel is averaged over
                    causes["factored squares move as their product does"] = 0.0
                if names[id(p)] in mixed and isinstance(o, _NORMALIZING):
                    causes[f"under {', '.join(mixing)} squares move as those of uncorrelated entries"] = 0.0
                for cause, share in causes.items():
                    found[f"{kind}: {cause}"] = max(found.get(f"{kind}: {cause}", 0.0), share)
    return [f"{cause}{f' (up to {share:.2g} of it)' if share else ''}" for cause, share in found.items()]


def _decay(o: optim.Optimizer, group: dict[str, Any], p: Tensor, state: State) -> dict[str, float]:
    """{cause: its share} of a weight decay that is added to the gradients, of which means are kept."""
    decay, momentum = group.get("weight_decay", 0), group.get("momentum", 0)
    if not decay or not isinstance(o, (optim.SGD, *_ADAPTIVE)) or group.get("decoupled_weight_decay"):
        return {}
    if isinstance(o, optim.SGD) and not momentum:
        return {}
    share = 0.0
    for key, x in state.items():
        if kind_of(key, state) == "gradients":
            x = x.norm() * (1 - momentum if isinstance(o, optim.SGD) else 1)
        elif kind_of(key, state) == "squares":
            x = (x.sum() / (state["step"] if key == "sum" else 1)).sqrt()
        else:
            continue
        share = max(share, (decay * p.detach().norm() / x.clamp_min(1e-30)).item())
    return {f"weight_decay {decay:g} is coupled, its part of the mean gradients moves as they do": share}


def _epsilon(o: optim.Optimizer, group: dict[str, Any], state: State) -> dict[str, float]:
    """{cause: its share} of an eps that does not move with what it is added to."""
    eps, x = group.get("eps") or 0, None
    if isinstance(o, optim.RMSprop) and group["momentum"] and eps:
        x = state.get("square_avg")
        x = x if x is None else (x - state["grad_avg"] ** 2 if "grad_avg" in state else x).clamp_min(0).sqrt()
    elif isinstance(o, optim.Adadelta | optim.Adamax) and eps:
        x = state.get("square_avg", state.get("exp_inf"))
    else:
        return {}
    share = 0.0 if x is None or not x.any() else (eps / (eps + x[x > 0].median())).item()
    return {f"eps {eps:g} stays where what it is added to moves": share}
