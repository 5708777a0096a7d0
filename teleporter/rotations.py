"""Rotations: what commutes with rotary positions on queries and keys, and O(d) on the residual stream of RMSNorms."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teleporter.layers import columns, rows
from teleporter.passes import kept_attributes
from teleporter.symmetry import Candidate, Rows, Slot, Symmetry

_SPREAD = 1e3  # of a norm's gains, which a rotation of the stream divides by
_BLOCK = {"half": lambda d: torch.arange(d).view(2, -1).T, "interleaved": lambda d: torch.arange(d).view(-1, 2)}


class Rotary(NamedTuple):
    """Queries and keys with rotary positions added by hand: names of Linear modules; q = k names a fused projection.

    Features are ordered (heads, d_head). layout: which entries of a head rotate together, "half" (i, i + d_head/2) as
    in Llama, or "interleaved" (2i, 2i + 1). All of a head rotates; nothing else acts on queries or keys alone (no
    normalization). A fused projection holds queries, keys, values, in this order. kv_heads as of Attention.
    """

    q: str
    k: str
    heads: int
    kv_heads: int | None = None
    layout: str = "half"


class Stream(NamedTuple):
    """A residual stream added by hand: writers, names of Linear and Embedding; readers, {norm: names of Linear}.

    Whatever reads the stream does so through an RMSNorm, with or without gains; "" stands for none. Stream(["embed",
    "out", "down"], {"norm1": ["q", "k", "v"], "norm2": ["gate", "up"], "norm": ["head"]}). All writers and readers must
    be named. A tied embedding is both; the gains that it is read through must be equal.
    """

    writers: str | list
    readers: dict


class RotarySymmetry(Symmetry):
    """Scaled rotations, T = [[log a, −θ], [θ, log a]] for each pair of a head: queries a R(θ), keys R(θ) / a."""

    __slots__ = ()

    @property
    def dimension(self) -> int:
        """A scale and an angle a group."""
        return 2 * self.shape[0]

    def tangent(self, D: Tensor) -> Tensor:
        """The nearest scale and angle."""
        quarter = D.new_tensor([[0.0, -1.0], [1.0, 0.0]])
        return (D - quarter @ D @ quarter) / 2

    def steepest(self, D: Tensor) -> Tensor:
        """The tangent with log(a)² + θ² = 1 (or 0) in each group that maximizes ⟨D, T⟩."""
        T = self.tangent(D)
        return T / T[:, :, :1].norm(dim=1, keepdim=True).clamp_min(torch.finfo(T.dtype).tiny)


class StreamSymmetry(Symmetry):
    """Orthogonal Q = exp(T), T antisymmetric. Gains γ stay: what reads through them moves by γ Qᵀ γ^-1."""

    __slots__ = ()

    @property
    def dimension(self) -> int:
        """That of O(d)."""
        return self.shape[1] * (self.shape[1] - 1) // 2

    def tangent(self, D: Tensor) -> Tensor:
        """The antisymmetric part."""
        return (D - D.mT) / 2

    def steepest(self, D: Tensor) -> Tensor:
        """The direction of D's antisymmetric part, its largest angle 1 (or 0)."""
        T = self.tangent(D)
        return T / torch.linalg.matrix_norm(T, ord=2, keepdim=True) if T.any() else T

    def norm_derivative(self, covectors: dict, vectors: dict) -> Tensor:
        """None: with gains of one a rotation changes no norm, and with others such objectives leave it alone too."""
        return torch.zeros(self.shape, dtype=torch.float64, device="cpu")

    def derivative(self, covectors: dict, vectors: dict) -> Tensor:
        """As of any symmetry; 0 where it is rounding, as of whatever depends on norms alone."""
        D, scale = super().derivative(covectors, vectors), 0.0
        for slot in self.slots:
            c, x = covectors[slot.name].detach(), vectors[slot.name].detach()
            scale += 100 * torch.finfo(x.dtype).eps * (c.double().norm() * x.double().norm()).item()
        return torch.where(self.tangent(D).norm() > scale, D, (D + D.mT) / 2)

    def factors(self, slot: Any, M: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Q, or its conjugates by the gains that a reader has before it."""
        gain = getattr(slot, "gain", None)
        if gain is None:
            return M, M
        gain = gain.detach().to(M)
        return M / gain[:, None] * gain, M * gain[:, None] / gain

    def check(self) -> None:
        """Raises ValueError for gains that cannot be divided by, or that are not alike before a tied reader."""
        for slot in self.slots:
            reason = uneven(slot.gain, isinstance(slot, Tied)) if isinstance(slot, Through | Tied) else None
            if reason:
                raise ValueError(f"{self.name} cannot move now: {slot.name} is read through gains that {reason}")

    def regain(self, parameters: Mapping[str, Tensor]) -> None:
        """Give trained gains the gradients that belong to the readers': γ ∂L/∂γ = Σ W ∂L/∂W, channel by channel."""
        found, skipped = {}, {id(slot.gain) for slot in self.slots if isinstance(slot, Tied)}
        for slot in self.slots:
            gain, p = getattr(slot, "gain", None), parameters[slot.name]
            if gain is not None and gain.grad is not None:
                skipped |= {id(gain)} if p.grad is None else set()
                product = None if p.grad is None else slot.view.product(p.grad, p.detach(), True)[0].diagonal()
                found.setdefault(id(gain), (gain, []))[1].append(product)
        for gain, products in (pair for key, pair in found.items() if key not in skipped):
            gain.grad.copy_(sum(products) / gain.detach())


class Through(NamedTuple):
    """A slot that reads a space through gains; the interface is that of Slot."""

    name: str
    reads: bool
    view: Slot | Rows
    gain: Tensor  # the model's own parameter

    def act_(self, tensor: Tensor, M: Tensor) -> None:
        """Multiply by M, which knows the gains."""
        self.view.act_(tensor, M)

    def product(self, c: Tensor, x: Tensor, matrices: bool) -> Tensor:
        """Σ (γ c) (x/γ)ᵀ over all but the space: the derivative along γ^-1 exp(−T)ᵀ γ."""
        product = self.view.product(c, x, matrices)
        gain = self.gain.detach().to(product)
        return product * gain[:, None] / gain


class Tied(NamedTuple):
    """A reader that is a writer as well, and moves as such, through gains that must be alike."""

    name: str
    reads: bool
    view: Slot | Rows
    gain: Tensor | None

    def act_(self, tensor: Tensor, M: Tensor) -> None:
        """The writer's slot does it."""

    def product(self, c: Tensor, x: Tensor, matrices: bool) -> Tensor:
        """The writer's slot has it all."""
        return torch.zeros_like(self.view.product(c, x, matrices))


def uneven(gain: Tensor | None, tied: bool) -> str | None:
    """What forbids a rotation before these gains; None if nothing does."""
    if gain is None or gain.is_meta:
        return None
    sizes = gain.detach().double().abs()
    if tied and not bool((gain == gain[0]).all()):
        return "are not alike, and it writes what it reads (tied)"
    if not bool(gain.isfinite().all()) or sizes.min() * _SPREAD < sizes.max() or not sizes.max():
        return f"are not finite, or spread over more than a factor {_SPREAD:g}"
    return None


def still_gains(symmetries: Sequence[Symmetry]) -> set[int]:
    """ids of the gains that must be alike, whatever else a trial disturbs."""
    return {id(slot.gain) for s in symmetries for slot in s.slots if isinstance(slot, Tied)}


def trained_gains(symmetries: Sequence[Symmetry]) -> set[int]:
    """ids of the gains that symmetries move nothing of, and that training moves."""
    gains = [getattr(slot, "gain", None) for s in symmetries for slot in s.slots]
    return {id(gain) for gain in gains if gain is not None and gain.requires_grad}


def by_hand(finder: Any, items: Sequence) -> Iterator[Candidate]:
    """Candidates of the Rotary and the Stream among these items. Raises ValueError for what does not fit."""
    for item in items:
        if isinstance(item, Rotary):
            yield rotary(finder, item)
        elif isinstance(item, Stream):
            yield stream(finder, item)


def rotary(finder: Any, r: Rotary) -> Candidate:
    """The scaled rotations of a Rotary."""
    kv, fused = r.kv_heads or r.heads, r.q == r.k
    for name in (r.q, r.k):
        if type(finder.module(name)) is not nn.Linear:
            raise ValueError(f"{name} is not a Linear: Rotary joins plain projections")
    widths = [finder.modules[name].out_features for name in (r.q, r.k)]
    d, rest = divmod(widths[1], r.heads + 2 * kv if fused else kv)
    if rest or d % 2 or r.heads % kv or not fused and widths[0] != r.heads * d or r.layout not in _BLOCK:
        raise ValueError(f"{r}: the widths of these projections do not fit its heads, or there is no such layout")
    slots = []
    for name, heads, start, reads in ((r.q, r.heads, 0, False), (r.k, kv, r.heads * d if fused else 0, True)):
        table = start + d * torch.arange(heads).view(kv, -1, 1, 1) + _BLOCK[r.layout](d)
        table = table.permute(0, 2, 3, 1).flatten(0, 1)  # (kv heads, sharing, pairs, 2) -> (groups, 2, sharing)
        found = finder.slots(name, [("weight", rows), ("bias", rows)], reads)
        slots += [Rows(slot.name, reads, 0, table) for slot in found]
    return RotarySymmetry(f"{r.q}, {r.k}: rotary", "rotary", (kv * d // 2, 2, 2), tuple(slots)), (r.q, r.k), None


def stream(finder: Any, s: Stream) -> Candidate:
    """The rotations of a Stream."""
    writers = [s.writers] if isinstance(s.writers, str) else list(s.writers)
    readers = [(n, norm) for norm, names in s.readers.items() for n in ([names] if isinstance(names, str) else names)]
    slots, tied, modules = [], set(), [*writers, *(n for n, _ in readers)]
    for name in writers:
        kind = type(finder.module(name))
        if kind is not nn.Linear and (kind is not nn.Embedding or finder.modules[name].max_norm is not None):
            raise ValueError(f"{name} is neither a Linear nor an Embedding: Stream joins plain writers")
        table = [("weight", rows), ("bias", rows)] if kind is nn.Linear else [("weight", columns())]
        slots += finder.slots(name, table, False)
        tied |= {slot.name for slot in slots[-1:] if kind is nn.Embedding}
    for name, norm in readers:
        if type(finder.module(name)) is not nn.Linear:
            raise ValueError(f"{name} is not a Linear: Stream joins plain readers")
        gain = gains(finder.module(norm), norm, finder.modules[name].in_features) if norm else None
        for slot in finder.slots(name, [("weight", columns())], True):
            slots.append(Tied(*slot[:2], slot, gain) if slot.name in tied else Through(*slot[:2], slot, gain))
    sizes = {slot.view(finder.parameters[slot.name]).shape[1] for slot in slots if isinstance(slot, Slot)}
    if len(sizes) != 1 or not readers:
        raise ValueError(f"{s}: no readers, or the widths of what it writes and reads do not fit")
    return joined(finder, f"{', '.join(writers)}: stream", sizes.pop(), slots, modules)


def joined(finder: Any, name: str, size: int, slots: Sequence, modules: Sequence[str]) -> Candidate:
    """The candidate of these slots, with the reason if something forbids it."""
    tied, counts = {slot.name for slot in slots if isinstance(slot, Tied)}, Counter(slot.name for slot in slots)
    reason = finder.obstacle([slot for slot in slots if slot.name not in tied], modules)
    for slot in slots:
        p = finder.parameters.get(slot.name)
        if slot.name in tied and reason is None:
            shared = finder.uses[id(p)] > counts[slot.name] and f"{slot.name} is shared with what is not in the stream"
            reason = shared or (None if p.requires_grad else f"{slot.name} is frozen")
        why = uneven(slot.gain, slot.name in tied) if isinstance(slot, Through | Tied) else None
        reason = reason or why and f"{slot.name} is read through gains that {why}"
    return StreamSymmetry(name, "stream", (1, size, size), tuple(slots)), None, reason


def gains(norm: nn.Module, name: str, size: int) -> Tensor | None:
    """The gains of an RMSNorm, told by what it does to numbers. Raises ValueError if it is none."""
    gain = getattr(norm, "weight", None)
    like = gain if isinstance(gain, Tensor) else torch.empty((), dtype=torch.get_default_dtype())
    x = 100 * torch.randn(3, size, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        with torch.no_grad(), kept_attributes(norm):
            y = norm(x).double()
        known = x.double() * (1 if gain is None else gain.detach().double())
        scale = (y * known).sum(1, keepdim=True) / known.square().sum(1, keepdim=True)
        levels = scale * x.double().square().mean(1, keepdim=True).sqrt()
        off = max((y - scale * known).norm() / y.norm(), levels.std() / levels.mean().abs())
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no RMSNorm: {error}") from error
    if not off <= 1e-5 + 16 * torch.finfo(x.dtype).eps:
        raise ValueError(f"{name} is no RMSNorm whose weight are its gains: only those let the stream rotate")
    return gain
