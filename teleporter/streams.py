"""Which spaces of a forward pass may rotate as a whole: a residual stream that only RMSNorms read, with their gains.

What a parameter writes along its last dimension is a vector of a new space. Vectors stay vectors under what moves whole
ones about, under numbers and factors that a vector's entries share; what adds two makes their spaces one; their squares
may be summed over the whole space; gains may multiply them once, before a parameter reads them. Any other use of a
vector, or of a parameter, is a reason for its space to stay.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from teleporter.rotations import StreamSymmetry, Through, Tied, uneven
from teleporter.symmetry import Candidate, Rows

_IN_PLACE = {"add_", "sub_", "mul_", "div_"}
Use = dict[int, tuple[int, Tensor | None, bool]]  # dimension of a parameter: (space, gains before it, whether it reads)


class Vector(NamedTuple):
    """The last dimension of a tensor: a vector of this space, times gains, or the squares of its entries."""

    space: int
    gain: Tensor | None = None
    squared: bool = False


class Streams:
    """Follows the vectors of a forward pass."""

    def __init__(self, tracer: Any) -> None:
        """Nothing has run yet."""
        self.tracer, self.vectors, self.gains = tracer, WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.parent, self.sizes, self.dead, self.normed = [], [], {}, set()
        self.uses: dict[str, list[Use]] = {}
        for p in tracer.model.parameters():
            if p.ndim == 1:
                self.gains[p] = p

    def find(self, space: int) -> int:
        """The space that this one has become."""
        while self.parent[space] != space:
            space = self.parent[space]
        return space

    def fresh(self, size: int) -> Vector:
        """A vector of a new space."""
        self.parent.append(len(self.parent))
        self.sizes.append(size)
        return Vector(self.parent[-1])

    def join(self, a: int, b: int) -> int:
        """One space of two."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a
            if b in self.dead:
                self.dead.setdefault(a, self.dead[b])
            self.normed |= {a} if b in self.normed else set()
        return a

    def of(self, x: Any) -> Vector | None:
        """What is known of an argument."""
        return self.vectors.get(x) if isinstance(x, Tensor) else None

    def lost(self, x: Any) -> None:
        """A parameter is used in a way that is not followed."""
        if isinstance(x, Tensor) and x in self.tracer.tags:
            self.uses.setdefault(self.tracer.tags[x][0], []).append({})

    def end(self, x: Any) -> None:
        """The model's output stays."""
        self.lost(x)
        self.kill(x, "it is the output of the model")

    def kill(self, x: Any, reason: str) -> None:
        """The space of a tensor stays."""
        if self.of(x):
            self.dead.setdefault(self.find(self.vectors[x].space), reason)

    def follow(self, name: str, moves: bool, args: tuple, kwargs: dict, outputs: Sequence[Tensor], move: Any) -> None:
        """What an operation does to vectors. move(args): what it does to integers."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        mine = [x for x in tensors if x in self.vectors]
        if moves or name == "_to_copy":
            if tensors and tensors[0] in self.gains and self.kept(tensors, args, move if moves else None):
                self.gains[outputs[0]] = self.gains[tensors[0]]
            for x in tensors if outputs[0] not in self.tracer.tags else ():
                self.lost(x)
            found = self.moved(tensors, args, kwargs, move if moves else None) if mine else []
            found = found and found * len(outputs)
        else:
            self.used = {self.tracer.tags[x][0]: {} for x in tensors if x in self.tracer.tags}
            handler = getattr(self, f"op_{name.removesuffix('_') if name in _IN_PLACE else name}", None)
            known = handler and (mine or self.used) and set(kwargs) <= {"alpha", "keepdim"}
            found = handler(*args, **kwargs) if known else None
            for parameter, use in self.used.items():
                self.uses.setdefault(parameter, []).append(use)
            if name in _IN_PLACE and found and (x := self.of(args[0])):
                found = found if found[0][1:] == x[1:] else None
            elif name in _IN_PLACE:
                found = None
        if found is None:
            for x in mine:
                self.kill(x, f"{name} in {self.tracer.place} does not rotate with it")
        for x, vector in zip(outputs, found or ()):
            self.vectors[x] = vector

    # Moves

    def kept(self, tensors: Sequence[Tensor], args: tuple, move: Callable | None) -> bool:
        """Whether whole vectors are moved, entries in order."""
        floats = [x for x in tensors if x.is_floating_point()]
        if move is None or len({x.shape[-1:] for x in floats}) > 1:
            return move is None
        order = torch.arange(floats[0].shape[-1], device=floats[0].device)

        def of(y: Any) -> Any:
            return order.to(y.device).expand(y.shape) if isinstance(y, Tensor) and y.is_floating_point() else y

        moved = move(tree_map(of, list(args)))
        return all(y.shape[-1:] == order.shape and bool((y == order).all()) for y in moved)

    def moved(self, tensors: Sequence[Tensor], args: tuple, kwargs: dict, move: Callable | None) -> list | None:
        """Vectors that are moved about, among themselves."""
        floats = [x for x in tensors if x.is_floating_point()]
        found = [self.vectors.get(x) for x in floats]
        alike = all(x is not None and x.gain is found[0].gain and x.squared == found[0].squared for x in found)
        if not alike or not self.kept(floats, args, move) or not (kwargs.get("dtype") or torch.half).is_floating_point:
            return None
        space = found[0].space
        for vector in found[1:]:
            space = self.join(space, vector.space)
        return [found[0]._replace(space=space)]

    # Parameters

    def matrix(self, x: Tensor) -> tuple[int, int] | None:
        """(dimension that is read, dimension that writes) of a parameter that is multiplied by, whole."""
        name, index = self.tracer.tags[x]
        shape = self.tracer.parameters[name].shape
        index = index[0] if index.ndim == 3 and bool((index == index[:1]).all()) else index
        if len(shape) != 2 or index.ndim != 2:
            return None
        whole = torch.arange(shape.numel(), device=index.device).view(shape)
        for dims, same in (((1, 0), whole.T), ((0, 1), whole)):
            if index.shape == same.shape and torch.equal(index, same):
                return dims
        return None

    def op_mm(self, x: Tensor, w: Tensor) -> list | None:
        """A parameter reads a vector, if it is one, and writes another."""
        tags = self.tracer.tags
        if w not in tags or x in tags or (dims := self.matrix(w)) is None:
            return None
        new, use = self.fresh(w.shape[-1]), {}
        use[dims[1]] = (new.space, None, False)
        if x in self.vectors:
            space, gain, squared = self.vectors[x]
            if squared:
                return None
            use[dims[0]] = (space, gain, True)
        self.used[tags[w][0]] = use
        return [new]

    op_bmm = op_mm

    def op_addmm(self, bias: Tensor, x: Tensor, w: Tensor) -> list | None:
        """The same, with a bias."""
        found = self.op_mm(x, w)
        if found is None:
            return None
        return self.added(found[0], bias) or self.buried(found, "it meets a bias that is computed or frozen")

    op_baddbmm = op_addmm

    def buried(self, found: list, reason: str) -> list:
        """Vectors of a space that stays."""
        for vector in found:
            self.dead.setdefault(self.find(vector.space), reason)
        return found

    def added(self, vector: Vector, x: Any) -> list | None:
        """A vector plus a parameter, whose last dimension writes."""
        if not isinstance(x, Tensor) or x not in self.tracer.tags or vector.gain is not None or vector.squared:
            return None
        name, index = self.tracer.tags[x]
        shape, d = self.tracer.parameters[name].shape, self.sizes[vector.space]
        if shape[-1:] != (d,) or index.shape[-1:] != (d,):
            return None
        if not bool((index % d == torch.arange(d, device=index.device)).all()):
            return None
        self.used[name] = {len(shape) - 1: (vector.space, None, False)}
        return [vector]

    def op_embedding(self, w: Tensor, *options: Any) -> list | None:
        """Rows of a parameter are vectors."""
        if w not in self.tracer.tags or self.matrix(w) is None:
            return None
        name, new = self.tracer.tags[w][0], self.fresh(w.shape[-1])
        self.used[name] = {self.matrix(w)[1]: (new.space, None, False)}
        return [new]

    # Arithmetic

    def op_add(self, a: Any, b: Any, alpha: float = 1) -> list | None:
        """Of two vectors, or of one and a parameter."""
        a, b = (a, b) if self.of(a) else (b, a)
        x, y = self.of(a), self.of(b)
        if x is None or y is None:
            return None if x is None else self.added(x, b)
        if a.shape[-1] != b.shape[-1] or any(v.gain is not None or v.squared for v in (x, y)):
            return None
        return [Vector(self.join(x.space, y.space))]

    op_sub = op_add

    def op_mul(self, a: Any, b: Any) -> list | None:
        """By what all entries share, by gains, by itself."""
        a, b = (a, b) if self.of(a) else (b, a)
        x = self.of(a)
        if x is None or x.squared:
            return None
        if b is a:
            return self.op_pow(a, 2)
        if not isinstance(b, Tensor):
            return [x]
        if b in self.gains and b.shape[-1] == a.shape[-1] > 1:
            self.normed.add(self.find(x.space))
            return [x._replace(gain=self.gains[b])] if x.gain is None else None
        shared = b.ndim == 0 or b.shape[-1] == 1 or b.stride(-1) == 0
        return [x] if shared and not self.of(b) and a.shape[-1] > 1 else None

    def op_div(self, a: Any, b: Any) -> list | None:
        """By what all entries share."""
        refused = not self.of(a) or self.of(b) or isinstance(b, Tensor) and b in self.gains
        return None if refused else self.op_mul(a, b)

    def op_neg(self, x: Tensor) -> list | None:
        """The other sign."""
        return [self.of(x)] if self.of(x) else None

    def op_pow(self, x: Any, power: Any) -> list | None:
        """Squares, of which there will be a sum."""
        vector = self.of(x)
        if vector is None or power != 2 or vector.gain is not None or vector.squared:
            return None
        return [vector._replace(squared=True)]

    def op_sum(self, x: Tensor, dims: Any = None, keepdim: bool = False) -> list | None:
        """Of squares over the whole space; of vectors over anything else."""
        if not self.of(x) or not dims:
            return None
        dims, vector = {d % x.ndim for d in dims}, self.of(x)
        if vector.squared:
            self.normed |= {self.find(vector.space)}
            return [] if dims == {x.ndim - 1} else None
        return [vector] if x.ndim - 1 not in dims else None

    op_mean = op_sum

    def op_linalg_vector_norm(
        self, x: Tensor, power: float = 2, dims: Any = None, keepdim: bool = False
    ) -> list | None:
        """The root of the sum of squares."""
        squared = self.op_pow(x, power)
        if not squared or not dims or {d % x.ndim for d in dims} != {x.ndim - 1}:
            return None
        self.normed.add(self.find(squared[0].space))
        return []

    def op__fused_rms_norm(self, x: Tensor, shape: Sequence[int], gain: Tensor | None, *eps: Any) -> list | None:
        """All of a norm at once."""
        if not self.of(x) or len(shape) != 1 or self.of(x).squared or self.of(x).gain is not None:
            return None
        self.normed.add(self.find(self.of(x).space))
        return [self.of(x)] if gain is None else self.op_mul(x, gain)

    # What is left

    def settle(self) -> None:
        """A parameter that is used in several ways must rotate in each alike."""
        before = None
        while before != len(self.dead):
            before = len(self.dead)
            for name, uses in self.uses.items():
                spaces = {(dim, self.find(use[dim][0])) for use in uses for dim in use}
                for dim, space in spaces:
                    if any(dim not in use or self.find(use[dim][0]) != space for use in uses):
                        self.dead.setdefault(space, f"{name} is used in more than one way")

    def candidates(self, order: Sequence[str]) -> Iterator[Candidate]:
        """One for each space that a norm reads, with the reason if it stays."""
        self.settle()
        for space in sorted({self.find(space) for space in self.normed}):
            d, slots, reason = self.sizes[space], [], self.dead.get(space)
            for name in order:
                for dim in sorted({dim for use in self.uses.get(name, ()) for dim in use}):
                    found = [u[dim] for u in self.uses[name] if dim in u and self.find(u[dim][0]) == space]
                    if found:
                        rows = torch.arange(d, device="cpu").view(1, d, 1)
                        slots += self.slots(name, Rows(name, False, dim, rows), found)
            through = [slot for slot in slots if not isinstance(slot, Rows)]
            gains = [(slot.name, uneven(slot.gain, isinstance(slot, Tied))) for slot in through]
            forbidden = [f"{name} is read through gains that {why}" for name, why in gains if why]
            writers = dict.fromkeys(slot.name.rpartition(".")[0] or slot.name for slot in slots if not slot.reads)
            readers = [slot for slot in slots if slot.reads]
            reason = reason or next(iter(forbidden), None) or (None if readers else "nothing reads it")
            if writers and d > 1:
                yield StreamSymmetry(f"{', '.join(writers)}: stream", "stream", (1, d, d), tuple(slots)), None, reason

    def slots(self, name: str, rows: Rows, found: Sequence[tuple]) -> Iterator[Rows | Through | Tied]:
        """The slots of one dimension of a parameter, which writes, reads through gains, or does both."""
        gains = {id(gain): gain for _, gain, reads in found if reads}
        writes = not all(reads for _, _, reads in found)
        if writes or len(gains) > 1:  # of several gains each must be alike
            yield rows if writes else rows._replace(reads=True)
        for gain in gains.values():
            if writes or len(gains) > 1:
                yield Tied(name, True, rows, gain)
            else:
                yield Through(name, True, rows._replace(reads=True), gain)
