"""Which numbers of a forward pass can only be scaled together: one real run, followed operation by operation.

Each channel that a layer writes gets a label, an integer for the unknown logarithm of its scale (−k: of the inverse
scale). Labels travel beside the tensors: what moves numbers about (view, cat, slicing) moves their labels by the same
operation, what adds them makes their labels one, what multiplies by a parameter makes new ones, and what is not
homogeneous makes them FIXED. What is not FIXED in the end is free, and every use of every parameter has been seen.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import NotImplementedType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from teleporter.classes import ANY, FIXED, Classes, shrunk
from teleporter.products import Products
from teleporter.streams import Streams
from teleporter.turning import Turns

# Names of aten operations. Those that move numbers about, with and without arithmetic that labels (integers) lack:
MOVES = re.compile(
    r"view|_unsafe_view|reshape|_reshape_alias|permute|transpose|t|expand|squeeze|unsqueeze|select|slice|split|unbind|"
    r"split_with_sizes|clone|alias|detach|lift_fresh|unfold|flip|roll|repeat|repeat_interleave|index|_unsafe_index|cat|"
    r"index_select|diagonal|gather|stack|constant_pad_nd|tril|triu|pixel_(un)?shuffle|channel_shuffle"
)
MOVES_AS_FLOATS = re.compile(r"im2col|(reflection|replication)_pad[123]d|(upsample|_upsample)_nearest(_exact)?[123]d")
LINEAR = re.compile(r"neg|_to_copy|positive")
HOMOGENEOUS = re.compile(r"relu|leaky_relu|abs|native_dropout|_prelu_kernel")
SUMS = re.compile(r"add|sub|rsub|maximum|minimum|where|masked_fill")
REDUCTIONS = re.compile(r"sum|mean|amax|amin|max|min|nansum|cumsum")
POOLS = re.compile(r"_?(adaptive_)?(max|avg)_pool[123]d(_with_indices)?|_?upsample_(bi|tri)?(linear|cubic)[123]d(_aa)?")
CLAMPS = re.compile(r"clamp(_min)?")
SIGNS = re.compile(r"gt|ge|lt|le|eq|ne|sign|signbit|isnan|isinf|isfinite")  # the same for every positive scale
MAKES = re.compile(r"(new_)?(zeros|ones|empty|full|empty_strided)|(zeros|ones|empty|full|rand|randn)_like")
NORMS = re.compile(r"(_?native|cudnn|_fused|_batch)_?\w*norm\w*")


@contextmanager
def named_modules_on_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """stack[-1] is the name of the module whose forward is running."""
    names = {id(m): name for name, m in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            stack.append(names[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names:
            stack.pop()

    hooks = [
        torch_module.register_module_forward_pre_hook(enter),
        torch_module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Follower(TorchDispatchMode):
    """Sees every operation of the forward passes in its context."""

    def __init__(self, model: nn.Module) -> None:
        """Nothing has run yet."""
        super().__init__()
        self.stack, self.model = ["the model"], model

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks; a yes would import its compiler, which takes seconds, for nothing."""
        return False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The context of the one forward pass: no gradients, no fused attention, every operation in sight."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with ExitStack() as contexts:
                contexts.enter_context(named_modules_on_stack(self.model, self.stack))
                contexts.enter_context(torch.inference_mode())
                contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
                contexts.enter_context(self)
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def __torch_dispatch__(self, function: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, or what it is made of, and follow it."""
        kwargs = kwargs or {}
        with self:
            output = function.decompose(*args, **kwargs)
        if output is NotImplemented:
            output = function(*args, **kwargs)
            self.seen(function, args, kwargs, output)
        return output

    def seen(self, function: OpOverload, args: tuple, kwargs: dict, output: Any) -> None:
        """Follow an operation that has run."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """The module whose forward is running, for reasons."""
        return self.stack[-1] or "the model"


# Of one tensor:
KNOWN = re.compile(
    "|".join(p.pattern for p in (MOVES_AS_FLOATS, LINEAR, HOMOGENEOUS, REDUCTIONS, POOLS, CLAMPS, SIGNS))
)


class Tracer(Products, Follower):
    """Follows the labels through the forward pass in its context.

    labels: {tensor: its labels}; tags: {parameter or rearrangement of it: (name, flat positions in the parameter)}; a
    tensor in neither is FIXED. uses: {name: [(positions, labels of what they write, labels of what they read)]}.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Nothing has run yet; parameters: those that may move, {name: parameter}."""
        super().__init__(model)
        self.classes = Classes()
        self.labels, self.tags = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.uses = {name: [] for name in parameters}
        self.whole, self.fixed, self.parameters, self.calls = {}, {}, parameters, 0
        self.turns, self.streams = Turns(self), Streams(self)
        for name, p in parameters.items():
            self.tags[p] = (name, torch.arange(p.numel(), device=p.device).view(p.shape))

    def seen(self, function: OpOverload, args: tuple, kwargs: dict, output: Any) -> None:
        """Labels, and what may turn or rotate besides them."""
        self.follow(function, args, kwargs, output)
        self.turn(function, args, kwargs, output)

    def turn(self, function: OpOverload, args: tuple, kwargs: dict, output: Any) -> None:
        """Follow what may turn in pairs (turning.py), or rotate as a whole (streams.py), besides the labels."""
        name = function._schema.name.partition("::")[2]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if MAKES.fullmatch(name):
            return
        moves = bool(MOVES.fullmatch(name)) and name != "constant_pad_nd"
        for follower in (self.turns, self.streams):
            follower.follow(name, moves, args, kwargs, outputs, lambda moved: _moved(function, name, moved, kwargs))

    # Labels of arguments

    def known(self, x: Any) -> bool:
        """Whether an argument has labels, or is a parameter."""
        return isinstance(x, Tensor) and (x in self.labels or x in self.tags)

    def of(self, x: Tensor | float) -> Tensor:
        """Labels of an argument: tensor (None: FIXED everywhere), parameter, number."""
        if not isinstance(x, Tensor):
            return torch.tensor(ANY if x == 0 or x in (float("inf"), float("-inf")) else FIXED, device="cpu")
        if x in self.tags:
            return self.written(*self.tags[x])
        if x in self.labels:
            return self.labels[x]
        zero = x.ndim == 0 and not x.is_meta and x.item() == 0
        return torch.full((), ANY if zero else FIXED, device=x.device).expand(x.shape)

    def free(self, labels: Tensor) -> bool:
        """Whether some of these labels are neither FIXED nor ANY."""
        (x,) = shrunk(labels)
        return any(self.classes.find(k)[0] > FIXED for k in torch.unique(x).tolist())

    def written(self, name: str, index: Tensor) -> Tensor:
        """Labels of a parameter's own numbers, each with its own: what adds a parameter writes with it."""
        if name not in self.whole:
            n = self.parameters[name].numel()
            self.whole[name] = first = self.classes.fresh(n, None).to(index.device)
            self.uses[name].append((torch.arange(n, device=index.device), first, torch.full_like(first, FIXED)))
        return self.whole[name][index]

    def fresh(self, n: int, like: Tensor) -> Tensor:
        """New labels (n,) of a key of their own, on the device of `like`."""
        self.calls += 1
        return self.classes.fresh(n, self.calls).to(like.device)

    def block(self, labels: Tensor, reason: str) -> None:
        """Make labels FIXED."""
        self.classes.unify(labels, torch.full((), FIXED, device=labels.device), reason)

    # Operations

    def follow(self, function: OpOverload, args: tuple, kwargs: dict, output: Any) -> None:
        """Note what an operation does to the labels of its arguments, and give its output its own."""
        name = function._schema.name.partition("::")[2]
        in_place = name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if MAKES.fullmatch(name) or not any(self.known(x) for x in tensors):
            if name in ("zeros", "zeros_like", "new_zeros"):
                self.labels[output] = torch.zeros(output.shape, dtype=torch.long, device=output.device)
            return
        if (
            args
            and isinstance(args[0], Tensor)
            and args[0] in self.tags
            and not in_place
            and (MOVES.fullmatch(name) or name == "_to_copy")
        ):
            self.move_tag(function, args, kwargs, outputs)
            return
        labels = self.result(name, function, args, kwargs, outputs)
        if in_place:
            self.overwrite(args[0], labels, name)
            return
        for x, own in zip(outputs, labels if isinstance(labels, list) else [labels]):
            if own is not None:
                self.labels[x] = own if own.shape == x.shape else own.expand(x.shape)

    def move_tag(self, function: OpOverload, args: tuple, kwargs: dict, outputs: Sequence[Tensor]) -> None:
        """A rearrangement of a parameter knows the positions of its numbers."""
        name, index = self.tags[args[0]]
        moved = function._schema.name.partition("::")[2]
        moved = [index] if moved == "_to_copy" else _moved(function, moved, [index, *args[1:]], kwargs)
        for x, y in zip(outputs, moved):
            self.tags[x] = (name, y)

    def overwrite(self, target: Tensor, labels: Tensor | None, name: str) -> None:
        """What an operation in place leaves in its target."""
        if labels is None:
            labels = torch.full((), FIXED, device=target.device)
        if target in self.labels:
            if not self.classes.alike(self.labels[target], labels):  # seldom: most are one class by now
                self.labels[target].copy_(labels)
        else:  # a buffer, or a parameter
            self.block(labels, f"{name} in {self.place} stores it")

    def result(
        self, name: str, function: OpOverload, args: tuple, kwargs: dict, outputs: Sequence[Tensor]
    ) -> Tensor | list[Tensor] | None:
        """Labels of the outputs: one for the first of them, or a list; None for FIXED."""
        handler = getattr(self, f"op_{name}", None)
        if handler is not None:
            return handler(*args, **kwargs)
        if MOVES.fullmatch(name):
            labels = tree_map(lambda x: self.of(x) if _is_float(x) else x, list(args))
            if name == "constant_pad_nd" and len(args) > 2 and args[2] != 0:
                labels[2] = FIXED
            return _moved(function, name, labels, kwargs)
        if SUMS.fullmatch(name):
            return self.sum(name, args, kwargs.get("alpha", 1))
        if name in ("mul", "div"):
            return self.product(name, *args[:2])
        if NORMS.fullmatch(name):
            return self.norm(name, args, outputs[0])
        if KNOWN.fullmatch(name):
            labels = self.followed(name, function, self.of(args[0]), args, kwargs, outputs)
            if labels is not NotImplemented:
                return labels
        for x in tree_leaves((args, kwargs)):
            self.fix(x, f"{name} in {self.place} is not homogeneous")
        return None

    def followed(
        self, name: str, function: OpOverload, first: Tensor, args: tuple, kwargs: dict, outputs: Sequence[Tensor]
    ) -> Tensor | NotImplementedType | None:
        """The same for operations on one tensor; NotImplemented for options that are not homogeneous."""
        if MOVES_AS_FLOATS.fullmatch(name):
            return function(first.double(), *args[1:], **kwargs).round().long()
        if LINEAR.fullmatch(name) and outputs[0].is_floating_point():
            return self.classes.scaled(first, "mul -1") if name == "neg" else first
        if HOMOGENEOUS.fullmatch(name):
            for x in args[1:]:
                self.fix(x, f"{name} in {self.place} has it for a slope")
            return self.classes.marked(first)
        if CLAMPS.fullmatch(name) and args[1] == 0 and len(args) == 2:
            return self.classes.marked(first)
        if REDUCTIONS.fullmatch(name):
            return self.reduction(name, first, args, kwargs, outputs)
        if POOLS.fullmatch(name):
            n = int(re.search("[123]", name)[0])
            one = self.classes.unified(first, tuple(range(-n, 0)), f"{name} in {self.place} pools it")
            return self.classes.marked(one).expand(outputs[0].shape)
        if SIGNS.fullmatch(name) and (len(args) == 1 or not isinstance(args[1], Tensor) and args[1] == 0):
            self.classes.marked(first)
            return None
        return NotImplemented

    def fix(self, x: Any, reason: str) -> None:
        """What an argument holds must stay."""
        if not self.known(x):
            return
        if x in self.tags:
            name, index = self.tags[x]
            fixed = torch.full_like(index, FIXED).flatten()
            self.uses[name].append((index.flatten(), fixed, fixed))
            self.fixed.setdefault(name, reason)
        else:
            self.block(self.labels[x], reason)

    def sum(self, name: str, args: tuple, alpha: float = 1) -> Tensor:
        """What is added, or chosen from, is scaled alike."""
        a, b = args[1:3] if name == "where" else args[::2] if name == "masked_fill" else args[:2]
        if name in ("sub", "rsub") or alpha != 1:
            self.classes.scaled(self.of(a if name == "rsub" else b), f"mul {alpha if name == 'add' else -alpha}")
        labels = self.classes.unify(self.of(a), self.of(b), f"it meets what is not scaled: {name} in {self.place}")
        return labels if name in ("add", "sub", "rsub") else self.classes.marked(labels)

    def reduction(self, name: str, labels: Tensor, args: tuple, kwargs: dict, outputs: Sequence[Tensor]) -> Tensor:
        """What is reduced together is scaled alike."""
        if len(args) > 1 and isinstance(args[1], Tensor):  # the larger of two
            return self.sum(name, args)
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = range(labels.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        one = self.classes.unified(labels, tuple(d % labels.ndim for d in dims), f"{name} in {self.place} joins it")
        if name == "cumsum":
            return one.expand(outputs[0].shape)
        if name in ("amax", "amin", "max", "min"):
            self.classes.marked(one)
        return one.reshape(outputs[0].shape)

    def norm(self, name: str, args: tuple, output: Tensor) -> Tensor | None:
        """Its own scale and shift write; what it normalizes stays."""
        self.fix(args[0], f"{self.place} normalizes it")
        last = "layer" in name or "rms" in name
        w, b = (args[2], None if "rms" in name else args[3]) if last else args[1:3]
        if not self.known(w):
            self.fix(b, f"{self.place} has no scale")
            return None
        labels = self.classes.marked(self.of(w))
        if b is not None:
            labels = self.classes.unify(labels, self.of(b), f"the shift of {self.place} is not scaled")
        return (labels if last else labels.view(-1, *[1] * (output.ndim - 2))).expand(output.shape)


def _moved(function: OpOverload, name: str, args: Sequence, kwargs: dict) -> list[Tensor]:
    """The labels of what an operation moves: a list; their strides are not those of the tensors."""
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        return [args[0].reshape(args[1])]
    moved = args[0].clone() if name == "clone" else function(*args, **kwargs)
    return list(moved) if isinstance(moved, list | tuple) else [moved]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
