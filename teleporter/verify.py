"""Proof by trial: symmetries are tried on real inputs before the first move, and the model is compared before each."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from teleporter.passes import kept_attributes, kept_buffers, same_randomness
from teleporter.rotations import still_gains
from teleporter.symmetry import Symmetry


def precision(tensors: Collection[Tensor]) -> float:
    """The coarsest ε at work: that of these tensors, or of autocast."""
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
    devices = {x.device.type for x in tensors} - {"meta"}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def refuse_distributed(model: nn.Module) -> None:
    """ValueError for a model whose parameters live on several processes, which would move each its own way."""
    for m in model.modules():
        if type(m).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"model is a {type(m).__name__}, whose processes would move differently: teleport before wrapping it, "
                "or give each process its module, the same tangents and apply"
            )
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "device_mesh")]
    if sharded:
        raise ValueError(f"{sharded[0]} is sharded (DTensor), and no process has all of it: teleport before sharding")


def called(model: nn.Module, inputs: Any) -> Any:
    """model(inputs): a tensor, a tuple of positional or a dict of keyword arguments."""
    torch.clear_autocast_cache()  # autocast keeps casts of weights, and does not notice that they moved
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Copies of what comes out for these inputs, [] without any; the model does not notice."""
    if inputs is None:
        return []
    with torch.no_grad(), same_randomness(model), kept_buffers(model):
        return tensors_of(called(model, inputs))


def nothing_found(left_alone: Mapping[str, str], inputs: Any) -> ValueError:
    """The error for a model in which nothing may move."""
    more = "" if inputs is not None else "; inputs= would show a real run"
    return ValueError(f"no symmetry found: {left_alone or 'no layers that could be joined'}{more}")


def proper(tangents: Sequence, symmetries: Sequence[Symmetry]) -> list[Tensor]:
    """The tangents in float64. Raises ValueError for other shapes, what is not finite, and what leaves the symmetry."""
    tangents = [torch.as_tensor(T, dtype=torch.float64, device="cpu").detach() for T in tangents]
    if [tuple(T.shape) for T in tangents] != [s.shape for s in symmetries]:
        raise ValueError(f"tangents must have the shapes {[s.shape for s in symmetries]}")
    for s, T in zip(symmetries, tangents):
        if not T.isfinite().all():
            raise ValueError("tangents must be finite")
        if (s.tangent(T) - T).norm() > 1e-9 * T.norm():
            raise ValueError(f"tangents: {s.name} moves along its tangent(T) only, this T is not one")
    return tangents


def tensors_of(output: Any) -> list[Tensor]:
    """Copies of the floating-point tensors in a model's output, whatever container holds them."""
    leaves = tree_leaves(vars(output) if hasattr(output, "__dataclass_fields__") else output)
    return [x.detach().clone() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest ‖after − before‖ / ‖before‖ of two lists of tensors; infinite if they are unlike or not finite."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return float("inf")
    largest = 0.0
    for x, y in zip(before, after):
        change = (y.double() - x.double()).norm() / x.double().norm().clamp_min(1e-30)
        largest = max(largest, change.item() if change.isfinite() else float("inf"))
    return largest


@contextmanager
def _disturbed(
    model: nn.Module, dtype: torch.dtype | None, still: Collection[int], buffers: Collection[str]
) -> Iterator[None]:
    """The model with other weights: a layer that starts at zero would hide what reads it. dtype: None keeps its own;
    still: ids of what keeps its numbers; buffers: names of those that have others too, and as positive (variances)."""
    parameters = {id(p): p for p in model.parameters()}.values()
    before = [(t, t.data) for t in [*parameters, *model.buffers()] if t.is_floating_point()]
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        for t, data in before:
            t.data = data.to(dtype or data.dtype, copy=True)
            if isinstance(t, nn.Parameter) and not t.is_meta and id(t) not in still:
                noise = torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu")
                t.data += (0.1 * (data.abs().mean() + 0.1) * noise.to(data.device)).to(t.dtype)
        for name in buffers:
            t = model.get_buffer(name)
            noise = torch.rand(t.shape, generator=generator, dtype=torch.float64, device="cpu")
            t.data += (0.5 * (t.data.abs().mean() + 0.1) * noise.to(t.device)).to(t.dtype)
        yield
    finally:
        for t, data in before:
            t.data = data


def refuted(
    model: nn.Module, parameters: Mapping[str, Tensor], symmetries: Sequence[Symmetry], inputs: Any
) -> dict[str, str]:
    """{name: by how much} of the symmetries that change the outputs, tried with a random element each.

    The model itself is tried, with disturbed weights, in float64 or, where that fails, in its own dtype, and put back
    bit for bit. Costs two forward passes, one more for a stream, and one for each symmetry if something is wrong.
    """
    cast = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    with torch.no_grad():
        try:
            wrong = _tried(model, parameters, symmetries, cast, torch.float64)
        except (RuntimeError, TypeError, ValueError):  # some constant of the forward pass keeps its dtype
            wrong = _tried(model, parameters, symmetries, inputs, None)
    return {name: f"a trial changed the output by {change:.2g}" for name, change in wrong.items()}


def _tried(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    inputs: Any,
    dtype: torch.dtype | None,
) -> dict[str, float]:
    options = {"generator": torch.Generator("cpu").manual_seed(1), "dtype": torch.float64, "device": "cpu"}
    random = [2 * torch.rand(s.shape, **options) - 1 for s in symmetries]
    random = [T if s.kind == "rescale" else s.tangent(T / s.shape[-1]) for s, T in zip(symmetries, random)]
    tolerance = 1e-8 if dtype else max(1e-3, 16 * precision(parameters.values()))

    def output() -> list[Tensor]:
        with same_randomness(model), kept_attributes(model):
            return tensors_of(called(model, inputs))

    def move(pairs: Iterable[tuple[Symmetry, Tensor]], sign: int = 1) -> None:
        for s, T in pairs:
            s.act_(parameters, sign * T)

    buffers = {name for name, b in model.named_buffers() if b.is_floating_point()}
    buffers &= {slot.name for s in symmetries for slot in s.slots}
    with _disturbed(model, dtype, still_gains(symmetries), sorted(buffers)):
        before, found = output(), {}
        for rotating in (False, True):  # what norms read: some compute in float32 whatever the model's dtype, and round
            pairs = [(s, T) for s, T in zip(symmetries, random) if (s.kind in ("stream", "permutation")) == rotating]
            allowed = max(tolerance, 1e-5 * rotating)
            move(pairs)
            if not pairs or relative_change(before, output()) <= allowed:
                continue
            move(pairs, -1)
            for s, T in pairs:
                move([(s, T)])
                change = relative_change(before, output())
                move([(s, T)], -1)
                if change > allowed:
                    found[s.name] = change
        return found


_NORMALIZERS = (nn.modules.batchnorm._NormBase,)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """{what: value, compared by identity or equality} of all that the finder's map rests on."""
    marks = {}
    for name, m in model.named_modules(remove_duplicate=False):
        marks[f"module {name or 'model'}"] = (m, type(m), vars(m).get("forward"), type(m).forward)
        marks[f"hooks of {name or 'model'}"] = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        if isinstance(m, _NORMALIZERS):
            marks[f"training mode of {name}"] = m.training
    for name, p in model.named_parameters(remove_duplicate=False):
        marks[f"parameter {name}"] = (p, tuple(p.shape), p.dtype, p.device, p.requires_grad)
    return marks


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What differs between two fingerprints, in words; None if nothing."""

    def same(a: Any, b: Any) -> bool:
        pairs = zip(a, b) if isinstance(a, tuple) else [(a, b)]
        alike = (x is y or (not isinstance(x, Tensor | nn.Module) and x == y) for x, y in pairs)
        return type(a) is type(b) and (not isinstance(a, tuple) or len(a) == len(b)) and all(alike)

    for what in {**before, **after}:
        if what not in before or what not in after or not same(before[what], after[what]):
            return f"{what} is not what it was when the Teleporter was made"
    return None
