"""Permutations of hidden units: moved with all that belongs to a unit, measured, and taken back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_leaves

from teleporter.passes import evaluating, undone_on_error
from teleporter.state import Tensors, _act_lbfgs, _each, _plain, _sparse_moved, checked, copies
from teleporter.units import Chains, PermutationSymmetry, followed
from teleporter.verify import (
    difference,
    fingerprint,
    nothing_found,
    outputs_of,
    precision,
    refuted,
    relative_change,
)

_FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError)
_ROUNDING = 4096  # times ε, of the outputs: what another order of sums may do, 1e-12 in float64


class Permutations:
    """What a Teleporter of symmetries "permutation" hands over to; options as there.

    They hold for any activation, and for any optimizer that treats the numbers of a parameter alike, or its rows: each
    tensor of the parameter's shape in its state is permuted with it, as are means along a dimension (Adafactor). Any
    other tensor is an error unless on_unknown_state is "keep" or "reset". Frozen parameters, and buffers that are not
    saved, stay, and so does what they meet.

    Attributes: symmetries, a list of PermutationSymmetry; left_alone, {writers: why their units stay}.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any = None,
        optimizer: optim.Optimizer | Sequence[optim.Optimizer] | None = None,
        averaged: nn.Module | Tensors | Sequence | None = None,
        on_unknown_state: str | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        """Find them; with inputs, of real runs, and try them. Raises ValueError if there is none."""
        self.model, self.inputs, self.optimizer, self.averaged = model, inputs, optimizer, averaged
        self.on_unknown_state, self.tolerance = on_unknown_state, tolerance
        self.symmetries, self.left_alone, self.moves, self.verified, self.epsilon = [], {}, [], False, 0.0
        self.fingerprint = self._fingerprint()
        found, failed = [], {}
        if inputs is not None:
            try:
                found, self.epsilon = followed(model, inputs)
            except _FAILURES as error:
                failed = {"trace of the inputs": f"{type(error).__name__}: {error}"}
        for symmetry, _, reason in (
            Chains(model, inputs is not None).candidates() if inputs is None or failed else found
        ):
            if reason is None:
                self.symmetries.append(symmetry)
            else:
                self.left_alone[symmetry.name] = reason
        self.left_alone |= failed
        if not self.symmetries:
            raise nothing_found(self.left_alone, inputs)
        self._followers()
        self._verify(inputs)

    def permute(
        self, orders: Mapping[str, Tensor] | None = None, inputs: Any = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """As of Teleporter.permute."""
        inputs = self.inputs if inputs is None else inputs
        chosen = self._orders(orders, generator)  # before the trial, which may leave some alone
        self._verify(inputs)
        left = [name for name in chosen if name in self.left_alone]
        if left and orders is not None:
            raise RuntimeError(f"{left[0]} changed the output when tried, nothing was moved")
        moves = [(s, chosen[s.name]) for s in self.symmetries if s.name in chosen]
        self._followers()
        with undone_on_error(self._tensors()):
            before = self._output(inputs)
            self._act(self._tensors(), moves)
            after = self._output(inputs)
            change, allowed = relative_change(before, after), self._allowed(before)
            if change > allowed:
                raise RuntimeError(f"permuting changed the output by {change:.2g} of its size and was undone")
        self._carry(moves)
        self.moves.append(moves)
        return {s.name: order for s, order in moves}

    def undo(self) -> None:
        """Take all permutations back, the latest first, bit for bit; what was trained in between stays."""
        self._verify(None)
        self._followers()
        while self.moves:
            back = [(s, -order) for s, order in reversed(self.moves.pop())]
            self._act(self._tensors(), back)
            self._carry(back)

    def __getstate__(self) -> dict[str, Any]:
        """Without the fingerprint, which knows modules by identity."""
        return vars(self) | {"fingerprint": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With the copy's own."""
        vars(self).update(state)
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> dict[str, Any]:
        """As of the model, but for its mode: both were followed."""
        return {what: value for what, value in fingerprint(self.model).items() if not what.startswith("training mode")}

    def _tensors(self) -> dict[str, Tensor]:
        """{name: parameter or buffer that moves}."""
        tensors = dict(self.model.named_buffers()) | dict(self.model.named_parameters())
        known = {s.name: s for s in self.symmetries} | {s.name: s for moves in self.moves for s, _ in moves}
        return {slot.name: tensors[slot.name] for s in known.values() for slot in s.slots}

    def _moving(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._tensors().items() if isinstance(x, nn.Parameter)}

    def _orders(self, orders: Mapping[str, Tensor] | None, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Orders that fit. Raises ValueError for others."""
        widths = {s.name: s.shape[0] for s in self.symmetries}
        if orders is None:
            device = "cpu" if generator is None else generator.device
            return {name: torch.randperm(n, generator=generator, device=device).cpu() for name, n in widths.items()}
        chosen = {}
        for name, order in orders.items():
            if name not in widths:
                raise ValueError(f"orders: {name!r} is none of the symmetries {list(widths)}")
            n, order = widths[name], torch.as_tensor(order, device="cpu")
            if order.shape != (n,) or order.is_floating_point() or order.sort()[0].tolist() != list(range(n)):
                raise ValueError(f"orders: that of {name!r} must hold each of 0 … {n - 1} once")
            chosen[name] = order.long()
        return chosen

    def _verify(self, inputs: Any) -> None:
        """Check that nothing changed since the model was searched and, once, try every symmetry on these inputs."""
        change = difference(self.fingerprint, self._fingerprint())
        if change is not None:
            raise RuntimeError(f"{change}: make a new Teleporter")
        if self.verified or inputs is None:
            return
        with evaluating(self.model):
            wrong = refuted(self.model, self._tensors(), self.symmetries, inputs)
        self.left_alone |= wrong
        self.symmetries[:] = [s for s in self.symmetries if s.name not in wrong]
        self.verified = True
        if not self.symmetries:
            raise RuntimeError(
                f"every symmetry found changed the output when tried, which was undone: {self.left_alone}"
            )

    def _output(self, inputs: Any) -> list[Tensor]:
        with evaluating(self.model):
            return outputs_of(self.model, inputs)

    def _allowed(self, outputs: Sequence[Tensor]) -> float:
        """The relative change of the output that another order of sums may make."""
        epsilon = max(self.epsilon, precision([*self._tensors().values(), *outputs]))
        return min(_ROUNDING * epsilon, max(self.tolerance, 16 * epsilon))

    def _followers(self) -> tuple[list[optim.Optimizer], list[dict[str, Tensor]]]:
        """Optimizers and averaged copies. Raises ValueError if one of them cannot follow."""
        moving = self._moving()
        optimizers = checked(self.optimizer, moving)
        for o, _, name, p, state in _each(moving, optimizers):
            for key, value in state.items():
                if _odd(value, p) and self.on_unknown_state is None:
                    raise ValueError(
                        f"optimizer {type(o).__name__} keeps {key!r} of {name}, which is not of its shape: "
                        'on_unknown_state="keep" leaves it as it is, "reset" sets it to zero'
                    )
        return optimizers, copies(self.averaged, moving)

    @torch.no_grad()
    def _act(self, tensors: Mapping[str, Tensor], moves: Sequence[tuple[PermutationSymmetry, Tensor]]) -> None:
        for s, T in moves:
            s.act_(tensors, T)
        torch.clear_autocast_cache()  # of what the caller casts next

    @torch.no_grad()
    def _carry(self, moves: Sequence[tuple[PermutationSymmetry, Tensor]]) -> None:
        """Move gradients, what optimizers remember and averaged copies after the parameters."""
        moving, (optimizers, averages) = self._moving(), self._followers()

        def act(tensors: Mapping[str, Tensor], like: str = "weights") -> None:
            self._act(tensors, moves)

        for name, p in moving.items():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = _sparse_moved(p.grad, lambda dense, name=name: act({name: dense}))
            elif p.grad is not None:
                act({name: p.grad})
        for copy, tensors in zip(_listed(self.averaged), averages):
            act(self._buffers_of(copy) | tensors)
        for _, _, name, p, state in _each(moving, optimizers):
            for value in state.values():
                if not _odd(value, p):
                    act({name: value} if isinstance(value, Tensor) and value.ndim == p.ndim else {})
                elif self.on_unknown_state == "reset":
                    [t.zero_() for t in tree_leaves(value) if isinstance(t, Tensor)]
        for o in optimizers:
            if isinstance(o, optim.LBFGS):
                _act_lbfgs(o, {id(p): name for name, p in moving.items()}, act)

    def _buffers_of(self, copy: nn.Module | Tensors) -> dict[str, Tensor]:
        """{name: buffer that moves} of an averaged copy, of those that it has."""
        buffers = dict(copy.named_buffers()) if isinstance(copy, nn.Module) else copy
        buffers = {_plain(name): x for name, x in buffers.items()}
        own = {name: x for name, x in self._tensors().items() if not isinstance(x, nn.Parameter)}
        return {name: buffers[name] for name, x in own.items() if getattr(buffers.get(name), "shape", None) == x.shape}


def _listed(averaged: nn.Module | Tensors | Sequence | None) -> list[nn.Module | Tensors]:
    return [] if averaged is None else list(averaged) if isinstance(averaged, list | tuple) else [averaged]


def _odd(value: Any, p: Tensor) -> bool:
    """Whether something in an optimizer's state is neither a number, nor of p's shape or of means along some of it."""
    if isinstance(value, Tensor) and value.ndim == p.ndim and all(m in (1, n) for m, n in zip(value.shape, p.shape)):
        return False
    return any(isinstance(t, Tensor) and t.numel() > 1 for t in tree_leaves(value))
