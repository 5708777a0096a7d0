"""What operations that move entries about, or tell them apart, do to axes (axes.py)."""

import math
from collections.abc import Sequence

from torch import Tensor

Label = tuple[int, ...]  # of a dimension: numbers of axes, outermost first
Labels = list[Label]  # of a tensor


class Rearranged:
    """The half of the AxisTracer that computes nothing: op_NAME follows the aten operation NAME."""

    # What tells entries apart

    def along(self, name: str, dims: Sequence[int], x: Tensor, outputs: Sequence[Tensor]) -> list[Labels]:
        """Something happens along these dimensions; the others pass."""
        labels, reason = list(self.of(x)), f"{name} in {self.place} mixes it"
        for d in dims if x.ndim else ():
            self.axes.fix(labels[d], reason)
            labels[d] = self.axes.new(outputs[0].shape[d], reason)
        return [labels] * len(outputs)

    def op_constant_pad_nd(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Padding."""
        pad = given["pad"]
        dims = [-1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]]
        return self.along("padding", dims, given["self"], outputs)

    def op_tril(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Half of a matrix."""
        return self.along("a triangle", (-2, -1), given["self"], outputs)

    op_triu = op_tril

    def piece(self, label: Label, size: int, start: int, length: int) -> Label:
        """A part of a dimension: of axes that it holds whole, the inner ones are free."""
        inner, reason = math.gcd(size, start, length), f"{self.place} takes a part of it"
        outer, rest = (label, ()) if length < size else ((), label)
        if length < size and inner > 1:
            outer, rest = self.axes.cut(label, inner) or (outer, rest)
        self.axes.fix(outer, reason)
        return (self.axes.new(length // self.axes.width(self.axes.known(rest)), reason) if outer else ()) + rest

    def pieces(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """A dimension cut into pieces, one after the other."""
        x, found, start = given["self"], [], 0
        d = given["dim"] % x.ndim
        for y in outputs:
            labels = list(self.of(x))
            labels[d] = self.piece(labels[d], x.shape[d], start, y.shape[d])
            found.append(labels)
            start += y.shape[d]
        return found

    op_split = op_split_with_sizes = op_unsafe_split = op_unsafe_split_with_sizes = pieces

    def op_slice(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """x[start:end:step] along one dimension."""
        x, labels = given["self"], list(self.of(given["self"]))
        d = given["dim"] % x.ndim
        start, _, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[d])
        if step > 1 and x.shape[d] > 1:
            return self.along("a slice", (d,), x, outputs)
        labels[d] = self.piece(labels[d], x.shape[d], start, outputs[0].shape[d])
        return [labels]

    def op_select(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """One entry of a dimension, or each of them."""
        x = given["self"]
        d, labels = given["dim"] % x.ndim, self.of(x)
        self.axes.fix(labels[d], f"{self.place} takes a part of it")
        return [labels[:d] + labels[d + 1 :]] * len(outputs)

    op_unbind = op_select

    def op_glu(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """The first half times a function of the second."""
        (first, _) = self.pieces(given, [outputs[0], outputs[0]])
        return [first]

    def op_embedding(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Rows that are looked up."""
        labels = self.of(given["weight"])
        self.axes.fix(labels[0], f"{self.place} looks it up")
        self.note(given["weight"])
        return [self.of(given["indices"]) + labels[1:]]

    def op_cat(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Tensors side by side: along their own dimension, or a new one (stack)."""
        tensors = given["tensors"]
        new = outputs[0].ndim > tensors[0].ndim
        d = given["dim"] % outputs[0].ndim
        rows = [list(self.of(x)) for x in tensors]
        for labels in rows:
            if not new:
                self.axes.fix(labels.pop(d), f"{self.place} concatenates it")
            for a, b in zip(rows[0], labels):
                self.axes.join(a, b, f"{self.place} concatenates it")
        side = self.axes.new(outputs[0].shape[d], f"{self.place} concatenates it")
        return [rows[0][:d] + [side] + rows[0][d:]]

    op_stack = op_cat

    # What moves dimensions about

    def reshaped(self, labels: Labels, shape: Sequence[int]) -> list[Labels] | None:
        """The same entries in the same order."""
        rest, found = sum(labels, ()), []
        if self.axes.width(self.axes.known(rest)) != math.prod(shape):
            return None
        for n in reversed(shape):
            both = self.axes.cut(rest, n)
            if both is None:
                return None
            rest = both[0]
            found.insert(0, both[1])
        return [found]

    def op_permute(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Any order of the dimensions."""
        labels = self.of(given["self"])
        return [[labels[d] for d in given["dims"]]]

    def op_transpose(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Two dimensions swapped."""
        labels = list(self.of(given["self"]))
        i, j = given.get("dim0", 0), given.get("dim1", 1)
        if labels[1:]:
            labels[i], labels[j] = labels[j], labels[i]
        return [labels]

    op_t = op_transpose

    def op_expand(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Dimensions of one entry repeated: all entries are alike."""
        x, shape = given["self"], outputs[0].shape
        sizes, labels = [1] * (len(shape) - x.ndim) + list(x.shape), [()] * (len(shape) - x.ndim) + self.of(x)
        return [[label if m == n else self.axes.new(n) for m, n, label in zip(sizes, shape, labels)]]

    def op_repeat(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Whole dimensions repeated: the outer part of what comes out, all of whose entries are alike."""
        labels = self.of(given["self"])
        labels = [()] * (len(given["repeats"]) - len(labels)) + labels
        return [[self.axes.new(n) + label for n, label in zip(given["repeats"], labels)]]
