"""Move each layer in the directions that its inputs on a batch do not span: the outputs on the batch stay."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from teleport import Teleportation
from teleporter.passes import check_loss, check_trials, gradient, kept_buffers, same_randomness, undone_on_error
from teleporter.verify import relative_change, tensors_of

_CONVOLUTIONS = {getattr(torch, f"conv{n}d") for n in (1, 2, 3)}
_MULTIHEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_LOOKING = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "data_ptr"}
_LIMIT = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative change of the outputs that still counts as none

Tensors = Mapping[str, Tensor]  # by the names of parameters
Sizes = int | Sequence[int]  # one for all dimensions, or one each


def null_space_teleport(
    model: nn.Module, loss_fn: Callable, steps: int = 10, *, radius: float = 0.01, tolerance: float = 1e-3,
    rank_tolerance: float | None = None, approximate: bool = False, energy: float = 1e-3,
) -> Teleportation:  # fmt: skip
    """Raise ‖∇L‖ by changes ΔW of the layers that their inputs h on the batch do not notice, ΔW h = 0, in place.

    After Wu, Dong, Aloui, Tarokh 2025, arXiv 2502.11362. Each step is q, the gradient of ½ log ‖∇L‖² (a Hessian-vector
    product), projected for each layer onto the left-over space of h: q − (q Q)Qᵀ, Q an orthonormal basis of the span of
    its inputs: what a Linear or an attention projection reads (tokens), the patches of a convolution (within a group);
    a bias is one more row of ones. Every layer's output on the batch stays, so the next layer's inputs and its space
    do. A step is taken if the objective grows by a tenth of what it promises; its length doubles after one that was
    taken and is divided by 4 after one that was not.

    loss_fn(model) -> scalar, deterministic: the same batch each time. steps: trials, each at the cost of one gradient
    and at most one Hessian-vector product. radius: length of the first trial, relative to ‖w‖. rank_tolerance: singular
    values of h (features, samples) up to this share of the largest count as zero; None: max(h.shape) times the rounding
    of its dtype. approximate: leave over, too, the directions that hold no more than `energy` of Σ h² together, the
    weakest in any case: there the outputs move a little, the drift is reported, and no step goes above
    L_0 + tolerance (1 + |L_0|).

    Layers whose inputs span everything stay; so do parameters that anything but linear maps and convolutions uses.
    Returns the Teleportation, its weights {name: parameter}, its objective ‖∇L‖². Raises ValueError if no layer has any
    room, for a loss that is not a finite scalar, a zero gradient, half precision, numbers that are not positive and
    finite, a rank_tolerance or energy outside [0, 1); RuntimeError (parameters restored) if no trial left the outputs
    on the batch where they were.
    """
    check_trials(steps, radius, tolerance, rank_tolerance=rank_tolerance, energy=energy)
    W = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not W or {p.dtype for p in W.values()} - {torch.float32, torch.float64}:
        raise ValueError("trainable parameters must be float32 or float64")
    with torch.enable_grad(), kept_buffers(model), undone_on_error(W), sdpa_kernel(SDPBackend.MATH):
        room = _room(model, loss_fn, W, rank_tolerance, energy if approximate else 0.0)
        loss_0, g, outputs_0 = _evaluate(model, loss_fn, W)
        d, size = _ascent(g, W, room)
        loss, norm2_0, kept = loss_0, _norm2(g), False
        rho = radius * math.sqrt(_norm2(W)) / size
        for step in range(steps):
            point = {name: p.detach().clone() for name, p in W.items()}
            for layer, x in d.items():
                layer.add_(W, rho * x)
            trial, g_trial, outputs = _evaluate(model, loss_fn, W)
            if approximate:
                allowed = trial - loss_0 <= tolerance * (1 + abs(loss_0))
            else:
                allowed = relative_change(outputs_0, outputs) <= _LIMIT[next(iter(W.values())).dtype]
            kept = kept or allowed
            if allowed and (_norm2(g_trial) / _norm2(g)).log() / 2 >= 0.1 * rho * size**2:
                loss, g, rho = trial, g_trial, 2 * rho
                if step < steps - 1:
                    d, size = _ascent(g, W, room)
            else:
                rho /= 4
                with torch.no_grad():
                    for name, p in W.items():
                        p.copy_(point[name])
        if not kept:
            raise RuntimeError(
                "every trial moved the outputs: they depend on these layers in a way that is out of sight"
            )
    return Teleportation(W, loss_0, loss, norm2_0, _norm2(g))


def _room(
    model: nn.Module, loss_fn: Callable, W: Tensors, rank_tolerance: float | None, energy: float
) -> dict["Layer", Tensor]:
    """{Layer: orthonormal basis of its inputs' span} of the layers that have any directions left."""
    recorder = Recorder(W)
    with recorder, same_randomness(model):
        loss_fn(model)
    spans = recorder.spans(rank_tolerance, energy)
    room = {layer: Q for layer, Q in spans.items() if Q.any(1).sum(1).min() < Q.shape[1]}
    if not room:
        full = ", ".join(dict.fromkeys(layer.weight for layer in spans)) or "no linear map or convolution"
        raise ValueError(f"the batch leaves no room: its inputs span all that these layers read ({full})")
    return room


def _evaluate(model: nn.Module, loss_fn: Callable, W: Tensors) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """loss, {name: ∂L/∂W with its graph}, and what the model returned on the way."""
    outputs = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.extend(tensors_of(output)))
    try:
        with same_randomness(model):
            loss = loss_fn(model)
    finally:
        hook.remove()
    check_loss(loss)
    return loss.detach(), gradient(loss, W, create_graph=True), outputs


def _norm2(g: Tensors) -> Tensor:
    return sum(x.detach().square().sum() for x in g.values())


def _ascent(g: Tensors, W: Tensors, spans: Mapping["Layer", Tensor]) -> tuple[dict["Layer", Tensor], float]:
    """{Layer: gradient of ½ log ‖∇L‖², projected} and its norm. Raises ValueError if nothing of it is left."""
    norm2 = _norm2(g)
    if not 0 < norm2 < math.inf:
        raise ValueError(f"the gradient's norm is {norm2.sqrt()}: it must be finite and not zero")
    covectors = [x.detach() / norm2 for x in g.values()]
    q = torch.autograd.grad(list(g.values()), list(W.values()), covectors, allow_unused=True, materialize_grads=True)
    q = dict(zip(W, q))
    d = {layer: layer.matrix(q).double() for layer in spans}
    whole = math.sqrt(sum(x.square().sum().item() for x in d.values()))
    for layer, Q in spans.items():
        for _ in range(2):  # once more, for the rounding of the first time
            d[layer] = d[layer] - (d[layer] @ Q) @ Q.mT
    size = math.sqrt(sum(x.square().sum().item() for x in d.values()))
    if size <= 1e3 * torch.finfo(next(iter(W.values())).dtype).eps * whole:
        raise ValueError("the batch leaves no room for the gradient norm: it does not depend on the left-over space")
    return d, size


class Layer(NamedTuple):
    """A linear map y = W h (+ b) of the forward pass: rows of a weight and, if the bias moves too, of that bias."""

    weight: str
    start: int  # its first row; MultiheadAttention keeps three maps in one parameter
    rows: int
    groups: int
    bias: str | None
    bias_start: int

    def parts(self, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        """{parameter name: tensor} -> views of the parts of them that belong to this layer."""
        bias = None if self.bias is None else tensors[self.bias].narrow(0, self.bias_start, self.rows)
        return tensors[self.weight].narrow(0, self.start, self.rows), bias

    def matrix(self, tensors: Tensors) -> Tensor:
        """(groups, rows / groups, features): the bias is the last column."""
        W, b = self.parts(tensors)
        W = W.reshape(self.groups, self.rows // self.groups, -1)
        return W if b is None else torch.cat([W, b.reshape(self.groups, -1, 1)], 2)

    @torch.no_grad()
    def add_(self, tensors: Tensors, matrix: Tensor) -> None:
        """Add a matrix, as of `matrix`, in place."""
        W, b = self.parts(tensors)
        if b is not None:
            b.add_(matrix[..., -1].flatten())
            matrix = matrix[..., :-1]
        W.add_(matrix.reshape(W.shape))


class Recorder(TorchFunctionMode):
    """Sees every function that receives a parameter in the forward pass in this context, and what it multiplies."""

    def __init__(self, parameters: Tensors) -> None:
        """Watch these parameters, {name: parameter}."""
        super().__init__()
        self.parameters = parameters
        self.names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self.inputs, self.counts, self.spoiled = {}, {}, set()  # {Layer: h}, {Layer: samples, eps}, names

    def name(self, tensor: Any) -> str | None:
        """Of the parameter that the tensor is, or is a view of; None for other tensors."""
        return self.names.get(tensor.untyped_storage().data_ptr()) if _plain(tensor) else None

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the function, and note what it does with parameters."""
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            return self.multihead(dict(zip(_MULTIHEAD, args)) | kwargs)
        if function is F.linear:
            return self.linear(*args, **kwargs)
        if function in _CONVOLUTIONS:
            return self.convolution(function, *args, **kwargs)
        output = function(*args, **kwargs)
        if getattr(function, "__name__", "") not in _LOOKING:
            used = {self.name(x) for x in tree_leaves((args, kwargs))} - {None}
            if used and {self.name(x) for x in tree_leaves(output)} != used:  # not just another view
                self.spoiled |= used
        return output

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch's function, noted."""
        self.note(input.detach().reshape(1, -1, input.shape[-1]).mT, weight, bias)
        return F.linear(input, weight, bias)

    def convolution(
        self,
        function: Callable,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Tensor:
        """One of torch's functions, noted if its weight is a parameter."""
        if self.name(weight) is not None:
            h = patches(input.detach(), tuple(weight.shape[2:]), groups, stride, padding, dilation)
            self.note(h, weight, bias, groups)
        return function(input, weight, bias, stride, padding, dilation, groups)

    def multihead(self, values: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """torch's function reads its weights out of sight: note what they read, and project its output here."""
        width, bias = values["query"].shape[-1], values["in_proj_bias"]
        for i, (part, name) in enumerate(zip("qkv", ("query", "key", "value"))):
            W = values.get(f"{part}_proj_weight")
            if not values.get("use_separate_proj_weight"):
                W = values["in_proj_weight"].narrow(0, i * width, width)
            x = values[name].detach()
            self.note(x.reshape(1, -1, x.shape[-1]).mT, W, None if bias is None else bias.narrow(0, i * width, width))
        self.spoiled |= {self.name(values[name]) for name in ("bias_k", "bias_v")} - {None}
        out, out_bias = values["out_proj_weight"], values["out_proj_bias"]
        identity = torch.eye(width, dtype=out.dtype, device=out.device)
        values = {**values, "out_proj_weight": identity, "out_proj_bias": None}
        heads, attention = F.multi_head_attention_forward(**values)
        return self.linear(heads, out, out_bias), attention

    def note(self, h: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> None:
        """Add samples h (groups, features, samples) to what this layer read; only their span and size are kept."""
        name, bias_name = self.name(weight), self.name(bias)
        if name is None or weight.shape[1:] != (p := self.parameters[name]).shape[1:] or weight.stride() != p.stride():
            self.spoiled |= {name, bias_name} - {None}
            return
        first = (weight.storage_offset() - p.storage_offset()) // weight.stride(0)
        bias_first = bias.storage_offset() - self.parameters[bias_name].storage_offset() if bias_name else 0
        layer = Layer(name, first, len(weight), groups, bias_name, bias_first)
        eps, h = torch.finfo(h.dtype).eps, h.double()
        if bias_name:
            h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        samples = h.shape[2] + self.counts.get(layer, (0, 0))[0]
        if layer in self.inputs:
            h = torch.cat([self.inputs[layer], h], 2)
        self.inputs[layer] = torch.linalg.qr(h.mT, mode="r").R.mT if h.shape[2] > h.shape[1] else h
        self.counts[layer] = samples, eps

    def spans(self, rank_tolerance: float | None, energy: float) -> dict[Layer, Tensor]:
        """{Layer: orthonormal basis of its inputs' span (groups, features, rank), or zeros in its place}."""
        used = [(layer.weight, range(layer.start, layer.start + layer.rows)) for layer in self.inputs]
        used += [(layer.bias, range(layer.bias_start, layer.bias_start + layer.rows)) for layer in self.inputs]
        for i, (name, rows) in enumerate(used):
            if any(other == name and max(rows[0], r[0]) <= min(rows[-1], r[-1]) for other, r in used[:i]):
                self.spoiled.add(name)  # the same rows with another bias, or in another grouping
        found = {}
        for layer, h in self.inputs.items():
            if {layer.weight, layer.bias} & self.spoiled - {None}:
                continue
            samples, eps = self.counts[layer]
            Q, S, _ = torch.linalg.svd(h, full_matrices=False)
            zero = max(samples, h.shape[1]) * eps if rank_tolerance is None else rank_tolerance
            keep = S > zero * S[:, :1]
            if energy:
                left = S.square().flip(1).cumsum(1).flip(1)  # in this direction and all weaker ones
                keep &= left > energy * left[:, :1]
                keep[:, h.shape[1] - 1 :] = False
            found[layer] = Q * keep.unsqueeze(1)
        return found


def _plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided


def patches(
    x: Tensor,
    kernel: Sequence[int],
    groups: int = 1,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
) -> Tensor:
    """What a convolution multiplies its weight with: (batch, C, *positions) -> (groups, C / groups · taps, samples).

    The arguments are those of torch.nn.functional.conv1d, conv2d, conv3d; x may come without a batch.
    """
    n = len(kernel)

    def each(value: Sizes) -> tuple[int, ...]:
        value = (value,) if isinstance(value, int) else tuple(value)
        return value * n if len(value) == 1 else value

    stride, dilation = each(stride), each(dilation)
    total = [d * (k - 1) for d, k in zip(dilation, kernel)]
    sides = [(t // 2, t - t // 2) for t in total]
    if padding != "same":
        sides = [(p, p) for p in each(0 if padding == "valid" else padding)]
    x = F.pad(x if x.ndim == n + 2 else x[None], [p for side in reversed(sides) for p in side])
    for i in range(n):
        x = x.unfold(2 + i, total[i] + 1, stride[i])[..., :: dilation[i]]  # one more dimension at the end: the taps
    x = x.unflatten(1, (groups, -1)).movedim(1, 0)  # (groups, batch, C / groups, *positions, *taps)
    x = x.movedim(2, 2 + n)  # (groups, batch, *positions, C / groups, *taps)
    return x.flatten(2 + n).flatten(1, 1 + n).mT
