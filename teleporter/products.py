"""What products do to labels: with parameters, which read and write, and between what the network computes."""

from typing import Any

import torch
from torch import Tensor

from teleporter.classes import ANY, FIXED, shrunk

Operand = Tensor | tuple[str, Tensor]  # labels of a matrix, or (name, positions) of a parameter


class Products:
    """The half of the Tracer (tracing.py) that multiplies: op_NAME follows the aten operation NAME."""

    def product(self, name: str, a: Tensor, b: Tensor | float) -> Tensor:
        """a times b (mul), or over b: one of the two may be scaled."""
        if not isinstance(b, Tensor):
            return self.classes.scaled(self.of(a), f"{name} {b}")
        if name == "mul" and a in self.tags and b not in self.tags:
            a, b = b, a
        if name == "mul" and b in self.tags:
            return self.gain(a, b)
        self.fix(b if b in self.tags else None, f"{self.place} divides by it")
        x, y = self.of(a), self.of(b)
        shape = torch.broadcast_tensors(x, y)[0].shape  # broadcast_shapes imports sympy
        if self.free(y):
            self.classes.marked(y)
            if self.free(x):
                return self.classes.multiplied(self.classes.marked(x), y if name == "mul" else -y)
            return (y if name == "mul" else -y).expand(shape)
        elif any(n > 1 and x.ndim >= d and x.stride(-d) != 0 for d, n in enumerate(reversed(b.shape), 1)):
            self.classes.marked(x)
        else:
            self.calls += 1
            self.classes.scaled(x, f"{name} of {self.calls}")
        return x.expand(shape)

    def gain(self, a: Tensor, b: Tensor) -> Tensor:
        """A parameter b that multiplies each of its channels: it reads what was there and writes what comes."""
        name, index = self.tags[b]
        shape = torch.broadcast_tensors(a, b)[0].shape
        x = self.of(a).expand(shape)
        labels, positions = shrunk(x, index.expand(shape))
        read = torch.full((self.parameters[name].numel(),), FIXED, device=index.device)
        read[positions.flatten()] = labels.flatten()
        pairs = torch.stack([read[positions].flatten(), labels.flatten()]).unique(dim=1).T.tolist()
        if any(self.classes.find(p) != self.classes.find(q) for p, q in pairs):  # one number for several channels
            self.fix(b, f"{self.place} multiplies several channels by it")
            return x if index.numel() == 1 else self.classes.marked(x)
        write = self.fresh(len(read), index)
        self.uses[name].append((index.flatten(), write[index.flatten()], self.at_rest(read[index.flatten()])))
        self.classes.marked(x)
        return self.classes.marked(write[index]).expand(shape)

    @staticmethod
    def at_rest(labels: Tensor) -> Tensor:
        """FIXED instead of ANY: what reads a zero is not scaled."""
        return torch.where(labels == ANY, FIXED, labels)

    def operand(self, x: Tensor, n: int) -> Operand:
        """A matrix as (batch, ., .): its labels, or (name, positions) of a parameter."""
        if x in self.tags:
            return self.tags[x][0], self.tags[x][1][(None,) * n]
        return self.of(x)[(None,) * n]

    def op_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """A product of matrices for each member of a batch."""
        return self.contract(self.operand(a, 0), self.operand(b, 0))

    def op_mm(self, a: Tensor, b: Tensor) -> Tensor:
        """A product of matrices: a batch of one."""
        return self.contract(self.operand(a, 1), self.operand(b, 1))[0]

    def op_mv(self, a: Tensor, b: Tensor) -> Tensor:
        """A matrix times a vector: a matrix of one column."""
        return self.op_mm(a, self.column(b))[:, 0]

    def column(self, x: Tensor) -> Tensor:
        """A vector as a matrix of one column that has its labels, or is the same parameter."""
        y = x[:, None]
        for known in (self.tags, self.labels):
            if x in known:
                known[y] = (known[x][0], known[x][1][:, None]) if known is self.tags else known[x][:, None]
        return y

    def op_addmm(self, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        """A bias plus a product of matrices."""
        return self.biased(bias, self.op_mm(a, b))

    def op_baddbmm(self, bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        """A bias plus a product of matrices, for each member of a batch."""
        return self.biased(bias, self.op_bmm(a, b))

    def biased(self, bias: Tensor, labels: Tensor) -> Tensor:
        """Labels of what a bias is added to: it writes the same channels."""
        return self.classes.unify(labels, self.of(bias), f"{self.place} adds what is not scaled")

    def contract(self, A: Operand, B: Operand) -> Tensor:
        """Σ_k A[b, m, k] B[b, k, n]."""
        if isinstance(A, tuple) and isinstance(B, tuple):  # A reads nothing and writes its columns
            write = self.fresh(A[1].shape[2], A[1]).expand(A[1].shape)
            self.uses[A[0]].append((A[1].flatten(), write.flatten(), torch.full_like(write, FIXED).flatten()))
            A = write
        if isinstance(A, tuple):
            return self.contract(B.mT, (A[0], A[1].mT)).mT
        if isinstance(B, tuple):
            return self.linear(A, *B)
        reason, classes = f"the product in {self.place} joins it", self.classes
        size = (A.shape[0], A.shape[1], B.shape[2])
        if not self.free(A):
            rows = classes.unified(B, (1,), reason)
            if self.free(B):
                classes.refine(rows.expand(len(B), 1, B.shape[2])[:, 0], attended=True)
            return rows.expand(size)
        if not self.free(B):
            return self.contract(B.mT, A.mT).mT
        a, b = classes.unified(A, (1,), reason)[:, 0], classes.unified(B, (2,), reason)[:, :, 0]
        for rows in (a, b):
            classes.refine(rows, attended=True)
        classes.unify(a, -b, f"{self.place} multiplies it with what is not scaled")
        return torch.full((), FIXED, device=A.device).expand(size)

    def linear(self, x: Tensor, name: str, positions: Tensor) -> Tensor:
        """A parameter's matrix (batch or 1, k, n) reads the last dimension of x (batch, m, k) and writes anew."""
        size = (*x.shape[:2], positions.shape[2])
        if bool((positions == positions[:1]).all()):  # the same for the whole batch
            positions = positions[:1]
        dims = (1,) if len(positions) > 1 or len(x) == 1 else (0, 1)
        read = self.classes.unified(x, dims, f"{self.place} reads it at every position alike")
        read = read.expand(len(positions), 1, x.shape[2])
        write = self.fresh(len(positions) * size[2], positions).view(-1, 1, size[2])
        self.classes.refine(read[:, 0])
        everywhere = (labels.expand(positions.shape).flatten() for labels in (write, self.at_rest(read.mT)))
        self.uses[name].append((positions.flatten(), *everywhere))
        return write.expand(size)

    def op_convolution(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> Tensor | None:
        """A convolution of any kind: its weight reads the channels of x and writes new ones."""
        if w not in self.tags:
            for y in (x, w, b):
                self.fix(y, f"{self.place} has a weight that is computed or frozen")
            return None
        name, index = self.tags[w]
        n, ones, alone = index.ndim - 2, [1] * (index.ndim - 2), index.shape[1]
        read = self.classes.unified(self.of(x), (0, *range(2, 2 + n)), f"{self.place} reads it at every position alike")
        read = self.at_rest(read.reshape(-1))
        write = self.fresh(alone * groups if transposed else len(index), index)
        inner, outer = (write, read) if transposed else (read, write)  # the second dimension counts within a group
        inner = inner.view(groups, alone).repeat_interleave(len(index) // groups, 0)
        inner, outer = inner.view(*index.shape[:2], *ones), outer.view(-1, 1, *ones)
        pair = (inner, outer) if transposed else (outer, inner)
        self.uses[name].append((index.flatten(), *(y.expand(index.shape).flatten() for y in pair)))
        self.classes.refine(read[None])
        if groups > 1:
            self.classes.marked(torch.cat([read, write]))
        if b is not None:
            self.biased(b, write)
        return write.view(1, -1, *ones)

    def op_embedding(self, w: Tensor, positions: Tensor, *options: Any) -> Tensor | None:
        """Rows of a parameter: every column is a channel that it writes."""
        if w not in self.tags:
            return self.of(w)[:1].expand(*positions.shape, -1) if w in self.labels else None
        name, index = self.tags[w]
        write = self.fresh(index.shape[1], index)
        fixed = torch.full((), FIXED, device=index.device).expand(index.shape)
        self.uses[name].append((index.flatten(), write.expand(index.shape).flatten(), fixed.flatten()))
        return write.expand(*positions.shape, -1)
