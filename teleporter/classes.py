"""Labels of channels that can only be scaled together."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ANY, FIXED = 0, 1  # labels of a zero, which every scale leaves alone, and of a number that must stay


class Classes:
    """Labels joined into classes: a union-find with signs, that remembers why a class is FIXED."""

    def __init__(self) -> None:
        """ANY and FIXED alone."""
        self.parent, self.sign, self.size, self.reason = [0, 1], [1, 1], [1, 1], {}
        self.products, self.factors = {}, {}  # see `times`, `settle`
        self.key, self.plain, self.attended = [0, 0], [False, False], set()  # see `refine`; plain: only linear maps

    def fresh(self, n: int, key: int | None) -> Tensor:
        """New labels (n,), each a class of its own, of one key; None: they never mix."""
        first = len(self.parent)
        self.parent += range(first, first + n)
        self.sign += [1] * n
        self.size += [1] * n
        self.key += [key] * n
        self.plain += [True] * n
        return torch.arange(first, first + n, device="cpu")

    def find(self, label: int) -> tuple[int, int]:
        """(root, sign) of a label."""
        k, sign = abs(label), 1 if label >= 0 else -1
        while self.parent[k] != k:
            sign *= self.sign[k]
            k = self.parent[k]
        return k, sign

    def why(self, label: int) -> str:
        """The reason of a label that is FIXED."""
        k = abs(label)
        while self.parent[k] not in (k, FIXED):
            k = self.parent[k]
        return self.reason.get(k, "it is not scaled")

    def join(self, a: int, b: int, reason: str) -> None:
        """label a = label b."""
        (a, s), (b, t) = self.find(a), self.find(b)
        if ANY in (a, b) or a == b and (s == t or a == FIXED):
            return
        if a == b:  # equal to its own inverse
            b, t = FIXED, s
        if b != FIXED and (a == FIXED or self.size[a] > self.size[b]):
            a, b = b, a
        self.parent[a], self.sign[a] = b, s * t
        self.size[b] += self.size[a]
        if b == FIXED:
            self.reason[a] = reason

    def unify(self, a: Tensor, b: Tensor, reason: str) -> Tensor:
        """Equal labels wherever two broadcast tensors of them meet; returns the labels of the result."""
        a, b = torch.broadcast_tensors(a, b)
        for p, q in met(a, b):
            self.join(p, q, reason)
        return torch.where(a == ANY, b, a)

    def alike(self, a: Tensor, b: Tensor) -> bool:
        """Whether labels that meet are of one class already."""
        classes = ((self.find(p), self.find(q)) for p, q in met(*torch.broadcast_tensors(a, b)))
        return all(x == y or x[0] == y[0] == FIXED for x, y in classes)

    def unified(self, labels: Tensor, dims: tuple[int, ...], reason: str) -> Tensor:
        """Equal labels along these dimensions, which become of size 1."""
        (x,) = shrunk(labels, dims=dims)
        if not dims or all(x.shape[d] == 1 for d in dims):
            return x
        one, other = x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)
        one = torch.where(one > ANY, one, other)
        self.unify(one, x, reason)
        return one

    def multiplied(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of the elementwise product of two broadcast tensors."""
        a, b = torch.broadcast_tensors(a, b)
        x, y = shrunk(a, b)
        pairs, back = torch.unique(torch.stack([x.flatten(), y.flatten()]), dim=1, return_inverse=True)
        labels = torch.tensor([self.times(*pair) for pair in pairs.T.tolist()], device=a.device)
        return labels[back].view(x.shape).expand(a.shape)

    def times(self, a: int, b: int) -> int:
        """The label of a product: one of its own where both factors scale."""
        p, q = self.find(a)[0], self.find(b)[0]
        if ANY in (p, q):
            return ANY
        if FIXED in (p, q):
            return a if q == FIXED else b
        if (a, b) not in self.products:
            self.products[a, b] = int(self.fresh(1, None))
            self.plain[-1] = False
        return self.products[a, b]

    def settle(self) -> None:
        """When all is joined: factors of the classes that are products, {class: {class: ±1}}; what is too odd stays."""
        reason, before = "it is multiplied with what is scaled as well", None
        while before != (classes := sum(k == root for k, root in enumerate(self.parent))):
            before, self.factors = classes, {}
            for (a, b), c in self.products.items():
                total, root = Counter(), self.find(c)[0]
                for label, sign in ((c, 1), (a, -1), (b, -1)):
                    k, s = self.find(label)
                    total[k] += s * sign
                left = [(k, n) for k, n in total.items() if n and k != FIXED]
                if len(left) == 2 and all(abs(n) == 1 for _, n in left):
                    (k, m), (q, n) = left
                    self.join(k, -m * n * q, reason)
                elif len(left) == 3:
                    found = {k: -n * total[root] for k, n in left if k != root}
                    if self.factors.setdefault(root, found) != found:
                        self.join(root, FIXED, reason)
                else:
                    for k, _ in left:
                        self.join(k, FIXED, reason)
            for root in self.factors:
                if self.parts(root) is None:
                    self.join(root, FIXED, reason)

    def parts(self, root: int, above: tuple[int, ...] = ()) -> dict[int, int] | None:
        """{class: ±1}: whose scales a class's is the product of; None if it is more involved."""
        if root in above:
            return None
        total = Counter()
        for k, sign in self.factors.get(root, {}).items():
            for part, s in (self.parts(k, (*above, root)) or {k: 2}).items():
                total[part] += s * sign
        total = {k: n for k, n in total.items() if n} if root in self.factors else {root: 1}
        return total if all(abs(n) == 1 for n in total.values()) else None

    def marked(self, labels: Tensor) -> Tensor:
        """Note that something acts on each of these channels by itself: they scale, but do not mix."""
        for k in torch.unique(*shrunk(labels)).tolist():
            self.plain[abs(k)] = False
        return labels

    def scaled(self, labels: Tensor, by: float | str) -> Tensor:
        """Note a common factor of these channels: they do not mix with others of their key that have another."""
        for k in torch.unique(*shrunk(labels)).tolist():
            if abs(k) > FIXED:
                self.key[abs(k)] = hash((self.key[abs(k)], by)) if self.key[abs(k)] is not None else None
        return labels

    def refine(self, rows: Tensor, attended: bool = False) -> None:
        """Labels of one key may mix. rows (n, size): channels that are read side by side; others are not among them."""
        members = {}
        for i, row in enumerate(torch.unique(rows.abs(), dim=0).tolist()):
            for k in set(row):
                members.setdefault(k, []).append(i)
        for k, among in members.items():
            self.key[k] = hash((self.key[k], tuple(among)))
            if attended:
                self.attended.add(k)


def met(a: Tensor, b: Tensor) -> list[list[int]]:
    """The pairs of different labels at the same place of two tensors of one shape."""
    x, y = shrunk(a, b)
    differ = x != y
    return torch.unique(torch.stack([x[differ], y[differ]]), dim=1).T.tolist()


def shrunk(*tensors: Tensor, dims: Iterable[int] | None = None) -> Sequence[Tensor]:
    """The same tensors without the repetitions of expanded dimensions (those that all of them repeat)."""
    for d in range(tensors[0].ndim) if dims is None else dims:
        if all(x.stride(d) == 0 for x in tensors) and tensors[0].shape[d] > 1:
            tensors = [x.narrow(d, 0, 1) for x in tensors]
    return tensors
