"""Which channels of a forward pass may turn in pairs: rotary positions, followed number by number to the product q·k.

What a Linear writes is followed as a sum of at most two of its channels with known coefficients, through what moves
numbers about, constants, signs and one sum. Where two such tensors meet in a product of matrices, and each pair of
entries is its pair of channels times [[u, −v], [v, u]], whatever commutes with that may act on the pair. Any other use
of a channel is noted, and it turns no more.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from teleporter.classes import FIXED, Classes, met, shrunk
from teleporter.symmetry import Rows

_OPTIONS = {"alpha", "dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}


class Sum(NamedTuple):
    """c1 · channel base1 + c2 · channel base2, number by number; base 0: none. pure: no constant tensor so far."""

    base1: Tensor
    base2: Tensor
    c1: Tensor
    c2: Tensor
    pure: bool


class Turns:
    """Follows the sums; partner: {label: (label that it turns with, 0 if it is the first, else 1)}."""

    def __init__(self, tracer: Any) -> None:
        """Nothing has run yet."""
        self.tracer, self.sums = tracer, WeakTensorKeyDictionary()
        self.partner, self.twins, self.loose = {}, {}, set()  # twins: {label of a bias: label of its channel}

    def follow(self, name: str, moves: bool, args: tuple, kwargs: dict, outputs: Sequence[Tensor], move: Any) -> None:
        """After the labels of an operation: what it does to sums. move(args): what it does to integers."""
        mine = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x in self.sums]
        if name in ("mm", "addmm", "bmm", "baddbmm") and args[-1] in self.tracer.tags:
            self.loosen(mine)
            self.start(args, outputs[0])
        elif mine:
            handler = getattr(self, f"op_{name}", self.unknown) if set(kwargs) <= _OPTIONS else self.unknown
            sums = self.moved(args, move) if moves else handler(*args, **kwargs)
            if sums is None:
                self.loosen(mine)
            for x, found in zip(outputs, sums or ()):
                self.sums[x] = found

    def loosen(self, tensors: Sequence[Tensor]) -> None:
        """The channels in these tensors turn no more."""
        for x in tensors:
            for base in self.sums[x][:2]:
                self.loose.update(torch.unique(*shrunk(base)).tolist())

    def start(self, args: tuple, output: Tensor) -> None:
        """What a parameter's matrix writes: its own channels; a bias belongs to them."""
        if output not in self.tracer.labels:
            return
        labels = self.tracer.labels[output][..., :1, :].expand(output.shape)  # all rows alike
        one = torch.ones((), dtype=torch.float64, device=labels.device).expand(labels.shape)
        self.sums[output] = Sum(labels, torch.zeros_like(one, dtype=torch.long), one, 0 * one, True)
        if len(args) == 3 and args[0] in self.tracer.tags:
            self.bias(labels, args[0])

    def bias(self, labels: Tensor, bias: Tensor) -> None:
        """Note what a bias is added to."""
        for label, own in met(labels, self.tracer.of(bias).expand(labels.shape)):
            if self.twins.setdefault(own, label) != label:  # one number for several channels
                self.loose |= {label, self.twins[own]}

    def unknown(self, *args: Any, **kwargs: Any) -> None:
        """All that has no method here."""

    def moved(self, args: tuple, move: Any) -> list[Sum] | None:
        """What is moved about, if there is nothing else among it."""
        floats = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        if not all(x in self.sums for x in floats):
            return None

        def part(i: int) -> list[Tensor]:
            def of(x: Any) -> Any:
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    return x
                return self.sums[x][i] if x in self.sums else x.to(self.sums[floats[0]][i].dtype)  # an empty cache

            return move(tree_map(of, list(args)))

        pure = all(self.sums[x].pure for x in floats)
        return [Sum(*parts, pure) for parts in zip(*map(part, range(4)))]

    def op_neg(self, x: Tensor) -> list[Sum]:
        """The other sign."""
        s = self.sums[x]
        return [s._replace(c1=-s.c1, c2=-s.c2)]

    def op__to_copy(self, x: Tensor, **kwargs: Any) -> list[Sum] | None:
        """Another dtype or device."""
        return [self.sums[x]] if kwargs.get("dtype", torch.float32).is_floating_point else None

    def op_mul(self, a: Any, b: Any, divide: bool = False) -> list[Sum] | None:
        """Times a constant."""
        if not divide and isinstance(b, Tensor) and b in self.sums:
            a, b = b, a
        if a not in self.sums or self.tracer.known(b):
            return None
        s = self.sums[a]
        b = torch.as_tensor(b, dtype=torch.float64, device=s.c1.device)
        b = 1 / b if divide else b
        base1, base2, c1 = torch.broadcast_tensors(s.base1, s.base2, s.c1 * b)
        return [Sum(base1, base2, c1, s.c2 * b, s.pure and b.numel() == 1)]

    def op_div(self, a: Any, b: Any, **kwargs: Any) -> list[Sum] | None:
        """Over a constant."""
        return None if kwargs else self.op_mul(a, b, divide=True)

    def op_add(self, a: Any, b: Any, alpha: float = 1) -> list[Sum] | None:
        """A bias, or two multiples of channels."""
        if isinstance(a, Tensor) and a in self.tracer.tags:
            a, b = b, a
        if alpha == 1 and isinstance(b, Tensor) and b in self.tracer.tags and a in self.sums and self.sums[a].pure:
            self.bias(self.sums[a].base1, b)
            return [self.sums[a]]
        if alpha not in (1, -1) or not all(isinstance(x, Tensor) and x in self.sums for x in (a, b)):
            return None
        s, t = self.sums[a], self.sums[b]
        if a.shape != b.shape or s.pure and t.pure or bool(s.base2.any()) or bool(t.base2.any()):
            return None
        return [Sum(s.base1, t.base1, s.c1, alpha * t.c1, False)]

    def op_sub(self, a: Any, b: Any, alpha: float = 1) -> list[Sum] | None:
        """The same with the other sign."""
        tagged = any(isinstance(x, Tensor) and x in self.tracer.tags for x in (a, b))
        return None if tagged else self.op_add(a, b, -alpha)

    def op_bmm(self, a: Tensor, b: Tensor) -> list[Sum] | None:
        """Queries meet keys: note who turns with whom."""
        if a not in self.sums or b not in self.sums:
            return None
        found = [paired(self.sums[a]), paired(Sum(*(x.mT for x in self.sums[b][:4]), self.sums[b].pure))]
        if None in found or not torch.equal(found[0][0], found[1][0]):
            return None
        for _, pairs in found:
            for first, second in pairs:
                for label, known in ((first, (second, 0)), (second, (first, 1))):
                    if self.partner.setdefault(label, known) != known:
                        self.loose |= {first, second}
        return []

    def turning(self, classes: Classes) -> set[int]:
        """The classes of which every label turns."""
        stay, roots = set(), set()
        if not self.partner:
            return roots
        self.loosen_shared()
        for label in range(FIXED + 1, len(classes.parent)):
            root, channel = classes.find(label)[0], self.twins.get(label, label)
            roots.add(root)
            if channel not in self.partner or {channel, self.partner[channel][0]} & self.loose:
                stay.add(root)
        return roots - stay - {FIXED}

    def loosen_shared(self) -> None:
        """A parameter that writes several channels, or in several places, could turn differently in each."""
        for name, uses in self.tracer.uses.items():
            whole = torch.zeros(self.tracer.parameters[name].numel(), dtype=torch.long)
            for index, labels, _ in uses:
                index, labels = index.cpu(), labels.cpu()
                whole[index] = torch.where(whole[index] == 0, labels, whole[index])
                for pair in met(whole[index], labels):
                    self.loose.update(self.twins.get(label, label) for label in pair)

    def slot(self, classes: Classes, name: str, reads: bool, labels: Tensor, groups: Mapping[int, int]) -> Rows | None:
        """Rows of a parameter that turn, {class: number of its group}; None if they stand otherwise.

        labels: of what the parameter writes, compressed.
        """
        along = [d for d in range(labels.ndim) if labels.shape[d] > 1]
        firsts, seconds = [[] for _ in groups], {}
        for i, label in enumerate(labels.flatten().tolist()):
            root, sign = classes.find(label)
            if root in groups and (sign < 0) == reads:
                channel = self.twins.get(label, label)
                other, role = self.partner[channel]
                if role:
                    seconds[channel] = i
                else:
                    firsts[groups[root]].append((i, other))
        complete = all(other in seconds for group in firsts for _, other in group)
        if len(along) != 1 or not complete or len({len(group) for group in firsts}) != 1 or not firsts[0]:
            return None
        table = [[[i for i, _ in group], [seconds[other] for _, other in group]] for group in firsts]
        return Rows(name, reads, along[0], torch.tensor(table, device="cpu"))


def paired(s: Sum) -> tuple[Tensor, list[list[int]]] | None:
    """(index of each entry's partner, (batch, k); [first, second label] of the pairs) of the rows of s (batch, m, k).

    An entry that is no sum is its own partner. None if something in s is no rotation of pairs.
    """
    if not all(torch.equal(base, base[:, :1].expand(base.shape)) for base in s[:2]) or not bool(s.c2.any()):
        return None
    p, q = s.base1[:, 0], s.base2[:, 0]
    own = torch.diag_embed(q == 0)
    match = (p[:, :, None] == q[:, None, :]) & (q[:, :, None] == p[:, None, :]) | own
    if not bool((match.sum(2) == 1).all()):
        return None
    index = match.to(torch.uint8).argmax(2)
    there = index[:, None].expand(s.c1.shape)
    c1, c2 = s.c1.gather(2, there), s.c2.gather(2, there)
    turned = (q != 0)[:, None]
    if bool(((c1 == s.c1) & (c2 == -s.c2) | ~turned).all()):
        first, second = p, q
    elif bool(((c1 == -s.c1) & (c2 == s.c2) | ~turned).all()):
        first, second = q, p
    else:
        return None
    leads = (index > torch.arange(index.shape[1], device=index.device)) & (q != 0)
    return index, torch.stack([first[leads], second[leads]], 1).unique(dim=0).tolist()
