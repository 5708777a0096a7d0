"""The moves of a Teleporter: what was moved so far, how far the next may go, and the way back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from teleporter.passes import undone_on_error
from teleporter.symmetry import Symmetry, move_
from teleporter.verify import precision


class Moves:
    """The half of the Teleporter that remembers."""

    def permute(
        self,
        orders: Mapping[str, Tensor] | None = None,
        inputs: Any = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Permute hidden units, of a Teleporter of symmetries "permutation": unit i becomes what unit order[i] was.

        orders: {name of the symmetry: LongTensor (width,)}, others stay; default: a random order of each, from the
        generator. inputs: as of `step`, default those of the constructor. With inputs the symmetries are tried before
        the first move, and the outputs compared at each, in evaluation mode. All that has units moves: parameters,
        .grad, what the optimizer remembers, averaged copies, buffers. The function is the same in evaluation mode, up
        to the order of sums; in training mode dropout meets other units, with the same distribution.

        Returns the orders. Raises ValueError for a name that is no symmetry, and for what is no order of its width;
        RuntimeError (all restored) for outputs that moved, and for a model that changed since.
        """
        if self.permutations is None:
            raise ValueError('permute needs symmetries "permutation"')
        return self.permutations.permute(orders, inputs, generator)

    def _refuse_rotations(self) -> None:
        if self.low_rank is not None:
            raise ValueError("a rotation has no tangents and is not undone: see Teleporter.low_rank.apply")

    def _refuse_permutations(self) -> None:
        if self.permutations is not None:
            raise ValueError("permutations have no tangents and no gradient to follow: use permute")

    def _remember(self, tangents: Sequence[Tensor]) -> None:
        """Move the optimizer's state after the parameters, and note the move."""
        moved = [(s, T) for s, T in zip(self.symmetries, tangents) if T.any()]
        if moved:
            self._transport(*zip(*moved))
            self.moves.append(moved)
            self.totals |= {s.name: self._total(s, T) for s, T in moved}

    def undo(self) -> None:
        """Move back to where the orbit was entered, the latest move first, keeping what was trained in between.

        Exact as every move is; bit for bit where all factors were powers of two (rescalings by `step` with the default
        bound) and nothing under- or overflows, and of permutations.
        """
        self._refuse_rotations()
        if self.permutations is not None:
            return self.permutations.undo()
        self._verify(None)
        while self.moves:
            symmetries, tangents = zip(*self.moves[-1])
            tangents = [-T for T in tangents]
            with torch.no_grad(), undone_on_error(self._moving()):
                move_(self.parameters, symmetries, tangents)
            self.moves.pop()
            self._transport(symmetries, tangents)
        self.totals = {}

    def _within_total_bound(self, tangents: Sequence[Tensor], allowed: float = math.inf) -> Sequence[Tensor]:
        """The tangents, shortened where the factor since the start would leave [1/total_bound, total_bound].

        allowed: the rounding allowed. A matrix of singular values up to k and its inverse round by about k² ε.
        """
        if self.action is not None:
            return tangents
        limit, shortened = math.log(self.total_bound), []
        rounding = math.log(allowed / (16 * (precision(self.parameters.values()) or 1.0))) / 2  # 0: no parameters
        mixing = min(limit, max(rounding, math.log(self.bound)))
        for s, T in zip(self.symmetries, tangents):
            total = self._total(s, T)
            if s.kind == "rescale":
                rest = T.sign() * limit - (total - T)  # up to the bound; not a rounding error further
                T = torch.where(total.abs() <= limit + 1e-9, T, torch.where(rest.abs() > 1e-9, rest, 0.0))
            else:
                size = torch.linalg.svdvals(total).log().abs().amax(-1)
                T = torch.where((size <= mixing + 1e-9)[:, None, None], T, 0.0)
            shortened.append(T)
        return shortened

    def _total(self, s: Symmetry, T: Tensor) -> Tensor:
        """What all moves along a symmetry make, one by T included: of rescalings the tangent, else the matrices."""
        past = self.totals.get(s.name)
        if s.kind == "rescale":
            return T if past is None else past + T
        element = T.new_ones(1, 1, 1) if s.kind == "stream" else torch.linalg.matrix_exp(T)  # a rotation's factor is 1
        return element if past is None else element @ past
