"""Rotate the inner space of low-rank pairs, LoRA's A and B, into the eigenbasis of its gradients: a teleport that Adam
feels.

    rotation = LowRankRotation(model, adam)     # a peft LoRA model, or names given by hand
    …
    loss.backward(); adam.step()
    rotation.step()                             # before zero_grad: it reads the gradients

Between two linear maps, BA = (BQᵀ)(QA) for every orthogonal Q: the function stays, gradient norms stay, and gradient
descent, momentum and weight decay cannot tell. Adam can: it divides entry by entry, and Q chooses the basis in which it
does. In the eigenbasis of Σ G_A G_Aᵀ + G_Bᵀ G_B, the covariance of the inner space's gradients, entries are least
correlated. The optimizer's memory moves along: means of gradients by Q, means of their squares by Q's squared entries
(exact for permutations and signs; otherwise what uncorrelated entries would do). r × r matrices are all it costs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from teleport import _check_count
from teleporter.state import checked, copies, kind_of
from teleporter.symmetry import Slot, Symmetry
from teleporter.verify import refuted


class _Pair(NamedTuple):
    name: str
    modules: tuple  # names of the two nn.Linear
    A: nn.Parameter  # (r, d_in): writes into the inner space
    B: nn.Parameter  # (d_out, r): reads from it


class LowRankRotation:
    """Rotates the inner spaces of low-rank pairs in place, an optimizer's state included; exact for every input.

    model: a peft LoRA model as peft builds it (modules with lora_A and lora_B, dictionaries of nn.Linear; scaling,
    dropout before A and a bias after B do not matter). pairs: instead, [(name of A, name of B), …], nn.Linear modules
    between which nothing happens but multiplication by a number, A without a bias. optimizer: one or a list, that hold
    the pairs' parameters. averaged: copies of the model that average its weights, or None; they rotate too. every:
    rotate at every so many calls of `step`; each call reads the gradients. decay: of the gradients' covariance, a call.
    inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments) for model(...), or None; with them
    every pair is tried with a random element, on the model with disturbed weights, and left alone if outputs change.

    Attributes: names, of the pairs; left_alone, {name: why this pair is not rotated}.

    Raises ValueError if nothing can be rotated, for a name that is no nn.Linear of the model, parameters that the
    optimizer does not hold, a copy that is unlike the model, half precision, and a decay outside [0, 1] or an every
    below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | list | tuple,
        *,
        averaged: nn.Module | dict | list | tuple | None = None,
        inputs: Tensor | tuple | dict | None = None,
        pairs: list | None = None,
        every: int = 1,
        decay: float = 0.99,
    ) -> None:
        """Find the pairs, and try them if there are inputs."""
        _check_count("every", every)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.model, self.every, self.decay, self.calls = model, every, decay, 0
        self.left_alone, self._pairs = {}, []
        found = _lora(model) if pairs is None else [(" -> ".join(pair), *pair) for pair in pairs]
        uses = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
        for name, *modules in found:
            first, second = (_linear(model, module) for module in modules)
            reason = _obstacle(first, second, uses)
            if reason is None:
                self._pairs.append(_Pair(name, tuple(modules), first.weight, second.weight))
            elif pairs is not None:
                raise ValueError(f"pairs: {name}: {reason}")
            else:
                self.left_alone[name] = reason
        self._names = {p: name for name, p in model.named_parameters()}
        if inputs is not None:
            self._leave_alone(refuted(model, dict(model.named_parameters()), self._symmetries(), inputs))
        if not self._pairs:
            raise ValueError(
                f"model: no low-rank pair found to rotate: {self.left_alone or 'it has no lora_A, lora_B'}"
            )
        rotating = {self._names[p]: p for pair in self._pairs for p in (pair.A, pair.B)}
        self._optimizers, self._averages = checked(optimizer, rotating), copies(averaged, rotating)
        if not self._optimizers:
            raise ValueError("optimizer must be given: what a rotation changes is the step that an optimizer takes")
        self.names = [pair.name for pair in self._pairs]
        self._covariances = [pair.A.new_zeros(2 * pair.A.shape[:1]) for pair in self._pairs]

    def _symmetries(self) -> list[Symmetry]:
        """The pairs as symmetries, to be tried."""
        views = (lambda x: x.unsqueeze(0)), (lambda x: x.mT.unsqueeze(0))
        return [
            Symmetry(pair.name, "low_rank", (1, len(pair.A), len(pair.A)), (Slot(self._names[pair.A], False, views[0]),
                                                                          Slot(self._names[pair.B], True, views[1])))
            for pair in self._pairs
        ]  # fmt: skip

    def _leave_alone(self, wrong: Mapping[str, str]) -> None:
        self.left_alone |= wrong
        self._pairs = [pair for pair in self._pairs if pair.name not in wrong]

    @torch.no_grad()
    def step(self) -> None:
        """Read the gradients and, at every `every`-th call, rotate into their eigenbasis.

        Call it after optimizer.step() and before zero_grad(). Raises ValueError if gradients are missing or not finite,
        RuntimeError if a layer was replaced since; nothing is moved then.
        """
        self._check()
        grown = []
        for pair, C in zip(self._pairs, self._covariances):
            if pair.A.grad is None or pair.B.grad is None:
                raise ValueError(f"{pair.name} has no gradient: call step after backward and before zero_grad")
            grown.append(self.decay * C + pair.A.grad @ pair.A.grad.mT + pair.B.grad.mT @ pair.B.grad)
        if not all(C.isfinite().all() for C in grown):
            raise ValueError("gradients are not finite: skip rotation.step() where the optimizer's step is skipped")
        self._covariances, self.calls = grown, self.calls + 1
        if self.calls % self.every == 0:
            self.apply([gradient_eigenbasis(C) for C in grown])

    @torch.no_grad()
    def apply(self, rotations: list) -> None:
        """Rotate by given orthogonal Q (r, r), one for each pair, in the order of `names`; Qᵀ rotates back.

        Raises ValueError, and moves nothing, if one is not orthogonal or the optimizer remembers what is not known.
        """
        self._check()
        if len(rotations) != len(self._pairs):
            raise ValueError(f"rotations must be {len(self._pairs)}, one for each pair, got {len(rotations)}")
        for pair, Q in zip(self._pairs, rotations):
            eye = torch.eye(len(pair.A), dtype=pair.A.dtype, device=pair.A.device)
            if Q.shape != eye.shape or not (Q @ Q.mT - eye).abs().max() <= len(eye) * 50 * torch.finfo(Q.dtype).eps:
                raise ValueError(f"rotations: that of {pair.name} is not an orthogonal {len(eye)} × {len(eye)} matrix")
        states = [[self._memory(pair.name, p) for p in (pair.A, pair.B)] for pair in self._pairs]
        for k, (pair, Q) in enumerate(zip(self._pairs, rotations)):
            self._covariances[k] = Q @ self._covariances[k] @ Q.mT
            for parameter, (gradients, squares), move in zip((pair.A, pair.B), states[k], (_rows, _columns)):
                averages = [copy[self._names[parameter]] for copy in self._averages]
                for x in (parameter, *averages, *gradients, *([] if parameter.grad is None else [parameter.grad])):
                    x.copy_(move(x, Q))
                for x in squares:
                    x.copy_(move(x, Q.square()))

    def _memory(self, name: str, parameter: nn.Parameter) -> tuple[list[Tensor], list[Tensor]]:
        """What the optimizers remember of a parameter: tensors that rotate as gradients do, and as their squares do."""
        like_gradients, like_squares = [], []
        for optimizer in self._optimizers:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if all(torch.is_tensor(x) and x.ndim == 0 for x in tree_leaves(value)):
                    continue
                kind = kind_of(key, state)
                if kind not in ("gradients", "weights", "squares") or value.shape != parameter.shape:
                    raise ValueError(f"optimizer: how {key} of {name} rotates is not known")
                (like_squares if kind == "squares" else like_gradients).append(value)
        return like_gradients, like_squares

    def _check(self) -> None:
        for pair in self._pairs:
            now = [getattr(_linear(self.model, name), "weight", None) for name in pair.modules]
            if now[0] is not pair.A or now[1] is not pair.B:
                raise RuntimeError(f"{pair.name} changed since: make a new LowRankRotation")

    def __repr__(self) -> str:
        """The pairs with their ranks, and what is left alone, with why."""
        lines = [f"  {pair.name}: rank {len(pair.A)}" for pair in self._pairs]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        return "LowRankRotation(\n" + "\n".join(lines) + "\n)"


def gradient_eigenbasis(covariance: Tensor) -> Tensor:
    """The orthogonal Q (r, r) whose rows are the eigenvectors of a covariance, the largest eigenvalue first."""
    return torch.linalg.eigh(covariance)[1].mT.flip(-2)


def _rows(x: Tensor, Q: Tensor) -> Tensor:
    return Q @ x


def _columns(x: Tensor, Q: Tensor) -> Tensor:
    return x @ Q.mT


def _lora(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """(name, name of A, name of B) of every adapter of every LoRA layer."""
    for name, module in model.named_modules():
        first, second = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(first, nn.ModuleDict) and isinstance(second, nn.ModuleDict):
            for adapter in first:
                if adapter in second:
                    yield tuple(f"{name}.{part}{adapter}".lstrip(".") for part in ("", "lora_A.", "lora_B."))


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"pairs: the model has no module {name!r}") from None


def _obstacle(first: nn.Module, second: nn.Module, uses: Sequence[int]) -> str | None:
    """Why this pair cannot be rotated; None if it can. Raises ValueError for half precision."""
    if type(first) is not nn.Linear or type(second) is not nn.Linear:
        return f"{type(first).__name__}, {type(second).__name__}: only nn.Linear is supported"
    if parametrize.is_parametrized(first) or parametrize.is_parametrized(second):
        return "its weights are computed from others"
    A, B = first.weight, second.weight
    if any(module._forward_hooks or module._forward_pre_hooks for module in (first, second)):
        return "hooks see what passes between its factors"
    if first.bias is not None:
        return "A has a bias"
    if len(A) != B.shape[1]:
        return f"A writes {len(A)} features, B reads {B.shape[1]}"
    if not (A.requires_grad and B.requires_grad):
        return "a factor is frozen"
    if uses.count(id(A)) > 1 or uses.count(id(B)) > 1:
        return "a factor is shared with another module"
    if A.dtype != B.dtype or A.device != B.device:
        return "its factors differ in dtype or device"
    if A.dtype.itemsize < 4:
        raise ValueError(f"model: {A.dtype} is too coarse to rotate exactly: keep the factors in float32")
    return None
