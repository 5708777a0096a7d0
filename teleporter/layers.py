"""What the finder knows of single layers and operations: where they write and read, what keeps channels apart."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor, fx, nn

from teleporter.symmetry import Candidate, Symmetry

View = Callable[[Tensor], Tensor]  # of a Slot
Table = list[tuple[str, View]]  # where modules write and read: (attribute, view)


def rows(x: Tensor) -> Tensor:
    """Each row is a channel, (1, rows, …)."""
    return x.unsqueeze(0)


def columns(start: int = 0, size: int | None = None) -> View:
    """Each column is a channel, of `size` rows (default: all) from `start` on."""
    return partial(_columns, start, size)


def _columns(start: int, size: int | None, x: Tensor) -> Tensor:
    return x.narrow(0, start, size or len(x)).movedim(1, 0).unsqueeze(0)


def flat_columns(size: int, channels_first: bool) -> View:
    """Columns of a Linear that reads flattened (channels, positions), or (positions, channels)."""
    return partial(_flat_columns, size, channels_first)


def _flat_columns(size: int, channels_first: bool, x: Tensor) -> Tensor:
    x = x.movedim(1, 0)
    return (x.unflatten(0, (size, -1)) if channels_first else x.unflatten(0, (-1, size)).movedim(1, 0)).unsqueeze(0)


def grouped(groups: int) -> View:
    """A convolution's second weight dimension counts the channels of one group: (groups, size, out / groups, ...)."""
    return partial(_grouped, groups)


def _grouped(groups: int, x: Tensor) -> Tensor:
    return x.unflatten(0, (groups, -1)).movedim(2, 1)


def split_dim(heads: int, d: int, start: int = 0, size: int | None = None, dim: int = 0) -> View:
    """(heads, d, heads that share this element, ...)"""

    return partial(_split_dim, heads, d, start, size, dim)


def _split_dim(heads: int, d: int, start: int, size: int | None, dim: int, x: Tensor) -> Tensor:
    x = x.movedim(dim, 0)
    return x.narrow(0, start, size or len(x)).unflatten(0, (heads, -1, d)).movedim(2, 1)


CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def writer(module: nn.Module) -> Table:
    """What scales the module's output channels. Raises ValueError if nothing does."""
    kind = type(module)
    if kind in NORM and (module.weight is None or module.weight.ndim > 1):
        raise ValueError(f"{kind.__name__} has no scale per channel")
    if kind is nn.Linear or kind in CONV + NORM:
        return [("weight", rows), ("bias", rows)]
    if kind in CONV_TRANSPOSE:
        return [("weight", grouped(module.groups)), ("bias", rows)]
    if kind is nn.Embedding and module.max_norm is None:
        return [("weight", columns())]
    if kind is nn.MultiheadAttention:
        return [("out_proj.weight", rows), ("out_proj.bias", rows)]
    raise ValueError(f"{kind.__name__} is not supported")


def reader(module: nn.Module, size: int, flow: "Flow", part: int | None = None) -> Table:
    """What reads `size` channels from flow. Raises ValueError if they are not read one by one."""
    kind = type(module)
    if kind is nn.Linear and flow.dim != 1 and module.in_features % size == 0:
        if flow.flat is not None or module.in_features == size:
            return [("weight", flat_columns(size, flow.flat is not False))]
    if kind in CONV + CONV_TRANSPOSE and flow.dim != -1 and module.in_channels == size:
        return [("weight", grouped(module.groups) if kind in CONV else rows)]
    if kind is nn.MultiheadAttention and flow.dim == -1 and flow.flat is None:
        if module.in_proj_weight is None:
            return [("qkv"[part] + "_proj_weight", columns())]
        return [("in_proj_weight", columns(part * size, size))]
    raise ValueError(f"{kind.__name__} does not read its {size} channels one by one")


# Operations f with f(sx) = s f(x) for s > 0 in each channel: type of module, or name of function or method, lower case.
HOMOGENEOUS = re.compile(r"(leaky_?)?relu_?|prelu|identity|(feature_)?dropout[123]?d?_?|contiguous|clone|neg|abs")
POOLING = re.compile(
    r"(adaptive_?)?(max|avg)_?pool(?P<dims>[123])d|upsample|interpolate|zeropad[123]d|reflectionpad[123]d"
)


class Channels:
    """Channels that can only be scaled together: who writes and reads them, and why they stay, if they must."""

    def __init__(self, blocked: str | None = None) -> None:
        """Channels that nobody has written yet; blocked: why they stay."""
        self.blocked, self.size, self.writers, self.readers, self.slots = blocked, None, [], [], []

    def block(self, reason: str | bool | None) -> None:
        """They stay, for this reason if it is one and the first."""
        self.blocked = self.blocked or reason

    def absorb(self, other: "Channels") -> None:
        """Take over what writes and reads others that are added to these."""
        self.block(other.blocked or (self.size != other.size and "tensors of different widths are added"))
        self.writers += other.writers
        self.readers += other.readers
        self.slots += other.slots

    def candidate(self) -> Candidate:
        """Their rescaling."""
        reason = self.blocked or (None if self.readers else "nothing reads it")
        writers, readers = (", ".join(dict.fromkeys(names)) for names in (self.writers, self.readers))
        name = writers if reason else f"{writers} -> {readers}"
        return Symmetry(name, "rescale", (self.size,), tuple(self.slots)), (*self.writers, *self.readers), reason


class Flow(NamedTuple):
    """A tensor of the graph: its channels and where they are."""

    channels: Channels
    dim: int | None = None  # 1, or -1: features in the last dimension
    positions: int = 0  # how many dimensions follow dimension 1
    flat: bool | None = None  # flattened together with positions: channels first (True) or last (False)


def flattens(op: str, node: fx.Node, module: nn.Module | None) -> bool:
    """Whether node flattens all but the batch dimension; x.view(.., features) is taken to do so."""
    arguments = (*node.args[1:], *node.kwargs.values())
    if module is not None:
        return op == "flatten" and (module.start_dim, module.end_dim) == (1, -1)
    if op in ("view", "reshape"):
        return len(arguments[0] if isinstance(arguments[0], tuple | list) else arguments) == 2
    return op == "flatten" and arguments in ((1,), (1, -1))


def passes(op: str, node: fx.Node, module: nn.Module | None, flow: Flow, flows: Mapping[fx.Node, Flow]) -> Flow | None:
    """The flow that comes out of an operation on one flow that keeps its channels apart; None if it may not."""
    args, kwargs = node.args, node.kwargs
    if HOMOGENEOUS.fullmatch(op):
        return flow
    pooling = POOLING.fullmatch(op)
    if pooling and flow.dim == 1 and not getattr(module, "return_indices", False):
        return flow if pooling["dims"] in (None, str(flow.positions)) else None
    numbers = [x for x in args if isinstance(x, int | float)]
    if op.strip("i_") == "mul" and len(args) == 2 and len(numbers) == 1:
        return flow
    if (
        op.strip("i_") in ("truediv", "div", "mul")
        and args[0] in flows
        and args[1:]
        and not (args[1] in flows or kwargs)
    ):
        return flow  # by a number
    if op in ("clamp", "clamp_min") and (args[1:], kwargs) in (((0,), {}), ((), {"min": 0})):
        return flow
    if flattens(op, node, module) and flow.dim and flow.flat is None:
        return flow._replace(dim=-1, positions=0, flat=flow.dim == 1)
    if flow.flat is None and (positions := reduced(op, node, flow)) is not None:
        return flow._replace(dim=1 if positions else -1, positions=positions)
    return None


def reduced(op: str, node: fx.Node, flow: Flow) -> int | None:
    """How many positions are left after a reduction over some (images) or all (tokens) of them; None: channels too."""
    args, kwargs, p = node.args, node.kwargs, flow.positions
    if op == "flatten" and flow.dim == 1 and p and (*args[1:], *kwargs.values()) in ((2,), (2, -1)):
        return 1
    if op not in ("mean", "sum", "amax", "amin", "squeeze") or set(kwargs) - {"dim"}:
        return None
    dims = args[1] if len(args) == 2 else kwargs.get("dim") if len(args) == 1 else None
    dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
    if flow.dim == 1 and dims and all(isinstance(d, int) for d in dims):
        dims = {d if d > 0 else 2 + p + d for d in dims}
        return p - len(dims) if dims <= set(range(2, 2 + p)) else None
    return 0 if flow.dim == -1 and dims == (1,) and op != "squeeze" else None


def changed_by_hand(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own make this layer more than its type says."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def needs_inputs(name: str, node: fx.Node, module: nn.Module | None, op: str, flow: Flow) -> str | None:
    """Why only real inputs could tell what a node does to the channels of its input; None if its type says it.

    Shapes decide which dimension holds the channels: a batch or none, tokens or none.
    """
    kind = type(module)
    if module is not None and changed_by_hand(module):
        return f"{name} has a hook or another forward, and no inputs were given"
    shapes = kind in (nn.BatchNorm1d, nn.SyncBatchNorm, nn.GroupNorm) or flattens(op, node, module)
    if flow.dim == 1:
        shapes = shapes or op in ("squeeze", "flatten")
    else:
        shapes = shapes or kind in (nn.BatchNorm2d, nn.BatchNorm3d) or op in ("mean", "sum", "amax", "amin")
    return f"shapes decide what {name} does, and no inputs were given" if shapes else None
