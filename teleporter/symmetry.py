"""What a symmetry is: a hidden space, the parts of parameters that write into it and read from it, and its elements."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from teleport import Activation
from teleporter.passes import full_precision


class Slot(NamedTuple):
    """A part of a parameter that writes into a hidden space (reads: False) or reads from it (reads: True)."""

    name: str  # of the parameter
    reads: bool
    view: Callable  # a tensor of the parameter's shape -> a view of it with the space in front: (groups, size, ...)

    def act_(self, tensor: Tensor, M: Tensor) -> None:
        """Multiply by M: one number for each entry, or a matrix for each group."""
        x = self.view(tensor)
        if M.ndim == 1:
            x.mul_(M.reshape(*x.shape[:2], *[1] * (x.ndim - 2)))
        else:
            x.copy_(torch.einsum("hij,hj...->hi...", M, x))

    def product(self, c: Tensor, x: Tensor, matrices: bool) -> Tensor:
        """Σ c xᵀ over all but the space: the diagonal alone, or the matrix of each group."""
        c, x = (y.reshape(*y.shape[:2], -1) for y in map(self.view, (c, x)))
        return c @ x.mT if matrices else (c * x).sum(2).flatten()


class Entries(NamedTuple):
    """A slot that is scaled number by number; the interface is that of Slot."""

    name: str
    reads: bool
    index: Tensor  # broadcasts to the parameter: which entry of the space scales this number; -1: none

    def act_(self, tensor: Tensor, M: Tensor) -> None:
        """Multiply each number by the entry of M (size,) that scales it."""
        tensor.mul_(torch.cat([M, M.new_ones(1)])[self.index.to(M.device)])

    def product(self, c: Tensor, x: Tensor, matrices: bool) -> Tensor:
        """Σ c x over the numbers that each entry scales: (entries,)."""
        index = self.index.to(x.device)
        dims = [d for d in range(x.ndim) if index.shape[d] == 1]
        products = (c * x).sum(dims, keepdim=True) if dims else c * x
        total = products.new_zeros(int(index.max()) + 2).index_add_(0, (index + 1).flatten(), products.flatten())
        return total[1:]


class Rows(NamedTuple):
    """A slot that is mixed row by row, along any dimension of the parameter; the interface is that of Slot."""

    name: str
    reads: bool
    dim: int
    table: Tensor  # (groups, size, repeats): which rows are this entry of that group

    def act_(self, tensor: Tensor, M: Tensor) -> None:
        """Multiply by M (groups, size, size)."""
        x, table = tensor.movedim(self.dim, 0), self.table.to(tensor.device)
        x[table] = torch.einsum("hij,hj...->hi...", M, x[table])

    def product(self, c: Tensor, x: Tensor, matrices: bool) -> Tensor:
        """Σ c xᵀ over all but the rows: the matrix of each group."""
        c, x = (y.movedim(self.dim, 0)[self.table.to(y.device)].flatten(2) for y in (c, x))
        return c @ x.mT


class Symmetry(NamedTuple):
    """A hidden space. Its elements are exp(T), T of this shape: (size,) for "rescale", otherwise (groups, d, d).

    Rotations (rotations.py) take only some T of that shape.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slots: tuple[Slot | Entries | Rows, ...]

    @property
    def dimension(self) -> int:
        """How many numbers a tangent has to choose."""
        return math.prod(self.shape)

    def tangent(self, D: Tensor) -> Tensor:
        """The nearest tangent: D itself, where every D of this shape is one."""
        return D

    def check(self) -> None:
        """Raises ValueError if the model's present numbers forbid a move."""

    def factors(self, slot: Slot | Entries | Rows, M: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """What the weights of a slot are multiplied by, and what gradients of them are; dual = M^-T."""
        return (dual, M) if slot.reads else (M, dual)

    def act_(self, tensors: dict, T: Tensor, like: str = "weights") -> None:
        """Move {parameter name: tensor or None} in place by exp(T), T float64 on the CPU; -T is the exact inverse.

        like: what the tensors are. "weights"; "gradients", or running means of them, which move by the inverse
        transpose; "squares", running means of squared gradients, which move by its squared entries (exact for a
        rescaling; for attention, what uncorrelated entries would do).
        """
        if self.kind == "rescale":
            M, dual = T.exp(), (-T).exp()
        else:
            M, dual = torch.linalg.matrix_exp(T), torch.linalg.matrix_exp(-T).mT
        for slot in self.slots:
            if tensors.get(slot.name) is None:
                continue
            x, factor = tensors[slot.name], self.factors(slot, M, dual)[like != "weights"]
            factor = factor**2 if like == "squares" else factor
            wide = x.float() if x.dtype.itemsize < 4 else x  # half precision rounds once, at the end
            with full_precision(x):
                slot.act_(wide, factor.to(wide))
            if wide is not x:
                x.copy_(wide)

    def derivative(self, covectors: dict, vectors: dict) -> Tensor:
        """∂/∂T at T = 0 of Σ⟨covector, vector moved by exp(T)⟩; covectors = ∂objective/∂W, vectors = W."""
        total = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
        for slot in self.slots:
            c, x = (tensors[slot.name].detach() for tensors in (covectors, vectors))
            c, x = (y.float() if y.dtype.itemsize < 4 else y for y in (c, x))
            c, x = (-x, c) if slot.reads else (c, x)
            with full_precision(x):
                found = slot.product(c, x, self.kind != "rescale").cpu()
            total[: len(found)] += found  # Entries end with the last one that they scale
        return total

    def norm_derivative(self, covectors: dict, vectors: dict) -> Tensor:
        """The same of what depends on norms alone, and knows no antisymmetric T: not even by rounding."""
        D = self.derivative(covectors, vectors)
        return D if self.kind == "rescale" else (D + D.mT) / 2

    def steepest(self, D: Tensor) -> Tensor:
        """The symmetric T with singular values up to 1 that maximizes ⟨D, T⟩: the sign of D (as a matrix).

        Antisymmetric T, rotations within a head, are left out: they change no norm.
        """
        if self.kind == "rescale":
            return D.sign()
        eigenvalues, Q = torch.linalg.eigh(D + D.mT)
        return (Q * eigenvalues.sign().unsqueeze(-2)) @ Q.mT


class HiddenAction(NamedTuple):
    """g = exp(T), T (width, width), between the Linear modules V and U, an activation in between (teleport.py)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    V: str
    activation: Activation
    U: str

    @property
    def dimension(self) -> int:
        """How many numbers a tangent has to choose."""
        return math.prod(self.shape)

    def steepest(self, D: Tensor) -> Tensor:
        """The T of Frobenius norm 1 that maximizes ⟨D, T⟩."""
        return D / D.norm().clamp_min(torch.finfo(D.dtype).tiny)


def move_(parameters: dict, symmetries: Iterable[Symmetry], tangents: Iterable[Tensor]) -> None:
    """Move {name: parameter} in place along each symmetry, if by anything. Raises ValueError for what forbids it."""
    for s, T in zip(symmetries, tangents):
        if T.any():
            s.check()
            s.act_(parameters, T)


# A symmetry, the names of the modules that it needs to itself (None: no need to check), a reason against it or None
Candidate = tuple[Symmetry | HiddenAction, tuple[str, ...] | None, str | None]


class Pair(NamedTuple):
    """A rescaling added by hand: writers share their output channels, readers take these as their input channels.

    Names of modules, one or several: Pair("fc1", "fc2"); for a residual stream Pair(["stem", "block.conv2"],
    ["block.conv1", "head"]). What lies between must be positively homogeneous channel by channel; a Linear may read a
    flattened image.
    """

    writers: str | list
    readers: str | list


class Attention(NamedTuple):
    """Plain attention projections added by hand: names of Linear modules; q = k = v names a fused projection.

    Features are ordered (heads, d_head). Nothing may act on queries or keys alone (rotary embedding, normalization).
    kv_heads < heads: grouped queries, consecutive heads sharing their keys and values.
    """

    q: str
    k: str
    v: str
    out: str
    heads: int
    kv_heads: int | None = None
