"""Which axes of a forward pass may be permuted: one real run, followed operation by operation.

Every dimension of every parameter (and of every buffer that is saved) is an axis. Beside each tensor travels, for each
of its dimensions, the axes that it is the product of, outermost first: () for a dimension of one entry, (heads, d_head)
for what was flattened. The claim that each rule keeps: permute the parameters along their axes, and every tensor is
permuted along its own. What operations pair entry by entry, or sum over, makes two axes one; whatever tells an axis'
entries apart by their position (slices, inputs, constants, all operations without a rule) makes it stay.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from teleporter.rearranged import Label, Labels, Rearranged
from teleporter.tracing import MAKES, Follower


class Axes:
    """Axes joined into classes, split into products, or staying for a reason."""

    def __init__(self) -> None:
        """None yet."""
        self.parent, self.size, self.parts, self.reason = [], [], {}, {}

    def new(self, size: int, reason: str | None = None) -> Label:
        """A dimension with an axis of its own; reason: why it stays."""
        if size <= 1:
            return ()
        self.parent.append(len(self.parent))
        self.size.append(size)
        if reason is not None:
            self.reason[self.parent[-1]] = reason
        return (self.parent[-1],)

    def known(self, label: Label) -> list[int]:
        """The classes that a dimension is the product of by now."""
        found = []
        for axis in label:
            while self.parent[axis] != axis:
                axis = self.parent[axis]
            found += self.known(self.parts[axis]) if axis in self.parts else [axis]
        return found

    def width(self, label: Sequence[int]) -> int:
        """How many entries a dimension has."""
        return math.prod(self.size[axis] for axis in label)

    def fix(self, label: Label, reason: str) -> None:
        """It stays, for this reason if it is the first."""
        for axis in self.known(label):
            self.reason.setdefault(axis, reason)

    def split(self, axis: int, inner: int) -> None:
        """Make a class the product of two, the inner one of that size."""
        why = self.reason.get(axis)
        self.parts[axis] = self.new(self.size[axis] // inner, why) + self.new(inner, why)

    def cut(self, label: Label, inner: int) -> tuple[Label, Label] | None:
        """A dimension as the product of two, the inner one of that size; None if an axis would be torn."""
        rest, tail = self.known(label), []
        while (have := self.width(tail)) < inner:
            axis = rest.pop()
            if inner % (have * self.size[axis]):
                need, odd = divmod(inner, have)
                if odd or self.size[axis] % need:
                    return None
                self.split(axis, need)
                return tuple(rest) + self.parts[axis][:1], (self.parts[axis][1], *tail)
            tail.insert(0, axis)
        return tuple(rest), tuple(tail)

    def join(self, a: Label, b: Label, reason: str) -> None:
        """Two dimensions of one size are permuted alike."""
        while (left := self.known(a)) != (right := self.known(b)):
            x, y = next((x, y) for x, y in zip(reversed(left), reversed(right)) if x != y)
            small, large = sorted((x, y), key=lambda axis: self.size[axis])
            if self.size[large] % self.size[small]:
                self.fix(a, reason)
                self.fix(b, reason)
                return
            if self.size[large] > self.size[small]:
                self.split(large, self.size[small])
                continue
            self.parent[x] = y
            if x in self.reason:
                self.reason.setdefault(y, self.reason[x])


# Names of aten operations.
SAME = re.compile(r"_?native_dropout|_prelu_kernel|_to_copy|copy|fill|zero|detach|alias|lift_fresh|gelu|bernoulli|"
                  r"rrelu_with_noise|floor_divide|hardswish|square|_weight_norm_interface")  # fmt: skip
RESHAPES = re.compile(r"view|_unsafe_view|reshape|_reshape_alias|squeeze|unsqueeze")
SUMS = re.compile(r"sum|mean|amax|amin|var|std|var_mean|std_mean|nansum|prod|any|all|logsumexp|linalg_vector_norm|norm")
PICKS = re.compile(r"max|min|argmax|argmin|median|nanmedian|mode")  # which entry it was tells them apart
ALONG = re.compile(r"_?(log_)?softmax|_safe_softmax|cumsum|cumprod|logcumsumexp|cummax|cummin|flip|roll|sort|topk")
POOLS = re.compile(
    r"_?(adaptive_)?(max|avg)_pool([123])d(_with_indices)?|_?upsample_\w+([123])d(_aa)?|re\w+_pad([123])d"
)
BATCH_NORMS = re.compile(r"_?(native|cudnn|miopen)_batch_norm(_legit)?(_functional|_no_training)?|_batch_norm_with\w+")


class AxisTracer(Rearranged, Follower):
    """Follows axes through the forward passes in its context; op_NAME follows the aten operation NAME.

    labels: {tensor: the label of each dimension}; a tensor that has none is a constant. leaves: {what is made of
    parameters alone: their names}. roles: [(names, label of a dimension, whether a product sums over it)].
    """

    def __init__(self, model: torch.nn.Module, leaves: Mapping[str, Tensor], fixed: Mapping[str, str]) -> None:
        """Nothing has run yet. leaves: {name: parameter or buffer}; fixed: why some of them stay."""
        super().__init__(model)
        self.axes, self.roles, self.used, self.epsilon = Axes(), [], set(), 0.0  # epsilon: the coarsest at work
        self.labels, self.leaves = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.dimensions, self.summed = {}, []  # {name: its labels}; labels that products without parameters sum over
        for name, x in leaves.items():
            self.dimensions[name] = self.labels[x] = [self.axes.new(n, fixed.get(name)) for n in x.shape]
            self.leaves[x] = {name}

    def seen(self, function: OpOverload, args: tuple, kwargs: dict, output: Any) -> None:
        """Give what an operation returns its labels."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        known = [x for x in tensors if x in self.labels]
        name = function._schema.name.partition("::")[2].rstrip("_")
        if MAKES.fullmatch(name):  # entries that are alike, or random
            for x in outputs:
                self.labels[x] = [self.axes.new(n) for n in x.shape]
        if MAKES.fullmatch(name) or not (known or name == "expand"):
            return
        self.used |= {leaf for x in known for leaf in self.leaves.get(x, ())}
        floats = [torch.finfo(x.dtype).eps for x in outputs if known and x.is_floating_point()]
        self.epsilon = max([self.epsilon, *floats])
        given = {a.name: a.default_value for a in function._schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in function._schema.arguments), args)) | kwargs
        ruled = function.namespace == "aten" and all(x.numel() for x in tensors)
        found = self.result(name, function, given, tensors, outputs) if ruled else None
        if found is None:
            reason = f"{name} in {self.place} may tell its entries apart"
            for label in (label for x in known for label in self.labels[x]):
                self.axes.fix(label, reason)
            found = [[self.axes.new(n, reason) for n in x.shape] for x in outputs]
        leaves = [self.leaves.get(x) for x in tensors]
        for x, labels in zip(outputs, found):
            for a, b in zip(labels, self.labels[x] if x in self.labels and len(self.labels[x]) == len(labels) else ()):
                self.axes.join(a, b, f"{name} in {self.place} stores it")  # in place
            self.labels[x] = labels
            if None not in leaves and x not in self.leaves:
                self.leaves[x] = set.union(*leaves)

    def of(self, x: Tensor) -> Labels:
        """Labels of an argument; of a constant, axes that stay."""
        if x in self.labels:
            return self.labels[x]
        return [self.axes.new(n, "it meets an input or a constant") for n in x.shape]

    def end(self, output: Any) -> None:
        """What the model returns stays."""
        for x in tree_leaves(vars(output) if hasattr(output, "__dataclass_fields__") else output):
            for label in self.of(x) if isinstance(x, Tensor) else ():
                self.axes.fix(label, "it is the output of the model")

    def result(
        self, name: str, function: OpOverload, given: dict, tensors: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> list[Labels] | None:
        """Labels of each output; None for what has no rule. given: {argument: value}."""
        handler, pool = getattr(self, f"op_{name}", None), POOLS.fullmatch(name)
        if torch.Tag.pointwise in function.tags or SAME.fullmatch(name):
            operands = [(x, self.of(x)) for x in tensors]
            return [self.broadcast(operands, x) for x in outputs]
        if handler is not None:
            return handler(given, outputs)
        if RESHAPES.fullmatch(name):
            return self.reshaped(self.of(tensors[0]), outputs[0].shape)
        if name in ("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv"):
            return self.product(tensors, outputs[0])
        if BATCH_NORMS.fullmatch(name):
            return self.batch_norm(tensors, outputs)
        dims = given.get("dim", given.get("dims"))
        dims = [dims] if isinstance(dims, int) else dims or range(tensors[0].ndim)
        if SUMS.fullmatch(name) or PICKS.fullmatch(name):
            return self.reduced(name, dims, "dim" in given and bool(PICKS.fullmatch(name)), tensors[0], outputs)
        if ALONG.fullmatch(name):
            return self.along(name, dims, tensors[0], outputs)
        return self.along(name, range(-int(max(filter(str.isdigit, name))), 0), tensors[0], outputs) if pool else None

    # What meets entry by entry

    def broadcast(self, operands: Sequence[tuple[Tensor, Labels]], output: Tensor) -> Labels:
        """Dimensions that are paired, from the last on, are one."""
        found = []
        for d in range(1, output.ndim + 1):
            paired = [labels[-d] for x, labels in operands if x.ndim >= d and x.shape[-d] == output.shape[-d]]
            for label in paired[1:]:
                self.axes.join(paired[0], label, f"{self.place} pairs it with other axes")
            found.insert(0, paired[0] if paired else ())
        return found

    def batch_norm(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Labels] | None:
        """Scale, shift and statistics go with the channels; statistics over the rest do not feel an order."""
        labels = self.of(tensors[0])
        if any(x.ndim != 1 for x in tensors[1:]):
            return None
        for x in tensors[1:]:
            self.axes.join(labels[1], self.of(x)[0], f"{self.place} normalizes it")
        return [labels if x.ndim > 1 else [labels[1]] if x.numel() > 1 else [()] * x.ndim for x in outputs]

    def op_native_layer_norm(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels]:
        """Mean and variance do not feel an order; scale and shift go with what is normalized."""
        n, labels = len(given["normalized_shape"]), self.of(given["input"])
        for x in (given.get("weight"), given.get("bias")):
            for a, b in zip(labels[-n:], [] if x is None else self.of(x)):
                self.axes.join(a, b, f"{self.place} normalizes it")
        return [labels] + [labels[:-n] + [()] * n for _ in outputs[1:]]

    op__fused_rms_norm = op_native_layer_norm

    # What sums over axes

    def note(self, x: Tensor, *over: int, reads: bool = True) -> None:
        """x is a factor of a product that sums over these dimensions."""
        for d, label in enumerate(self.of(x) if x in self.leaves else ()):
            self.roles.append((self.leaves[x], label, d in over and reads))

    def product(self, tensors: Sequence[Tensor], output: Tensor) -> list[Labels]:
        """A product of matrices or vectors, of each of a batch, a bias added."""
        *bias, a, b = tensors
        A, B, k = self.of(a), self.of(b), max(b.ndim - 2, 0)
        self.note(a, a.ndim - 1)
        self.note(b, k, reads=a not in self.leaves)
        if a not in self.leaves and b not in self.leaves:
            self.summed.append(A[-1])
        self.axes.join(A[-1], B[k], f"{self.place} multiplies it with other axes")
        if a.ndim == 3:
            self.axes.join(A[0], B[0], f"{self.place} pairs it with other axes")
        found = A[:-1] + B[k + 1 :]
        return [self.broadcast([(output, found), *((x, self.of(x)) for x in bias)], output)]

    def op_convolution(self, given: dict, outputs: Sequence[Tensor]) -> list[Labels] | None:
        """A convolution of any kind: groups are the outer part of the channels, within which the weight mixes."""
        x, w, b, groups = (given[key] for key in ("input", "weight", "bias", "groups"))
        X, W, n = self.of(x), self.of(w), w.ndim - 2
        for label in X[2:] + W[2:]:
            self.axes.fix(label, f"{self.place} knows positions")
        self.note(w, 0 if given["transposed"] else 1)
        outer, there = self.axes.cut(W[0], w.shape[0] // groups), self.axes.cut(X[1], x.shape[1] // groups)
        if outer is None or there is None:
            return None
        self.axes.join(outer[0], there[0], f"{self.place} has groups")
        read, write = (outer[1], outer[0] + W[1]) if given["transposed"] else (W[1], W[0])
        self.axes.join(read, there[1], f"{self.place} reads it")
        if b is not None:
            self.axes.join(write, self.of(b)[0], f"{self.place} adds a bias")
        return [[X[0], write, *(self.axes.new(m, f"{self.place} knows positions") for m in outputs[0].shape[-n:])]]

    def reduced(
        self, name: str, dims: Sequence[int], picks: bool, x: Tensor, outputs: Sequence[Tensor]
    ) -> list[Labels]:
        """A sum, or the like, does not feel an order."""
        labels, dims = self.of(x), {d % x.ndim for d in dims} if x.ndim else set()
        for d in dims if picks else ():
            self.axes.fix(labels[d], f"{name} in {self.place} says which it is")
        kept = outputs[0].ndim == x.ndim
        return [[() if d in dims else label for d, label in enumerate(labels) if kept or d not in dims]] * len(outputs)
