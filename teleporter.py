"""Teleport your own model: find its symmetries, move it along them in place, leave its function alone.

    teleporter = Teleporter(model, optimizer=optimizer)
    print(teleporter)                                   # what moves; what is left alone, and why
    moved = teleporter.step(x, lambda output: F.cross_entropy(output, y))
    moved.drift                                         # loss_after - loss_before: rounding

A symmetry is a hidden space with parameters that write into it and parameters that read from it. An element M moves the
writers by M and the readers by M^-T, so that what passes between them stays the same:

    "rescale"     M = diag(s), s > 0: channels between layers that positively homogeneous operations join (ReLU, leaky
                  ReLU, dropout, pooling, flattening, residual additions). Writers: Linear, Conv, ConvTranspose,
                  Embedding, MultiheadAttention's output, the scale and shift of a normalization. Readers: Linear, Conv,
                  ConvTranspose, MultiheadAttention's inputs. A residual stream is one space.
    "attention"   M in GL(d_head), one per head: queries write and keys read, since q·k is preserved; values write and
                  the output projection reads.

Both are exact for every input, in training and in evaluation mode. A BatchNorm between two layers is no obstacle: its
scale and shift are the writer, its statistics stay. What comes before a normalization is left alone: in training mode
the loss does not depend on its scale (up to ε), so that moving it would only change its learning rate; in evaluation
mode it could be traded against the scale and statistics of the BatchNorm, but that breaks when training goes on.

    "preactivation", "postactivation"   g in GL(width) between two Linear (teleport.py). Data-dependent: exact on a
                  batch no larger than the layer, a least-squares fit otherwise. Only on request, and on their own.

Gradients move against the weights: where L is invariant, ∂L/∂W of a writer moves by M^-T, that of a reader by M. One
gradient G therefore gives the gradient norm on the whole orbit, and its derivative at M = exp(T), T = 0,

    ∂‖∂L/∂W‖²/∂T = 2 (Σ_readers G Gᵀ − Σ_writers G Gᵀ)    (its diagonal for a rescaling; rows of G: the space).

It equals what a Hessian-vector product would give, 2 (Σ_writers HG Wᵀ − Σ_readers W (HG)ᵀ), which is what any other
objective uses. The norm has no maximum on the orbit: `bound` makes one.

`level_set_teleport` needs no symmetry (Mishkin, Bietti, Gower, AISTATS 2025, arXiv 2403.03362).
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport import SIGMOID, TANH, Activation, Teleportation, leaky_relu, postactivation_action, preactivation_action

# ---------------------------------------------------------------------------------------------------------------------
# Symmetries


class Slot(NamedTuple):
    """A part of a parameter that writes into a hidden space (reads: False) or reads from it (reads: True)."""

    name: str  # of the parameter
    reads: bool
    view: Callable  # a tensor of the parameter's shape -> a view of it with the space in front: (groups, size, ...)


class Symmetry(NamedTuple):
    """A hidden space. Its elements are exp(T), T of this shape: (size,) rescaling, (heads, d, d) attention."""

    name: str
    kind: str
    shape: tuple
    slots: tuple

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
        if like != "weights":
            M, dual = dual, M
        if like == "squares":
            M, dual = M**2, dual**2
        for slot in self.slots:
            if tensors.get(slot.name) is None:
                continue
            x = slot.view(tensors[slot.name])
            m = (dual if slot.reads else M).to(x)
            if self.kind == "rescale":
                x.mul_(m.reshape(*x.shape[:2], *[1] * (x.ndim - 2)))
            else:
                x.copy_(torch.einsum("hij,hj...->hi...", m, x))

    def derivative(self, covectors: dict, vectors: dict) -> Tensor:
        """∂/∂T at T = 0 of Σ⟨covector, vector moved by exp(T)⟩; covectors = ∂objective/∂W, vectors = W."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for slot in self.slots:
            c, x = (slot.view(tensors[slot.name]) for tensors in (covectors, vectors))
            c, x = (y.detach().reshape(*y.shape[:2], -1) for y in (c, x))
            c, x = (-x, c) if slot.reads else (c, x)
            total += ((c * x).sum(2).flatten() if self.kind == "rescale" else c @ x.mT).cpu()
        return total

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
    shape: tuple
    slots: tuple
    V: str
    activation: Activation
    U: str

    def steepest(self, D: Tensor) -> Tensor:
        """The T of Frobenius norm 1 that maximizes ⟨D, T⟩."""
        return D / D.norm().clamp_min(torch.finfo(D.dtype).tiny)


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


# ---------------------------------------------------------------------------------------------------------------------
# Where modules write and read: [(attribute, view)]


def _rows(x):
    return x.unsqueeze(0)


def _columns(start=0, size=None):
    return lambda x: x.narrow(0, start, size or len(x)).movedim(1, 0).unsqueeze(0)


def _flat_columns(size, channels_first):
    """Columns of a Linear that reads flattened (channels, positions), or (positions, channels)."""
    if channels_first:
        return lambda x: x.movedim(1, 0).unflatten(0, (size, -1)).unsqueeze(0)
    return lambda x: x.movedim(1, 0).unflatten(0, (-1, size)).movedim(1, 0).unsqueeze(0)


def _grouped(groups):
    """A convolution's second weight dimension counts the channels of one group: (groups, size, out / groups, ...)."""
    return lambda x: x.unflatten(0, (groups, -1)).movedim(2, 1)


def _heads(heads, d, start=0, size=None, dim=0):
    """(heads, d, heads that share this element, ...)"""

    def view(x):
        x = x.movedim(dim, 0)
        return x.narrow(0, start, size or len(x)).unflatten(0, (heads, -1, d)).movedim(2, 1)

    return view


_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def _writer(module):
    """What scales the module's output channels. Raises ValueError if nothing does."""
    kind = type(module)
    if kind in _NORM and (module.weight is None or module.weight.ndim > 1):
        raise ValueError(f"{kind.__name__} has no scale per channel")
    if kind is nn.Linear or kind in _CONV + _NORM:
        return [("weight", _rows), ("bias", _rows)]
    if kind in _CONV_TRANSPOSE:
        return [("weight", _grouped(module.groups)), ("bias", _rows)]
    if kind is nn.Embedding and module.max_norm is None:
        return [("weight", _columns())]
    if kind is nn.MultiheadAttention:
        return [("out_proj.weight", _rows), ("out_proj.bias", _rows)]
    raise ValueError(f"{kind.__name__} is not supported")


def _reader(module, size, flow, part=None):
    """What reads `size` channels from flow. Raises ValueError if they are not read one by one."""
    kind = type(module)
    if kind is nn.Linear and flow.dim != 1 and module.in_features % size == 0:
        if flow.flat is not None or module.in_features == size:
            return [("weight", _flat_columns(size, flow.flat is not False))]
    if kind in _CONV + _CONV_TRANSPOSE and flow.dim != -1 and module.in_channels == size:
        return [("weight", _grouped(module.groups) if kind in _CONV else _rows)]
    if kind is nn.MultiheadAttention and flow.dim == -1 and flow.flat is None:
        if module.in_proj_weight is None:
            return [("qkv"[part] + "_proj_weight", _columns())]
        return [("in_proj_weight", _columns(part * size, size))]
    raise ValueError(f"{kind.__name__} does not read its {size} channels one by one")


# ---------------------------------------------------------------------------------------------------------------------
# Finding symmetries: follow the channels through the graph of the forward pass

# Operations f with f(sx) = s f(x) for s > 0 in each channel: type of module, or name of function or method, lower case.
_HOMOGENEOUS = re.compile(r"(leaky_?)?relu_?|prelu|identity|(feature_)?dropout[123]?d?_?|contiguous|clone|neg|abs")
_POOLING = re.compile(r"(adaptive_?)?(max|avg)_?pool[123]d|upsample|interpolate|zeropad[123]d|reflectionpad[123]d")


class _Channels:
    """Channels that can only be scaled together: who writes and reads them, and why they stay, if they must."""

    def __init__(self, blocked=None):
        self.blocked, self.size, self.writers, self.readers, self.slots = blocked, None, [], [], []

    def block(self, reason):
        self.blocked = self.blocked or reason

    def absorb(self, other):
        self.block(other.blocked or (self.size != other.size and "tensors of different widths are added"))
        self.writers += other.writers
        self.readers += other.readers
        self.slots += other.slots

    def candidate(self):
        reason = self.blocked or (None if self.readers else "nothing reads it")
        writers, readers = (", ".join(dict.fromkeys(names)) for names in (self.writers, self.readers))
        name = writers if reason else f"{writers} -> {readers}"
        return Symmetry(name, "rescale", (self.size,), tuple(self.slots)), (*self.writers, *self.readers), reason


class _Flow(NamedTuple):
    """A tensor of the graph: its channels and where they are."""

    channels: _Channels
    dim: int | None = None  # 1, or -1: features in the last dimension
    positions: int = 0  # how many dimensions follow dimension 1
    flat: bool | None = None  # flattened together with positions: channels first (True) or last (False)


def _attribute(module, path):
    return reduce(lambda m, name: getattr(m, name, None), path.split("."), module)


def _graphs(module, prefix=""):
    """(prefix, graph) of the largest submodules that torch.fx can trace; torch's own layers are the leaves."""
    children, graph = dict(module.named_children()), None
    if type(module) is nn.Sequential or not type(module).__module__.startswith("torch.nn"):
        attributes = set(vars(module))
        try:
            graph = fx.Tracer().trace(module)
        except Exception:  # whatever the user's forward raises when it meets a proxy
            pass
        for name in set(vars(module)) - attributes:  # constants that tracing leaves behind
            delattr(module, name)
    if graph is not None:
        yield prefix, graph
        children = {n.target: module.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"}
    for name, child in children.items():
        yield from _graphs(child, f"{prefix}{name}.")


class _Finder:
    """Finds candidates, (symmetry, the modules it needs to itself, a reason against it or None), of three sorts."""

    def __init__(self, model):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters())
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self.calls = Counter()
        self.spaces, self.heads, self.hidden = [], [], []  # rescalings, attention, data-dependent actions
        for name, module in model.named_modules():
            if type(module) is nn.MultiheadAttention:
                self.heads += self.multihead(name, module)
            elif type(module) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):  # fx cannot trace these
                if module.activation is F.relu or type(module.activation) is nn.ReLU:
                    self.spaces.append(self.pair(Pair(f"{name}.linear1".lstrip("."), f"{name}.linear2".lstrip("."))))
        for prefix, graph in _graphs(model):
            self.follow(prefix, graph)

    def module(self, name):
        if name not in self.modules:
            raise ValueError(f"the model has no module {name!r}")
        return self.modules[name]

    def slots(self, name, table, reads):
        """Slots of [(attribute, view)]; a name that is no parameter's stands for a weight computed from others."""
        found = [(attribute, view, _attribute(self.modules[name], attribute)) for attribute, view in table]
        return [Slot(self.names.get(id(p), f"{name}.{a}"), reads, view) for a, view, p in found if p is not None]

    def obstacle(self, slots, modules=()):
        """Why these slots of these modules cannot move; None if they can. Raises ValueError for half precision."""
        for slot in slots:
            parameter = self.parameters.get(slot.name)
            if parameter is None:
                return f"{slot.name} is computed from other parameters"
            if not parameter.requires_grad:
                return f"{slot.name} is frozen"
            if self.uses[id(parameter)] > 1:
                return f"{slot.name} is shared"
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{slot.name} is {parameter.dtype}: use float32 parameters (autocast is fine)")
        reused = [name for name in modules if self.calls[id(self.modules[name])] > 1]
        return f"{reused[0]} is called more than once" if reused else None

    # Rescaling

    def write(self, name, flow):
        channels = flow.channels
        channels.writers.append(name)
        module = self.module(name)
        table = _writer(module)
        size = table[0][1](_attribute(module, table[0][0])).shape[:2].numel()
        if channels.size not in (None, size):
            raise ValueError(f"{name} writes {size} channels, {channels.writers[0]} writes {channels.size}")
        channels.size = size
        channels.slots += self.slots(name, table, reads=False)

    def read(self, name, flow, part=None):
        channels, module = flow.channels, self.module(name)
        channels.readers.append(name)
        if channels.size is not None:  # otherwise blocked already
            channels.slots += self.slots(name, _reader(module, channels.size, flow, part), reads=True)

    def pair(self, pair):
        flow = _Flow(_Channels(), flat=True)
        for names, note in zip(pair, (self.write, self.read)):
            for name in [names] if isinstance(names, str) else names:
                note(name, flow)
        return flow.channels.candidate()

    def follow(self, prefix, graph):
        flows = {}
        for node in graph.nodes:
            flow = self.flow(prefix, node, flows)
            if flow is not None:
                flows[node] = flow
            self.hidden += self.linear_pair(prefix, node)
        channels = dict.fromkeys(flow.channels for flow in flows.values())
        self.spaces += [c.candidate() for c in channels if c.writers]

    def operation(self, prefix, node):
        """Name, module (or None) and lower-case name of the operation of a node."""
        if node.op == "call_module":
            module = self.modules[prefix + node.target]
            return prefix + node.target, module, type(module).__name__.lower()
        if node.op == "call_function":
            known = (node.target.__module__ or "").partition(".")[0] in ("torch", "_operator", "builtins")
            return node.target.__name__, None, node.target.__name__.lower() if known else ""
        return prefix + node.target if node.op == "get_attr" else node.target, None, node.target

    def flow(self, prefix, node, flows):
        """Note what a node reads and writes; return the tensor that comes out of it, None if it is not a tensor."""
        name, module, op = self.operation(prefix, node)
        kind, args = type(module), node.args
        inputs = [flows[n] for n in node.all_input_nodes if n in flows]
        flow = inputs[0] if inputs else None
        self.calls[id(module)] += 1

        def blocked(reason):
            for flow in inputs:
                flow.channels.block(reason)
            return _Flow(_Channels(reason))

        def noted(note, flow, *part):
            try:
                note(name, flow, *part)
            except ValueError as error:
                flow.channels.block(str(error))
            return flow

        if node.op == "placeholder":
            return blocked("it is an input")
        if node.op == "get_attr":
            self.uses[id(_attribute(self.modules[prefix.rstrip(".")], node.target))] += 1
            return blocked(f"{name} is used outside its module")
        if node.op == "output":
            return blocked("it is the output of " + (prefix.rstrip(".") or "the model"))
        if not inputs or op in ("size", "dim") or op == "getattr" and args[1] in ("shape", "ndim", "dtype", "device"):
            return None

        if kind is nn.Linear or kind is nn.Embedding:
            if kind is nn.Linear:
                noted(self.read, flow)
            return noted(self.write, _Flow(_Channels(), -1))
        if kind in _CONV + _CONV_TRANSPOSE:
            noted(self.read, flow)
            return noted(self.write, _Flow(_Channels(), 1, positions=int(kind.__name__[-2])))
        if kind in _NORM:
            blocked(f"{name} normalizes it")
            dim = -1 if kind in (nn.LayerNorm, nn.RMSNorm) else flow.dim or 1
            return noted(self.write, _Flow(_Channels(), dim, flow.positions))
        if kind is nn.MultiheadAttention:
            tensors = [n for n in (*args, *map(node.kwargs.get, ("query", "key", "value"))) if n is not None]
            for part, tensor in enumerate(tensors[:3]):
                if tensor in flows:
                    noted(self.read, flows[tensor], part)
            return noted(self.write, _Flow(_Channels(), -1))
        if op == "getitem" and self.operation(prefix, args[0])[2] == "multiheadattention" and args[1] == 0:
            return flow

        if op.strip("i_") in ("add", "sub") and len(args) == 2 and all(n in flows for n in args):
            obstacles = (f.channels.blocked for f in inputs if f.channels.blocked)
            return self.add(flows, *map(flows.get, args)) or blocked(next(obstacles, "unlike tensors are added"))
        if len(inputs) == 1:
            if _HOMOGENEOUS.fullmatch(op):
                return flow
            if _POOLING.fullmatch(op) and flow.dim == 1 and not getattr(module, "return_indices", False):
                return flow
            if op.strip("i_") in ("mul", "truediv", "div") and args[0] in flows and args[1:] and args[1] not in flows:
                return flow  # by a number
            if _flattens(op, node, module) and flow.dim and flow.flat is None:
                return flow._replace(dim=-1, positions=0, flat=flow.dim == 1)
            if op == "mean" and flow.flat is None and _mean_over(node, flow):
                return flow._replace(dim=-1, positions=0)
        if op == "scaled_dot_product_attention":
            self.heads += self.plain_attention(prefix, node)
        reason = blocked(f"{name} is not homogeneous in each channel")
        if module is not None and next(module.parameters(), None) is not None:
            reason.channels.writers.append(name)
        return reason

    def add(self, flows, a, b):
        """The sum of two tensors: from now on their channels are one."""
        if a[1:] != b[1:]:
            return None
        if a.channels is not b.channels:
            a.channels.absorb(b.channels)
            for node, flow in flows.items():
                if flow.channels is b.channels:
                    flows[node] = flow._replace(channels=a.channels)
        return a

    # Attention

    def multihead(self, name, m):
        fused, E, heads, d = m.in_proj_weight is not None, m.embed_dim, m.num_heads, m.head_dim

        def slots(part, reads):
            weight, at = ("in_proj_weight", part * E) if fused else ("qkv"[part] + "_proj_weight", 0)
            table = [(weight, _heads(heads, d, at, E)), ("in_proj_bias", _heads(heads, d, part * E, E))]
            if part > 0:
                table.append(("bias_" + "qkv"[part], _heads(heads, d, dim=2)))
            return self.slots(name, table, reads)

        out = self.slots(name, [("out_proj.weight", _heads(heads, d, dim=1))], True)
        queries, values = slots(0, False) + slots(1, True), slots(2, False) + out
        yield Symmetry(f"{name}: queries, keys", "attention", (heads, d, d), tuple(queries)), (), None
        yield Symmetry(f"{name}: values, output", "attention", (heads, d, d), tuple(values)), (), None

    def attention(self, a):
        kv, fused = a.kv_heads or a.heads, a.q == a.k == a.v
        for name in a[:4]:
            if type(self.module(name)) is not nn.Linear:
                raise ValueError(f"{name} is not a Linear: Attention joins plain projections")
        widths = [self.modules[n].out_features // (3 if fused else 1) for n in a[:3]]
        d, d_v = widths[1] // kv, widths[2] // kv
        if widths != [a.heads * d, kv * d, kv * d_v] or self.modules[a.out].in_features != a.heads * d_v:
            raise ValueError(f"{a}: the widths of these projections do not fit its heads")

        def slots(part, d, reads):
            view = _heads(kv, d, part * widths[0] if fused else 0, widths[part])
            return self.slots(a[part], [("weight", view), ("bias", view)], reads)

        out = self.slots(a.out, [("weight", _heads(kv, d_v, dim=1))], True)
        queries, values = slots(0, d, False) + slots(1, d, True), slots(2, d_v, False) + out
        yield Symmetry(f"{a.q}, {a.k}: queries, keys", "attention", (kv, d, d), tuple(queries)), a[:4], None
        yield Symmetry(f"{a.v}, {a.out}: values, output", "attention", (kv, d_v, d_v), tuple(values)), a[:4], None

    def plain_attention(self, prefix, node):
        """The projections around a scaled_dot_product_attention, if heads are split and merged in the usual way."""
        sources, out = [self.split_heads(prefix, n) for n in node.args[:3]], self.merge_heads(prefix, node)
        if out is not None and None not in sources:
            names, heads, parts = zip(*sources)
            if len(set(heads)) == 1 and parts == ((0, 1, 2) if len(set(names)) == 1 else (None, None, None)):
                yield from self.attention(Attention(*names, out, heads[0]))

    def split_heads(self, prefix, node):
        """(Linear, heads, part of it or None) if node is Linear, view(batch, tokens, heads, d), transpose(1, 2)."""
        op, part = partial(self.operation, prefix), None
        view = node.args[0]
        if op(node)[2] != "transpose" or {*node.args[1:]} not in ({1, 2}, {-2, -3}) or len(node.users) > 1:
            return None
        sizes = view.args[-1] if isinstance(view.args[-1], tuple | list) else view.args[1:]
        if (op(view)[2], len(sizes)) not in (("view", 4), ("reshape", 4), ("unflatten", 2)) or len(view.users) > 1:
            return None
        source = view.args[0]
        if op(source)[2] == "getitem" and op(source.args[0])[2] in ("chunk", "split") and len(source.users) == 1:
            source, part = source.args
            third = 3 if op(source)[2] == "chunk" else getattr(op(source.args[0])[1], "out_features", 0) // 3
            known = isinstance(source.args[1], fx.Node) or source.args[1] == third
            if len(source.users) != 3 or not known or {*source.args[2:], *source.kwargs.values()} not in ({-1}, {2}):
                return None
            source = source.args[0]
        name, module, _ = op(source)
        usual = type(module) is nn.Linear and isinstance(sizes[-2], int) and len(source.users) == 1
        return (name, sizes[-2], part) if usual else None

    def merge_heads(self, prefix, node):
        """The Linear that reads node.transpose(1, 2).reshape(batch, tokens, features), or None."""
        for expected in ("transpose", "contiguous", "view|reshape|flatten", "linear"):
            if len(node.users) > 1:
                return None
            name, module, op = self.operation(prefix, user := next(iter(node.users)))
            if re.fullmatch(expected, op):
                node = user
                arguments = {"transpose": ({1, 2}, {-2, -3}), "flatten": ({2}, {-2})}.get(op)
                if arguments and {*node.args[1:]} not in arguments or op in ("view", "reshape") and len(node.args) != 4:
                    return None
            elif expected != "contiguous":
                return None
        return name if type(module) is nn.Linear else None

    # Data-dependent actions

    def linear_pair(self, prefix, node):
        """A HiddenAction if node is an activation of teleport.py between two Linear, and nothing else reads either."""
        _, module, op = self.operation(prefix, node)
        slope = getattr(module, "negative_slope", node.kwargs.get("negative_slope", 0.01))
        known = {"tanh": TANH, "sigmoid": SIGMOID, "relu": leaky_relu(0.0), "leakyrelu": leaky_relu(slope)}
        activation = known.get(op.replace("_", ""))
        if activation is None or len(node.users) != 1 or len(node.all_input_nodes) != 1:
            return
        before, after = node.all_input_nodes[0], next(iter(node.users))
        (V, first, _), (U, second, _) = self.operation(prefix, before), self.operation(prefix, after)
        if type(first) is type(second) is nn.Linear and len(before.users) == 1:
            slots = [s for name in (V, U) for s in self.slots(name, [("weight", _rows), ("bias", _rows)], False)]
            d = first.out_features
            yield HiddenAction(f"{V} -> {U}", "hidden", (d, d), tuple(slots), V, activation, U), (V, U), None


def _flattens(op, node, module):
    """Whether node flattens all but the batch dimension; x.view(.., features) is taken to do so."""
    arguments = (*node.args[1:], *node.kwargs.values())
    if module is not None:
        return op == "flatten" and (module.start_dim, module.end_dim) == (1, -1)
    if op in ("view", "reshape"):
        return len(arguments[0] if isinstance(arguments[0], tuple | list) else arguments) == 2
    return op == "flatten" and arguments in ((1,), (1, -1))


def _mean_over(node, flow):
    """Whether node averages all positions of a flow: of images, or of tokens."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    p = flow.positions
    positions = (tuple(range(2, 2 + p)), tuple(range(-p, 0))) if flow.dim == 1 else ((1,),) if flow.dim == -1 else ()
    return len(node.args) < 3 and not node.kwargs.get("keepdim") and dims != () and dims in positions


# ---------------------------------------------------------------------------------------------------------------------
# Teleporter

_ACTIONS = {"preactivation": preactivation_action, "postactivation": postactivation_action}
_HALVINGS = 10

# Optimizer states that are made of gradients, and of their squares; all others are kept as they are.
_STATES = {"gradients": ("momentum_buffer", "exp_avg", "grad_avg"),
           "squares": ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")}  # fmt: skip


class Teleporter:
    """Moves a model's parameters, in place, along its symmetries to where an objective is larger.

    model: any nn.Module. symmetries: "auto" (all that are exact), or a list of "rescale", "attention" (found in the
    model), Pair and Attention (given by hand); or ["preactivation"] or ["postactivation"]. objective: "gradient_norm",
    ‖∂L/∂W‖² over all trainable parameters, or objective(loss, parameters) -> scalar, parameters {name: tensor}, which
    must be differentiable in them (through torch.autograd.grad(..., create_graph=True) if it uses gradients). maximize:
    False makes it smaller. bound: one step scales every channel, and every singular value of an attention element, by a
    factor within [1/bound, bound]; of a data-dependent action, log(bound) is the Frobenius norm of its tangent. With 2,
    the default, rescalings are by powers of two, which floating point does without any rounding. optimizer: its running
    means of gradients (momentum) and of their squares (Adam, RMSprop, Adagrad) move with the gradients, to what they
    would be had the past gradients been taken at the moved weights; everything else in it is kept. tolerance: the drift
    allowed, relative to 1 + |loss|.

    Attributes: symmetries, a list of Symmetry (or HiddenAction); left_alone, {writers: why their output stays}.

    Raises ValueError if nothing can be moved, for an option or module that does not exist, and for half precision.
    Shared and frozen parameters are left alone. Parameters may be on several devices. A forward pass that torch.fx
    cannot trace is searched module by module. Hooks, and branches other than the traced one (training mode, optional
    arguments all given), are out of sight: `step` measures the loss, undoes a move that changed it and says so.
    """

    def __init__(self, model, symmetries="auto", objective="gradient_norm", bound=2.0, *, maximize=True, optimizer=None,
                 tolerance=1e-3):  # fmt: skip
        if not 1 < bound < math.inf:
            raise ValueError(f"bound must be a finite factor above 1, got {bound}")
        if not callable(objective) and objective != "gradient_norm":
            raise ValueError(f'objective must be "gradient_norm" or callable(loss, parameters), got {objective!r}')
        items = [symmetries] if isinstance(symmetries, str) else list(symmetries)
        for item in items:
            if not isinstance(item, Pair | Attention) and item not in ("auto", "rescale", "attention", *_ACTIONS):
                raise ValueError(f"symmetries: {item!r} is neither a kind of symmetry nor a Pair or Attention")
        self.action = next((_ACTIONS[item] for item in items if isinstance(item, str) and item in _ACTIONS), None)
        if self.action is not None and len(items) > 1:
            raise ValueError("symmetries: a data-dependent action must stand alone")
        self.model, self.bound, self.sign, self.tolerance = model, bound, 1 if maximize else -1, tolerance
        self.objective, self.optimizer = objective if callable(objective) else None, optimizer
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.symmetries, self.left_alone = [], {}
        self._find(items)
        if not self.symmetries:
            raise ValueError(f"no symmetry found: {self.left_alone or 'no layers that could be joined'}")

    def _find(self, items):
        with _same_randomness(self.model):
            finder = _Finder(self.model)
        kinds = {item for item in items if isinstance(item, str)}
        found = finder.hidden if self.action is not None else []
        found = found + (finder.spaces if kinds & {"auto", "rescale"} else [])
        found = found + (finder.heads if kinds & {"auto", "attention"} else [])
        by_hand = [finder.pair(item) for item in items if isinstance(item, Pair)]
        by_hand += [h for item in items if isinstance(item, Attention) for h in finder.attention(item)]
        for candidates, wanted in ((found, False), (by_hand, True)):
            for symmetry, modules, reason in candidates:
                reason = reason or finder.obstacle(symmetry.slots, modules)
                if reason is None:
                    self.symmetries.append(symmetry)
                elif wanted:
                    raise ValueError(f"{symmetry.name}: {reason}")
                else:
                    self.left_alone[symmetry.name] = reason

    def __repr__(self):
        lines = [(s.kind, f"{s.name} {'×'.join(map(str, s.shape))}") for s in self.symmetries]
        lines += [("left alone", f"output of {name}: {reason}") for name, reason in self.left_alone.items()]
        return "Teleporter(\n" + "".join(f"  {kind:<11} {what}\n" for kind, what in lines) + ")"

    def step(self, inputs, loss_fn: Callable) -> Teleportation:
        """One teleport: ascend the objective of loss_fn(model(inputs)) over the symmetries, from the identity.

        inputs: a tensor, a tuple (positional arguments) or a dict (keyword arguments) for model(...). loss_fn(output)
        -> scalar; it must depend on the parameters through the output alone. The step goes as far as `bound` allows in
        the steepest direction. The gradient norm grows all the way; another objective is tried there and then at half
        the distance, up to ten times, and the parameters stay if nothing helps. Random numbers (dropout) are the same
        before and after; neither they nor buffers (running statistics) notice that a teleport happened.

        Cost: two forward-backward passes for the gradient norm; else the objective's derivative, and the objective once
        for each trial. Returns the Teleportation, its weights {name: parameter that may have moved}. Raises ValueError
        for a loss that is not a finite scalar, RuntimeError (parameters restored) if an exact symmetry moved the loss.
        """
        moving = {slot.name: self.parameters[slot.name] for s in self.symmetries for slot in s.slots}
        with torch.enable_grad(), _kept_buffers(self.model), _undone_on_error(moving) as undo:
            loss, value, tangents, hidden = self._evaluate(inputs, loss_fn, derivative=True)
            for _ in range(1 + _HALVINGS):
                if self._move(tangents, hidden):
                    loss_after, value_after = self._evaluate(inputs, loss_fn)
                    kept = abs(loss_after - loss) <= self.tolerance * (1 + abs(loss))
                    if kept and self.sign * (value_after - value) >= 0:
                        break
                    if self.action is None and not kept:
                        raise RuntimeError(
                            f"teleporting moved the loss from {loss:.6g} to {loss_after:.6g} and was undone: it "
                            f"depends on some of these parameters in a way that the model's graph does not show\n{self}"
                        )
                undo()
                tangents = [T / 2 for T in tangents]
            else:
                tangents, loss_after, value_after = [T * 0 for T in tangents], loss, value
        if self.action is None:
            self._transport(tangents)
        return Teleportation(moving, loss, loss_after, value, value_after)

    def random_tangents(self, generator=None) -> list:
        """Tangents as long as those of `step` in a random direction: `apply` them for a control."""
        random = (torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in self.symmetries)
        return [s.steepest(D) * math.log(self.bound) for s, D in zip(self.symmetries, random)]

    def apply(self, tangents: list) -> None:
        """Move by exp(T), one T (Symmetry.shape, float64, CPU) for each exact symmetry; -T moves back exactly."""
        if self.action is not None:
            raise ValueError("a data-dependent action has no meaning without data: use step")
        if [tuple(T.shape) for T in tangents] != [s.shape for s in self.symmetries]:
            raise ValueError(f"tangents must have the shapes {[s.shape for s in self.symmetries]}")
        if not all(T.isfinite().all() for T in tangents):
            raise ValueError("tangents must be finite")
        self._move(tangents)
        self._transport(tangents)

    @torch.no_grad()
    def _move(self, tangents, hidden=None):
        """Move the parameters; False if a data-dependent action cannot take that step."""
        if self.action is None:
            for s, T in zip(self.symmetries, tangents):
                s.act_(self.parameters, T)
            return True
        try:
            moved = self._act_on_hidden(tangents, hidden)
        except ValueError:  # a post-activation step left the range of its activation
            return False
        for name, W in moved.items():
            self.parameters[name].copy_(W)
        return True

    @torch.no_grad()
    def _transport(self, tangents):
        """Move what the optimizer remembers, and the gradients that wait in .grad."""
        state = self.optimizer.state if self.optimizer is not None else {}
        groups = [("gradients", {name: p.grad for name, p in self.parameters.items()})]
        for like, keys in _STATES.items():
            for key in keys:
                found = {name: state.get(p, {}) for name, p in self.parameters.items()}
                # RMSprop's momentum is made of normalized gradients, on which a rescaling has no effect.
                found = {n: x for n, x in found.items() if key != "momentum_buffer" or "square_avg" not in x}
                groups.append((like, {name: x.get(key) for name, x in found.items()}))
        for like, tensors in groups:
            for s, T in zip(self.symmetries, tangents):
                s.act_(tensors, T, like)

    def _evaluate(self, inputs, loss_fn, derivative=False):
        """loss, objective; with derivative also the tangents of the steepest ascent and the inputs of hidden layers."""
        by_transport = self.objective is None and self.action is None
        second = derivative and not by_transport
        args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
        read_by = [s.V for s in self.symmetries] if derivative and self.action is not None else []
        with _same_randomness(self.model), _recorded_inputs(self.model, read_by) as hidden:
            with sdpa_kernel(SDPBackend.MATH) if second else nullcontext():  # the others have no second derivative
                loss = loss_fn(self.model(*args, **(inputs if isinstance(inputs, dict) else {})))
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad or not loss.isfinite():
            raise ValueError(f"loss_fn must return a finite scalar that depends on the parameters, got {loss}")
        W = self.parameters
        if self.objective is None:
            G = _gradient(loss, W, create_graph=second)
            value = sum(g.square().sum().to(loss.device) for g in G.values())
        else:
            value = self.objective(loss, W)
        if not derivative:
            return loss.detach(), value.detach()
        if by_transport:  # ‖M^-T G‖²: gradients move against the weights
            tangents = [s.derivative({n: -2 * g for n, g in G.items()}, G) for s in self.symmetries]
        else:
            C = _gradient(value, W)
            by_action = self.action is not None
            tangents = self._pull_back(C, hidden) if by_action else [s.derivative(C, W) for s in self.symmetries]
        tangents = [self.sign * math.log(self.bound) * s.steepest(D) for s, D in zip(self.symmetries, tangents)]
        return loss.detach(), value.detach(), tangents, hidden

    def _act_on_hidden(self, tangents, hidden):
        """{name: tensor} moved by g = exp(T), layer after layer; each sees its true, already transformed input."""
        W = {slot.name: self.parameters[slot.name].detach() for s in self.symmetries for slot in s.slots}
        hidden = dict(hidden)
        for s, T in zip(self.symmetries, tangents):
            U, V, b = f"{s.U}.weight", f"{s.V}.weight", f"{s.V}.bias"
            h, A = hidden[s.V], W[V]
            if b in W:  # one more column of V, one more row of ones in h
                h, A = torch.cat([h, torch.ones_like(h[:1])]), torch.cat([A, W[b].unsqueeze(1)], 1)
            W[U], A = self.action(W[U], A, h, torch.linalg.matrix_exp(T.to(A)), s.activation)
            hidden[s.U] = s.activation.f(A @ h)
            W[V] = A[:, : W[V].shape[1]]
            if b in W:
                W[b] = A[:, -1]
        return W

    def _pull_back(self, C, hidden):
        """∂objective/∂T at T = 0 through the data-dependent actions, from C = ∂objective/∂W."""
        tangents = [torch.zeros(s.shape, dtype=torch.float64, requires_grad=True) for s in self.symmetries]
        moved = self._act_on_hidden(tangents, hidden)
        moved = {name: x for name, x in moved.items() if x.requires_grad}  # not the last layer's bias
        return torch.autograd.grad(list(moved.values()), tangents, [C[name] for name in moved])


def _gradient(value, parameters, create_graph=False):
    """{name: ∂value/∂parameter}, zero for parameters that value does not depend on."""
    G = torch.autograd.grad(
        value, list(parameters.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, G))


@contextmanager
def _undone_on_error(parameters):
    """Yields a function that puts the parameters back where they were; an exception does that too."""
    before = [(p, p.detach().clone()) for p in parameters.values()]

    def undo():
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)

    try:
        yield undo
    except BaseException:
        undo()
        raise


@contextmanager
def _kept_buffers(model):
    """Forward passes in here leave no trace in the buffers (running statistics)."""
    before = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _same_randomness(model):
    """Every pass in such a context draws the same random numbers, and the outside world sees none of it."""
    return torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda})


@contextmanager
def _recorded_inputs(model, names):
    """{name: what that Linear read, (features, samples)} of the forward pass in this context."""
    inputs = {}

    def record(name, module, args):
        inputs[name] = args[0].detach().flatten(0, -2).T

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in names]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Level sets


def level_set_teleport(
    model, loss_fn: Callable, steps: int = 10, *, radius: float = 0.01, tolerance: float = 1e-3
) -> Teleportation:
    """Raise ‖∇L‖ without raising L, for any twice differentiable model, in place (Mishkin, Bietti, Gower 2025).

    Sequential programming for: maximize ½ log ‖∇L(w)‖² subject to L(w) ≤ L(w_0). With q = ∇²L ∇L / ‖∇L‖², the gradient
    of that objective (a Hessian-vector product; thanks to the logarithm the step does not depend on the scale of the
    loss), each step solves

        max_d ⟨q, d⟩ − ‖d‖²/2ρ   subject to   L + ⟨∇L, d⟩ ≤ L_0,      d = ρq − v∇L,  v = (ρ⟨q, ∇L⟩ + L − L_0)_+ / ‖∇L‖²,

    and takes it if the merit ½ log ‖∇L‖² − γ (L − L_0)_+ grows by a tenth of ‖d‖²/ρ, which it promises to first order
    when γ ≥ v/ρ, the multiplier. ρ doubles after a step that was taken and is divided by 4 after one that was not.

    loss_fn(model) -> scalar, deterministic: the same batch each time. steps: trials, whether taken or not, each at the
    cost of one gradient and at most one Hessian-vector product. radius: length of the first trial, relative to ‖w‖.
    tolerance: no step goes above L_0 + tolerance (1 + |L_0|). Returns the Teleportation, its weights {name: parameter},
    its objective ‖∇L‖²; drift may be negative, since the loss may fall. Raises ValueError for a loss that is not a
    finite scalar, a zero gradient, parameters on several devices or in half precision.
    """
    W = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if len({(p.device, p.dtype) for p in W.values()}) != 1 or next(iter(W.values())).dtype.itemsize < 4:
        raise ValueError("trainable parameters must share one device and one dtype, float32 or float64")

    def assign(w):
        with torch.no_grad():
            for p, x in zip(W.values(), w.split([p.numel() for p in W.values()])):
                p.copy_(x.view_as(p))

    def evaluate(w):
        assign(w)
        with _same_randomness(model), sdpa_kernel(SDPBackend.MATH):
            loss = loss_fn(model)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            raise ValueError(f"loss_fn must return a scalar that depends on the parameters, got {loss}")
        return loss.detach(), torch.cat([g.flatten() for g in _gradient(loss, W, create_graph=True).values()])

    def curved(g):
        """∇L without its graph, and q."""
        q = torch.autograd.grad(
            g, list(W.values()), g.detach() / g.detach().square().sum(), allow_unused=True, materialize_grads=True
        )
        return g.detach(), torch.cat([x.flatten() for x in q])

    with torch.enable_grad(), _kept_buffers(model), _undone_on_error(W):
        w = torch.cat([p.detach().flatten() for p in W.values()])
        loss_0, g = evaluate(w)
        if not loss_0.isfinite() or not 0 < g.norm() < math.inf:
            raise ValueError(f"loss {loss_0}, gradient norm {g.norm()}: they must be finite, the latter not zero")
        g, q = curved(g)
        loss, norm2_0, gamma = loss_0, g @ g, torch.zeros_like(loss_0)
        rho = radius * w.norm() / (q - ((q @ g) / (g @ g)).clamp_min(0) * g).norm()
        for step in range(steps):
            v = ((rho * (q @ g) + loss - loss_0) / (g @ g)).clamp_min(0)
            d = rho * q - v * g
            if not 0 < d.norm() < math.inf:  # a stationary point of the problem
                break
            gamma = torch.maximum(gamma, 1.1 * v / rho)
            trial, g_trial = evaluate(w + d)
            gain = (g_trial.detach().norm() / g.norm()).log()
            gain = gain - gamma * ((trial - loss_0).clamp_min(0) - (loss - loss_0).clamp_min(0))
            if gain >= 0.1 * (d @ d) / rho and trial - loss_0 <= tolerance * (1 + abs(loss_0)):
                w, loss, rho = w + d, trial, 2 * rho
                g, q = curved(g_trial) if step < steps - 1 else (g_trial.detach(), None)
            else:
                rho = rho / 4
        assign(w)
    return Teleportation(W, loss_0, loss, norm2_0, g @ g)
