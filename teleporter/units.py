"""Which hidden units may be permuted: found on real inputs (axes.py), or between the layers that torch.fx shows."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from teleporter.axes import AxisTracer
from teleporter.finder import Finder, Flows, attribute_of, blocked
from teleporter.layers import CONV, CONV_TRANSPOSE, NORM, Channels, Flow
from teleporter.passes import evaluating, kept_attributes, same_randomness
from teleporter.symmetry import Candidate, Symmetry
from teleporter.traced import _kept_parameters, _module
from teleporter.verify import called

ELEMENTWISE = re.compile(
    r"(gelu|silu|mish|tanh|sigmoid|r?r?elu|selu|celu|relu6|softplus|softsign|hardswish|hardsigmoid|hardtanh|logsigmoid|"
    r"tanhshrink|softshrink|hardshrink|threshold|exp|sin|cos|square|alphadropout)_?"
)
ARITHMETIC = re.compile(r"i?(add|sub|rsub|mul|div|truediv|pow|clamp|clamp_min|clamp_max)_?")  # by numbers


class Along(NamedTuple):
    """A slot that is permuted along one dimension, which is the product (outer, size, inner)."""

    name: str  # of the parameter or buffer
    reads: bool
    dim: int
    outer: int
    size: int
    inner: int

    def act_(self, tensor: Tensor, order: Tensor) -> None:
        """Entry i becomes what entry order[i] was; a dimension of one entry (a mean along it) has no order."""
        if tensor.shape[self.dim] > 1:
            x = tensor.movedim(self.dim, 0).unflatten(0, (self.outer, self.size, self.inner))
            x.copy_(x[:, order.to(x.device)])


class PermutationSymmetry(Symmetry):
    """Orders of the units, LongTensors (width,): unit i becomes what unit order[i] was; −order is the inverse."""

    __slots__ = ()

    @property
    def dimension(self) -> int:
        """None: a finite group."""
        return 0

    def tangent(self, D: Tensor) -> Tensor:
        """An order made of numbers: a cycle through all units, none of which stays where it is."""
        cycle = D.argsort()
        return torch.empty_like(cycle).index_copy_(0, cycle, cycle.roll(1))

    def act_(self, tensors: dict, T: Tensor, like: str = "weights") -> None:
        """Permute {name: tensor or None} in place; whatever the tensors are, each follows its parameter."""
        order = (-T).argsort() if bool((T < 0).any()) else T
        for slot in self.slots:
            if tensors.get(slot.name) is not None:
                slot.act_(tensors[slot.name], order)


def followed(model: nn.Module, inputs: Any) -> tuple[list[Candidate], float]:
    """Candidates of forward passes of real inputs, as the model is and in evaluation and training mode, and the
    coarsest ε at work. Raises whatever the model raises as it is."""
    leaves, fixed = _leaves(model)
    tracer = AxisTracer(model, leaves, fixed)
    with same_randomness(model), kept_attributes(model), _kept_parameters(model):
        with tracer.running():
            output = called(model, inputs)
        tracer.end(output)
    for training in {False, True} - ({model.training} if len({m.training for m in model.modules()}) == 1 else set()):
        with same_randomness(model), kept_attributes(model), _kept_parameters(model), evaluating(model, training):
            try:
                with tracer.running():
                    output = called(model, inputs)
                tracer.end(output)
            except Exception:  # a mode that these inputs do not fit: a batch of one to normalize
                pass
    return list(_spaces(tracer, dict(model.named_parameters()))), tracer.epsilon


def _leaves(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """{name: parameter or buffer}, and {name: why it stays}."""
    leaves, fixed, storages = {**dict(model.named_parameters()), **dict(model.named_buffers())}, {}, defaultdict(list)
    unsaved = {id(m._buffers[n]) for m in model.modules() for n in m._non_persistent_buffers_set}
    for name, x in leaves.items():
        if isinstance(x, nn.Parameter) and not x.requires_grad:
            fixed[name] = f"{name} is frozen"
        elif id(x) in unsaved:
            fixed[name] = f"{name} is not saved with the model"
        if x.numel() and not x.is_meta and x.layout == torch.strided:
            storages[x.untyped_storage().data_ptr()].append(name)
    for names in storages.values():
        fixed |= {name: f"{name} shares its memory with another" for name in names if len(names) > 1}
    return leaves, fixed


def _spaces(tracer: AxisTracer, parameters: Mapping[str, Tensor]) -> Iterator[Candidate]:
    """(symmetry, None, reason or None) of each free class that something writes; then one for each module whose
    output stays."""
    axes, slots, roles, names = tracer.axes, defaultdict(list), defaultdict(set), set()
    for leaves, label, reads in tracer.roles:
        for axis in axes.known(label):
            roles[axis] |= {(name, reads) for name in leaves}
    for name, labels in tracer.dimensions.items():
        for d, label in enumerate(labels):
            for i, axis in enumerate(known := axes.known(label)):
                sizes = axes.width(known[:i]), axes.size[axis], axes.width(known[i + 1 :])
                slots[axis].append(Along(name, (name, True) in roles[axis], d, *sizes))
    moving, summed = set(), {axis for label in tracer.summed for axis in axes.known(label)}
    for axis, found in slots.items():
        has = dict.fromkeys(slot.name for slot in found)
        writers, readers = ([n for n in has if (n, reads) in roles[axis]] for reads in (False, True))
        if axis in axes.reason or not writers or not readers and axis not in summed:
            continue
        name = " -> ".join(", ".join(dict.fromkeys(map(_module, side))) for side in (writers, readers) if side)
        while name in names:  # two spaces between the same modules
            name += "'"
        names.add(name)
        moving |= {_module(n) for n in has if n not in readers or n in writers}
        yield PermutationSymmetry(name, "permutation", (axes.size[axis],), tuple(found)), None, None
    stays = {}
    for name in parameters:
        known = [axis for label in tracer.dimensions[name] for axis in axes.known(label)]
        written = [axis for axis in known if (name, True) not in roles[axis]] or known
        reasons = [axes.reason[axis] for axis in written if axis in axes.reason]
        reason = reasons[0] if reasons else "nothing reads it" if known else "it is one number"
        if _module(name) not in moving:
            stays.setdefault(_module(name), reason if name in tracer.used else "it is not used in this forward pass")
    for name, reason in stays.items():
        yield PermutationSymmetry(name, "permutation", (0,), ()), None, reason


class Chains(Finder):
    """Finds them in the graph of torch.fx, for want of inputs: plain layers with what acts on each unit in between."""

    def candidates(self) -> Iterator[Candidate]:
        """(symmetry, the modules that it needs to itself, a reason against it or None)."""
        self.search()
        for s, _, reason in self.spaces:
            parameters = [slot for slot in s.slots if slot.name in self.parameters]
            modules = dict.fromkeys(slot.name.rpartition(".")[0] for slot in s.slots)
            reason = reason or self.obstacle(parameters, modules) or ("it is one unit" if s.shape == (1,) else None)
            yield PermutationSymmetry(s.name, "permutation", s.shape, s.slots), None, reason

    def along(self, channels: Channels, name: str, reads: bool, dims: Mapping[str, int], outer: int = 1) -> None:
        """Slots of a module: {attribute: dimension}."""
        for attribute, dim in dims.items():
            x = attribute_of(self.modules[name], attribute)
            if x is not None:
                inner = x.shape[dim] // (outer * channels.size)
                where = self.names.get(id(x), f"{name}.{attribute}")
                channels.slots.append(Along(where, reads, dim, outer, channels.size, inner))

    def write(self, name: str, flow: Flow) -> None:
        """Note that a module writes these channels. Raises ValueError if it cannot."""
        channels, module = flow.channels, self.module(name)
        channels.writers.append(name)
        dim = 1 if type(module) in (*CONV_TRANSPOSE, nn.Embedding) else 0
        plain = type(module) in (nn.Linear, nn.Embedding, *CONV, *CONV_TRANSPOSE)
        if not plain or getattr(module, "groups", 1) > 1 or getattr(module, "max_norm", None) is not None:
            raise ValueError(f"{type(module).__name__} is not supported, or has groups")
        if channels.size not in (None, module.weight.shape[dim]):
            raise ValueError(f"{name} and {channels.writers[0]} write different numbers of channels")
        channels.size = module.weight.shape[dim]
        self.along(channels, name, False, {"weight": dim} | ({} if type(module) is nn.Embedding else {"bias": 0}))

    def read(self, name: str, flow: Flow, part: int | None = None) -> None:
        """Note that a module reads these channels. Raises ValueError if it cannot."""
        channels, module, size = flow.channels, self.module(name), flow.channels.size
        channels.readers.append(name)
        if size is None:  # blocked already
            return
        if type(module) is nn.Linear and flow.dim != 1 and module.in_features % size == 0:
            if flow.flat is not None or module.in_features == size:
                outer = module.in_features // size if flow.flat is False else 1
                return self.along(channels, name, True, {"weight": 1}, outer)
        if type(module) in CONV + CONV_TRANSPOSE and flow.dim != -1 and module.in_channels == size:
            if module.groups == 1:
                return self.along(channels, name, True, {"weight": int(type(module) in CONV)})
        raise ValueError(f"{type(module).__name__} does not read its {size} channels one by one")

    def layer(
        self, node: fx.Node, name: str, module: nn.Module | None, flows: Flows, inputs: list[Flow]
    ) -> Flow | None:
        """What comes out of a layer: of one that acts on each channel by itself, the same channels."""
        flow, kind, size = inputs[0], type(module), inputs[0].channels.size
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            dims = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
            own = module.num_features == size
        elif kind in CONV and module.groups == module.in_channels == module.out_channels > 1:
            dims, own = {"weight": 0, "bias": 0}, module.in_channels == size
        elif kind is nn.PReLU and module.num_parameters > 1:
            dims, own = {"weight": 0}, module.num_parameters == size
        elif kind in NORM:
            return blocked(inputs, f"{name} normalizes it", [name])
        else:
            return Finder.layer(self, node, name, module, flows, inputs)
        if flow.dim != 1 or not own:
            return blocked(inputs, f"{name} may not act on each channel by itself", [name])
        self.along(flow.channels, name, False, dims)
        return flow

    def between(
        self, prefix: str, node: fx.Node, module: nn.Module | None, op: str, flows: Flows, inputs: list[Flow]
    ) -> Flow | None:
        """What comes out of an operation: of one on each number by itself, the same channels."""
        if len(inputs) == 1 and (ELEMENTWISE.fullmatch(op) or ARITHMETIC.fullmatch(op)):
            others = [x for x in (*node.args, *node.kwargs.values()) if x not in flows]
            return inputs[0] if all(isinstance(x, bool | int | float | str | None) for x in others) else None
        return Finder.between(self, prefix, node, module, op, flows, inputs)
