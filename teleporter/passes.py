"""Forward passes that leave no trace, and gradients of what they return."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teleport import _check_count, _check_positive


def check_trials(steps: int, radius: float, tolerance: float, **shares: float | None) -> None:
    """ValueError, naming it, for what is not positive and finite, and for a share outside [0, 1)."""
    _check_count("steps", steps)
    _check_positive("radius", radius)
    _check_positive("tolerance", tolerance)
    for name, share in shares.items():
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"{name} must be in [0, 1), got {share}")


def check_loss(loss: Any) -> None:
    """ValueError unless a loss_fn's result can be differentiated: a finite scalar that depends on parameters."""
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad or not loss.isfinite():
        raise ValueError(f"loss_fn must return a finite scalar that depends on the parameters, got {loss}")


def gradient(value: Tensor, parameters: Mapping[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    """{name: ∂value/∂parameter}, zero for parameters that value does not depend on; float32 for half precision."""
    G = torch.autograd.grad(value, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    if any(g is None for g in G) and "CheckpointFunctionBackward" in _operations(value):
        raise ValueError("reentrant checkpointing hides gradients of parameters: give checkpoint use_reentrant=False")
    G = [torch.zeros_like(p) if g is None else g for g, p in zip(G, parameters.values())]
    G = [g.to_dense() if g.is_sparse else g for g in G]
    return {name: g.float() if g.dtype.itemsize < 4 else g for name, g in zip(parameters, G)}


def _operations(value: Tensor) -> set[str]:
    """Names of the operations that autograd would go back through."""
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast leaves what happens in here to x's own dtype."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@contextmanager
def undone_on_error(parameters: Mapping[str, Tensor]) -> Iterator[Callable[[], None]]:
    """Yields a function that puts the parameters back where they were; an exception does that too."""
    before = [(p, p.detach().clone()) for p in parameters.values()]

    def undo() -> None:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        torch.clear_autocast_cache()

    try:
        yield undo
    except BaseException:
        undo()
        raise


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Forward passes in here leave no trace in the buffers (running statistics)."""
    before = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass leaves in the modules (attributes, entries of containers, buffers) is taken back."""

    def held(value: Any) -> tuple[Any, Any]:
        if type(value) in (dict, OrderedDict, list, set):  # ten a module: copy.copy takes longer than a small model
            return value, value.copy()
        return (value, copy.copy(value)) if isinstance(value, list | dict | set) else (value, None)

    tensors = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    tensors = [(t, t.detach().clone()) for t in tensors]
    before = [(vars(m), {name: held(value) for name, value in vars(m).items()}) for m in model.modules()]
    try:
        with kept_buffers(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        for attributes, values in before:
            for name in set(attributes) - set(values):
                del attributes[name]
            for name, (value, content) in values.items():
                attributes[name] = value
                if content or content is not None and value:
                    _refill(value, content)


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """All modules in evaluation mode, or all in training mode, whatever mode each of them is in."""
    before = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in before:
            m.training = training
        yield
    finally:
        for m, mode in before:
            m.training = mode


def _refill(container: list | dict | set, content: list | dict | set) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def same_randomness(model: nn.Module) -> AbstractContextManager:
    """Every pass in such a context draws the same random numbers, and the outside world sees none of it."""
    return torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda})


@contextmanager
def recorded_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """{name: what that Linear read, (features, samples)} of the forward pass in this context."""
    inputs = {}

    def record(name: str, module: nn.Module, args: tuple) -> None:
        inputs[name] = args[0].detach().flatten(0, -2).T

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in names]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
