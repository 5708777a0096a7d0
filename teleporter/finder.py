"""Finding symmetries: follow the channels through the graph of the forward pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from teleport import SIGMOID, TANH, leaky_relu
from teleporter.layers import (
    CONV,
    CONV_TRANSPOSE,
    NORM,
    Channels,
    Flow,
    Table,
    changed_by_hand,
    needs_inputs,
    passes,
    reader,
    rows,
    split_dim,
    writer,
)
from teleporter.passes import kept_attributes, same_randomness
from teleporter.symmetry import Attention, Candidate, HiddenAction, Pair, Slot, Symmetry
from teleporter.traced import traced

_FACTS = ("shape", "ndim", "dtype", "device")  # of a tensor, which say nothing of its values
Flows = dict[fx.Node, Flow]


def attribute_of(module: nn.Module, path: str) -> Any:
    """What a dotted path leads to; None if nothing."""
    return reduce(lambda m, name: getattr(m, name, None), path.split("."), module)


def _graphs(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, fx.Graph]]:
    """(prefix, graph) of the largest submodules that torch.fx can trace; torch's own layers are the leaves."""
    children, graph = dict(module.named_children()), None
    if type(module) is nn.Sequential or not type(module).__module__.startswith("torch.nn"):
        try:
            with kept_attributes(module):
                graph = fx.Tracer().trace(module)
        except Exception:  # whatever the user's forward raises when it meets a proxy
            pass
    if graph is not None:
        yield prefix, graph
        children = {n.target: module.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"}
    for name, child in children.items():
        yield from _graphs(child, f"{prefix}{name}.")


def blocked(flows: Iterable[Flow], reason: str, writers: Sequence[str] = ()) -> Flow:
    """The channels of these tensors stay; so do those of the tensor returned, which these modules write."""
    for flow in flows:
        flow.channels.block(reason)
    stays = Flow(Channels(reason))
    stays.channels.writers += writers
    return stays


def noted(note: Callable, name: str, flow: Flow, *part: int) -> Flow:
    """flow, which a module reads or writes, or whose channels stay because it cannot."""
    try:
        note(name, flow, *part)
    except ValueError as error:
        flow.channels.block(str(error))
    return flow


def exact_candidates(model: nn.Module, finder: "Finder", kinds: set[str], inputs: Any) -> list[Candidate]:
    """Candidates of these kinds ("auto", "rescale", "attention", "stream"): of one run of the inputs if there are any,
    otherwise, or if that run cannot be followed, of the finder's graphs."""
    scaling, mixing, failed = kinds & {"auto", "rescale"}, kinds & {"auto", "attention"}, []
    wanted = {"rescale": scaling, "stream": kinds & {"auto", "stream"}}
    if inputs is not None and (mixing or any(wanted.values())):
        try:
            found = traced(model, inputs)
        except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError) as error:
            failed = [(Symmetry("trace of the inputs", "rescale", (0,), ()), (), f"{type(error).__name__}: {error}")]
        else:
            return [c for c in found if c[2] or wanted.get(c[0].kind, mixing)]
    finder.search()
    return failed + (finder.spaces if scaling else []) + (finder.heads if mixing else [])


class Finder:
    """Finds candidates, (symmetry, the modules it needs to itself, a reason against it or None), of three sorts.

    on_trial: whether they will be tried on real inputs. If not, what shapes or hooks have to decide is left alone.
    """

    def __init__(self, model: nn.Module, on_trial: bool = True) -> None:
        """Search this model."""
        self.on_trial = on_trial
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters())
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        self.calls, self.model, self.searched = Counter(), model, False
        self.spaces, self.heads, self.hidden = [], [], []  # rescalings, attention, data-dependent actions

    def search(self) -> None:
        """Fill spaces, heads and hidden, once."""
        if self.searched:
            return
        self.searched = True
        for name, module in self.model.named_modules():
            if changed_by_hand(module) and not self.on_trial:
                continue
            if type(module) is nn.MultiheadAttention:
                self.heads += self.multihead(name, module)
            elif type(module) in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):  # fx cannot trace these
                if module.activation is F.relu or type(module.activation) is nn.ReLU:
                    self.spaces.append(self.pair(Pair(f"{name}.linear1".lstrip("."), f"{name}.linear2".lstrip("."))))
        with same_randomness(self.model):
            for prefix, graph in _graphs(self.model):
                self.follow(prefix, graph)

    def module(self, name: str) -> nn.Module:
        """The module of this name. Raises ValueError if there is none."""
        if name not in self.modules:
            raise ValueError(f"the model has no module {name!r}")
        return self.modules[name]

    def slots(self, name: str, table: Table, reads: bool) -> list[Slot]:
        """Slots of [(attribute, view)]; a name that is no parameter's stands for a weight computed from others."""
        found = [(attribute, view, attribute_of(self.modules[name], attribute)) for attribute, view in table]
        return [Slot(self.names.get(id(p), f"{name}.{a}"), reads, view) for a, view, p in found if p is not None]

    def obstacle(self, slots: Iterable[Slot], modules: Iterable[str] = ()) -> str | None:
        """Why these slots of these modules cannot move; None if they can."""
        for slot in slots:
            parameter = self.parameters.get(slot.name)
            if parameter is None:
                return f"{slot.name} is computed from other parameters"
            if not parameter.requires_grad:
                return f"{slot.name} is frozen"
            if self.uses[id(parameter)] > 1:
                return f"{slot.name} is shared"
            if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
                return f"{slot.name} is {parameter.dtype}"
        reused = [name for name in modules if self.calls[id(self.modules[name])] > 1]
        return f"{reused[0]} is called more than once" if reused else None

    # Rescaling

    def write(self, name: str, flow: Flow) -> None:
        """Note that a module writes these channels. Raises ValueError if it cannot."""
        channels = flow.channels
        channels.writers.append(name)
        module = self.module(name)
        table = writer(module)
        size = table[0][1](attribute_of(module, table[0][0])).shape[:2].numel()
        if channels.size not in (None, size):
            raise ValueError(f"{name} writes {size} channels, {channels.writers[0]} writes {channels.size}")
        channels.size = size
        channels.slots += self.slots(name, table, reads=False)

    def read(self, name: str, flow: Flow, part: int | None = None) -> None:
        """Note that a module reads these channels. Raises ValueError if it cannot."""
        channels, module = flow.channels, self.module(name)
        channels.readers.append(name)
        if channels.size is not None:  # otherwise blocked already
            channels.slots += self.slots(name, reader(module, channels.size, flow, part), reads=True)

    def pair(self, pair: Pair) -> Candidate:
        """The rescaling of a Pair."""
        first = self.module(pair.writers if isinstance(pair.writers, str) else pair.writers[0])
        flow = Flow(Channels(), flat=None if type(first) in (nn.Linear, nn.Embedding) else True)
        for names, note in zip(pair, (self.write, self.read)):
            for name in [names] if isinstance(names, str) else names:
                note(name, flow)
        return flow.channels.candidate()

    def follow(self, prefix: str, graph: fx.Graph) -> None:
        """Note what there is in a graph."""
        flows = {}
        for node in graph.nodes:
            try:
                flow = self.flow(prefix, node, flows)
            except (ValueError, TypeError, LookupError, AttributeError, StopIteration) as error:  # an odd call
                flow = self.flow(prefix, node, flows, f"{node.name} is called in an unknown way: {error}")
            if flow is not None:
                flows[node] = flow
            self.hidden += self.linear_pair(prefix, node)
        channels = dict.fromkeys(flow.channels for flow in flows.values())
        self.spaces += [c.candidate() for c in channels if c.writers]

    def operation(self, prefix: str, node: fx.Node) -> tuple[str, nn.Module | None, str]:
        """Name, module (or None) and lower-case name of the operation of a node."""
        if node.op == "call_module":
            module = self.modules[prefix + node.target]
            return prefix + node.target, module, type(module).__name__.lower()
        if node.op == "call_function":
            known = (node.target.__module__ or "").partition(".")[0] in ("torch", "_operator", "builtins")
            return node.target.__name__, None, node.target.__name__.lower() if known else ""
        return prefix + node.target if node.op == "get_attr" else node.target, None, node.target

    def flow(self, prefix: str, node: fx.Node, flows: Flows, obstacle: str | None = None) -> Flow | None:
        """Note what a node reads and writes; return the tensor that comes out of it, None if it is not a tensor.

        obstacle: why its tensors stay, if that is known already.
        """
        name, module, op = self.operation(prefix, node)
        inputs = [flows[n] for n in node.all_input_nodes if n in flows]
        self.calls[id(module)] += 1
        obstacle = obstacle or self.end(prefix, node, name)
        if obstacle is not None:
            return blocked(inputs, obstacle)
        if not inputs or op in ("size", "dim") or op == "getattr" and node.args[1] in _FACTS:
            return None
        if not self.on_trial and (obstacle := needs_inputs(name, node, module, op, inputs[0])):
            return blocked(inputs, obstacle, [name] if module is not None else [])
        after = self.layer(node, name, module, flows, inputs) or self.between(prefix, node, module, op, flows, inputs)
        if after is not None:
            return after
        if op == "scaled_dot_product_attention":
            self.heads += self.plain_attention(prefix, node)
        layer = module is not None and next(module.parameters(), None) is not None
        return blocked(inputs, f"{name} is not homogeneous in each channel", [name] if layer else [])

    def end(self, prefix: str, node: fx.Node, name: str) -> str | None:
        """Why tensors stay where the graph begins, ends, or takes a parameter out of its module; else None."""
        if node.op == "placeholder":
            return "it is an input"
        if node.op == "output":
            return "it is the output of " + (prefix.rstrip(".") or "the model")
        facts = (self.operation(prefix, n)[2] == "getattr" and n.args[1] in _FACTS for n in node.users)
        if node.op == "get_attr" and not all(facts):
            self.uses[id(attribute_of(self.modules[prefix.rstrip(".")], node.target))] += 1
            return f"{name} is used outside its module"
        return None

    def layer(
        self, node: fx.Node, name: str, module: nn.Module | None, flows: Flows, inputs: list[Flow]
    ) -> Flow | None:
        """What comes out of a layer that reads or writes channels; None if it is none."""
        kind, flow = type(module), inputs[0]
        if kind is nn.Embedding:
            return noted(self.write, name, Flow(Channels(), -1))
        if kind is nn.Linear:
            noted(self.read, name, flow)
            return noted(self.write, name, Flow(Channels(), -1))
        if kind in CONV + CONV_TRANSPOSE:
            noted(self.read, name, flow)
            return noted(self.write, name, Flow(Channels(), 1, positions=int(kind.__name__[-2])))
        if kind in NORM:
            blocked(inputs, f"{name} normalizes it")
            dim = -1 if kind in (nn.LayerNorm, nn.RMSNorm) else flow.dim or 1
            return noted(self.write, name, Flow(Channels(), dim, flow.positions))
        if kind is nn.MultiheadAttention:
            tensors = [n for n in (*node.args, *map(node.kwargs.get, ("query", "key", "value"))) if n is not None]
            for part, tensor in enumerate(tensors[:3]):
                if tensor in flows:
                    noted(self.read, name, flows[tensor], part)
            return noted(self.write, name, Flow(Channels(), -1))
        return None

    def between(
        self, prefix: str, node: fx.Node, module: nn.Module | None, op: str, flows: Flows, inputs: list[Flow]
    ) -> Flow | None:
        """What comes out of an operation that keeps channels apart or adds them; None if it does neither."""
        args = node.args
        if op == "getitem" and self.operation(prefix, args[0])[2] == "multiheadattention" and args[1] == 0:
            return inputs[0]
        if op.strip("i_") in ("add", "sub") and len(args) == 2 and all(n in flows for n in args):
            obstacles = (f.channels.blocked for f in inputs if f.channels.blocked)
            unlike = next(obstacles, "unlike tensors are added")
            return self.add(flows, *map(flows.get, args)) or blocked(inputs, unlike)
        return passes(op, node, module, inputs[0], flows) if len(inputs) == 1 else None

    def add(self, flows: Flows, a: Flow, b: Flow) -> Flow | None:
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

    def multihead(self, name: str, m: nn.MultiheadAttention) -> Iterator[Candidate]:
        """The two spaces of each of its heads."""
        fused, E, heads, d = m.in_proj_weight is not None, m.embed_dim, m.num_heads, m.head_dim

        def slots(part: int, reads: bool) -> list[Slot]:
            weight, at = ("in_proj_weight", part * E) if fused else ("qkv"[part] + "_proj_weight", 0)
            table = [(weight, split_dim(heads, d, at, E)), ("in_proj_bias", split_dim(heads, d, part * E, E))]
            if part > 0:
                table.append(("bias_" + "qkv"[part], split_dim(heads, d, dim=2)))
            return self.slots(name, table, reads)

        out = self.slots(name, [("out_proj.weight", split_dim(heads, d, dim=1))], True)
        queries, values = slots(0, False) + slots(1, True), slots(2, False) + out
        yield Symmetry(f"{name}: queries, keys", "attention", (heads, d, d), tuple(queries)), (), None
        yield Symmetry(f"{name}: values, output", "attention", (heads, d, d), tuple(values)), (), None

    def attention(self, a: Attention) -> Iterator[Candidate]:
        """The same of plain projections. Raises ValueError if they do not fit."""
        kv, fused = a.kv_heads or a.heads, a.q == a.k == a.v
        for name in a[:4]:
            if type(self.module(name)) is not nn.Linear:
                raise ValueError(f"{name} is not a Linear: Attention joins plain projections")
        widths = [self.modules[n].out_features // (3 if fused else 1) for n in a[:3]]
        d, d_v = widths[1] // kv, widths[2] // kv
        if widths != [a.heads * d, kv * d, kv * d_v] or self.modules[a.out].in_features != a.heads * d_v:
            raise ValueError(f"{a}: the widths of these projections do not fit its heads")

        def slots(part: int, d: int, reads: bool) -> list[Slot]:
            view = split_dim(kv, d, part * widths[0] if fused else 0, widths[part])
            return self.slots(a[part], [("weight", view), ("bias", view)], reads)

        out = self.slots(a.out, [("weight", split_dim(kv, d_v, dim=1))], True)
        queries, values = slots(0, d, False) + slots(1, d, True), slots(2, d_v, False) + out
        yield Symmetry(f"{a.q}, {a.k}: queries, keys", "attention", (kv, d, d), tuple(queries)), a[:4], None
        yield Symmetry(f"{a.v}, {a.out}: values, output", "attention", (kv, d_v, d_v), tuple(values)), a[:4], None

    def plain_attention(self, prefix: str, node: fx.Node) -> Iterator[Candidate]:
        """The projections around a scaled_dot_product_attention, if heads are split and merged in the usual way."""
        tensors = (*node.args[:3], *map(node.kwargs.get, ("query", "key", "value")[len(node.args) :]))
        if node.kwargs.keys() & {"enable_gqa"} or not all(isinstance(n, fx.Node) for n in tensors):
            return
        sources, out = [self.split_heads(prefix, n) for n in tensors], self.merge_heads(prefix, node)
        if out is not None and None not in sources:
            names, heads, parts = zip(*sources)
            if len(set(heads)) == 1 and parts == ((0, 1, 2) if len(set(names)) == 1 else (None, None, None)):
                yield from self.attention(Attention(*names, out, heads[0]))

    def split_heads(self, prefix: str, node: fx.Node) -> tuple[str, int, int | None] | None:
        """(Linear, heads, part of it or None) if node is Linear, view(batch, tokens, heads, d), transpose(1, 2)."""
        op, part = partial(self.operation, prefix), None
        view = node.args[0] if node.args else None
        if not isinstance(view, fx.Node) or not view.args:
            return None
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
        if type(module) is not nn.Linear or not isinstance(sizes[-2], int) or len(source.users) != 1:
            return None
        heads, d = sizes[-2:]
        if heads < 0 and isinstance(d, int):  # as many as fit
            heads = module.out_features // (d if part is None else 3 * d)
        return (name, heads, part) if heads > 0 else None

    def merge_heads(self, prefix: str, node: fx.Node) -> str | None:
        """The Linear that reads node.transpose(1, 2).reshape(batch, tokens, features), or None."""
        for expected in ("transpose", "contiguous", "view|reshape|flatten", "linear"):
            if len(node.users) != 1:
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

    def linear_pair(self, prefix: str, node: fx.Node) -> Iterator[Candidate]:
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
            slots = [s for name in (V, U) for s in self.slots(name, [("weight", rows), ("bias", rows)], False)]
            d = first.out_features
            yield HiddenAction(f"{V} -> {U}", "hidden", (d, d), tuple(slots), V, activation, U), (V, U), None
